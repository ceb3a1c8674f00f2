"""The cross-entropy loss of a linear layer, as a module that holds the layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightkit.ops import linear_cross_entropy
from lightkit.ops.linear_cross_entropy import MEMORY_LIMIT


class LinearCrossEntropyLoss(nn.Module):
    """A linear layer and its cross-entropy loss without the logits: see `lightkit.ops.linear_cross_entropy`.

    Takes the arguments of ``torch.nn.LinearCrossEntropyLoss`` (torch 2.13 and later) for one set of classes, and has
    the same state dict: the layer is ``linear``. A model that has the layer for itself, or shares its weight with an
    embedding, calls the function instead.

    Args:
        in_features: size of a hidden state.
        num_classes: number of classes.
        bias: whether the layer has a bias.
        device: of the parameters.
        dtype: of the parameters.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        weight: ``(num_classes)``, a factor for each class.
        ignore_index: targets that count for nothing.
        label_smoothing: between 0 and 1.
        z_loss: coefficient of the squared log-partition function.
        softcap: bound of the logits; 0 for none.
        memory_limit: bytes for logits and what becomes of them.

    Shape:
        input ``(..., in_features)`` and target ``(...)`` -> ``()``, or ``(...)`` with ``reduction="none"``.

    Raises:
        ValueError: ``weight`` is not of shape ``(num_classes)``.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float = 0.0,
        memory_limit: int = MEMORY_LIMIT,
    ) -> None:
        super().__init__()
        if weight is not None and weight.shape != (num_classes,):
            raise ValueError(f"weight must have shape ({num_classes},), got {tuple(weight.shape)}")
        self.linear = nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)
        self.register_buffer("weight", weight)
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self.softcap = softcap
        self.memory_limit = memory_limit

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of hidden states ``input`` and class indices ``target``."""
        return linear_cross_entropy(
            input,
            self.linear.weight,
            target,
            linear_bias=self.linear.bias,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            memory_limit=self.memory_limit,
        )

    def extra_repr(self) -> str:
        """What the children do not say."""
        return f"reduction={self.reduction}, ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing}"
