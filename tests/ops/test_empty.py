"""Sizes of zero: values, shapes and gradients are torch's, for every op, reduction and dtype."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from lightkit.ops import (
    ChainLayer,
    conv_relu_pool,
    conv_relu_pool_reference,
    cross_entropy,
    layer_chain,
    layer_chain_reference,
    linear_cross_entropy,
)

pytestmark = pytest.mark.sanitized

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
REDUCTIONS = ["none", "mean", "sum"]


def outcome(function, *arguments):
    """Returns the results and the gradients of all leaves, or the class of the error."""
    leaves = [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]
    try:
        result = function(*arguments)
        gradients = torch.autograd.grad(result.sum(), leaves)
    except (RuntimeError, ValueError, IndexError) as error:
        return IndexError if isinstance(error, IndexError) else Exception
    return [result, *gradients]


def assert_same(ours, theirs) -> None:
    if not isinstance(theirs, list):
        assert ours is theirs
        return
    for own, other in zip(ours, theirs, strict=True):
        # Without rows or features nothing is rounded, unless there is a bias.
        tolerance = {"rtol": 0.02, "atol": 0.01} if own.dtype in (torch.bfloat16, torch.float16) else {}
        torch.testing.assert_close(own, other, equal_nan=True, check_stride=False, **tolerance)


def leaf(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_cross_entropy(with_bias, reduction, dtype) -> None:
    """Without rows, features or classes, in all combinations. Without rows, backward divided by a stride of 0."""
    for rows, features, classes in itertools.product([0, 3], [0, 10], [0, 28]):
        arguments = [leaf(rows, features, dtype=dtype), leaf(classes, features, dtype=dtype)]
        arguments += [leaf(classes, dtype=dtype)] if with_bias else []
        target = torch.zeros(rows, dtype=torch.int64)

        def ours(x, w, b=None, target=target):
            return linear_cross_entropy(x, w, target, linear_bias=b, reduction=reduction)

        def theirs(x, w, b=None, target=target):
            return F.cross_entropy(F.linear(x, w, b), target, reduction=reduction)

        if rows * features * classes == 0 or dtype in (torch.float32, torch.float64):
            assert_same(outcome(ours, *arguments), outcome(theirs, *arguments))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_linear_cross_entropy_of_ignored_rows(reduction, dtype) -> None:
    """Where all rows are ignored the kernel has none, as if there were none."""
    hidden, weight = leaf(5, 4, dtype=dtype), leaf(3, 4, dtype=dtype)
    target = torch.full((5,), -100)
    ours = outcome(lambda x, w: linear_cross_entropy(x, w, target, reduction=reduction), hidden, weight)
    theirs = outcome(lambda x, w: F.cross_entropy(F.linear(x, w), target, reduction=reduction), hidden, weight)
    assert_same(ours[:1], theirs[:1])
    for gradient in ours[1:]:
        assert not gradient.any()


@pytest.mark.parametrize("leading", [(), (0,), (2, 0), (0, 3)])
@pytest.mark.parametrize("probabilities", [False, True])
def test_linear_cross_entropy_of_any_dimensions(probabilities, leading) -> None:
    """Leading dimensions of size 0, with indices and with probabilities, and features of size 0 behind them."""
    for features in (0, 4):
        hidden, weight = leaf(*leading, features), leaf(3, features)
        target = torch.full((*leading, 3), 1 / 3) if probabilities else torch.zeros(leading, dtype=torch.int64)
        loss, lse = linear_cross_entropy(hidden, weight, target, reduction="none", return_lse=True)
        assert loss.shape == lse.shape == leading
        torch.autograd.grad(loss.sum(), [hidden, weight])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("sizes", [(0, 5), (0, 200), (2, 5, 0), (0, 5, 3), (2, 200, 0, 3), (0, 5, 0)])
def test_cross_entropy(sizes, reduction, dtype) -> None:
    """Without rows, for few and many classes and any dimensions, with indices and probabilities."""
    logits = leaf(*sizes, dtype=dtype)
    indices = torch.zeros(sizes[:1] + sizes[2:], dtype=torch.int64)
    for target in (indices, torch.zeros(sizes, dtype=dtype)):
        ours = outcome(lambda x, t=target: cross_entropy(x, t, reduction=reduction), logits)
        theirs = outcome(lambda x, t=target: F.cross_entropy(x, t, reduction=reduction), logits)
        assert_same(ours, theirs)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_layer_chain_of_linear_layers(with_bias, relu) -> None:
    """Without rows, inputs or outputs, alone and before another layer. Empty weights were refused."""
    for rows, inputs, outputs, last in itertools.product([0, 2], [0, 3], [0, 4], [0, 5]):
        arguments = [leaf(rows, inputs), leaf(outputs, inputs), leaf(last, outputs)]
        arguments += [leaf(outputs), leaf(last)] if with_bias else []

        def run(function, x, v, w, b=None, c=None):
            return function(x, [ChainLayer(v, b, relu=relu), ChainLayer(w, c, relu=relu)])

        ours = outcome(lambda *a: run(layer_chain, *a), *arguments)
        theirs = outcome(lambda *a: run(layer_chain_reference, *a), *arguments)
        assert_same(ours, theirs)


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize(
    ("input", "weight"),
    [
        ((0, 3, 6, 6), (4, 3, 3, 3)),
        ((2, 3, 0, 6), (4, 3, 3, 3)),
        ((2, 3, 6, 0), (4, 3, 3, 3)),
        ((2, 3, 6, 6), (0, 3, 3, 3)),
        ((2, 3, 6, 6), (4, 3, 0, 3)),
    ],
)
def test_conv_relu_pool(input, weight, pool) -> None:
    """Without images there are none in the result; what torch refuses is refused."""
    arguments = [leaf(*input), leaf(*weight)]
    ours = outcome(lambda x, w: conv_relu_pool(x, w, padding=1, pool=pool), *arguments)
    theirs = outcome(lambda x, w: conv_relu_pool_reference(x, w, padding=1, pool=pool), *arguments)
    assert_same(ours, theirs)
