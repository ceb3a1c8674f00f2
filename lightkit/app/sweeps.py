"""The start and the resumption of a sweep.

A resumed sweep launches all of its jobs again in the same order; a finished job returns the objective in its record at
once.
"""

from __future__ import annotations

import math
import random
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

from lightkit._util.atomic_write import remove_leftovers
from lightkit._util.directory_lock import hold, release
from lightkit.app.restarts import restarted_directory
from lightkit.app.run_directories import check_sweep_directory, is_named_by_time, make_new
from lightkit.app.run_records import display_path
from lightkit.app.run_search import has_runs
from lightkit.app.sweep_record import Sweep, find, find_all, read
from lightkit.app.texts import quote_word
from lightkit.errors import CarriedError, CheckpointError, ConfigError, LightkitError

_STUDY_FILE = "study.db"

# Hydra's keys for directories and processes, which do not change the results of a sweep.
_LOCATION_KEYS = ("hydra.mode", "hydra.run.dir", "hydra.sweep.dir", "hydra/launcher", "hydra.launcher.jobs")


class RecordSweep(Callback):
    """A callback of Hydra that begins a sweep, or resumes the sweep that ``ckpt_path=last`` means.

    Hydra builds it from ``conf/train.yaml``.
    """

    def __init__(self) -> None:
        self._sweep: Sweep | None = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Chooses the directory, the Optuna study and the seeds of the sweep."""
        if config.hydra.runtime.choices["hydra/launcher"] == "fork":
            # These imports draw random numbers, so that they must precede the sweep's seed.
            from lightkit.app import fork_launcher

            fork_launcher.register()
        # Hydra sets HydraConfig for the jobs alone; the name of the sweep's directory may interpolate it too.
        HydraConfig.instance().set_config(config)
        try:
            with read_write(config), read_write(config.hydra), open_dict(config):
                self._sweep = _begin_sweep(config)
            # The reports of the jobs link to it.
            _write_page(self._sweep.directory)
        except (LightkitError, OSError) as error:
            raise CarriedError(error) from error

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Records that all jobs are finished."""
        if self._sweep is not None:
            replace(self._sweep, is_finished=True).write()
            _write_page(self._sweep.directory)
            release(self._sweep.directory)


def _write_page(directory: Path) -> None:
    # A single run needs none of these modules.
    from lightkit.app.runs.sweep_page import update_sweep_page

    update_sweep_page(directory, force=True)


def objective_for_sweeper(config: Mapping[str, Any], value: float | None) -> float | None:
    """Returns the objective of a job in the form that the sweeper accepts: no NaN.

    Args:
        config: the configuration of the job.
        value: the metric that the key ``objective`` names; None if the job has not logged it.

    Raises:
        ConfigError: the sweeper needs an objective and ``value`` is None. Hydra's basic sweeper needs none.
    """
    job = HydraConfig.get()
    sweeper = job.runtime.choices["hydra/sweeper"]
    if job.mode != RunMode.MULTIRUN or sweeper == "basic":
        return value
    if value is None:
        raise ConfigError(
            f"objective={config['objective']}: the job has logged no such metric, and hydra/sweeper={sweeper} needs "
            f"one; {config['run_dir']}/metrics.json has the metrics that it has logged"
        )
    # NaN ends a sweep of Optuna's sweeper; a job that diverged must count as a bad trial instead.
    worst = -math.inf if "maximize" in str(job.sweeper.get("direction")) else math.inf
    return worst if math.isnan(value) else value


