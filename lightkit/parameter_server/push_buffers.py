"""A server's buffers for the pushes of a worker."""

from __future__ import annotations

import torch

from lightkit.parameter_server.compression import make_codec
from lightkit.parameter_server.flat_tensors import allocate_flat
from lightkit.parameter_server.protocol import PUSH_FLAGS
from lightkit.parameter_server.training_spec import TrainingSpec
from lightkit.parameter_server.transport import Connection, ProtocolError


class PushBuffers:
    """Buffers that receive the pushes of one connection for one optimizer, and the buffers of the reply.

    Args:
        spec: the specification of the server's shard of the training.
        optimizer_index: the index of the optimizer.
        hyperparameters: the number of hyperparameters in a push.

    Attributes:
        flats: the gradient of the latest push, one flat tensor for each dtype.
        views: views of ``flats``, one for each parameter.
        metadata: the flags, the hyperparameters and the presence of gradients, a one-dimensional float64 tensor: see
            `protocol.PUSH_FLAGS`.
        reply: the parameters after the step, tensors with the shapes and dtypes of ``flats``.
    """

    def __init__(self, spec: TrainingSpec, optimizer_index: int, hyperparameters: int) -> None:
        parameters = spec.optimizers[optimizer_index].parameters
        self.flats, self.views = allocate_flat(parameters)
        self._codecs = [make_codec(flat, spec.compression, spec.fraction) for flat in self.flats]
        self._payload = [tensor for codec in self._codecs for tensor in codec.payload]
        self.metadata = torch.zeros(PUSH_FLAGS + hyperparameters + len(parameters), dtype=torch.float64)
        self.reply = [torch.empty_like(flat) for flat in self.flats]
        self._present_start = PUSH_FLAGS + hyperparameters

    def receive(self, connection: Connection) -> None:
        """Receives a push into the buffers and decompresses it.

        Raises:
            ProtocolError: the push has another size, or indices out of range.
            TransportError: the worker is gone.
        """
        connection.receive(self.metadata, *self._payload)
        try:
            for codec in self._codecs:
                codec.decode()
        except (IndexError, RuntimeError) as error:
            raise ProtocolError(f"a push cannot be decompressed: {error}") from None

    @property
    def is_skipped(self) -> bool:
        """True if the worker asks the server to skip the step."""
        return self.metadata[0].item() != 0

    @property
    def max_value(self) -> float:
        """The largest absolute value of an element of the mean gradient, to which it is clamped; 0 for no limit."""
        return self.metadata[1].item()

    @property
    def needs_norm(self) -> bool:
        """True if the workers need the norm of the mean gradient before the step."""
        return self.metadata[2].item() != 0

    @property
    def hyperparameters(self) -> list[float]:
        """The hyperparameters of the push, group by group."""
        return self.metadata[PUSH_FLAGS : self._present_start].tolist()

    @property
    def present(self) -> list[bool]:
        """For each parameter True if the worker has a gradient of it."""
        return [value != 0 for value in self.metadata[self._present_start :].tolist()]
