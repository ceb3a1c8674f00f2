"""Cross-validation: one training for each fold of the data, each with a directory and a record of its own.

The leading process runs the trainings one after the other. A cross-validation that goes on skips the folds whose
records say that they are finished, as a sweep skips its jobs. Its own record lies in ``.hydra/run.json``.
"""

from __future__ import annotations

import copy
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from lightkit._util.directory_lock import is_held_by_another
from lightkit.app import fold_results, processes, run_records, run_search, sweep_record
from lightkit.app.restarts import overrides_of_run, restarted_directory
from lightkit.app.run_records import Run, display_path
from lightkit.app.run_search import have_same_overrides
from lightkit.errors import CheckpointError, ConfigError
from lightkit.runtime.worker import Worker


def is_cross_validation(config: DictConfig) -> bool:
    """Returns True if a job trains all folds; ``fold=INDEX`` makes a job of a single one."""
    return config.get("kfold") is not None and config.get("fold") is None


def check(config: DictConfig) -> None:
    """Rejects wrong values of ``kfold`` and ``fold``.

    Raises:
        ConfigError: a value is out of its range, or ``fold`` is given without ``kfold``.
    """
    count, index = config.get("kfold"), config.get("fold")
    if count is None:
        if index is not None:
            raise ConfigError(f"fold={index} is one of several folds: kfold=COUNT must give their number")
        return
    if count < 2:
        raise ConfigError(f"kfold must be at least 2, or null for one training, got {count}")
    if index is not None and not 0 <= index < count:
        raise ConfigError(f"fold must be from 0 to {count - 1}, or null for all folds, got {index}")


def lead(function: processes.JobFunction, config: DictConfig, command: list[str], worker: Worker) -> Any:
    """Runs a job by `lightkit.app.processes.lead`, or with ``kfold`` one job for each fold.

    The job of a fold gets ``fold`` and the directory ``fold_INDEX`` within ``run_dir``.

    Args:
        function: the function that runs the job of a fold and returns its objective.
        config: the configuration of the job.
        command: the command line that starts a further process: see `lightkit.app.processes.lead`.
        worker: this process.

    Returns:
        The result of the job; of a cross-validation the mean of the objectives, None if a fold has none.

    Raises:
        LightkitError: a value is wrong, or the job of a fold ended in an error.
    """
    check(config)
    if not is_cross_validation(config):
        return processes.lead(function, config, command, worker)
    directory = Path(config.run_dir).absolute()
    run = _begin(config, directory)
    if run.is_finished:
        print(f"done before the restart: {directory}", flush=True)
        return run.result
    objectives = []
    for index in range(config.kfold):
        fold = _config_of_fold(config, index)
        print(f"fold {index} of {config.kfold}: {display_path(Path(fold.run_dir))}", flush=True)
        objectives.append(processes.lead(function, fold, command, worker, job=run.job))
    fold_results.write(directory, config)
    result = None if None in objectives else fold_results.mean(objectives)
    run.finished(result).write()
    return result


def find_to_resume(config: DictConfig) -> Path | None:
    """Returns the directory of the cross-validation that ``ckpt_path`` means; None if a new one begins.

    ``ckpt_path=last`` means the newest unfinished one with the same overrides below ``runs/NAME``; the path of a
    directory means the one there.

    Args:
        config: the configuration of the job, whose ``run_dir`` can be resolved.

    Raises:
        CheckpointError: there is none to go on with; the message has the nearest one and the differences.
    """
    checkpoint = config.get("ckpt_path")
    if not is_cross_validation(config) or checkpoint is None:
        return None
    run = replace(run_records.describe(config), overrides=overrides_of_run())
    if checkpoint != "last":
        found = run_records.read(Path(checkpoint).absolute())
        if found is None or not _is_record(found):
            raise CheckpointError(
                f"ckpt_path={checkpoint}: with kfold={config.kfold} each fold begins anew, so that ckpt_path must be "
                "null, last, or the directory of an unfinished run with kfold"
            )
        candidates = [found]
    else:
        candidates = [other for other in run_search.find_candidates(run, str(config.name)) if _is_record(other)]
    same = [other for other in candidates if _is_same(run, other)]
    unfinished = next((other for other in same if not other.is_finished), None)
    if unfinished is not None:
        return unfinished.directory
    if same:
        raise CheckpointError(
            f"ckpt_path={checkpoint}: {display_path(same[0].directory)}, with the same overrides, is finished: "
            "lightkit.evaluate and lightkit.predict take the directory as ckpt_path"
        )
    if not candidates:
        place = (Path("runs") / str(config.name)).absolute()
        raise CheckpointError(f"ckpt_path=last: there is no run with kfold={config.kfold} below {place}")
    nearest = min(candidates, key=lambda other: len(_different(run, other)) + len(_different(other, run)))
    there, here = (" ".join(_different(*pair)) or "nothing" for pair in ((nearest, run), (run, nearest)))
    raise CheckpointError(
        f"ckpt_path={checkpoint}: all folds must be trained with the same overrides; "
        f"{display_path(nearest.directory)} has {there} there and {here} here"
    )


