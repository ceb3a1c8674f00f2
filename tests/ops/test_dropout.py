"""Dropout: the kernel against its reference to the bit, the distribution of its draws, and autograd."""

from __future__ import annotations

import math
import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.threads import assert_same_with_any_threads
from torch._dynamo.testing import AotEagerAndRecordGraphs

import lightkit.native
from lightkit.ops import dropout, dropout_mask, dropout_reference
from lightkit.ops.dropout import _draws

# For torch.ops.lightkit.
lightkit.native.load()

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def values(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def philox(counter: int, key: int) -> list[int]:
    """Philox 4x32-10 in Python's integers, as in the paper's figure."""
    words = [counter & 0xFFFFFFFF, counter >> 32, 0, 0]
    low, high = key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF
    for _ in range(10):
        first, second = words[0] * 0xD2511F53, words[2] * 0xCD9E8D57
        words = [second >> 32 ^ words[1] ^ low, second % 2**32, first >> 32 ^ words[3] ^ high, first % 2**32]
        low, high = (low + 0x9E3779B9) % 2**32, (high + 0xBB67AE85) % 2**32
    return words


@pytest.mark.parametrize("seed", [0, 1, -1, 2**62 + 12345])
def test_draws_are_those_of_philox(seed):
    """The draws are the generator's of the paper: element e has draw e % 64 // 16 of counter 16 (e // 64) + e % 16."""
    assert philox(0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    draws = _draws(130, torch.tensor(seed), torch.device("cpu"))
    for e, draw in enumerate(draws.tolist()):
        assert draw == philox(e // 64 * 16 + e % 16, seed % 2**64)[e % 64 // 16]


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 15, 16, 63, 64, 65, 127, 1000])
def test_kernel_has_the_mask_of_the_reference(count, dtype):
    """The kernel drops the elements that the reference drops, for ends of blocks and vectors, and any p."""
    input = values(count, dtype=dtype)
    for p in (0.5, 0.1, 1 / 3, 1e-11, 2**-32, 1 - 2**-32, 1 - 1e-12, 1.0):
        assert torch.equal(dropout(input, p, seed=7), dropout_reference(input, p, seed=7))


@given(
    shape=st.lists(st.integers(1, 6), min_size=0, max_size=5),
    p=st.floats(0, 1),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_any_shape_and_strides(shape, p, seed):
    """Whatever the strides: the reference's mask, counted in the order of memory, and the strides of the input."""
    dims = list(range(len(shape)))
    random.Random(seed).shuffle(dims)
    inverse = [dims.index(dim) for dim in range(len(dims))]
    memory = values(*[shape[dim] for dim in dims])
    output = dropout(memory.permute(inverse), p, seed=seed)
    assert torch.equal(output, dropout_reference(memory.permute(inverse), p, seed=seed))
    assert torch.equal(dropout(memory, p, seed=seed), memory * dropout_mask(memory.shape, p, seed) if p else memory)
    if all(size > 1 for size in shape):
        # Otherwise several orders fit the strides.
        assert output.stride() == memory.permute(inverse).stride()
        assert torch.equal(output.permute(dims), dropout(memory, p, seed=seed))


@pytest.mark.sanitized
def test_memory_formats():
    """Channels-last stays channels-last, with the mask of that format; gaps and overlaps are copied."""
    input = values(2, 5, 4, 3)
    last = input.to(memory_format=torch.channels_last)
    mask = dropout_mask(input.shape, 0.4, 3, memory_format=torch.channels_last)
    output = dropout(last, 0.4, seed=3)
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(output, input * mask)
    assert not torch.equal(mask, dropout_mask(input.shape, 0.4, 3))
    gaps = torch.stack([input] * 2, -1)[..., 0]
    expanded = input[:1].expand(3, 5, 4, 3)
    for strided in (gaps, expanded, torch._neg_view(-input)):
        assert torch.equal(dropout(strided, 0.4, seed=3), dropout(strided.contiguous(), 0.4, seed=3))
        assert torch.equal(dropout_reference(strided, 0.4, seed=3), dropout(strided.contiguous(), 0.4, seed=3))


def test_backward_has_the_mask_of_forward():
    """The gradient is the upstream gradient times the mask, whatever the strides of either."""
    input = values(2, 5, 4, 3).to(memory_format=torch.channels_last).requires_grad_()
    mask = dropout_mask(input.shape, 0.4, 3, memory_format=torch.channels_last)
    output = dropout(input, 0.4, seed=3)
    for upstream in (values(2, 5, 4, 3, seed=1), torch.ones(()).expand(2, 5, 4, 3)):
        (gradient,) = torch.autograd.grad(output, input, upstream, retain_graph=True)
        assert torch.equal(gradient, upstream * mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_multipliers(dtype):
    """An element is 0 or x / (1 - p), rounded once; the mask has the multipliers in its dtype."""
    input = values(1000, dtype=dtype)
    output = dropout(input, 0.3, seed=1)
    scaled = (input.to(torch.float64 if dtype == torch.float64 else torch.float32) * (1 / 0.7)).to(dtype)
    assert torch.equal(output, torch.where(output == 0, torch.zeros_like(input), scaled))
    mask = dropout_mask((1000,), 0.3, 1, dtype)
    assert mask.dtype == dtype
    assert torch.equal(mask, (output != 0) * torch.tensor(1 / 0.7).to(dtype) if dtype != torch.float64 else mask)


def test_not_finite_elements():
    """Infinite and NaN elements are what they are times the multiplier, as torch's."""
    input = torch.tensor([math.inf, -math.inf, math.nan]).repeat(40)
    assert torch.equal(
        dropout(input, 0.5, seed=2).nan_to_num(1.5), (input * dropout_mask((120,), 0.5, 2)).nan_to_num(1.5)
    )
    for p in (0.0, 1.0):
        torch.testing.assert_close(dropout(input, p), F.dropout(input, p), equal_nan=True)


@pytest.mark.parametrize("training", [True, False])
def test_identity(training):
    """Without training or with p of 0 the input itself is returned, as by torch; p of 1 gives zeros."""
    input = values(10)
    assert dropout(input, 0.0, training) is input
    assert dropout(input, 0.5, False) is input
    assert not dropout(input, 1.0).any()


def test_seed_of_torchs_generator():
    """Without a seed torch.manual_seed decides; each call draws another mask."""
    input = torch.ones(200)
    torch.manual_seed(5)
    first, second = dropout(input), dropout(input)
    torch.manual_seed(5)
    assert torch.equal(dropout(input), first)
    assert not torch.equal(first, second)
    assert torch.equal(dropout(input, seed=9), dropout(input, seed=torch.tensor(9)))


COUNT = 1 << 20
SEEDS = [0, 1, 2, 12345, -1]


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_share_of_zeros(p):
    """The share of zeros is p within five standard deviations, for neighbouring seeds and in every lane."""
    for seed in SEEDS:
        dropped = dropout_mask((COUNT,), p, seed) == 0
        deviation = (p * (1 - p) / COUNT) ** 0.5
        assert abs(dropped.double().mean() - p) < 5 * deviation
        # 64 lanes of a block, and 64 runs of consecutive elements.
        for parts in (dropped.view(-1, 64).double().mean(0), dropped.view(64, -1).double().mean(1)):
            assert (parts - p).abs().max() < 5 * 8 * deviation


def test_small_probabilities():
    """A probability of 2^-12 drops 256 of 2^20 elements, as a binomial distribution does: the threshold is fine."""
    counts = [(dropout_mask((COUNT,), 2**-12, seed) == 0).sum().item() for seed in range(10)]
    assert abs(sum(counts) - 2560) < 5 * 2560**0.5
    assert 100 < sum((count - 256) ** 2 for count in counts) / 9 < 700


def test_elements_and_seeds_are_independent():
    """Masks at any distance, and those of neighbouring seeds, have no correlation: within five standard deviations."""
    masks = [(dropout_mask((COUNT,), 0.5, seed) == 0).double() - 0.5 for seed in SEEDS]
    limit = 5 * 0.25 / COUNT**0.5
    for distance in (1, 2, 15, 16, 17, 63, 64, 128, 1000, 65536):
        assert (masks[0][distance:] * masks[0][:-distance]).mean().abs() < limit * 1.05
    for one in range(len(masks)):
        for other in range(one):
            assert (masks[one] * masks[other]).mean().abs() < limit


def test_runs_of_draws_are_uniform():
    """The draws, in 256 bins of their high and of their low bits, pass a chi-square test at five deviations."""
    draws = _draws(COUNT, torch.tensor(3), torch.device("cpu"))
    for bins in (draws >> 24, draws & 255, draws >> 12 & 255):
        expected = COUNT / 256
        chi_square = ((torch.bincount(bins, minlength=256) - expected) ** 2 / expected).sum()
        assert abs(chi_square - 255) < 5 * (2 * 255) ** 0.5


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bit_identical_across_threads(dtype):
    """Output and gradient do not depend on the number of threads."""
    input = values(70_001, dtype=dtype).requires_grad_()

    def compute():
        output = dropout(input, 0.3, seed=4)
        return [output, *torch.autograd.grad(output, input, input.detach())]

    assert_same_with_any_threads(compute)


def test_gradcheck_and_gradgradcheck():
    """First and second derivatives against finite differences."""
    input = values(3, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: dropout(x, 0.4, seed=1), input)
    assert torch.autograd.gradgradcheck(lambda x: dropout(x, 0.4, seed=1), input)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", [None, [0, 2, 3, 1]])
def test_opcheck(order, dtype):
    """Schema, fake tensors and autograd registration are consistent."""
    input = values(2, 5, 4, 3, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
    torch.library.opcheck(torch.ops.lightkit.dropout.default, (input, torch.tensor(3), 0.4, order))
    torch.library.opcheck(torch.ops.lightkit.dropout.default, (input[:, ::2], torch.tensor(3), 0.4, order))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic):
    """The op is no break in a compiled graph, with sizes fixed or not; backward has the same op."""
    torch._dynamo.reset()
    recorder = AotEagerAndRecordGraphs()
    compiled = torch.compile(lambda x: dropout(x, 0.4, seed=3), fullgraph=True, dynamic=dynamic, backend=recorder)
    for rows in (4, 5):
        input = values(rows, 30).requires_grad_()
        output = compiled(input)
        assert torch.equal(output, dropout(input, 0.4, seed=3))
        assert torch.equal(torch.autograd.grad(output.sum(), input)[0], dropout_mask(input.shape, 0.4, 3))
    assert "lightkit.dropout" in recorder.fw_graphs[0].code
    assert "lightkit.dropout" in recorder.bw_graphs[0].code


def test_functional_transforms():
    """torch.func goes through the reference, with the same mask; so does another device."""
    input = values(5, 70)
    (gradient, tangent) = (
        torch.func.grad(lambda x: dropout(x, 0.4, seed=3).sum())(input),
        torch.func.jvp(lambda x: dropout(x, 0.4, seed=3), (input,), (input,))[1],
    )
    mask = dropout_mask(input.shape, 0.4, 3)
    assert torch.equal(gradient, mask)
    assert torch.equal(tangent, input * mask)
    rows = torch.func.vmap(lambda x: dropout(x, 0.4, seed=3))(input)
    assert torch.equal(rows, input * dropout_mask((70,), 0.4, 3))
    masks = torch.func.vmap(lambda x: dropout(x, 0.4), randomness="different")(torch.ones(4, 70))
    assert len({tuple(mask.tolist()) for mask in masks}) == 4
    assert dropout(torch.empty(3, 4, device="meta"), 0.5).shape == (3, 4)


@pytest.mark.sanitized
@pytest.mark.parametrize("shape", [(0,), (3, 0), (2, 0, 4, 5), ()])
def test_empty_and_scalar(shape):
    """Sizes of 0, and a tensor without dimensions."""
    input = torch.ones(shape, requires_grad=True)
    output = dropout(input, 0.5, seed=0)
    assert output.shape == input.shape
    assert torch.autograd.grad(output.sum(), input)[0].shape == input.shape


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"p": -0.1}, "p must be between 0 and 1, got -0.1"),
        ({"p": 1.1}, "p must be between 0 and 1, got 1.1"),
        ({"p": math.nan}, "p must be between 0 and 1, got nan"),
        ({"input": torch.ones(3, dtype=torch.int64)}, "input must be floating point, got torch.int64"),
        ({"seed": 2**63}, "seed must be an int64, got 9223372036854775808"),
        ({"seed": torch.ones(())}, "seed must be an int64 without dimensions, got torch.float32"),
        ({"seed": torch.ones(2, dtype=torch.int64)}, "seed must be an int64 without dimensions"),
    ],
)
def test_wrong_arguments(arguments, message):
    """One error names the argument, its value and what was expected."""
    with pytest.raises(ValueError, match=message):
        dropout(**{"input": torch.ones(3), **arguments})


