"""The variables of cluster managers, by which Lightning would take a process that a user started for one of several.

lightkit starts its processes itself, or torchrun does. In the shell of an allocation SLURM's variables speak of tasks
that nobody has started.
"""

from __future__ import annotations

import os
from typing import Any

from lightkit.errors import ConfigError
from lightkit.runtime.environment import TORCHRUN_VARIABLES, is_under_torchrun

# The number of processes that a program has started with the same command, by the variable that it sets.
_STARTERS = {
    "SLURM_STEP_NUM_TASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpirun",
    "JSM_NAMESPACE_SIZE": "jsrun",
}

# The variables that SLURM sets for a task that it has started; Lightning reads all of them.
_SLURM_TASK = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID")


def plugins(devices: object = 1) -> list[Any]:
    """Returns the plugins of Lightning's Trainer that make it ignore a cluster manager's variables.

    Args:
        devices: the argument ``devices`` of the Trainer.

    Returns:
        Lightning's plain environment; an empty list where Lightning finds the right one itself. A single task of SLURM
        keeps SLURM's, which requeues the job on a signal.
    """
    is_foreign = _names_other_tasks(devices) or _several(*_STARTERS) or "JSM_NAMESPACE_SIZE" in os.environ
    if is_under_torchrun() or not is_foreign:
        return []
    from lightning.pytorch.plugins.environments import LightningEnvironment

    return [LightningEnvironment()]


def check_world_size() -> None:
    """Rejects a number of processes without the rest of torchrun's variables, as some operators of Kubernetes set it.

    Raises:
        ConfigError: ``WORLD_SIZE`` is not 1 and another variable is missing; the message has its name.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    missing = [name for name in TORCHRUN_VARIABLES if name not in os.environ]
    if size != "1" and missing:
        raise ConfigError(
            f"WORLD_SIZE={size} in the environment, but no {', '.join(missing)}: start the processes with torchrun, "
            "which sets all of them, or unset WORLD_SIZE to train in one process"
        )


def check_single_start(processes: int) -> None:
    """Rejects a job of several processes that srun or mpirun has started several times: each would start all of them.

    Args:
        processes: the number of processes that the job starts.

    Raises:
        ConfigError: the program was started several times; the message has the variable that says so.
    """
    if started := _several(*_STARTERS):
        name = started[0]
        raise ConfigError(
            f"{name}={os.environ[name]}: {_STARTERS[name]} has started this command {os.environ[name]} times, and each "
            f"of them would start {processes} processes: start it once, or use python -m lightkit.launch"
        )


def _names_other_tasks(devices: object) -> bool:
    """Returns True if the variables of SLURM do not describe one process with one task."""
    if "SLURM_NTASKS" not in os.environ:
        return False
    is_task = all(name in os.environ for name in _SLURM_TASK)
    return not is_task or devices != 1 or bool(_several("SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_NNODES"))


def _several(*names: str) -> list[str]:
    """Returns the names of the variables that are set and not 1."""
    return [name for name in names if os.environ.get(name, "1") != "1"]
