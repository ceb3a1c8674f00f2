"""Tells who started this process: a user, torchrun, or another process of lightkit."""

from __future__ import annotations

import os

# The supervisor sets it for the processes that it starts; not for those that these may start in turn.
STARTED = "LIGHTKIT_STARTED"
_is_started = os.environ.pop(STARTED, None) is not None


def is_started() -> bool:
    """Returns True if a supervisor of lightkit started this process, and prints its errors."""
    return _is_started


def is_under_torchrun() -> bool:
    """Returns True if torchrun, or somebody who sets its variables, started this process."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"))


def rank() -> int:
    """Returns the rank of this process among all processes of the job; torchrun or the supervisor has set it."""
    return int(os.environ["RANK"])


def world_size() -> int:
    """Returns the number of processes of the job; torchrun or the supervisor has set it."""
    return int(os.environ["WORLD_SIZE"])


def is_follower() -> bool:
    """Returns True if this process takes its jobs from another one."""
    return is_started() or (is_under_torchrun() and rank() != 0)