@pytest.mark.sanitized
def test_op_called_directly_is_safe():
    """The op checks its arguments itself: nothing is read beyond a tensor."""
    op = torch.ops.lightkit.dropout.default
    input, seed = torch.ones(4, 5), torch.tensor(3)
    short = torch.ones(4, 5)
    short.untyped_storage().resize_(40)
    for arguments, message in (
        ((short, seed, 0.5), "the input of shape .4, 5. reaches beyond its storage"),
        ((input, torch.ones(2, dtype=torch.int64), 0.5), "the seed must be one int64"),
        ((input, torch.ones(()), 0.5), "the seed must be one int64"),
        ((input, seed.to("meta"), 0.5), "the seed must be on the device of the input, cpu, got meta"),
        ((input, seed, math.nan), "p must be between 0 and 1"),
        ((input.long(), seed, 0.5), "the input must be floating point"),
        ((input, seed, 0.5, [0]), "the order must be a permutation of the 2 dimensions, got .0."),
        ((input, seed, 0.5, [0, 0]), "the order must be a permutation"),
        ((input, seed, 0.5, [0, 2]), "the order must be a permutation"),
        ((input, seed, 0.5, [-1, 0]), "the order must be a permutation"),
    ):
        with pytest.raises(ValueError, match=message):
            op(*arguments)
    output = op(input, seed, 0.5, [1, 0])
    assert torch.equal(output, op(input.t().contiguous(), seed, 0.5).t())
    assert output.is_contiguous() is False
