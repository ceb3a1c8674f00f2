"""A callback of Hydra that chooses the directory of a run before Hydra writes there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from lightkit._util.directory_lock import hold, is_held_by_another, release
from lightkit.app import run_records, run_search
from lightkit.app.cross_validation import resume_directory
from lightkit.app.restarts import restarted_directory
from lightkit.app.run_directories import check_free, is_named_by_time, make_new
from lightkit.app.run_records import display_path, find_results
from lightkit.errors import CarriedError, ConfigError, LightkitError


class ClaimRunDirectory(Callback):
    """A callback of Hydra that makes the directory of a run, before Hydra writes its own files there.

    Hydra builds it from ``conf/train.yaml``. A directory that is named by the time gets a number, if another run has
    the name. Another directory must hold no run, except the one that goes on.
    """

    def __init__(self) -> None:
        self._directory: Path | None = None

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Sets ``hydra.run.dir`` to a directory that exists now and holds no other run, and locks the directory."""
        try:
            with read_write(config), read_write(config.hydra), open_dict(config):
                self._directory = _claim(config)
        except OmegaConfBaseException:
            # Hydra raises the same error when it reads the value.
            return
        except (LightkitError, OSError) as error:
            raise CarriedError(error) from error

    def on_run_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Releases the lock of the directory."""
        if self._directory is not None:
            release(self._directory)


def _claim(config: DictConfig) -> Path:
    directory = Path(config.hydra.run.dir).absolute()
    restarted = restarted_directory()
    if restarted is not None and Path(restarted).absolute() == directory:
        # The file system may still hold the lock of a machine that is gone.
        directory.mkdir(parents=True, exist_ok=True)
        return directory
    if (resumed := resume_directory(config, directory)) is not None:
        if not hold(resumed):
            raise _still_running(resumed)
        return resumed
    is_named = is_named_by_time(config, "hydra.run.dir")
    if is_named:
        directory = make_new(directory)
        config.hydra.run.dir = str(directory)
    try:
        # Hydra sets both only later; `run_dir` may interpolate them.
        config.hydra.runtime.output_dir = str(directory)
        HydraConfig.instance().set_config(config)
        _check(config, directory)
    except BaseException:
        if is_named:
            directory.rmdir()
        raise
    directory.mkdir(parents=True, exist_ok=True)
    if not hold(directory):
        raise _still_running(directory)
    return directory


def _check(config: DictConfig, directory: Path) -> None:
    """Rejects a directory of Hydra or of the run that holds another run, or to which another process writes."""
    own = directory if config.get("run_dir") is None else Path(config.run_dir).absolute()
    checkpoint = None
    for key, place in {"hydra.run.dir": directory, "run_dir": own}.items():
        if place.is_dir() and is_held_by_another(place):
            raise _still_running(place)
        if find_results(place):
            checkpoint = checkpoint or _find_checkpoint(config)
            check_free(key, place, checkpoint)


def _still_running(directory: Path) -> ConfigError:
    return ConfigError(f"another lightkit.train, which is still running, writes to {display_path(directory)}")


def _find_checkpoint(config: DictConfig) -> str | None:
    """Returns the checkpoint that ``ckpt_path`` names.

    Raises:
        CheckpointError: ``ckpt_path=last``, and no run can be resumed.
    """
    checkpoint = config.get("ckpt_path")
    if checkpoint != "last":
        return None if checkpoint is None else str(checkpoint)
    job = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    return str(run_search.find_last(run_records.describe(job), str(config.name)))
