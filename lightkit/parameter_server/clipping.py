"""Gradient clipping of a push, and the norm of the mean gradient that it needs."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass

from lightkit.errors import LightkitError


@dataclass(frozen=True)
class Clipping:
    """Gradient clipping before a step: of the mean gradient in the mode ``sync``, else of each worker's gradient.

    Args:
        max_norm: the largest norm of all gradients of the optimizer together, as in
            :func:`torch.nn.utils.clip_grad_norm_`; None for no such limit.
        max_value: the largest absolute value of an element; None for no such limit.
        skip_nonfinite: skip the step if a gradient has an element that is NaN or infinite.
    """

    max_norm: float | None = None
    max_value: float | None = None
    skip_nonfinite: bool = False

    @property
    def needs_norm(self) -> bool:
        """True if `factor` depends on the norm of the gradient."""
        return self.max_norm is not None or self.skip_nonfinite

    def factor(self, norm: float) -> float:
        """Returns the factor for a gradient of the norm ``norm``; a negative factor skips the step."""
        if self.skip_nonfinite and not math.isfinite(norm):
            return -1.0
        return 1.0 if self.max_norm is None or norm < self.max_norm else self.max_norm / (norm + 1e-6)


class OtherServerError(LightkitError):
    """The error of a push to one server after the push to another one has failed."""


class NormReduction:
    """The norm of a mean gradient, which the client computes from the parts that the servers send.

    One thread for each server uses the object.

    Args:
        servers: the number of servers.
        clipping: the gradient clipping, which gives the factor for the norm.
        report: a function that receives the norm.
    """

    def __init__(self, servers: int, clipping: Clipping, report: Callable[[float], None]) -> None:
        self._servers = servers
        self._clipping, self._report = clipping, report
        self._squares: dict[str, float] = {}
        self._changed = threading.Condition()
        self._error: BaseException | None = None

    def factor(self, address: str, square: float) -> float:
        """Waits for the parts of all servers, and returns the factor by which the servers multiply the mean gradient.

        Args:
            address: the address of the server; a restarted server sends its part again.
            square: the square of the norm of that server's part.

        Raises:
            LightkitError: the push to another server has failed.
        """
        with self._changed:
            self._squares[address] = square
            self._changed.notify_all()
            while len(self._squares) < self._servers and self._error is None:
                self._changed.wait()
            if self._error is not None:
                raise OtherServerError("another parameter server failed") from self._error
            norm = math.sqrt(math.fsum(self._squares.values()))
        self._report(norm)
        return self._clipping.factor(norm)

    def add_missing(self, address: str) -> None:
        """Adds 0 for the server ``address`` if it has replied without its part, so that `factor` does not wait for it.

        A server replies so if it was restarted after the step, for which another worker had sent the factor.
        """
        with self._changed:
            self._squares.setdefault(address, 0.0)
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Makes the waiting calls of `factor` raise an exception, since ``error`` ended the push to a server."""
        with self._changed:
            self._error = error
            self._changed.notify_all()
