"""The cross-entropy loss as a module."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from lightkit.errors import ConfigError
from lightkit.ops import cross_entropy

_BALANCED = "balanced"


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """A drop-in for :class:`torch.nn.CrossEntropyLoss` on native kernels: see `lightkit.ops.cross_entropy`.

    The class derives from torch's class, takes its arguments, and has the same state dict.

    Args:
        weight: a factor for each class: a tensor ``(C)``, or a list of C numbers, none of them negative. None weights
            all classes equally. ``"balanced"`` weights each class by the inverse of its share of the training set, so
            that rare classes count as much as frequent ones: see `balance`, which `lightkit.tasks.ClassificationTask`
            calls before a fit.
        size_average: deprecated in torch; see ``reduction``.
        ignore_index: the target of rows that have loss 0 and do not count in the mean.
        reduce: deprecated in torch; see ``reduction``.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        label_smoothing: the label smoothing, between 0 and 1.
        z_loss: the coefficient of the squared log-partition function.
        softcap: the bound of the logits; 0 sets no bound.
        inplace: True stores the gradient in the memory of the logits, which are then lost.

    Attributes:
        is_balanced: True if ``weight`` is ``"balanced"``. The buffer ``weight`` is then None before `balance`.

    Raises:
        ValueError: ``weight`` is another text, or a list that has a value which is no number of at least 0.
    """

    # A class attribute, for the pickles of earlier releases.
    is_balanced = False

    def __init__(
        self,
        weight: Tensor | Sequence[float] | str | None = None,
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
        super().__init__(_to_tensor(weight), size_average, ignore_index, reduce, reduction, label_smoothing)
        self.is_balanced = isinstance(weight, str)
        self.z_loss = z_loss
        self.softcap = softcap
        self.inplace = inplace

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Returns the loss of logits ``input`` and class indices or probabilities ``target``.

        `lightkit.ops.cross_entropy` describes the shapes, the dtypes and the errors.

        Raises:
            ConfigError: the class weights are balanced, and neither `balance` nor a state dict has set them.
        """
        if self.is_balanced and self.weight is None:
            raise ConfigError(
                "weight='balanced' of the loss has no values before a training or a checkpoint: call "
                "loss.balance(counts) with the number of samples of each class"
            )
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

    def balance(self, counts: Tensor) -> None:
        """Sets the buffer ``weight`` to ``N / (C * counts)``, with which all classes count equally.

        The mean of the weights over the N samples is 1.

        Args:
            counts: the number of samples of each of the C classes in the training set, ``(C)``; none of them is 0.

        Raises:
            ValueError: a class has no sample, or ``counts`` has another shape.
        """
        if counts.dim() != 1 or not (counts > 0).all():
            raise ValueError(f"counts must be one positive number for each class, got {counts.tolist()}")
        weight = counts.sum().double() / (len(counts) * counts.double())
        like = torch.empty(()) if self.weight is None else self.weight
        self.register_buffer("weight", weight.to(like.device, like.dtype))

    def late_buffers(self) -> tuple[str, ...]:
        """Returns the names of the buffers that get their shape from the data or from a state dict."""
        return ("weight",) if self.is_balanced and self.weight is None else ()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **options: Any) -> None:
        saved = state_dict.get(f"{prefix}weight")
        if self.late_buffers() and isinstance(saved, Tensor):
            self.register_buffer("weight", torch.empty_like(saved))
        super()._load_from_state_dict(state_dict, prefix, *args, **options)


def _to_tensor(weight: Tensor | Sequence[float] | str | None) -> Tensor | None:
    if weight is None or isinstance(weight, Tensor):
        return weight
    if isinstance(weight, str):
        if weight == _BALANCED:
            return None
        raise ValueError(f"weight must be a list of numbers, 'balanced' or None, got {weight!r}")
    if not isinstance(weight, Iterable):
        raise ValueError(f"weight must be a list with a number for each class, got {weight!r}")
    values = list(weight)
    for place, value in enumerate(values):
        if not isinstance(value, Real) or not math.isfinite(value) or value < 0:
            raise ValueError(f"weight must have a number of at least 0 for each class, got {value!r} for class {place}")
    if not any(values):
        raise ValueError(f"weight must have a number above 0 for some class, got {values}")
    return torch.tensor([float(value) for value in values], dtype=torch.get_default_dtype())
