"""The processes of a job: one leading process runs Hydra, and all processes train with its resolved configuration.

The leading process composes the configuration, starts one process for each device and supervises them; under torchrun
the process of rank 0 leads the others. If every process ran Hydra, each would repeat a sweep, and ``${now:...}`` would
give each another directory.
"""

from __future__ import annotations

import logging.config
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from lightkit._util.output_log import OutputLog
from lightkit._util.strategy_traits import traits_of
from lightkit.app import cluster, restarts
from lightkit.app.job_output import start_log
from lightkit.app.log_filters import import_lightning_silently
from lightkit.app.run_records import OUTPUT
from lightkit.app.texts import escape_interpolations
from lightkit.config import to_plain
from lightkit.errors import ConfigError
from lightkit.runtime.environment import is_under_torchrun, rank, world_size
from lightkit.runtime.supervisor import Supervisor
from lightkit.runtime.worker import Worker
from lightkit.targets import find_class

JobFunction = Callable[[DictConfig], Any]


def lead(function: JobFunction, config: DictConfig, command: list[str], worker: Worker, job: str | None = None) -> Any:
    """Runs a job in as many processes as its configuration asks for, or as torchrun has started.

    Args:
        function: the function that runs the job in one process; under torchrun every process calls it.
        config: the configuration of the job.
        command: the command line that starts a further process of the program, which must call `follow`.
        worker: this process.
        job: the id of the cross-validation that the job belongs to; None for a job of its own.

    Returns:
        The result of ``function`` in the process of rank 0. With several processes it must consist of JSON's types.

    Raises:
        LightkitError: a process ended in an error; the supervisor has ended the others.
    """
    unresolved = config
    cluster.check_world_size()
    if is_under_torchrun():
        config = with_processes_of_torchrun(config)
    restart = restarts.of_this_process()
    with OutputLog() as log:
        if not restart.begin(config, unresolved, job):
            return restart.result()
        # The directory is this run's from here on.
        start_log(log, config)
        # Hydra's sweepers draw from Python's generator too: a job that is skipped must not change their next number.
        state = random.getstate()
        try:
            result = _run(function, config, command, worker)
            restart.end(result)
        except Exception as error:
            restart.fail(error)
            raise
        finally:
            random.setstate(state)
            restart.leave()
    return result


def _run(function: JobFunction, config: DictConfig, command: list[str], worker: Worker) -> Any:
    if is_under_torchrun():
        worker.publish(_to_job(config))
    elif (count := count_processes(config)) > 1:
        cluster.check_single_start(count)
        return Supervisor(command, count, _tolerates_worker_loss(config)).run(_to_job(config))
    return function(config)


def follow(function: JobFunction, worker: Worker) -> None:
    """Runs the jobs of the leading process until it has no more.

    Args:
        function: the function that runs a job of a resolved configuration.
        worker: this process.
    """

    def run(job: dict[str, Any]) -> Any:
        if rank() == 0 and job["logging"]:
            logging.config.dictConfig(job["logging"])
        config = DictConfig(escape_interpolations(job["config"]))
        if rank() != 0:
            return function(config)
        with OutputLog() as log:
            log.open(Path(config.run_dir) / OUTPUT)
            return function(config)

    worker.follow(run)


def _to_job(config: DictConfig) -> dict[str, Any]:
    """Returns the job for the other processes, as JSON values.

    The job has the resolved configuration, and Hydra's configuration of logging.
    """
    setup = HydraConfig.get().job_logging if HydraConfig.initialized() else None
    return {"config": to_plain(config), "logging": OmegaConf.to_container(setup, resolve=True) if setup else None}


def _tolerates_worker_loss(config: DictConfig) -> bool:
    target = config.strategy.get("_target_")
    return target is not None and traits_of(find_class(target)).tolerates_worker_loss


def count_processes(config: DictConfig) -> int:
    """Returns the number of processes that a configuration asks for on this machine.

    Raises:
        ConfigError: the configuration asks for several machines, for which torchrun must start the processes.
    """
    if config.trainer.get("num_nodes", 1) != 1:
        raise ConfigError(
            f"trainer.num_nodes={config.trainer.num_nodes}: start the processes of several machines with torchrun, "
            "which sets the number of nodes"
        )
    if config.trainer.devices == 1:
        return 1
    import_lightning_silently()
    from lightning.pytorch.strategies import ParallelStrategy

    from lightkit.app.factory import build_trainer

    # Lightning's Trainer resolves `auto` and lists of devices to a number.
    trainer = build_trainer(config, logger=False)
    return trainer.num_devices if isinstance(trainer.strategy, ParallelStrategy) else 1


def with_processes_of_torchrun(config: DictConfig) -> DictConfig:
    """Returns the resolved configuration with ``trainer.devices`` and ``trainer.num_nodes`` of torchrun's processes.

    Raises:
        ConfigError: the configuration asks for other devices, or the nodes have different numbers of processes.
    """
    world = world_size()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    nodes, rest = divmod(world, local)
    if rest:
        raise ConfigError(f"torchrun started {world} processes, which is no multiple of the {local} on this node")
    asked = config.trainer.devices
    if asked not in (1, -1, "auto", local, str(local)):
        raise ConfigError(f"trainer.devices={asked}, but torchrun started {local} processes on this node")
    resolved = DictConfig(escape_interpolations(to_plain(config)))
    resolved.trainer.devices = local
    resolved.trainer.num_nodes = nodes
    return resolved
