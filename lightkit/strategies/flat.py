"""Flat buffers: many tensors side by side, which one call reduces."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


class FlatBuffer:
    """A one-dimensional buffer for the values of tensors.

    Args:
        tensors: at least one tensor; all of one dtype and device, with any strides.

    Attributes:
        flat: the buffer, a one-dimensional tensor with the values of ``tensors`` one after the other.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self._tensors = tensors
        sizes = [tensor.numel() for tensor in tensors]
        self.flat = torch.empty(sum(sizes), dtype=tensors[0].dtype, device=tensors[0].device)
        parts = self.flat.split(sizes)
        self._parts = [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

    @property
    def nbytes(self) -> int:
        """The number of bytes of the buffer."""
        return self.flat.nbytes

    def load(self) -> None:
        """Copies the values of the tensors to the buffer."""
        torch._foreach_copy_(self._parts, self._tensors)

    def store(self) -> None:
        """Copies the buffer to the tensors."""
        torch._foreach_copy_(self._tensors, self._parts)

    def average(self, counts: bool, workers: int) -> None:
        """Sets the buffer to the mean of the buffers of some processes; all processes must call the method.

        Args:
            counts: True if the buffer of this process counts in the mean.
            workers: the number of processes whose buffers count.
        """
        if not counts:
            self.flat.zero_()
        dist.all_reduce(self.flat)
        self.flat.div_(workers)


def flat_buffers(tensors: Iterable[Tensor]) -> list[FlatBuffer]:
    """Returns a `FlatBuffer` for the tensors of each dtype and device."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        kinds[tensor.dtype, tensor.device].append(tensor.detach())
    return [FlatBuffer(members) for members in kinds.values()]
