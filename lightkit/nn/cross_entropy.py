"""The cross-entropy loss as a module."""

from __future__ import annotations

import torch
from torch import Tensor

from lightkit.ops import cross_entropy


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """A drop-in for :class:`torch.nn.CrossEntropyLoss` on native kernels: see `lightkit.ops.cross_entropy`.

    Takes the arguments of torch's module, has the same state dict, and is an instance of it.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of logits ``input`` and class indices or probabilities ``target``."""
        return cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )
