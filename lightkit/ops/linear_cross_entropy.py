"""Cross-entropy of logits that are a linear map of hidden states, without the logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightkit.ops.cross_entropy import cross_entropy_reference


def linear_cross_entropy_reference(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    dtype: torch.dtype | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The same function with logits as a whole, in terms of torch's own: see `linear_cross_entropy`."""
    return cross_entropy_reference(
        F.linear(input, linear_weight, linear_bias),
        target,
        weight,
        ignore_index,
        reduction,
        label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        dtype=dtype,
        return_lse=return_lse,
    )


linear_cross_entropy = linear_cross_entropy_reference