def _begin_sweep(config: DictConfig) -> Sweep:
    """Begins a sweep, or resumes an earlier one, and returns its record.

    The function locks the directory of the sweep and seeds Python's random generator.

    Args:
        config: the configuration of the sweep, in which the function sets the directory, ``ckpt_path`` and Optuna's
            study.

    Raises:
        ConfigError: another process writes to the directory, or it holds a run.
        CheckpointError: ``ckpt_path=last``, and no sweep can be resumed: see `_find_sweep_to_resume`.
    """
    overrides = config.hydra.overrides
    task = [word for word in overrides.task if _override_key(word) != "ckpt_path" or _is_sweep_override(word)]
    others = [word for word in overrides.hydra if _override_key(word) not in _LOCATION_KEYS]
    new = Sweep(
        Path(config.hydra.sweep.dir).absolute(),
        [*task, *others],
        _swept_keys(config, task),
        config.ckpt_path,
        objective=config.objective,
        direction=_direction(config),
    )
    restarted = restarted_directory()
    old = _find_sweep_to_resume(new, config.name, restarted) if restarted or config.ckpt_path == "last" else None
    if old is None and not restarted:
        new = replace(new, directory=_new_directory(config, new.directory))
    sweep = new if old is None else old
    sweep.directory.mkdir(parents=True, exist_ok=True)
    if not hold(sweep.directory) and not restarted:
        raise ConfigError(f"another lightkit.train, which is still running, writes to {display_path(sweep.directory)}")
    if old is None:
        if config.ckpt_path is None and (unfinished := find(new, config.name, finished=False)) is not None:
            directory = display_path(unfinished.directory)
            print(f"{directory} is unfinished: ckpt_path=last goes on with that sweep", flush=True)
        new.write()
        _set_directory(config, new.directory)
    else:
        print(f"continuing the sweep {display_path(old.directory)}", flush=True)
        given = [] if old.ckpt_path is None else [quote_word(f"ckpt_path={old.ckpt_path}")]
        config.hydra.overrides.task = [*task, *given]
        config.ckpt_path = old.ckpt_path
        _set_directory(config, old.directory)
    remove_leftovers(sweep.directory)
    random.seed(sweep.seed)
    if config.hydra.runtime.choices["hydra/sweeper"] == "optuna":
        _configure_optuna(config.hydra.sweeper, sweep, is_continued=old is not None)
    return sweep


def _new_directory(config: DictConfig, directory: Path) -> Path:
    """Returns the directory of a new sweep: ``directory``, or one with a number if it is named by the time and exists.

    Raises:
        ConfigError: the directory holds a run. With ``ckpt_path=last`` each job searches for a run to resume, and its
            own check follows later.
    """
    if is_named_by_time(config, "hydra.sweep.dir"):
        return make_new(directory)
    if config.ckpt_path != "last":
        check_sweep_directory(directory)
    return directory


def _set_directory(config: DictConfig, directory: Path) -> None:
    """Sets the directory of the sweep in its configuration, and in the overrides that compose the jobs."""
    config.hydra.sweep.dir = str(directory)
    kept = [word for word in config.hydra.overrides.hydra if _override_key(word) != "hydra.sweep.dir"]
    config.hydra.overrides.hydra = [*kept, quote_word(f"hydra.sweep.dir={directory}")]


def _find_sweep_to_resume(new: Sweep, name: str, restarted: str | None) -> Sweep | None:
    """Returns the sweep to resume; None if each job must search for a run of its own.

    Args:
        new: the sweep that begins now.
        name: the name of the job.
        restarted: the directory of the sweep that torchrun has restarted; None without a restart.

    Raises:
        CheckpointError: the sweep with the same overrides is finished or running, or ``runs/<name>`` has no run.
    """
    if restarted is not None:
        old = read(Path(restarted))
        return old if old is not None and old.overrides == new.overrides else None
    if (unfinished := find(new, name, finished=False)) is not None:
        return unfinished
    if (done := find(new, name, finished=True)) is not None:
        raise CheckpointError(
            f"ckpt_path=last: {display_path(done.directory)}, the sweep with the same overrides, "
            f"{'is finished' if done.is_finished else 'is still running'}"
        )
    if not has_runs(name):
        # The error comes before the directory of the new sweep is made, which would stay empty.
        raise CheckpointError(f"ckpt_path=last: there is no last.ckpt below {(Path('runs') / name).absolute()}")
    nearest = max(find_all(new, name), key=lambda old: (_similarity(new, old), old.started), default=None)
    if nearest is not None and not nearest.is_finished:
        there = " ".join(word for word in nearest.overrides if word not in new.overrides)
        here = " ".join(word for word in new.overrides if word not in nearest.overrides)
        print(
            f"no unfinished sweep has the same overrides; the nearest is {display_path(nearest.directory)}, with "
            f"{there or 'nothing'} there and {here or 'nothing'} here: each job goes on with a run of its own"
        )
    return None


