"""The comparison of an export with its model on samples: the labels and the outputs of both."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# An export may have this many times the rounding error of the model itself: it adds in another order.
_MAX_RATIO = 10.0

# The rounding of float32 that is always allowed, relative to the largest output; and that for a model that cannot
# compute in float64, so that its own rounding error is unknown.
_FLOOR, _UNKNOWN = 2.0**-20, 1e-4

# What a quantized model is allowed: a sum that rounding moves to the next level changes outputs by more than rounding.
# A flipped level of the documented CNN moves a logit by up to a hundredth of the largest one; labels that differ are
# those of samples between two classes.
_LEVEL_FLOOR, _MAX_DIFFERING = 2.0**-5, 0.005


@dataclass
class Agreement:
    """Describes how far an export and its model agree.

    The measure of rounding is the same model in float64. An export whose largest error against it is at most ten times
    that of the model computes the same function: labels that differ then have logits closer than both errors together.

    Attributes:
        samples: the number of samples.
        predictions: the number of labels: that of the samples, or of the tokens in them; 0 for values.
        differing: the number of labels that differ.
        largest_difference: the largest absolute difference between the outputs of the export and of the model.
        largest_output: the largest absolute output of the model.
        export_error: the largest absolute error of the export's outputs against float64; None if the model does not
            compute in float64.
        model_error: that of the model's outputs likewise.
        has_levels: True if layers of the model round their inputs to 8 bits.
    """

    samples: int = 0
    predictions: int = 0
    differing: int = 0
    largest_difference: float = 0.0
    largest_output: float = 0.0
    export_error: float | None = None
    model_error: float | None = None
    has_levels: bool = False

    def update(self, output: Tensor, expected: Tensor, exact: Tensor | None, has_labels: bool) -> None:
        """Adds the outputs for a batch.

        Args:
            output: the outputs of the export ``(N, ...)``.
            expected: those of the model.
            exact: those of the model in float64; None if it does not compute in float64.
            has_labels: True if the index of the largest value in the last dimension is a label.

        Raises:
            ValueError: the shapes differ, or the model returns values that are not finite.
        """
        if output.shape != expected.shape:
            raise ValueError(f"the export returns {tuple(output.shape)}, and the model {tuple(expected.shape)}")
        output, expected = output.double(), expected.double()
        if not bool(expected.isfinite().all()):
            raise ValueError("the model returns values that are not finite")
        self.samples += len(output)
        self.largest_difference = max(self.largest_difference, _distance(output, expected))
        self.largest_output = max(self.largest_output, float(expected.abs().max()))
        if has_labels:
            labels = output.argmax(dim=-1), expected.argmax(dim=-1)
            self.predictions += labels[0].numel()
            self.differing += int((labels[0] != labels[1]).sum())
        if exact is not None:
            self.export_error = max(self.export_error or 0.0, _distance(output, exact))
            self.model_error = max(self.model_error or 0.0, _distance(expected, exact))

    @property
    def bound(self) -> float:
        """The largest error of the export that rounding explains."""
        if self.has_levels:
            return _LEVEL_FLOOR * self.largest_output
        if self.model_error is None:
            return _UNKNOWN * self.largest_output
        return _MAX_RATIO * self.model_error + _FLOOR * self.largest_output

    @property
    def is_rounding(self) -> bool:
        """True if rounding explains all differences between the export and the model."""
        if self.has_levels and self.differing > max(1, _MAX_DIFFERING * self.predictions):
            return False
        error = self.largest_difference
        if self.export_error is not None and not self.has_levels:
            error = self.export_error
        # NaN is no such error.
        return error <= self.bound


def _distance(one: Tensor, other: Tensor) -> float:
    difference = (one - other.double()).abs()
    # max() of Python would drop a NaN.
    return torch.inf if bool(difference.isnan().any()) else float(difference.max())
