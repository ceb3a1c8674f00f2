"""A worker's session with one server: requests and replies over a connection, which is made anew after it breaks."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightkit.errors import ConfigError, LightkitError
from lightkit.parameter_server.compression import make_codec
from lightkit.parameter_server.flat_tensors import allocate_flat
from lightkit.parameter_server.hyperparameters import GroupOptions, read_hyperparameters
from lightkit.parameter_server.mask_update import NO_MASKS, MaskUpdate
from lightkit.parameter_server.protocol import PUSH_FLAGS, Reply, Request
from lightkit.parameter_server.rendezvous import connect
from lightkit.parameter_server.training_spec import TrainingSpec
from lightkit.parameter_server.transport import Connection, ProtocolError, TransportError, heartbeat_interval

T = TypeVar("T")

# Seconds from one heartbeat to the next without a connection.
_HEARTBEAT_INTERVAL = 0.2

# The most broken connections in one exchange: a server that ends every connection would otherwise keep the worker
# reconnecting for ever.
_MAX_ATTEMPTS = 30


class TransferBuffers:
    """Buffers of one optimizer's gradients and parameters on their way to and from one server.

    Args:
        spec: the specification of the server's shard of the training.
        optimizer_index: the index of the optimizer.

    Attributes:
        parameters: the specifications of the parameters.
        flats: the gradient, one flat tensor for each dtype.
        views: views of ``flats``, one in the shape of each parameter.
        codecs: the codec of each tensor in ``flats``.
        payload: the tensors that a push sends after its metadata.
        reply: the parameters that the server has sent, tensors with the shapes and dtypes of ``flats``.
        reply_views: views of ``reply``, one in the shape of each parameter.
        present: for each parameter True if the parameter has a gradient.
        group_indices: the sorted indices of the parameter groups with a parameter on the server.
        metadata: the metadata of the push, a one-dimensional float64 tensor: see `protocol.PUSH_FLAGS`.
        push_seq: the sequence number of the latest push; 0 before the first.
        version: the version of the parameters in ``reply``: the number of the server's updates.
        masks: the masks that the server is to set with the next push.
        push_masks: those that go with the latest push.
        mask_number: the number of the masks that the server has.
    """

    def __init__(self, spec: TrainingSpec, optimizer_index: int) -> None:
        self.parameters = spec.optimizers[optimizer_index].parameters
        self.flats, self.views = allocate_flat(self.parameters)
        self.codecs = [make_codec(flat, spec.compression, spec.fraction) for flat in self.flats]
        self.payload = [tensor for codec in self.codecs for tensor in codec.payload]
        self.reply, self.reply_views = allocate_flat(self.parameters)
        self.present = [True] * len(self.parameters)
        self.group_indices = sorted({p.group_index for p in self.parameters})
        self.metadata = torch.zeros(0, dtype=torch.float64)
        self.push_seq = 0
        self.version = 0
        self.masks = self.push_masks = NO_MASKS
        self.mask_number = 0


class ServerSession:
    """A session with one server, which survives broken connections and restarts of the server.

    The methods that exchange messages (`start`, `push`, `pull`, `state`, `send`) raise a `LightkitError` if the server
    does not come back within ``patience`` seconds, and a `ConfigError` if the server refuses the worker.

    Args:
        address: the address ``HOST:PORT`` of the server.
        secret: the secret of the server.
        join_request: the entries of a `lightkit.parameter_server.protocol.JoinRequest` as JSON values.
        spec: the specification of the server's shard of the training.
        timeout: the seconds without a byte from the server after which the server counts as gone.
        patience: the seconds that the session waits for the server to start, or to come back after a failure.
        ended: an event; once it is set, the session makes no new connection.

    Attributes:
        buffers: the buffers of each optimizer.
        bytes_sent: the number of bytes of pushes so far.
        bytes_received: the number of bytes of parameters so far.
    """

    def __init__(
        self,
        address: str,
        secret: str,
        join_request: dict[str, Any],
        spec: TrainingSpec,
        timeout: float,
        patience: float,
        ended: threading.Event,
    ) -> None:
        self.spec = spec
        self.buffers = [TransferBuffers(spec, index) for index in range(len(spec.optimizers))]
        self.bytes_sent = 0
        self.bytes_received = 0
        self.address, self._secret, self._join_request = address, secret, join_request
        self._timeout, self._patience, self._ended = timeout, patience, ended
        self._connection: Connection | None = None
        # The connection over which a heartbeat could not be sent.
        self._broken: Connection | None = None
        self._begin_message: dict[str, Any] = {}
        self._has_started = self._has_begun = False
        # One exchange at a time, also for different optimizers.
        self._exchanging = threading.Lock()

    @property
    def heartbeat_interval(self) -> float:
        """The seconds between two heartbeats to the server."""
        connection = self._connection
        return _HEARTBEAT_INTERVAL if connection is None else connection.heartbeat_interval

    def start(self, begin_message: dict[str, Any]) -> bool:
        """Connects to the server, and begins the training if the server has none.

        Args:
            begin_message: the entries ``options``, ``values`` and ``state`` for the server's shard, each with an
                element for each optimizer: see `lightkit.parameter_server.Client.start`.

        Returns:
            True if this session has begun the training; False if the server had begun it before.
        """
        self._begin_message = begin_message
        self._exchange(lambda connection: None)
        self._begin_message = {}
        return self._has_begun

    def load(self, optimizer_index: int, gradients: Sequence[Tensor | None]) -> None:
        """Copies gradients to this session's buffers, from which `encode` makes the next push.

        Args:
            optimizer_index: the index of the optimizer.
            gradients: the gradients of the parameters in this server's shard, in the order of the specification; None
                for a parameter without a gradient, for which the method writes zeros.
        """
        buffers = self.buffers[optimizer_index]
        buffers.present = [gradient is not None for gradient in gradients]
        pairs = list(zip(buffers.views, gradients, strict=True))
        if given := [(view, gradient) for view, gradient in pairs if gradient is not None]:
            torch._foreach_copy_([view for view, _ in given], [gradient for _, gradient in given])
        for view, gradient in pairs:
            if gradient is None:
                view.zero_()

    def encode(self, optimizer_index: int, flags: Sequence[float], groups: Sequence[GroupOptions], skip: bool) -> None:
        """Compresses the loaded gradients into the payload, and sets the sequence number and metadata of the push.

        Args:
            optimizer_index: the index of the optimizer.
            flags: the flags of the push: see `protocol.PUSH_FLAGS`.
            groups: all parameter groups of the optimizer.
            skip: True sends zeros in place of the gradients.

        Raises:
            ConfigError: a hyperparameter in ``groups`` is not a number any more.
        """
        assert len(flags) == PUSH_FLAGS
        buffers = self.buffers[optimizer_index]
        for codec in buffers.codecs:
            if skip:
                codec.encode_zeros()
            else:
                codec.encode()
        paths = self.spec.optimizers[optimizer_index].hyperparameters
        values = [
            value for index in buffers.group_indices for value in read_hyperparameters(groups[index], paths[index])
        ]
        buffers.metadata = torch.tensor(
            [*map(float, flags), *values, *map(float, buffers.present)], dtype=torch.float64
        )
        buffers.push_masks = buffers.masks
        buffers.push_seq += 1

    def push(self, optimizer_index: int, clip_factor: Callable[[str, float], float]) -> None:
        """Sends the encoded push, again after a broken connection, and receives the parameters after the step.

        The server counts a push once, also if it receives the push several times.

        Args:
            optimizer_index: the index of the optimizer.
            clip_factor: a function that returns the factor of the mean gradient. Its arguments are the address of the
                server, and the square of the norm of the server's part of the mean gradient.
        """
        buffers = self.buffers[optimizer_index]
        masks = buffers.push_masks

        def exchange(connection: Connection) -> None:
            if masks.number > buffers.mask_number:
                connection.send_header(Request.MASK, optimizer_index, masks.number)
                connection.send_message(masks.packed)
            connection.send_header(Request.PUSH, optimizer_index, buffers.push_seq, buffers.version)
            connection.send(buffers.metadata, *buffers.payload)
            self.bytes_sent += buffers.metadata.nbytes + sum(tensor.nbytes for tensor in buffers.payload)
            reply = self._receive_reply(connection, Reply.OK, Reply.NORM)
            if reply[0] == Reply.NORM:
                square = torch.zeros(1, dtype=torch.float64)
                connection.receive(square)
                factor = clip_factor(self.address, square.item())
                connection.send(torch.tensor([factor], dtype=torch.float64))
                reply = self._receive_reply(connection)
            self._receive_parameters(buffers, connection, reply)

        self._exchange(exchange)

    def pull(self, optimizer_index: int) -> None:
        """Receives the current parameters of an optimizer into its buffers."""

        def exchange(connection: Connection) -> None:
            connection.send_header(Request.PULL, optimizer_index)
            self._receive_parameters(self.buffers[optimizer_index], connection, self._receive_reply(connection))

        self._exchange(exchange)

    def state(self) -> list[dict[str, Any]]:
        """Returns the parameters and the optimizer states of the server.

        Returns:
            For each optimizer a dict: ``flats``, the parameters as flat tensors; ``state``, the optimizer's state of
            each parameter; ``seeds``, the ``rounding_seed`` or None of each group with a parameter on the server; and
            with masks ``mask_number`` and ``masks``, see `lightkit.parameter_server.mask_update.MaskUpdate`.
        """

        def exchange(connection: Connection) -> list[dict[str, Any]]:
            connection.send_header(Request.STATE)
            self._receive_reply(connection)
            found = connection.receive_message(self.spec.max_message_bytes)
            # The state of an untrusted server goes into a checkpoint: its form is checked.
            if (
                not isinstance(found, list)
                or len(found) != len(self.buffers)
                or not all(map(_is_state_of, found, self.buffers))
            ):
                raise ProtocolError("the server sent the state of other parameters")
            return found

        return self._exchange(exchange)

    def send(self, request: Request) -> None:
        """Sends a request whose reply has no content, and waits for the reply."""

        def exchange(connection: Connection) -> None:
            connection.send_header(request)
            self._receive_reply(connection)

        self._exchange(exchange)

    def send_heartbeat(self) -> None:
        """Sends a heartbeat if there is a connection; any thread may call the method."""
        connection = self._connection
        if connection is not None and connection is not self._broken:
            try:
                connection.send_heartbeat()
            except TransportError:
                # The next exchange makes a new connection.
                self._broken = connection

    def abandon(self) -> None:
        """Closes the connection without a request; a request in another thread then raises an exception."""
        if (connection := self._connection) is not None:
            connection.close()

    def leave(self) -> None:
        """Tells the server that the worker leaves, and closes the connection."""
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                connection.send_header(Request.LEAVE)
            except TransportError:
                pass
            connection.release()

    def _receive_parameters(self, buffers: TransferBuffers, connection: Connection, reply: list[int]) -> None:
        connection.receive(*buffers.reply)
        buffers.version, buffers.mask_number = reply[1], reply[2]
        self.bytes_received += sum(tensor.nbytes for tensor in buffers.reply)

    def _receive_reply(self, connection: Connection, *expected: Reply) -> list[int]:
        while (reply := connection.receive_header())[0] == Reply.WAIT:
            self._check_not_ended()
        if reply[0] == Reply.REFUSED:
            message = connection.receive_message()
            reason = message.get("error") if isinstance(message, dict) else None
            raise ConfigError(f"the parameter server at {self.address} refuses this worker: {reason}")
        if reply[0] not in (expected or (Reply.OK,)):
            raise ProtocolError(f"the server replied {reply[0]}")
        return reply

    def _check_not_ended(self) -> None:
        if self._ended.is_set():
            raise LightkitError("the training has ended")

    def _exchange(self, exchange: Callable[[Connection], T]) -> T:
        """Calls ``exchange`` with the connection, again with a new one if it breaks, and returns its result."""
        with self._exchanging:
            deadline = time.monotonic() + self._patience
            broken = 0
            while True:
                self._check_not_ended()
                try:
                    return exchange(self._connection or self._connect(deadline))
                except TransportError as error:
                    now = time.monotonic()
                    if (connection := self._connection) is not None:
                        self._connection = None
                        connection.release()
                        # The server was connected until now: the wait for a new connection begins now.
                        deadline = now + self._patience
                        broken += 1
                    elif now >= deadline:
                        raise LightkitError(
                            f"the parameter server at {self.address} did not come back in {self._patience:g} s: {error}"
                            if self._has_started
                            else str(error)
                        ) from None
                    if broken == _MAX_ATTEMPTS:
                        raise LightkitError(
                            f"the parameter server at {self.address} broke {broken} connections in a row: {error}"
                        ) from None
                    time.sleep(0.1)

    def _connect(self, deadline: float) -> Connection:
        patience = max(deadline - time.monotonic(), 0.1)
        connection = connect(self.address, self._secret, self._join_request, patience, self._timeout)
        # From this assignment on, the thread of the heartbeats uses the connection.
        self._connection = connection
        self._receive_reply(connection)
        joined = connection.receive_message()
        try:
            has_begun, timeout = bool(joined["begun"]), float(joined["timeout"])
        except (KeyError, TypeError, ValueError):
            has_begun, timeout = False, 0.0
        if not 0 < timeout < math.inf:
            raise ProtocolError("the server's first message must say begun and timeout")
        # The smaller of the two timeouts decides how often heartbeats are needed.
        connection.heartbeat_interval = heartbeat_interval(min(self._timeout, timeout))
        if not has_begun:
            if self._has_started:
                raise LightkitError(
                    f"the parameter server at {self.address} came back without the parameters: it needs a "
                    "directory, and snapshot_every above 0"
                )
            connection.send_header(Request.BEGIN)
            connection.send_message({"job": self.spec.to_json(), **self._begin_message})
            self._receive_reply(connection)
            self._has_begun = True
        self._has_started = True
        return connection


def _is_state_of(part: object, buffers: TransferBuffers) -> bool:
    """Returns True if ``part``, a dict in the reply to `Request.STATE`, fits the parameters in ``buffers``."""
    if not isinstance(part, dict):
        return False
    flats, state, seeds = (part.get(name) for name in ("flats", "state", "seeds"))
    if not isinstance(flats, list) or not isinstance(state, list) or not isinstance(seeds, list):
        return False
    counts = len(buffers.flats), len(buffers.parameters), len(buffers.group_indices)
    if (len(flats), len(state), len(seeds)) != counts:
        return False
    return (
        all(
            isinstance(flat, Tensor) and flat.dtype == own.dtype and flat.shape == own.shape
            for flat, own in zip(flats, buffers.flats, strict=True)
        )
        and all(isinstance(entry, dict) for entry in state)
        and all(seed is None or type(seed) is int for seed in seeds)
        and _has_masks_of(part, buffers)
    )


def _has_masks_of(part: dict[str, Any], buffers: TransferBuffers) -> bool:
    if "mask_number" not in part and "masks" not in part:
        return True
    number, packed = part.get("mask_number"), part.get("masks")
    try:
        MaskUpdate(number, packed).check(buffers.parameters)  # pyright: ignore[reportArgumentType]
    except ValueError:
        return False
    return True
