"""The cross-entropy loss as a module."""

from __future__ import annotations

import torch
from torch import Tensor

from lightkit.ops import cross_entropy


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """A drop-in for :class:`torch.nn.CrossEntropyLoss` on native kernels: see `lightkit.ops.cross_entropy`.

    It takes the arguments of torch's module, has the same state dict, and is an instance of it.

    Args:
        weight: ``(C)``, a factor for each class.
        size_average: deprecated in torch; see ``reduction``.
        ignore_index: rows with this target have loss 0, and do not count in the mean.
        reduce: deprecated in torch; see ``reduction``.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        label_smoothing: between 0 and 1.
        z_loss: coefficient of the squared log-partition function.
        softcap: bound of the logits; 0 for none.
        inplace: the gradient takes the memory of the logits.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        softcap: float = 0.0,
        inplace: bool = False,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.z_loss = z_loss
        self.softcap = softcap
        self.inplace = inplace

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Returns the loss of logits ``input`` and class indices or probabilities ``target``."""
        return cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            inplace=self.inplace,
        )
