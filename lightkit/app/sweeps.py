"""How a sweep begins, and goes on where it was.

A sweep that goes on asks for all of its jobs again, in the same order; those that are done answer at once, by their
records.
"""

from __future__ import annotations

import math
import random
import sqlite3
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from lightkit._util.atomic_write import hold, release, remove_leftovers
from lightkit.app.restarts import quoted, restarted_directory
from lightkit.app.run_records import has_runs, shown
from lightkit.app.sweep_record import Sweep, find, find_all, read
from lightkit.errors import CarriedError, CheckpointError, ConfigError, LightkitError

_STUDY = "study.db"

# Hydra's own keys that do not say what a sweep computes: where it writes, and which processes its jobs run in.
_PLACES = ("hydra.mode", "hydra.run.dir", "hydra.sweep.dir", "hydra/launcher", "hydra.launcher.jobs")


class RecordSweep(Callback):
    """A callback of Hydra that begins a sweep, or goes on with the one that ``ckpt_path=last`` means.

    Args: none; Hydra builds it from ``conf/train.yaml``.
    """

    def __init__(self) -> None:
        self._sweep: Sweep | None = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Chooses the directory, the study and the seeds of the sweep."""
        if config.hydra.runtime.choices["hydra/launcher"] == "fork":
            # Before the sweep seeds Python's random numbers, of which the imports take some.
            from lightkit.app import fork_launcher

            fork_launcher.register()
        # Hydra sets it for the jobs alone; a directory may be named by what it has.
        HydraConfig.instance().set_config(config)
        try:
            with read_write(config), read_write(config.hydra), open_dict(config):
                self._sweep = _begin(config)
        except (LightkitError, OSError) as error:
            raise CarriedError(error) from error

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Notes that all jobs are done."""
        if self._sweep is not None:
            replace(self._sweep, is_finished=True).write()
            release(self._sweep.directory)


def figure_for_sweeper(config: Mapping[str, Any], figure: float | None) -> float | None:
    """Returns the figure of a job as a sweeper takes it that chooses the next jobs by it.

    Args:
        config: of the job.
        figure: the one that ``objective`` names; None if the job has logged no such figure.

    Raises:
        ConfigError: the sweeper needs a figure, and there is none. Hydra's own sweeper runs all jobs without one.
    """
    job = HydraConfig.get()
    sweeper = job.runtime.choices["hydra/sweeper"]
    if job.mode != RunMode.MULTIRUN or sweeper == "basic":
        return figure
    if figure is None:
        raise ConfigError(
            f"objective={config['objective']}: the job has logged no such figure, and hydra/sweeper={sweeper} needs "
            f"one; {config['run_dir']}/metrics.json has those that it has logged"
        )
    # A training that diverged is a bad one, not the end of the sweep, which Optuna's sweeper makes of NaN.
    worst = -math.inf if "maximize" in str(job.sweeper.get("direction")) else math.inf
    return worst if math.isnan(figure) else figure


def _begin(config: DictConfig) -> Sweep:
    task = [word for word in config.hydra.overrides.task if _key(word) != "ckpt_path" or _is_sweep(word)]
    others = [word for word in config.hydra.overrides.hydra if _key(word) not in _PLACES]
    new = Sweep(Path(config.hydra.sweep.dir).absolute(), [*task, *others], _swept(config, task), config.ckpt_path)
    restarted = restarted_directory()
    old = _to_continue(new, config.name, restarted) if restarted or config.ckpt_path == "last" else None
    sweep = new if old is None else old
    sweep.directory.mkdir(parents=True, exist_ok=True)
    if not hold(sweep.directory) and not restarted:
        raise ConfigError(f"another lightkit.train, which is still running, writes to {shown(sweep.directory)}")
    if old is None:
        if config.ckpt_path is None and (unfinished := find(new, config.name, finished=False)) is not None:
            print(f"{shown(unfinished.directory)} is unfinished: ckpt_path=last goes on with that sweep", flush=True)
        new.write()
    else:
        print(f"continuing the sweep {shown(old.directory)}", flush=True)
        given = [] if old.ckpt_path is None else [f"ckpt_path={quoted(old.ckpt_path)}"]
        config.hydra.overrides.task = [*task, *given]
        config.ckpt_path = old.ckpt_path
        config.hydra.sweep.dir = str(old.directory)
        # By which each job is composed.
        places = [word for word in config.hydra.overrides.hydra if _key(word) != "hydra.sweep.dir"]
        config.hydra.overrides.hydra = [*places, f"hydra.sweep.dir={quoted(str(old.directory))}"]
    remove_leftovers(sweep.directory)
    random.seed(sweep.seed)
    if config.hydra.runtime.choices["hydra/sweeper"] == "optuna":
        _prepare_optuna(config.hydra.sweeper, sweep, is_continued=old is not None)
    return sweep


