"""A multilayer perceptron for rows of numbers and categories."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from lightkit.models.arguments import keeps_arguments

_NORMS = ("none", "layer", "batch")

# The largest size of an embedding whose size the model chooses.
_MAX_EMBEDDING = 32


@keeps_arguments
class MLP(nn.Module):
    """Hidden layers on numbers and on embeddings of categories, and a linear map to the outputs.

    With one output for each class the model classifies; with one output for each target it regresses. A hidden layer is
    a linear map, a normalisation, a ReLU and dropout.

    Args:
        input_size: the count of numbers in a row, F; it may be 0 if there are categories.
        num_outputs: the number of values that the model returns for a row.
        category_sizes: for each of the K columns of categories, the number of different indices.
        hidden_sizes: the sizes of the hidden layers; an empty list makes a linear model.
        dropout: the dropout probability after each hidden layer.
        norm: the normalisation of the hidden layers: ``"none"``, ``"layer"`` [1]_ or ``"batch"`` [2]_. A training batch
            of one row is normalised by the running statistics.
        embedding_size: the size of every embedding; None takes half the number of indices, from 1 to 32.

    Shape:
        Numbers ``(N, F)``, floating point, of which further dimensions are flattened, and categories ``(N, K)``, int64
        with column k in ``[0, category_sizes[k])``, or None for K = 0 -> ``(N, num_outputs)``.

    Raises:
        ValueError: an argument is out of its range, or the input has another shape.

    References:
        .. [1] Ba, Kiros and Hinton, Layer Normalization, 2016.
        .. [2] Ioffe and Szegedy, Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate
           Shift, ICML 2015.
    """

    def __init__(
        self,
        input_size: int,
        num_outputs: int,
        category_sizes: Sequence[int] = (),
        hidden_sizes: Sequence[int] = (128, 128),
        dropout: float = 0.0,
        norm: str = "none",
        embedding_size: int | None = None,
    ) -> None:
        super().__init__()
        _check_arguments(input_size, num_outputs, category_sizes, hidden_sizes, dropout, norm, embedding_size)
        self.input_size = input_size
        self.embeddings = nn.ModuleList(
            nn.Embedding(size, embedding_size or min(_MAX_EMBEDDING, max(1, size // 2))) for size in category_sizes
        )
        width = input_size + sum(cast(nn.Embedding, embedding).embedding_dim for embedding in self.embeddings)
        layers: list[nn.Module] = []
        for size in hidden_sizes:
            layers += [nn.Linear(width, size), *_norm(norm, size), nn.ReLU()]
            layers += [nn.Dropout(dropout)] if dropout else []
            width = size
        self.layers = nn.Sequential(*layers, nn.Linear(width, num_outputs))

    def forward(self, numbers: Tensor, categories: Tensor | None = None) -> Tensor:
        """Returns the outputs ``(N, num_outputs)`` for numbers ``(N, F)`` and categories ``(N, K)`` or None."""
        x = numbers.flatten(1) if numbers.dim() > 2 else numbers
        if x.dim() != 2 or x.shape[1] != self.input_size:
            raise ValueError(f"MLP takes numbers of shape (N, {self.input_size}), got {tuple(numbers.shape)}")
        count = len(self.embeddings)
        if (0 if categories is None else categories.shape[-1]) != count:
            shape = None if categories is None else tuple(categories.shape)
            raise ValueError(f"MLP takes categories of shape (N, {count}), got {shape}")
        if count and categories is not None:
            parts = [embedding(categories[:, index]) for index, embedding in enumerate(self.embeddings)]
            x = torch.cat([x.to(parts[0].dtype), *parts], dim=1)
        return self.layers(x)


class _BatchNorm(nn.BatchNorm1d):
    """Batch normalisation that takes the running statistics for a batch of one row, which has no deviation."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training and len(input) == 1:
            return nn.functional.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        return super().forward(input)


def _norm(norm: str, size: int) -> list[nn.Module]:
    return {"none": [], "layer": [nn.LayerNorm(size)], "batch": [_BatchNorm(size)]}[norm]


def _check_arguments(
    input_size: int,
    num_outputs: int,
    category_sizes: Sequence[int],
    hidden_sizes: Sequence[int],
    dropout: float,
    norm: str,
    embedding_size: int | None,
) -> None:
    if input_size < 0 or (input_size == 0 and not category_sizes):
        raise ValueError(f"input_size must be positive, or 0 beside category_sizes, got {input_size}")
    if num_outputs < 1:
        raise ValueError(f"num_outputs must be positive, got {num_outputs}")
    for name, sizes in {"category_sizes": category_sizes, "hidden_sizes": hidden_sizes}.items():
        if not isinstance(sizes, (list, tuple)) or any(type(size) is not int or size < 1 for size in sizes):
            raise ValueError(f"{name} must be a list of positive int, got {sizes!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
    if norm not in _NORMS:
        raise ValueError(f"norm must be one of {', '.join(map(repr, _NORMS))}, got {norm!r}")
    if embedding_size is not None and embedding_size < 1:
        raise ValueError(f"embedding_size must be positive, got {embedding_size}")
