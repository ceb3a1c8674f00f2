"""A worker's client: pushes gradients to all servers of a training, and receives the parameters."""

from __future__ import annotations

import math
import secrets
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from lightkit._util.deprecated import renamed_parameters
from lightkit._util.packed_masks import pack_mask, unpack_mask
from lightkit.errors import ConfigError
from lightkit.parameter_server.clipping import Clipping, NormReduction, OtherServerError
from lightkit.parameter_server.flat_tensors import view_flat
from lightkit.parameter_server.hyperparameters import GroupOptions
from lightkit.parameter_server.mask_update import MaskUpdate
from lightkit.parameter_server.protocol import Request
from lightkit.parameter_server.server_session import ServerSession
from lightkit.parameter_server.shard import ParameterState
from lightkit.parameter_server.training_spec import TrainingSpec

T = TypeVar("T")


class OptimizerState(NamedTuple):
    """The servers' parameters and state of one optimizer.

    Args:
        values: the parameters, in the order of the optimizer's groups.
        state: the optimizer's state of each parameter, in the same order.
        rounding_seeds: ``rounding_seed`` by the index of the parameter group, for groups with that option.
    """

    values: list[Tensor]
    state: list[ParameterState]
    rounding_seeds: dict[int, int]


class Client:
    """A worker's client: its connections to all servers of a training.

    Args:
        addresses: ``HOST:PORT`` of each server, in the same order at every worker.
        secret: the secret of the servers.
        rank: the rank of this worker; worker 0 sends the initial parameters.
        spec: the specification of the training, the same at every worker.
        timeout: the seconds without a byte from a server after which the server counts as gone.
        patience: the seconds that the client waits for a server to start, or to come back after a failure.

    Attributes:
        norm: the norm of the latest gradient that was clipped or checked: in the mode ``sync`` of the mean gradient,
            else of this worker's gradient. None before the first such gradient.

    Raises:
        ConfigError: ``addresses`` is empty, or names a server twice.
    """

    @renamed_parameters(job="spec")
    def __init__(
        self,
        addresses: Sequence[str],
        secret: str,
        rank: int,
        spec: TrainingSpec,
        timeout: float = 30.0,
        patience: float = 60.0,
    ) -> None:
        if not addresses or len(set(addresses)) != len(addresses):
            raise ConfigError(f"addresses must name each parameter server once, got {list(addresses)}")
        self._spec = spec
        join_request = {"rank": rank, "incarnation": secrets.token_hex(8), "timeout": timeout}
        self._ended = threading.Event()
        self._sessions = [
            ServerSession(
                address, secret, {**join_request, "job": shard.to_json()}, shard, timeout, patience, self._ended
            )
            for address, shard in zip(addresses, spec.shards(len(addresses)), strict=True)
        ]
        self._positions = [_positions(spec, session.spec) for session in self._sessions]
        self._pool = ThreadPoolExecutor(len(self._sessions), "lightkit-parameter-server")
        self.norm: float | None = None
        self._heartbeats = threading.Thread(target=self._send_heartbeats, daemon=True)
        self._heartbeats.start()

    @property
    def traffic(self) -> tuple[int, int]:
        """The number of bytes of pushes sent so far, and the number of bytes of parameters received so far."""
        sent = sum(session.bytes_sent for session in self._sessions)
        return sent, sum(session.bytes_received for session in self._sessions)

    def start(
        self,
        options: list[list[GroupOptions]],
        values: list[list[Tensor]],
        state: list[list[ParameterState]] | None = None,
    ) -> bool:
        """Joins the training. Worker 0 begins the training if the servers have none; other workers wait until then.

        Args:
            options: for each optimizer the options of its parameter groups, as `group_options` returns them.
            values: for each optimizer its parameters, in the order of its groups.
            state: for each optimizer the state of each parameter, in the same order; None for new optimizers.

        Returns:
            True if this worker has begun the training; False if the servers continue with their own parameters.

        Raises:
            ConfigError: a server refuses the worker: its secret, model, mode or version of lightkit is another one.
            LightkitError: a server cannot be reached.
        """
        states = state or [[] for _ in values]

        def start(session: ServerSession, positions: list[list[int]]) -> bool:
            return session.start(
                {
                    "options": options,
                    "values": [[v[i] for i in own] for v, own in zip(values, positions, strict=True)],
                    "state": [[s[i] for i in own if s] for s, own in zip(states, positions, strict=True)],
                }
            )

        return any(self._for_all(start))

    @renamed_parameters(table="optimizer_index")
    def pull(self, optimizer_index: int) -> list[Tensor]:
        """Asks the servers for the current parameters of an optimizer, and returns what `parameters` returns then."""
        self._for_all(lambda session, _: session.pull(optimizer_index))
        return self.parameters(optimizer_index)

    @renamed_parameters(table="optimizer_index")
    def push(
        self,
        optimizer_index: int,
        gradients: Sequence[Tensor | None],
        groups: Sequence[GroupOptions],
        clipping: Clipping | None = None,
    ) -> PendingPush:
        """Copies gradients, sends them in threads and returns at once.

        The caller may overwrite the gradients after the return. It must call ``result()`` of the returned push before
        the next push of the same optimizer.

        Args:
            optimizer_index: the index of the optimizer.
            gradients: one gradient for each parameter of the optimizer; None for a parameter without a gradient.
            groups: the optimizer's ``param_groups``; the servers' step uses the numbers among their options.
            clipping: the gradient clipping of this step; None for no clipping.

        Raises:
            ConfigError: an option that was a number at the start of the training is not a number any more.
        """
        clipping = clipping or Clipping()
        clips_here = self._spec.mode != "sync"
        for session, positions in zip(self._sessions, self._positions, strict=True):
            session.load(optimizer_index, [gradients[i] for i in positions[optimizer_index]])
        skip = clips_here and not self._clip(optimizer_index, clipping)
        flags = [
            float(skip),
            0.0 if clips_here else clipping.max_value or 0.0,
            float(not clips_here and clipping.needs_norm),
        ]
        for session in self._sessions:
            session.encode(optimizer_index, flags, groups, skip)
        reduction = NormReduction(len(self._sessions), clipping, self._set_norm)

        def exchange(session: ServerSession) -> None:
            try:
                session.push(optimizer_index, reduction.factor)
                reduction.add_missing(session.address)
            except BaseException as error:
                reduction.fail(error)
                raise

        futures = [self._pool.submit(exchange, session) for session in self._sessions]
        return PendingPush(futures, lambda: self.parameters(optimizer_index))

    def set_masks(self, optimizer_index: int, number: int, masks: Sequence[Tensor | None]) -> None:
        """Makes the servers keep entries of parameters at zero.

        The masks go with the next push of the optimizer: from the update with that push on, masked entries are zero on
        the servers, at all workers that receive the parameters later, and after a restart of a server, which writes the
        masks to its log. A lost push is sent again with its masks.

        Args:
            optimizer_index: the index of the optimizer.
            number: a number from 1; servers ignore masks whose number is not larger than that of the masks they have.
            masks: for each parameter a bool tensor of its shape, False where an entry stays zero; None for no mask.
        """
        update = MaskUpdate(number, [None if mask is None else pack_mask(mask) for mask in masks])
        for session, positions in zip(self._sessions, self._positions, strict=True):
            session.buffers[optimizer_index].masks = update.part(positions[optimizer_index])

    def masks(self, optimizer_index: int) -> list[Tensor | None]:
        """Returns the masks on the servers, as `set_masks` takes them."""
        found: dict[int, Tensor] = {}
        states = self._for_all(lambda session, _: session.state()[optimizer_index])
        for session, positions, part in zip(self._sessions, self._positions, states, strict=True):
            views = session.buffers[optimizer_index].views
            for i, view, packed in zip(positions[optimizer_index], views, part.get("masks", []), strict=False):
                if packed is not None:
                    found[i] = unpack_mask(packed, view.shape)
        return [found.get(i) for i in range(len(self._spec.optimizers[optimizer_index].parameters))]

    def mask_number(self, optimizer_index: int) -> int:
        """Returns the number of the masks of the parameters that the servers have sent last; 0 without masks."""
        return min(session.buffers[optimizer_index].mask_number for session in self._sessions)

    def state(self) -> list[OptimizerState]:
        """Returns, for each optimizer, the parameters and the optimizer state on the servers."""
        found = self._for_all(lambda session, _: session.state())
        whole = []
        for o, spec in enumerate(self._spec.optimizers):
            values: dict[int, Tensor] = {}
            state: dict[int, ParameterState] = {}
            seeds: dict[int, int] = {}
            for session, positions, parts in zip(self._sessions, self._positions, found, strict=True):
                own = session.spec.optimizers[o].parameters
                views = view_flat(parts[o]["flats"], own)
                for i, view, entry in zip(positions[o], views, parts[o]["state"], strict=True):
                    values[i], state[i] = view, entry
                indices = sorted({p.group_index for p in own})
                seeds |= {g: s for g, s in zip(indices, parts[o]["seeds"], strict=True) if s is not None}
            order = range(len(spec.parameters))
            whole.append(OptimizerState([values[i] for i in order], [state[i] for i in order], seeds))
        return whole

    def finish(self) -> None:
        """Tells the servers that this worker pushes no more, and waits until all workers have done so or are lost."""
        self._for_all(lambda session, _: session.send(Request.FINISH))

    def leave(self) -> None:
        """Tells the servers that this worker leaves, and closes the connections.

        Without a `finish` before, the servers take the worker for lost.
        """
        if not self._ended.is_set():
            self._ended.set()
            self._pool.shutdown()
            # The interpreter must not end while the thread of the heartbeats sends.
            self._heartbeats.join()
            for session in self._sessions:
                session.leave()

    def abandon(self) -> None:
        """Closes the connections at once, also during a push; the servers take the worker for lost."""
        self._ended.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        for session in self._sessions:
            session.abandon()

    @renamed_parameters(table="optimizer_index")
    def parameters(self, optimizer_index: int) -> list[Tensor]:
        """Returns the parameters of an optimizer from the latest reply of the servers.

        Args:
            optimizer_index: the index of the optimizer.

        Returns:
            One tensor for each parameter, a view of a buffer that the next pull or push overwrites.
        """
        found: dict[int, Tensor] = {}
        for session, positions in zip(self._sessions, self._positions, strict=True):
            views = session.buffers[optimizer_index].reply_views
            found.update(zip(positions[optimizer_index], views, strict=True))
        return [found[i] for i in range(len(found))]

    def _set_norm(self, norm: float) -> None:
        self.norm = norm

    def _for_all(self, action: Callable[[ServerSession, list[list[int]]], T]) -> list[T]:
        pairs = list(zip(self._sessions, self._positions, strict=True))
        futures = [self._pool.submit(action, session, positions) for session, positions in pairs]
        return [future.result() for future in futures]

    def _clip(self, optimizer_index: int, clipping: Clipping) -> bool:
        """Clips this worker's gradients in the buffers, in place; returns False if the step must be skipped."""
        every = [session.buffers[optimizer_index] for session in self._sessions]
        flats = [flat for buffers in every for flat in buffers.flats]
        if clipping.max_value is not None:
            torch._foreach_clamp_max_(flats, clipping.max_value)
            torch._foreach_clamp_min_(flats, -clipping.max_value)
        if not clipping.needs_norm:
            return True
        views = [view for buffers in every for view in buffers.views]
        self.norm = math.sqrt(math.fsum(norm.double().item() ** 2 for norm in torch._foreach_norm(views)))
        factor = clipping.factor(self.norm)
        if factor >= 0 and factor != 1:
            torch._foreach_mul_(flats, factor)
        return factor >= 0

    def _send_heartbeats(self) -> None:
        while not self._ended.wait(min(session.heartbeat_interval for session in self._sessions)):
            for session in self._sessions:
                session.send_heartbeat()


class PendingPush:
    """A push to all servers, some of which may not have replied yet."""

    def __init__(self, futures: list[Future[None]], parameters: Callable[[], list[Tensor]]) -> None:
        self._futures, self._parameters = futures, parameters

    def result(self) -> list[Tensor]:
        """Waits for the replies of all servers; returns the parameters after the step: see `Client.parameters`.

        Raises:
            LightkitError: a server is gone, or refuses the push.
        """
        errors = [error for future in self._futures if (error := future.exception()) is not None]
        if errors:
            # An `OtherServerError` is an effect of another error: the cause is raised if there is one.
            raise min(errors, key=lambda error: isinstance(error, OtherServerError))
        return self._parameters()


def _positions(spec: TrainingSpec, shard: TrainingSpec) -> list[list[int]]:
    """Returns for each optimizer the positions of a shard's parameters among all parameters of the optimizer."""
    found = []
    for whole, own in zip(spec.optimizers, shard.optimizers, strict=True):
        indices = {parameter.name: index for index, parameter in enumerate(whole.parameters)}
        found.append([indices[parameter.name] for parameter in own.parameters])
    return found