def _to_continue(new: Sweep, name: str, restarted: str | None) -> Sweep | None:
    """Returns the sweep to go on with; None if each of the jobs is to go on with a run of its own.

    Raises:
        CheckpointError: nothing of the sweep is left to do, it is being done, or there is no run at all.
    """
    if restarted is not None:
        old = read(Path(restarted))
        return old if old is not None and old.overrides == new.overrides else None
    if (found := find(new, name, finished=False)) is not None:
        return found
    if (done := find(new, name, finished=True)) is not None:
        raise CheckpointError(
            f"ckpt_path=last: {shown(done.directory)}, the sweep with the same overrides, "
            f"{'is finished' if done.is_finished else 'is still running'}"
        )
    if not has_runs(name):
        # Before there is a directory of a sweep that nobody wanted to begin.
        raise CheckpointError(f"ckpt_path=last: there is no last.ckpt below {(Path('runs') / name).absolute()}")
    nearest = max(find_all(new, name), key=lambda old: (_alike(new, old), old.started), default=None)
    if nearest is not None and not nearest.is_finished:
        there, here = (" ".join(w for w in a.overrides if w not in b.overrides) for a, b in _both_ways(nearest, new))
        print(
            f"no unfinished sweep has the same overrides; the nearest is {shown(nearest.directory)}, with "
            f"{there or 'nothing'} there and {here or 'nothing'} here: each job goes on with a run of its own"
        )
    return None


def _alike(one: Sweep, other: Sweep) -> int:
    return len(set(one.overrides) & set(other.overrides)) - len(set(one.overrides) ^ set(other.overrides))


def _both_ways(one: Sweep, other: Sweep) -> list[tuple[Sweep, Sweep]]:
    return [(one, other), (other, one)]


def _swept(config: DictConfig, task: list[str]) -> list[str]:
    """Returns the keys that have several values in a sweep, by the command line and by the sweeper's configuration."""
    given = [_key(word) for word in task if _is_sweep(word)]
    return [*given, *map(str, OmegaConf.select(config, "hydra.sweeper.params") or {})]


def _is_sweep(word: str) -> bool:
    (override,) = OverridesParser.create().parse_overrides([word])
    return override.is_sweep_override()


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+~")


def _prepare_optuna(sweeper: DictConfig, sweep: Sweep, is_continued: bool) -> None:
    """Gives Optuna a study that is a file, and a seed, by which it proposes the same trials again.

    The figures of the trials that are done come from their records: a sweep that goes on has its study written anew, as
    Optuna would add its trials to those of before, and its samplers would begin their random numbers again in the
    middle.
    """
    if sweeper.get("storage") is not None:
        if is_continued:
            raise ConfigError(
                f"hydra.sweeper.storage={sweeper.storage}: ckpt_path=last cannot go on with a sweep whose study lies "
                "elsewhere, as Optuna would repeat its trials there; without that key it lies in the sweep's directory"
            )
    elif (url := _new_study(sweep.directory / _STUDY)) is not None:
        sweeper.storage = url
        sweeper.study_name = sweeper.study_name or sweep.directory.name
    sampler = sweeper.get("sampler")
    if sampler is not None and "seed" in sampler and sampler.seed is None:
        sampler.seed = sweep.seed


def _new_study(path: Path) -> str | None:
    """Returns the URL of an empty data base for Optuna; None, with a line that says why, if there can be none.

    Optuna 2.10 notes the version of its tables without committing it, which SQLAlchemy 2 forgets: it then finds none
    and fails. Noted before, it finds it.
    """
    try:
        import optuna.storages
        from alembic.script import ScriptDirectory

        tables = Path(optuna.storages.__file__).parent / "_rdb" / "alembic"
        version = ScriptDirectory(str(tables)).get_current_head()
        for leftover in path.parent.glob(f"{path.name}*"):
            leftover.unlink()
        connection = sqlite3.connect(path)
        with connection:
            connection.execute("CREATE TABLE alembic_version (version_num VARCHAR(32) PRIMARY KEY NOT NULL)")
            connection.execute("INSERT INTO alembic_version VALUES (?)", (version,))
        connection.close()
        optuna.storages.RDBStorage(f"sqlite:///{path}").engine.dispose()
    except Exception as error:
        # Whatever goes wrong between three packages: the study is then in memory, and the sweep goes on all the same.
        print(f"Optuna's study is not kept in {shown(path)}: {type(error).__name__}: {error}", file=sys.stderr)
        return None
    return f"sqlite:///{path}"
