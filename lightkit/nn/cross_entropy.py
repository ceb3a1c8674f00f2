"""The cross-entropy loss as a module."""

from __future__ import annotations

import torch
from torch import Tensor

from lightkit.ops import cross_entropy


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """A drop-in for :class:`torch.nn.CrossEntropyLoss` on native kernels: see `lightkit.ops.cross_entropy`.

    The class derives from torch's class, takes its arguments, and has the same state dict.

    Args:
        weight: ``(C)``, a factor for each class; None weights all classes equally.
        size_average: deprecated in torch; see ``reduction``.
        ignore_index: the target of rows that have loss 0 and do not count in the mean.
        reduce: deprecated in torch; see ``reduction``.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        label_smoothing: the label smoothing, between 0 and 1.
        z_loss: the coefficient of the squared log-partition function.
        softcap: the bound of the logits; 0 sets no bound.
        inplace: True stores the gradient in the memory of the logits, which are then lost.
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
        """Returns the loss of logits ``input`` and class indices or probabilities ``target``.

        `lightkit.ops.cross_entropy` describes the shapes, the dtypes and the errors.
        """
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