def _similarity(one: Sweep, other: Sweep) -> int:
    """Returns the number of equal overrides minus the number of different ones."""
    return len(set(one.overrides) & set(other.overrides)) - len(set(one.overrides) ^ set(other.overrides))


def _swept_keys(config: DictConfig, task: list[str]) -> list[str]:
    """Returns the keys and groups that differ between the jobs of a sweep.

    Args:
        config: the configuration of the sweep, whose ``hydra.sweeper.params`` have such keys.
        task: the overrides on the command line, of which some have several values.
    """
    given = [_override_key(word) for word in task if _is_sweep_override(word)]
    return [*given, *map(str, OmegaConf.select(config, "hydra.sweeper.params") or {})]


def _direction(config: DictConfig) -> str | None:
    """Returns ``minimize`` or ``maximize`` as the sweeper does; None if it has no direction, or several."""
    direction = OmegaConf.select(config, "hydra.sweeper.direction")
    # Optuna's sweeper has an enumeration.
    name = str(getattr(direction, "name", direction))
    return name if name in ("minimize", "maximize") else None


def _is_sweep_override(word: str) -> bool:
    (override,) = OverridesParser.create().parse_overrides([word])
    return override.is_sweep_override()


def _override_key(word: str) -> str:
    return word.partition("=")[0].lstrip("+~")


def _configure_optuna(sweeper: DictConfig, sweep: Sweep, is_continued: bool) -> None:
    """Sets the sweeper's storage to a new study in a file, and its seed, so that Optuna proposes the same trials again.

    A resumed sweep gets a new study and the objectives of finished trials from their records. With the old study Optuna
    would append all trials a second time, and its samplers would restart their random numbers at the resumed trial.

    Args:
        sweeper: the configuration of Optuna's sweeper, which the function changes.
        sweep: the record of the sweep.
        is_continued: True for a resumed sweep.

    Raises:
        ConfigError: the sweep is resumed and its study lies in a storage of the user's.
    """
    if sweeper.get("storage") is not None:
        if is_continued:
            raise ConfigError(
                f"hydra.sweeper.storage={sweeper.storage}: ckpt_path=last cannot go on with a sweep whose study lies "
                "elsewhere, because Optuna would repeat its trials there; without that key the study lies in the "
                "sweep's directory"
            )
    elif (url := _create_study(sweep.directory / _STUDY_FILE)) is not None:
        sweeper.storage = url
        sweeper.study_name = sweeper.study_name or sweep.directory.name
    sampler = sweeper.get("sampler")
    if sampler is not None and "seed" in sampler and sampler.seed is None:
        sampler.seed = sweep.seed


def _create_study(path: Path) -> str | None:
    """Creates an empty database for Optuna in the file ``path`` and returns its URL; None, with a message, on failure.

    Optuna 2.10 writes the version of its tables without a commit, so that SQLAlchemy 2 discards it and Optuna fails to
    find it later. The function writes the version beforehand.
    """
    try:
        import sqlite3

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
        # Three packages may fail here in many ways; the sweep continues with a study in memory.
        print(f"Optuna's study is not kept in {display_path(path)}: {type(error).__name__}: {error}", file=sys.stderr)
        return None
    return f"sqlite:///{path}"
