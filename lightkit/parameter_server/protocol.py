"""Messages between workers and servers: the numbers in headers, the join request, and the metadata of a push."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from lightkit.parameter_server.training_spec import MAX_WORKERS, TrainingSpec
from lightkit.parameter_server.transport import ProtocolError

# The number of flags at the start of a push's metadata: 1 if the servers must skip the gradient; the largest absolute
# value of an element of the mean gradient, or 0 for no limit; 1 if the workers need the norm of the mean gradient
# before the step. After the flags come the hyperparameters, and then for each parameter 1 if it has a gradient, else 0.
PUSH_FLAGS = 3

# The largest number of characters of an incarnation; a worker of this release sends 16.
_MAX_INCARNATION = 64

# The longest timeout in seconds.
_MAX_TIMEOUT = 1e7


@dataclass(frozen=True)
class JoinRequest:
    """The first message of a worker after the handshake.

    Args:
        rank: the rank of the worker, from 0.
        incarnation: a random string of the worker's process; a process that replaces the worker has another one.
        timeout: the seconds without a heartbeat after which the worker takes the server for gone.
        spec: the specification of this server's shard of the training.
    """

    rank: int
    incarnation: str
    timeout: float
    spec: TrainingSpec

    @classmethod
    def from_message(cls, message: Any) -> JoinRequest:
        """Returns the join request in a message of an untrusted peer.

        Raises:
            ProtocolError: ``message`` is no join request.
            ConfigError: the specification in ``message`` is invalid.
        """
        if not isinstance(message, dict) or message.keys() != {"rank", "incarnation", "timeout", "job"}:
            raise ProtocolError("a worker's first message must say rank, incarnation, timeout and job")
        rank, incarnation, timeout = message["rank"], message["incarnation"], message["timeout"]
        if type(rank) is not int or not 0 <= rank < MAX_WORKERS:
            raise ProtocolError(f"rank must be a whole number from 0 to {MAX_WORKERS - 1}, got {repr(rank)[:100]}")
        if not isinstance(incarnation, str) or not 0 < len(incarnation) <= _MAX_INCARNATION:
            raise ProtocolError(f"incarnation must be a short string, got {repr(incarnation)[:100]}")
        if type(timeout) not in (int, float) or not 0 < timeout <= _MAX_TIMEOUT or not math.isfinite(timeout):
            raise ProtocolError(f"timeout must be a number of seconds above 0, got {repr(timeout)[:100]}")
        return cls(rank, incarnation, float(timeout), TrainingSpec.from_json(message["job"]))


class Request(IntEnum):
    """The first number of a worker's header, which says what the worker asks for.

    The other three numbers are the index of the optimizer, the sequence number of the push, and the version of the
    parameters with which the gradient was computed; a request that does not need a number has 0.

    MASK has no reply: the message after it has new masks, which the update with the worker's next push sets. Its third
    number is the number of the masks.
    """

    BEGIN = 1
    PULL = 2
    PUSH = 3
    STATE = 4
    FINISH = 5
    LEAVE = 6
    MASK = 7


class Reply(IntEnum):
    """The first number of a server's header.

    The second number is the version of the optimizer's parameters, and the third one the number of their masks.

    OK answers a request. WAIT is a heartbeat before the answer. NORM asks for the factor of the mean gradient, whose
    squared norm follows. REFUSED precedes a message with the reason, after which the server closes the connection.
    """

    OK = 1
    WAIT = 2
    NORM = 3
    REFUSED = 4
