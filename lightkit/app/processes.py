"""Runs a job in as many processes as its configuration asks for; all of them train with one resolved configuration.

The process that composed the configuration leads. It starts one process a device and watches them; under torchrun the
process of rank 0 leads the others. Only the leading process runs Hydra: the others neither run a sweep again, nor ask
again for the time in the name of a directory.
"""

from __future__ import annotations

import logging.config
import os
import random
from collections.abc import Callable
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from lightkit._util.strategy_traits import traits_of
from lightkit.app import restarts
from lightkit.app.log_filters import quiet_lightning
from lightkit.errors import ConfigError
from lightkit.runtime.environment import is_under_torchrun, rank, world_size
from lightkit.runtime.supervisor import Supervisor
from lightkit.runtime.worker import Worker
from lightkit.targets import find_class

JobFunction = Callable[[DictConfig], Any]


def lead(function: JobFunction, config: DictConfig, command: list[str], worker: Worker) -> Any:
    """Runs a job in as many processes as its configuration asks for, or as torchrun has started.

    Args:
        function: runs the job in one process; under torchrun every process calls it.
        config: of the job.
        command: starts a further process of the program, which must come to `follow`.
        worker: this process.

    Returns:
        What the function returned here, or in the process of rank 0, whose result must consist of JSON's types.

    Raises:
        LightkitError: a process has ended in an error; the others have been ended.
    """
    unresolved = config
    if is_under_torchrun():
        config = with_processes_of_torchrun(config)
    restart = restarts.of_this_process()
    if not restart.begin(config, unresolved):
        return restart.result()
    # Hydra's sweepers draw from it too: the next number must not depend on whether a job was done before.
    state = random.getstate()
    try:
        result = _run(function, config, command, worker)
        restart.end(result)
    finally:
        random.setstate(state)
        restart.leave()
    return result


def _run(function: JobFunction, config: DictConfig, command: list[str], worker: Worker) -> Any:
    if is_under_torchrun():
        worker.publish(_to_job(config))
    elif (count := count_processes(config)) > 1:
        return Supervisor(command, count, _tolerates_worker_loss(config)).run(_to_job(config))
    return function(config)


def follow(function: JobFunction, worker: Worker) -> None:
    """Runs the jobs of the process that leads this one, as they come."""

    def run(job: dict[str, Any]) -> Any:
        if rank() == 0 and job["logging"]:
            logging.config.dictConfig(job["logging"])
        return function(OmegaConf.create(job["config"]))

    worker.follow(run)


def _to_job(config: DictConfig) -> dict[str, Any]:
    """Returns what the other processes need: the resolved configuration, and Hydra's of logging."""
    setup = HydraConfig.get().job_logging if HydraConfig.initialized() else None
    return {"config": _resolved(config), "logging": OmegaConf.to_container(setup, resolve=True) if setup else None}


def _resolved(config: DictConfig) -> Any:
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)


def _tolerates_worker_loss(config: DictConfig) -> bool:
    target = config.strategy.get("_target_")
    return target is not None and traits_of(find_class(target)).tolerates_worker_loss


def count_processes(config: DictConfig) -> int:
    """Returns the number of processes that a configuration asks for on this machine.

    Raises:
        ConfigError: the configuration asks for several machines, on which somebody must start processes.
    """
    if config.trainer.get("num_nodes", 1) != 1:
        raise ConfigError(
            f"trainer.num_nodes={config.trainer.num_nodes}: start the processes of several machines with torchrun, "
            "which sets the number of nodes"
        )
    if config.trainer.devices == 1:
        return 1
    quiet_lightning()
    from lightning.pytorch.strategies import ParallelStrategy

    from lightkit.app.factory import build_trainer

    # Lightning knows what `auto` and lists of devices come to.
    trainer = build_trainer(config, logger=False)
    return trainer.num_devices if isinstance(trainer.strategy, ParallelStrategy) else 1


def with_processes_of_torchrun(config: DictConfig) -> DictConfig:
    """Returns the configuration, resolved, with the devices and nodes that torchrun has started processes for.

    Raises:
        ConfigError: the configuration asks for other devices, or the nodes have different numbers of processes.
    """
    world = world_size()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    nodes, rest = divmod(world, local)
    if rest:
        raise ConfigError(f"torchrun started {world} processes, which {local} a node does not divide")
    asked = config.trainer.devices
    if asked not in (1, -1, "auto", local, str(local)):
        raise ConfigError(f"trainer.devices={asked}, but torchrun started {local} processes on this node")
    config = OmegaConf.create(_resolved(config))
    with open_dict(config):
        config.trainer.devices = local
        config.trainer.num_nodes = nodes
    return config
