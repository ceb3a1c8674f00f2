"""What of a gradient is sent, and what the other side makes of it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

COMPRESSIONS = ("none", "bf16", "topk")


class Whole:
    """All of it.

    Args:
        flat: the gradients, one-dimensional; ``encode`` reads them, ``decode`` writes them.

    Attributes:
        wire: the tensors that are sent.
    """

    def __init__(self, flat: Tensor) -> None:
        self.flat = flat
        self.wire = [flat]

    def encode(self) -> None:
        """Puts what ``flat`` holds on the wire."""

    def encode_nothing(self) -> None:
        """Puts zeros on the wire, whatever ``flat`` holds."""
        for tensor in self.wire:
            tensor.zero_()

    def decode(self) -> None:
        """Puts what was on the wire into ``flat``."""


class BFloat16(Whole):
    """Rounded to bfloat16, half the bytes of float32."""

    def __init__(self, flat: Tensor) -> None:
        super().__init__(flat)
        self.wire = [torch.empty(flat.shape, dtype=torch.bfloat16)]

    def encode(self) -> None:
        """Rounds."""
        self.wire[0].copy_(self.flat)

    def decode(self) -> None:
        """Widens."""
        self.flat.copy_(self.wire[0])


class TopK(Whole):
    """The largest in absolute value; what was not sent is added to the next gradient [1]_.

    References:
        .. [1] Stich, Cordonnier, Jaggi, Sparsified SGD with memory, NeurIPS 2018.
    """

    def __init__(self, flat: Tensor, fraction: float) -> None:
        super().__init__(flat)
        count = max(1, math.ceil(fraction * flat.numel()))
        # Positions of 32 bits while they suffice: they are half of what is sent.
        positions = torch.int32 if flat.numel() <= 2**31 else torch.int64
        self.wire = [torch.zeros(count, dtype=positions), torch.zeros(count, dtype=flat.dtype)]
        self._left: Tensor | None = None

    def encode(self) -> None:
        """Picks the largest of the gradient and what was left of earlier ones."""
        if self._left is None:
            self._left = torch.zeros_like(self.flat)
        self._left.add_(self.flat)
        positions = self._left.abs().topk(len(self.wire[0]), sorted=False).indices
        self.wire[0].copy_(positions)
        torch.index_select(self._left, 0, positions, out=self.wire[1])
        self._left.index_fill_(0, positions, 0)
        if not self.wire[1].isfinite().all():
            # They count as the largest. What of them was not sent would be in every push to come.
            self._left.nan_to_num_(0.0, 0.0, 0.0)

    def decode(self) -> None:
        """Zeros, with the numbers at their positions; a position out of range is an IndexError."""
        self.flat.zero_().index_copy_(0, self.wire[0].long(), self.wire[1])


def codec(flat: Tensor, compression: str, fraction: float) -> Whole:
    """What sends or receives such gradients. Those that are no longer than bfloat16 are not rounded to it."""
    if compression == "topk" and flat.numel():
        return TopK(flat, fraction)
    if compression == "bf16" and flat.element_size() > 2:
        return BFloat16(flat)
    return Whole(flat)
