"""The constructors and the calls of the native decoders with arguments that do not fit: one error that names each."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lightkit.native

pytestmark = pytest.mark.sanitized


def transformer_arguments():
    """Returns right arguments of the native constructor: the width 8, two heads, one layer, 5 tokens."""
    sizes = [(8,), (24, 8), (8, 8), (8,), (6, 8), (8, 3)]
    return {
        "embedding": torch.randn(5, 8),
        "head": torch.randn(5, 8),
        "layers": [torch.randn(size) for size in sizes],
        "norm": torch.randn(8),
        "epsilons": [1e-6] * 3,
        "rotation": torch.randn(2, 10, 2),
        "sequences": 1,
        "weight_bits": 32,
        "cache_bits": 32,
    }


def recurrent_arguments():
    sizes = [(12, 3), (12, 4), (12,), (12,)]
    return {
        "cell": "gru",
        "embedding": torch.randn(5, 3),
        "head": torch.randn(5, 4),
        "layers": [torch.randn(size) for size in sizes],
        "sequences": 1,
        "weight_bits": 32,
    }


def short(*sizes: int) -> Tensor:
    """Returns a tensor whose storage has half of its elements."""
    tensor = torch.zeros(sizes)
    tensor.untyped_storage().resize_(tensor.untyped_storage().nbytes() // 2)
    return tensor


WRONG_TENSORS = [
    (lambda t: t.double(), "must be float32 on the CPU, got Double"),
    (lambda t: t.to("meta"), "must be float32 on the CPU, got Float on meta"),
    (lambda t: t[..., None], "dimensions of size 1 and more"),
    (lambda t: t[:0], "dimensions of size 1 and more"),
    (lambda t: torch.stack((t, t), dim=-1)[..., 0], "must be contiguous"),
    (lambda t: short(*t.shape), "reaches beyond its storage"),
    (lambda t: torch.cat((t, t)), "must have the shape|must be a multiple|cannot be the head|epsilons"),
    (lambda t: 7, "must be a torch.Tensor, got an object of <class 'int'>"),
    (lambda t: None, "must be a torch.Tensor, got an object of <class 'NoneType'>"),
    (lambda t: nn.Linear(1, 1), "must be a torch.Tensor"),
]


@pytest.mark.parametrize(("change", "message"), WRONG_TENSORS)
@pytest.mark.parametrize("kind", ["transformer", "recurrent"])
def test_wrong_tensors(kind, change, message):
    """A tensor of another type, layout or size is one error that names it, for each tensor of both constructors."""
    module = lightkit.native.load()
    make, right = {
        "transformer": (module.transformer_decoder, transformer_arguments()),
        "recurrent": (module.recurrent_decoder, recurrent_arguments()),
    }[kind]
    make(**right)
    for name, value in right.items():
        for index, tensor in enumerate(value if isinstance(value, list) else [value]):
            if not isinstance(tensor, Tensor):
                continue
            if change(tensor) is None and name == "head":
                continue
            changed = (
                [*value[:index], change(tensor), *value[index + 1 :]] if isinstance(value, list) else change(tensor)
            )
            with pytest.raises((ValueError, TypeError), match=message):
                make(**{**right, name: changed})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequences": 0}, "sequences must be from 1 to 1048576, got 0"),
        ({"sequences": -1}, "sequences must be from 1"),
        ({"sequences": 2**40}, "sequences must be from 1"),
        ({"weight_bits": 4}, "the bits of weights must be 32 or 8, got 4"),
        ({"cache_bits": 16}, "the bits of cache must be 32 or 8, got 16"),
        ({"layers": []}, "layers must have a positive multiple of 6 items, got 0"),
        ({"layers": [torch.ones(8)] * 5}, "a positive multiple of 6 items, got 5"),
        ({"layers": ()}, "layers must be a list, got an object of <class 'tuple'>"),
        ({"epsilons": [1e-6] * 2}, "there must be 3 epsilons of 1 layers, got 2"),
        ({"epsilons": [1e-6, -1.0, 1e-6]}, "an epsilon must be at least 0, got -1"),
        ({"epsilons": [1e-6, float("nan"), 1e-6]}, "an epsilon must be at least 0, got nan"),
        ({"epsilons": [1e-6, "a", 1e-6]}, "must be real number"),
        ({"rotation": torch.ones(3, 10, 2)}, "the rotation must have the shape"),
        ({"rotation": torch.ones(2, 10, 3)}, "must be a multiple of the size of a head, 6, got 8"),
    ],
)
def test_wrong_arguments_of_a_transformer(changes, message):
    """The error names the argument and what was expected."""
    with pytest.raises((ValueError, TypeError), match=message):
        lightkit.native.load().transformer_decoder(**{**transformer_arguments(), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cell": "rnn"}, "the cell must be 'lstm', 'gru' or 'elman', got 'rnn'"),
        ({"cell": "lstm"}, r"weight of the input of layer 0 must have the shape \[16, 3\], got \[12, 3\]"),
        ({"head": None}, "an embedding of size 3 cannot be the head of states of size 4"),
        ({"sequences": 2**40}, "sequences must be from 1"),
        ({"weight_bits": 0}, "the bits of weights must be 32 or 8, got 0"),
        ({"layers": [torch.ones(8)] * 3}, "a positive multiple of 4 items, got 3"),
    ],
)
def test_wrong_arguments_of_a_recurrent_network(changes, message):
    """The error names the argument and what was expected."""
    with pytest.raises((ValueError, TypeError), match=message):
        lightkit.native.load().recurrent_decoder(**{**recurrent_arguments(), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"draws": torch.ones(2, 1, 5)}, r"the draws must have the shape \[3, 1, 5\], got \[2, 1, 5\]"),
        ({"draws": None}, "the draws must be a torch.Tensor"),
        ({"draws": torch.ones(3, 1, 5).double()}, "the draws must be float32 on the CPU"),
        ({"draws": short(3, 1, 5)}, "the draws of shape .* reaches beyond its storage"),
        ({"count": 0}, "tokens to add must be at least 1, got 0"),
        ({"count": 2**63 - 1, "temperature": 0.0}, "too many tokens to add|reads 10 tokens at most"),
        ({"count": 10, "temperature": 0.0}, "reads 10 tokens at most, got 11 after 0"),
        ({"temperature": -1.0}, "temperature must be at least 0 and top_k at least 1, got -1 and 5"),
        ({"temperature": float("nan")}, "temperature must be at least 0"),
        ({"top_k": 0}, "temperature must be at least 0 and top_k at least 1, got 1 and 0"),
    ],
)
def test_wrong_arguments_of_the_native_extend(changes, message):
    """The object itself names what does not fit, and reads nothing."""
    reader = lightkit.native.load().transformer_decoder(**transformer_arguments())
    right = {"count": 3, "temperature": 1.0, "top_k": 5, "draws": torch.ones(3, 1, 5)}
    with pytest.raises((ValueError, TypeError), match=message):
        reader.extend(torch.tensor([[1, 2]]), **{**right, **changes})
    assert reader.position == 0


def test_wrong_tokens_of_the_native_object():
    """The object itself rejects what is no tensor, and tensors that reach beyond their storage."""
    reader = lightkit.native.load().transformer_decoder(**transformer_arguments())
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    tokens.untyped_storage().resize_(8)
    for wrong, message in (
        ([[1]], "must be a torch.Tensor, got an object of <class 'list'>"),
        (tokens, "reaches beyond"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            reader.read(wrong, False)
    assert reader.position == 0
    # Any strides are read.
    strided = reader.read(torch.tensor([[1], [2], [3]]).T, True)
    reader.reset()
    assert torch.equal(reader.read(torch.tensor([[1, 2, 3]]), True), strided) and reader.position == 3
