"""The multilayer perceptron of rows: embeddings, normalisation, arguments and errors."""

from __future__ import annotations

import pytest
import torch

from lightkit.models import MLP
from lightkit.models.description import build_described, describe


@pytest.mark.parametrize("norm", ["none", "layer", "batch"])
@pytest.mark.parametrize("rows", [1, 5])
def test_numbers_and_categories_reach_the_outputs(norm, rows):
    """A change of a number, and of a category, changes the outputs; a training batch may have one row."""
    torch.manual_seed(0)
    model = MLP(2, 3, category_sizes=[4, 1000], hidden_sizes=[16], norm=norm)
    numbers, categories = torch.randn(rows, 2), torch.tensor([[1, 7]]).expand(rows, 2)
    outputs = model(numbers, categories)
    assert outputs.shape == (rows, 3)
    outputs.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.eval()
    outputs = model(numbers, categories)
    assert not torch.equal(outputs, model(numbers + 1, categories))
    assert not torch.equal(outputs, model(numbers, torch.tensor([[1, 8]]).expand(rows, 2)))
    assert [embedding.embedding_dim for embedding in model.embeddings] == [2, 32]


def test_rows_of_categories_alone_and_images_are_taken():
    """A table may have no number; images are flattened, as ``lightkit.fit("mlp")`` needs."""
    assert MLP(0, 2, category_sizes=[3])(torch.empty(4, 0), torch.zeros(4, 1, dtype=torch.long)).shape == (4, 2)
    assert MLP(12, 2)(torch.zeros(4, 1, 3, 4)).shape == (4, 2)
    assert len(MLP(3, 2, hidden_sizes=[]).layers) == 1


def test_checkpoints_describe_the_model():
    """The description of a saved model has its sizes, and builds the same model."""
    model = MLP(2, 3, category_sizes=(4,), hidden_sizes=(8,), dropout=0.1, norm="layer")
    node = describe(model)
    assert node is not None and node["category_sizes"] == [4] and repr(build_described(node)) == repr(model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_size": 0}, "input_size must be positive, or 0 beside category_sizes, got 0"),
        ({"num_outputs": 0}, "num_outputs must be positive"),
        ({"category_sizes": [3, 0]}, r"category_sizes must be a list of positive int, got \[3, 0\]"),
        ({"hidden_sizes": 128}, "hidden_sizes must be a list of positive int, got 128"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"norm": "group"}, "norm must be one of 'none', 'layer', 'batch', got 'group'"),
        ({"embedding_size": 0}, "embedding_size must be positive"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    """An argument out of its range is named."""
    with pytest.raises(ValueError, match=message):
        MLP(**{"input_size": 2, "num_outputs": 1, **arguments})


def test_inputs_of_another_shape():
    """The message of a wrong input has the expected shape."""
    with pytest.raises(ValueError, match=r"numbers of shape \(N, 2\), got \(4, 3\)"):
        MLP(2, 1)(torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"categories of shape \(N, 1\), got None"):
        MLP(2, 1, category_sizes=[2])(torch.zeros(4, 2))
