"""Compression of pushes: codecs between a flat gradient and the tensors that are sent."""

from __future__ import annotations

import math

import torch
from torch import Tensor

COMPRESSIONS = ("none", "bf16", "topk")


class Codec:
    """A codec that sends the gradient as it is; the base class of the compressing codecs.

    Args:
        flat: the gradient, a one-dimensional tensor; `encode` reads it, `decode` writes it.

    Attributes:
        payload: the tensors that a push sends, which `encode` writes and `decode` reads.
    """

    def __init__(self, flat: Tensor) -> None:
        self.flat = flat
        self.payload = [flat]

    def encode(self) -> None:
        """Writes the encoded gradient to ``payload``."""

    def encode_zeros(self) -> None:
        """Writes zeros to ``payload``, whatever the gradient is."""
        for tensor in self.payload:
            tensor.zero_()

    def decode(self) -> None:
        """Writes the decoded content of ``payload`` to ``flat``."""


class BFloat16Codec(Codec):
    """A codec that rounds to bfloat16, which halves the bytes of float32."""

    def __init__(self, flat: Tensor) -> None:
        super().__init__(flat)
        self.payload = [torch.empty(flat.shape, dtype=torch.bfloat16)]

    def encode(self) -> None:
        """Rounds the gradient to bfloat16 in ``payload``."""
        self.payload[0].copy_(self.flat)

    def decode(self) -> None:
        """Converts the payload to the dtype of ``flat``."""
        self.flat.copy_(self.payload[0])


class TopKCodec(Codec):
    """A codec that sends the elements that are largest in absolute value, and adds the rest to the next gradient [1]_.

    Args:
        flat: the gradient, a one-dimensional tensor.
        fraction: the fraction of the elements that a push sends, from 0 to 1.

    References:
        .. [1] Stich, Cordonnier, Jaggi, Sparsified SGD with memory, NeurIPS 2018.
    """

    def __init__(self, flat: Tensor, fraction: float) -> None:
        super().__init__(flat)
        count = max(1, math.ceil(fraction * flat.numel()))
        # Indices are half of what is sent: 32 bits while they suffice.
        index_dtype = torch.int32 if flat.numel() <= 2**31 else torch.int64
        self.payload = [torch.zeros(count, dtype=index_dtype), torch.zeros(count, dtype=flat.dtype)]
        self._residual: Tensor | None = None

    def encode(self) -> None:
        """Adds the residual to the gradient, writes the largest elements to ``payload`` and keeps the other elements.

        The residual is what earlier pushes have not sent.
        """
        if self._residual is None:
            self._residual = torch.zeros_like(self.flat)
        self._residual.add_(self.flat)
        indices, values = self.payload
        largest = self._residual.abs().topk(len(indices), sorted=False).indices
        indices.copy_(largest)
        torch.index_select(self._residual, 0, largest, out=values)
        self._residual.index_fill_(0, largest, 0)
        if not values.isfinite().all():
            # NaN and infinity count as the largest. A rest of them in the residual would spoil every later push.
            self._residual.nan_to_num_(0.0, 0.0, 0.0)

    def decode(self) -> None:
        """Writes the values in ``payload`` to their indices in ``flat``, and zeros elsewhere.

        Raises:
            IndexError: an index is out of range.
        """
        self.flat.zero_().index_copy_(0, self.payload[0].long(), self.payload[1])


def make_codec(flat: Tensor, compression: str, fraction: float) -> Codec:
    """Returns the codec of a flat gradient.

    Args:
        flat: the gradient, a one-dimensional tensor.
        compression: ``none``, ``bf16`` or ``topk``; ``bf16`` does not change a dtype of two bytes or fewer.
        fraction: the fraction of the elements that ``topk`` sends.
    """
    if compression == "topk" and flat.numel():
        return TopKCodec(flat, fraction)
    if compression == "bf16" and flat.element_size() > 2:
        return BFloat16Codec(flat)
    return Codec(flat)
