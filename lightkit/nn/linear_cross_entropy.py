"""A module of a linear layer and its cross-entropy loss."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lightkit.errors import ArgumentError
from lightkit.ops import linear_cross_entropy
from lightkit.ops._thresholds import MEMORY_LIMIT


class LinearCrossEntropyLoss(nn.Module):
    """A linear layer and its cross-entropy loss without the logits: see `lightkit.ops.linear_cross_entropy`.

    The module takes the arguments of ``torch.nn.LinearCrossEntropyLoss`` (torch 2.13 and later), and has the same state
    dict: the layer is ``linear``. A model that owns the layer, or shares its weight with an embedding, calls the
    function instead.

    Args:
        in_features: the size of a hidden state.
        num_classes: the number of classes.
        out_features: the shape of the losses of one hidden state; ``()`` for a single loss. With several, all logits
            are in memory.
        bias: True gives the layer a bias.
        device: the device of the parameters.
        dtype: the dtype of the parameters.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        weight: ``(num_classes)``, a factor for each class; None weights all classes equally.
        ignore_index: the target of rows that have loss 0 and do not count in the mean; None means -100. With class
            probabilities it must be None.
        label_smoothing: the label smoothing, between 0 and 1.
        options: has no effect; torch's module chooses its chunks by ``options``, this one by ``memory_limit``.
        z_loss: the coefficient of the squared log-partition function.
        softcap: the bound of the logits; 0 sets no bound.
        memory_limit: the number of bytes that a call may allocate beyond its inputs and results.

    Shape:
        input ``(..., in_features)`` and target ``(...)`` -> ``()``, or ``(...)`` with ``reduction="none"``. With
        ``out_features`` input ``(N, in_features)`` and target ``(N, *out_features)``.

    Raises:
        ArgumentError: ``weight`` is not of shape ``(num_classes)``, or ``label_smoothing`` outside [0, 1].
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: object = None,
        z_loss: float = 0.0,
        softcap: float = 0.0,
        memory_limit: int = MEMORY_LIMIT,
    ) -> None:
        super().__init__()
        if weight is not None and weight.shape != (num_classes,):
            raise ArgumentError(f"weight must have shape ({num_classes},), got {tuple(weight.shape)}")
        if not 0 <= label_smoothing <= 1:
            raise ArgumentError(f"label_smoothing must be between 0 and 1, got {label_smoothing}")
        outputs = math.prod(out_features, start=num_classes)
        self.linear = nn.Linear(in_features, outputs, bias=bias, device=device, dtype=dtype)
        self.register_buffer("weight", weight)
        self.num_classes = num_classes
        self.out_features = out_features
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.options = options
        self.z_loss = z_loss
        self.softcap = softcap
        self.memory_limit = memory_limit

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Returns the loss of hidden states ``input`` and class indices or probabilities ``target``.

        `lightkit.ops.linear_cross_entropy` describes the dtypes and the errors.
        """
        linear_weight, linear_bias = self.linear.weight, self.linear.bias
        if self.out_features:
            sizes = (self.num_classes, *self.out_features)
            linear_weight = linear_weight.reshape(*sizes, self.linear.in_features)
            linear_bias = None if linear_bias is None else linear_bias.reshape(sizes)
        return linear_cross_entropy(
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            memory_limit=self.memory_limit,
        )

    def extra_repr(self) -> str:
        """Returns the settings that the children do not show."""
        return f"reduction={self.reduction}, ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing}"
