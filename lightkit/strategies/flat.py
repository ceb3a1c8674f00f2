"""Many tensors as one, so that one call sends them all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


class FlatBuffer:
    """Room for the values of tensors of one dtype and device, side by side.

    Args:
        tensors: at least one, of one dtype and device; of any strides.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self._tensors = tensors
        sizes = [tensor.numel() for tensor in tensors]
        self.flat = torch.empty(sum(sizes), dtype=tensors[0].dtype, device=tensors[0].device)
        parts = self.flat.split(sizes)
        self._parts = [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return self.flat.nbytes

    def load(self) -> None:
        """Takes the values of the tensors."""
        torch._foreach_copy_(self._parts, self._tensors)

    def store(self) -> None:
        """Gives the tensors their values."""
        torch._foreach_copy_(self._tensors, self._parts)

    def average(self, counts: bool, workers: int) -> None:
        """Makes ``flat`` the mean over those processes that count, ``workers`` in all."""
        if not counts:
            self.flat.zero_()
        dist.all_reduce(self.flat)
        self.flat.div_(workers)


def flat_buffers(tensors: Iterable[Tensor]) -> list[FlatBuffer]:
    """One buffer for each dtype and device."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        kinds[tensor.dtype, tensor.device].append(tensor.detach())
    return [FlatBuffer(members) for members in kinds.values()]
