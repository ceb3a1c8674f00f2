"""An ensemble of classifiers: the mean of their class probabilities."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Ensemble(nn.Module):
    """Averages the class probabilities of several models.

    The models return logits ``(N, C)`` of the same classes for the same inputs. `forward` returns the logarithm of the
    mean probabilities, so that the ensemble takes the place of a model: its softmax is the mean, and its cross-entropy
    is that of the mean.

    Args:
        models: the models, at least one.

    Raises:
        ValueError: there is no model.
    """

    def __init__(self, models: Iterable[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        if len(self.models) == 0:
            raise ValueError("models must have at least one model, got none")

    def forward(self, *inputs: Tensor) -> Tensor:
        """Returns the logarithms of the mean probabilities, float32 or float64 ``(N, C)``.

        Args:
            *inputs: the inputs of each model.
        """
        logits = [model(*inputs) for model in self.models]
        # Half precision would round the small probabilities to zero.
        wide = [part if part.dtype == torch.float64 else part.float() for part in logits]
        return torch.stack([part.log_softmax(dim=1) for part in wide]).logsumexp(dim=0) - math.log(len(wide))
