"""The environment variables that say who started this process: a user, torchrun, or a supervisor of lightkit."""

from __future__ import annotations

import os

# The supervisor sets the variable for its processes. The import removes it, so that their own children lack it.
STARTED = "LIGHTKIT_STARTED"
_is_started = os.environ.pop(STARTED, None) is not None


def is_started() -> bool:
    """Returns True if a `lightkit.runtime.supervisor.Supervisor`, which prints this process's errors, started it."""
    return _is_started


# The variables that torchrun sets for each process.
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def is_under_torchrun() -> bool:
    """Returns True if the environment has torchrun's variables, also if the supervisor or a user has set them."""
    return all(name in os.environ for name in TORCHRUN_VARIABLES)


def rank() -> int:
    """Returns the rank of this process among all processes of the job.

    Raises:
        KeyError: neither torchrun nor the supervisor has set ``RANK``.
    """
    return int(os.environ["RANK"])


def world_size() -> int:
    """Returns the number of processes of the job.

    Raises:
        KeyError: neither torchrun nor the supervisor has set ``WORLD_SIZE``.
    """
    return int(os.environ["WORLD_SIZE"])


def is_follower() -> bool:
    """Returns True if a supervisor started this process, or if torchrun started it with a rank other than 0.

    A supervisor gives the process its jobs; under torchrun the process of rank 0 gives them.
    """
    return is_started() or (is_under_torchrun() and rank() != 0)
