"""Weights rounded to a few bits: the kernel against its reference to the bit, and both against the definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.threads import assert_same_with_any_threads

import lightkit.native
from lightkit.errors import ArgumentError
from lightkit.ops import fake_quantize_weights, fake_quantize_weights_reference

# For torch.ops.lightkit.
lightkit.native.load()

BITS = [8, 4, 3, 2]
LEVELS = {8: 127, 4: 7, 3: 3, 2: 3}
LEAST = 2.0**-64


def weights(*shapes: tuple[int, ...], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def check(inputs: list[torch.Tensor], bits: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Fails unless kernel and reference give the same bits and leave the inputs alone; returns outputs and scales."""
    before = [weight.clone() for weight in inputs]
    results = []
    for function in (fake_quantize_weights, fake_quantize_weights_reference):
        outputs = [torch.full_like(weight, 7.0) for weight in inputs]
        results.append((outputs, function(inputs, outputs, bits)))
    (outputs, scales), expected = results
    for found, other in zip([*outputs, *scales], [*expected[0], *expected[1]], strict=True):
        assert found.shape == other.shape
        torch.testing.assert_close(found, other, rtol=0, atol=0, equal_nan=True)
    for weight, old in zip(inputs, before, strict=True):
        torch.testing.assert_close(weight, old, rtol=0, atol=0, equal_nan=True)
    return outputs, scales


@pytest.mark.sanitized
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", [1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 100, 1000])
def test_ends_of_vectors(columns, bits):
    """Rows that end at every place of a vector, behind and before others, and a tensor of one dimension."""
    check(weights((5, columns), (3, columns), (1, 1, columns), (columns,)), bits)


@pytest.mark.parametrize("bits", [8, 4, 3])
def test_definition(bits):
    """The scale is the largest magnitude over the largest integer; outputs are the nearest multiples of it."""
    (weight,) = inputs = weights((64, 3, 3, 3))
    (output,), (scale,) = check(inputs, bits)
    assert torch.equal(scale, weight.abs().amax((1, 2, 3)) / LEVELS[bits])
    each = scale.double().view(-1, 1, 1, 1)
    integers = (output.double() / each).round()
    assert integers.abs().max() == LEVELS[bits]
    torch.testing.assert_close(output.double(), integers * each, rtol=1e-7, atol=0)
    assert ((output - weight).abs().double() <= each * 0.500001).all()


def test_two_bits():
    """The levels of 2 bits are those of statistics-aware weight binning; each weight has the nearest one."""
    (weight,) = inputs = weights((64, 3, 3, 3))
    (output,), (scale,) = check(inputs, 2)
    rows = weight.flatten(1).double()
    alpha = 3.2 * rows.square().mean(1).sqrt() - 2.1 * rows.abs().mean(1)
    torch.testing.assert_close(scale.double(), alpha / 3, rtol=1e-6, atol=0)
    levels = torch.tensor([-3, -1, 1, 3]) * scale.view(-1, 1, 1, 1, 1).double()
    distances = (weight.double().unsqueeze(-1) - levels).abs()
    found = (weight.double() - output.double()).abs()
    torch.testing.assert_close(found, distances.amin(-1), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bits", BITS)
def test_zeros(bits):
    """A row of zeros, and one that is nearly so, has the scale 1 and stays zero; with 2 bits it has a tiny scale."""
    weight = torch.tensor([[0.0, 0.0, -0.0], [1e-30, -1e-40, 0.0], [1.0, 0.0, -1.0]])
    (output,), (scale,) = check([weight], bits)
    assert scale[:2].tolist() == ([LEAST] * 2 if bits == 2 else [1.0] * 2)
    assert output[:2].abs().max() <= (LEAST if bits == 2 else 0)
    assert output[2].any()


def test_least_scale_of_two_bits():
    """One weight that is far larger than all others keeps the scale from falling below 1/48 of it."""
    weight = torch.zeros(1, 100_000)
    weight[0, 5] = 1.0
    _, (scale,) = check([weight], 2)
    assert scale.item() == torch.tensor(1.0).div(48).item()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("place", [0, 20, 36])
def test_not_finite(place, value, bits):
    """NaN and infinity, in any vector of a row, do not touch other rows; kernel and reference agree on all of them."""
    (weight,) = weights((3, 37))
    weight[1, place] = value
    (output,), (scale,) = check([weight], bits)
    assert output[[0, 2]].isfinite().all() and scale[[0, 2]].isfinite().all()
    if math.isnan(value):
        assert output[1].isnan().all() and scale[1].isnan()


@pytest.mark.parametrize("bits", [8, 4, 3])
def test_near_ties(bits):
    """Quotients at and beside every tie are rounded as the division does it, which a product does not."""
    for largest in (LEVELS[bits] * 1.0, 1.0, 0.3, 1e-15, 3e38):
        halves = torch.arange(-2 * LEVELS[bits], 2 * LEVELS[bits] + 1) / 2 * (largest / LEVELS[bits])
        beside = [torch.nextafter(halves, torch.tensor(side * math.inf)) for side in (1.0, -1.0)]
        row = torch.cat([halves, *beside]).clamp(-largest, largest)
        check([row[None]], bits)


@given(
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4), min_size=1, max_size=6),
    st.sampled_from(BITS),
    st.floats(-30, 30),
    st.integers(0, 99),
)
def test_random_weights(shapes, bits, exponent, seed):
    """Any shapes, also empty ones, and any magnitudes."""
    inputs = [weight * 10**exponent for weight in weights(*map(tuple, shapes), seed=seed)]
    _, scales = check(inputs, bits)
    assert [scale.shape for scale in scales] == [weight.shape[:1] for weight in inputs]


