"""A worker's side: pushes gradients to the servers, and has the parameters that come back."""

from __future__ import annotations

import math
import secrets
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightkit.errors import ConfigError, LightkitError
from lightkit.parameter_server.channel import Channel
from lightkit.parameter_server.job import Job, views_of
from lightkit.parameter_server.protocol import Request

T = TypeVar("T")


@dataclass(frozen=True)
class Clipping:
    """What is done to gradients before a step: in ``sync`` to their mean, else to each worker's own.

    Args:
        max_norm: of all of them together, as in :func:`torch.nn.utils.clip_grad_norm_`.
        max_value: of each element, in absolute value.
        skip_nonfinite: the step is left out where a gradient is NaN or infinite.
    """

    max_norm: float | None = None
    max_value: float | None = None
    skip_nonfinite: bool = False

    @property
    def needs_norm(self) -> bool:
        """Whether the norm must be known."""
        return self.max_norm is not None or self.skip_nonfinite

    def factor(self, norm: float) -> float:
        """By what gradients of this norm are multiplied; below 0 where the step is left out."""
        if self.skip_nonfinite and not math.isfinite(norm):
            return -1.0
        return 1.0 if self.max_norm is None or norm < self.max_norm else self.max_norm / (norm + 1e-6)


class Client:
    """Connections to all servers of a job.

    Args:
        addresses: ``HOST:PORT`` of each; in the same order at every worker.
        secret: that the servers know.
        rank: of this worker; 0 brings the parameters.
        job: what is trained, the same at every worker.
        timeout: seconds without a word after which a server counts as gone.
        patience: seconds for servers to come up, and to come back.

    Raises:
        ConfigError: no address.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        secret: str,
        rank: int,
        job: Job,
        timeout: float = 30.0,
        patience: float = 60.0,
    ) -> None:
        if not addresses or len(set(addresses)) != len(addresses):
            raise ConfigError(f"addresses must name each parameter server once, got {list(addresses)}")
        self._job = job
        who = {"rank": rank, "incarnation": secrets.token_hex(8), "timeout": timeout}
        self._ended = threading.Event()
        self._channels = [
            Channel(address, secret, {**who, "job": part.to_json()}, part, timeout, patience, self._ended)
            for address, part in zip(addresses, job.parts(len(addresses)), strict=True)
        ]
        self._positions = [_positions(job, channel.job) for channel in self._channels]
        self._pool = ThreadPoolExecutor(len(self._channels), "lightkit-parameter-server")
        # Reads a mean's norm, which nobody clips by then.
        self.norm: float | None = None
        self._signs = threading.Thread(target=self._send_heartbeats, daemon=True)
        self._signs.start()

    @property
    def traffic(self) -> tuple[int, int]:
        """Bytes of pushes that were sent so far, and of parameters that were received."""
        sent = sum(channel.bytes_sent for channel in self._channels)
        return sent, sum(channel.bytes_received for channel in self._channels)

    def start(
        self,
        options: list[list[dict[str, Any]]],
        values: list[list[Tensor]],
        state: list[list[dict[str, Any]]] | None = None,
    ) -> bool:
        """Joins the job; worker 0 begins it, where that has not been done.

        Args:
            options: of the optimizers' groups; as the next two, by table.
            values: of the parameters.
            state: of the optimizers, for each parameter.

        Returns:
            Whether this worker has begun it: else the servers go on with the parameters that they have.

        Raises:
            ConfigError: a server refuses: another secret, model, version or mode.
            LightkitError: a server cannot be reached.
        """
        states = state or [[] for _ in values]

        def start(channel: Channel, positions: list[list[int]]) -> bool:
            return channel.start(
                {
                    "options": options,
                    "values": [[v[i] for i in own] for v, own in zip(values, positions, strict=True)],
                    "state": [[s[i] for i in own if s] for s, own in zip(states, positions, strict=True)],
                }
            )

        return any(self._all(start))

    def pull(self, table: int) -> list[Tensor]:
        """The parameters as they are now: see `parameters`."""
        self._all(lambda channel, _: channel.pull(table))
        return self.parameters(table)

    def push(
        self,
        table: int,
        gradients: Sequence[Tensor | None],
        groups: Sequence[dict[str, Any]],
        clipping: Clipping | None = None,
    ) -> Exchange:
        """Sends gradients; they may be written to when this returns.

        Args:
            table: number of the optimizer.
            gradients: of its parameters; None for those that have none.
            groups: the optimizer's, with the options of this step.
            clipping: see there.

        Returns:
            To wait for, before the next push of this table.
        """
        clipping = clipping or Clipping()
        local = self._job.mode != "sync"
        for channel, positions in zip(self._channels, self._positions, strict=True):
            channel.load(table, [gradients[i] for i in positions[table]])
        skip = local and not self._clip_own(table, clipping)
        facts = [skip, 0.0 if local else clipping.max_value or 0.0, not local and clipping.needs_norm]
        for channel in self._channels:
            channel.encode(table, facts, groups, skip)
        norms = _Norms(len(self._channels), clipping, self)

        def exchange(channel: Channel) -> None:
            try:
                channel.push(table, norms.factor)
                norms.go_on_without(channel)
            except BaseException as error:
                norms.fail(error)
                raise

        futures = [self._pool.submit(exchange, channel) for channel in self._channels]
        return Exchange(futures, lambda: self.parameters(table))

    def state(self) -> list[tuple[list[Tensor], list[dict[str, Any]], dict[int, int]]]:
        """By table: the parameters, the optimizer's state of each, and the groups' ``rounding_seed``s."""
        found = self._all(lambda channel, _: channel.state())
        whole = []
        for t, table in enumerate(self._job.tables):
            values: list[Any] = [None] * len(table.parameters)
            state: list[Any] = [None] * len(table.parameters)
            seeds: dict[int, int] = {}
            for channel, positions, parts in zip(self._channels, self._positions, found, strict=True):
                own = channel.job.tables[t].parameters
                views = views_of(parts[t]["flats"], own)
                for i, view, entry in zip(positions[t], views, parts[t]["state"], strict=True):
                    values[i], state[i] = view, entry
                groups = sorted({p.group for p in own})
                seeds |= {g: s for g, s in zip(groups, parts[t]["seeds"], strict=True) if s is not None}
            whole.append((values, state, seeds))
        return whole

    def finish(self) -> None:
        """Says that this worker pushes no more, and waits until no worker does; those that are lost do not count."""
        self._all(lambda channel, _: channel.ask(Request.FINISH))

    def leave(self) -> None:
        """Ends the connections, once `finish` has returned; without that, the servers take the worker for lost."""
        if not self._ended.is_set():
            self._ended.set()
            self._pool.shutdown()
            # Not to be met by the end of the interpreter while it sends.
            self._signs.join()
            for channel in self._channels:
                channel.leave()

    def abandon(self) -> None:
        """Ends without a word, whatever is under way: the servers take the worker for lost."""
        self._ended.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        for channel in self._channels:
            channel.abandon()

    def _all(self, action: Callable[[Channel, list[list[int]]], T]) -> list[T]:
        pairs = list(zip(self._channels, self._positions, strict=True))
        futures = [self._pool.submit(action, channel, positions) for channel, positions in pairs]
        return [future.result() for future in futures]

    def parameters(self, table: int) -> list[Tensor]:
        """What came last: views of memory that the next pull or push writes to."""
        parameters: list[Any] = [None] * len(self._job.tables[table].parameters)
        for channel, positions in zip(self._channels, self._positions, strict=True):
            for i, view in zip(positions[table], channel.places[table].reply_views, strict=True):
                parameters[i] = view
        return parameters

    def _clip_own(self, table: int, clipping: Clipping) -> bool:
        """Clips this worker's gradients; False where the step is to be left out."""
        places = [channel.places[table] for channel in self._channels]
        flats = [flat for place in places for flat in place.flats]
        if clipping.max_value is not None:
            torch._foreach_clamp_max_(flats, clipping.max_value)
            torch._foreach_clamp_min_(flats, -clipping.max_value)
        if not clipping.needs_norm:
            return True
        views = [view for place in places for view in place.views]
        self.norm = math.sqrt(math.fsum(norm.double().item() ** 2 for norm in torch._foreach_norm(views)))
        factor = clipping.factor(self.norm)
        if factor >= 0 and factor != 1:
            torch._foreach_mul_(flats, factor)
        return factor >= 0

    def _send_heartbeats(self) -> None:
        while not self._ended.wait(min(channel.heartbeat for channel in self._channels)):
            for channel in self._channels:
                channel.send_heartbeat()


