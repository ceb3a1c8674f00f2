"""What workers and servers say to each other: the numbers in headers, hellos, and what a push has beside gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from lightkit.parameter_server.job import MOST_WORKERS, Job
from lightkit.parameter_server.transport import ProtocolError

# What a push says of itself, before the optimizer's options and which gradients there are: whether the gradient is to
# be left out; what the mean is clamped to, 0 for no clamping; whether its norm is wanted before the step.
PUSH_FACTS = 3


# More characters than an incarnation has.
_LONGEST_INCARNATION = 64

# Seconds: a worker that takes a longer silence of the server is none.
_LONGEST_TIMEOUT = 1e7


@dataclass(frozen=True)
class Hello:
    """What a worker says of itself once it has shown that it knows the secret.

    Args:
        rank: of the worker, from 0.
        incarnation: another one is another process that has its place.
        timeout: seconds without a word after which it takes the server for gone.
        job: what it trains, and how.
    """

    rank: int
    incarnation: str
    timeout: float
    job: Job

    @classmethod
    def read(cls, message: Any) -> Hello:
        """Returns what a message of a worker says.

        Raises:
            ProtocolError: it is no hello.
            ConfigError: its job is none.
        """
        if not isinstance(message, dict) or message.keys() != {"rank", "incarnation", "timeout", "job"}:
            raise ProtocolError("a worker's first message must say rank, incarnation, timeout and job")
        rank, incarnation, timeout = message["rank"], message["incarnation"], message["timeout"]
        if type(rank) is not int or not 0 <= rank < MOST_WORKERS:
            raise ProtocolError(f"rank must be a whole number from 0 to {MOST_WORKERS - 1}, got {repr(rank)[:100]}")
        if not isinstance(incarnation, str) or not 0 < len(incarnation) <= _LONGEST_INCARNATION:
            raise ProtocolError(f"incarnation must be a short string, got {repr(incarnation)[:100]}")
        if type(timeout) not in (int, float) or not 0 < timeout <= _LONGEST_TIMEOUT or not math.isfinite(timeout):
            raise ProtocolError(f"timeout must be a number of seconds above 0, got {repr(timeout)[:100]}")
        return cls(rank, incarnation, float(timeout), Job.from_json(message["job"]))


class Request(IntEnum):
    """The first number of a worker's header; the others: table, number of the push, version that it is based on."""

    BEGIN = 1
    PULL = 2
    PUSH = 3
    STATE = 4
    FINISH = 5
    LEAVE = 6


class Answer(IntEnum):
    """The first number of a server's header; the second: version of the table."""

    OK = 1
    WAIT = 2
    NORM = 3
    REFUSED = 4
