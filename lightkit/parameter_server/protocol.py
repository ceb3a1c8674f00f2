"""What workers and servers say to each other: the numbers in headers, and what a push has beside its gradients."""

from __future__ import annotations

from enum import IntEnum

# What a push says of itself, before the optimizer's options and which gradients there are: whether the gradient is to
# be left out; what the mean is clamped to, 0 for no clamping; whether its norm is wanted before the step.
PUSH_FACTS = 3


def bulk(table: int) -> int:
    """The tag of a table's gradients and parameters, which both sides are ready for before their headers come."""
    return 1 + table


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
