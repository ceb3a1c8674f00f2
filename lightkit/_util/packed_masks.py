"""Masks packed to bits, for files and messages."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def pack_mask(mask: Tensor) -> Tensor:
    """Returns a bool tensor packed to bits: uint8 of a dimension, on the CPU."""
    return torch.from_numpy(np.packbits(mask.cpu().flatten().numpy()))


def unpack_mask(packed: Tensor, shape: torch.Size) -> Tensor:
    """Returns the bool tensor of the shape ``shape`` that `pack_mask` has packed, on the CPU."""
    return torch.from_numpy(np.unpackbits(packed.cpu().numpy(), count=shape.numel())).bool().view(shape)