class Exchange:
    """A push on its way."""

    def __init__(self, futures: list[Future], parameters: Callable[[], list[Tensor]]) -> None:
        self._futures, self._parameters = futures, parameters

    def result(self) -> list[Tensor]:
        """Waits for the parameters after the step, as of `Client.pull`.

        Raises:
            LightkitError: a server is gone, or refuses what was pushed.
        """
        errors = [error for future in self._futures if (error := future.exception()) is not None]
        if errors:
            # Rather the first cause than that another server has one.
            raise min(errors, key=lambda error: isinstance(error, _OtherFailedError))
        return self._parameters()


class _OtherFailedError(LightkitError):
    """Of a push to one server, because that to another failed."""


class _Norms:
    """Brings together the servers' parts of a norm."""

    def __init__(self, count: int, clipping: Clipping, client: Client) -> None:
        self._missing = count
        self._clipping, self._client = clipping, client
        self._squares: dict[str, float] = {}
        self._changed = threading.Condition()
        self._error: BaseException | None = None

    def factor(self, address: str, square: float) -> float:
        """Waits for the other parts; a server that asks again has come back."""
        with self._changed:
            self._squares[address] = square
            self._changed.notify_all()
            while len(self._squares) < self._missing and self._error is None:
                self._changed.wait()
            if self._error is not None:
                raise _OtherFailedError("another parameter server failed") from self._error
            norm = math.sqrt(math.fsum(self._squares.values()))
        self._client.norm = norm
        return self._clipping.factor(norm)

    def go_on_without(self, channel: Channel) -> None:
        """That server has made the step: it came back after another worker had told it the factor."""
        with self._changed:
            self._squares.setdefault(channel.address, 0.0)
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """One of the servers will not answer."""
        with self._changed:
            self._error = error
            self._changed.notify_all()


def _positions(job: Job, part: Job) -> list[list[int]]:
    """By table, where in the job the parameters of a part are."""
    found = []
    for table, own in zip(job.tables, part.tables, strict=True):
        numbers = {parameter.name: index for index, parameter in enumerate(table.parameters)}
        found.append([numbers[parameter.name] for parameter in own.parameters])
    return found