def _begin(config: DictConfig, directory: Path) -> Run:
    """Returns the record of the cross-validation in ``directory``, after writing it if it is a new one.

    Raises:
        ConfigError: ``ckpt_path`` is given in a sweep, whose jobs go on with their own folds alone.
    """
    sweep = sweep_record.current()
    before = run_records.read(directory)
    run = replace(run_records.describe(config), directory=directory, overrides=overrides_of_run())
    restarted = restarted_directory() is not None
    if before is not None and before.job is not None and _is_record(before) and _is_same(run, before):
        if before.job == sweep.job if sweep is not None else restarted or config.ckpt_path is not None:
            return before
    if config.ckpt_path is not None:
        raise ConfigError(
            f"ckpt_path={config.ckpt_path}: a job with kfold goes on with its own folds alone; in a sweep "
            "ckpt_path=last must find an unfinished sweep with the same overrides"
        )
    run = replace(run, job=uuid.uuid4().hex if sweep is None else sweep.job)
    if sweep is None:
        candidates = run_search.find_candidates(run, str(config.name), recorded=True)
        same = next((other for other in candidates if _is_record(other) and _is_same(run, other)), None)
        if same is not None and not same.is_finished and not is_held_by_another(same.directory):
            print(f"{display_path(same.directory)} is unfinished: ckpt_path=last goes on with it", flush=True)
    directory.mkdir(parents=True, exist_ok=True)
    run.write()
    return run


def _config_of_fold(config: DictConfig, index: int) -> DictConfig:
    fold = copy.deepcopy(config)
    with read_write(fold), open_dict(fold):
        fold.run_dir = str(Path(config.run_dir).absolute() / fold_results.directory_name(index))
        fold.fold = index
        fold.ckpt_path = None
    return fold


def _is_record(run: Run) -> bool:
    """Returns True for the record of a cross-validation, False for that of a fold or of another run."""
    return run.job is not None and run.config.get("kfold") is not None and run.config.get("fold") is None


def _is_same(run: Run, other: Run) -> bool:
    return have_same_overrides(run, other) and not run_search.config_differences(run, other)


def _different(one: Run, other: Run) -> list[str]:
    """Returns the overrides that ``one`` has and ``other`` has not; without any, the other differences."""
    words = {word.lstrip("+") for word in other.overrides}
    return [word for word in one.overrides if word.lstrip("+") not in words]


def resume_directory(config: DictConfig, directory: Path) -> Path | None:
    """Returns the directory of the run that Hydra must take instead of ``directory``: see `find_to_resume`.

    Args:
        config: Hydra's configuration with its key ``hydra``, which the function changes.
        directory: the directory that Hydra would take.
    """
    if config.get("ckpt_path") is None or not is_cross_validation(config):
        return None
    # Hydra sets both only later; `run_dir` may interpolate them.
    config.hydra.runtime.output_dir = str(directory)
    HydraConfig.instance().set_config(config)
    found = find_to_resume(OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"]))
    if found is not None:
        print(f"continuing the folds in {display_path(found)}", flush=True)
        # HydraConfig has made the keys read-only.
        with read_write(config.hydra):
            config.hydra.run.dir = str(found)
    return found