@pytest.mark.sanitized
@pytest.mark.parametrize("bits", BITS)
def test_memory(bits):
    """Channels-last, transposed and sliced tensors, and those with a pending negation, as weights and as outputs."""
    (weight,) = weights((6, 5, 3, 4))
    expected = torch.empty_like(weight)
    (scale,) = fake_quantize_weights([weight], [expected], bits)
    wide = torch.full((6, 5, 3, 8), math.nan)
    wide[..., ::2] = weight
    layouts = [
        weight,
        weight.to(memory_format=torch.channels_last),
        weight.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        wide[..., ::2],
        torch._neg_view(-weight),
    ]
    for given_layout in layouts:
        for layout in layouts:
            output = layout.clone(memory_format=torch.preserve_format)
            if layout is layouts[3]:
                output = torch.zeros_like(wide)[..., ::2]
            elif layout.is_neg():
                output = torch._neg_view(torch.zeros_like(weight))
            (found,) = fake_quantize_weights([given_layout], [output], bits)
            assert torch.equal(output, expected) and torch.equal(found, scale)


@pytest.mark.sanitized
@pytest.mark.parametrize("bits", BITS)
def test_bit_identical_across_threads(bits):
    """Threads share rows, whose results do not depend on the shares."""
    inputs = weights((300, 577), (3,), (1, 70_000), (64, 9), (200_000, 1))
    outputs = [torch.empty_like(weight) for weight in inputs]
    assert_same_with_any_threads(lambda: [*fake_quantize_weights(inputs, outputs, bits), *outputs])


def test_autograd():
    """Parameters are read without a graph, and a graph that has saved an output notices that it is written again."""
    parameter = torch.nn.Parameter(torch.randn(4, 5))
    output = torch.empty(4, 5)
    (scale,) = fake_quantize_weights([parameter], [output], 4)
    assert not scale.requires_grad and not output.requires_grad
    leaf = torch.randn(5, requires_grad=True)
    result = (output @ leaf).sum()
    fake_quantize_weights([parameter], [output], 4)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.backward()


def test_inference_mode():
    """Tensors that are made in inference mode are written there."""
    with torch.inference_mode():
        check(weights((4, 5)), 8)


def test_no_weights():
    """A model without weights has no scales."""
    assert fake_quantize_weights([], [], 8) == []


@pytest.mark.sanitized
def test_opcheck():
    """Schema and fake tensors are consistent."""
    inputs = weights((4, 5), (3, 2, 2))
    outputs = [torch.zeros_like(weight) for weight in inputs]
    torch.library.opcheck(torch.ops.lightkit._fake_quantize_weights_.default, (inputs, outputs, 2))


def test_functional_transforms():
    """Within torch.func, torch's operations compute the same."""
    (weight,) = weights((3, 4, 5))
    expected = torch.empty_like(weight)
    for index in range(3):
        fake_quantize_weights([weight[index]], [expected[index]], 4)

    def rounded(x: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(x)
        fake_quantize_weights([x], [output], 4)
        return output

    assert torch.equal(torch.func.vmap(rounded)(weight), expected)


SHORT = torch.zeros(4, 5)
SHORT.untyped_storage().resize_(40)
WEIGHT = torch.ones(4, 5)


@pytest.mark.parametrize(
    ("inputs", "outputs", "bits", "message"),
    [
        ([WEIGHT], [torch.ones(4, 5)], 5, "bits must be 2, 3, 4 or 8, got 5"),
        ([WEIGHT], [], 8, "an output for each of the 1 weights, got 0"),
        ([WEIGHT.double()], [torch.ones(4, 5)], 8, "weight 0 must be float32 of one or more dimensions"),
        ([WEIGHT, torch.ones(())], [torch.ones(4, 5), torch.ones(())], 8, "weight 1 must be float32 of one or more"),
        ([WEIGHT], [torch.ones(5, 4)], 8, "output 0 must be float32 of"),
        ([WEIGHT], [torch.ones(4, 5).half()], 8, "output 0 must be float32 of"),
        ([WEIGHT], [torch.ones(4, 5, device="meta")], 8, "output 0 must be float32 of"),
        ([WEIGHT], [WEIGHT], 8, "output 0 must not share the storage of its weight"),
    ],
)
def test_wrong_arguments(inputs, outputs, bits, message):
    """One error, of the kernel and of the reference, names the argument, its value and what was expected."""
    for function in (fake_quantize_weights, fake_quantize_weights_reference):
        with pytest.raises(ArgumentError, match=message):
            function(inputs, outputs, bits)


@pytest.mark.sanitized
def test_storage_that_is_too_short():
    """Nothing is read or written beyond a storage; nothing is written before all arguments are checked."""
    for inputs, outputs in (([WEIGHT, SHORT], [WEIGHT + 4, WEIGHT + 4]), ([WEIGHT, WEIGHT], [WEIGHT + 4, SHORT])):
        with pytest.raises(ArgumentError, match=r"of shape .4, 5. reaches beyond its storage"):
            fake_quantize_weights(inputs, outputs, 8)
        assert torch.equal(outputs[0], WEIGHT + 4)
