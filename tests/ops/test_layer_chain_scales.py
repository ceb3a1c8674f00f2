"""Chains whose outputs are rounded to 8 bits, against torch's fake quantization behind each layer."""

from __future__ import annotations

import math

import pytest
import torch
from chains import PLANS, chain_arguments, leaves_of, make, native_chain, results, settings_of
from hypothesis import given
from hypothesis import strategies as st

from lightkit.errors import ArgumentError
from lightkit.ops import ChainLayer, layer_chain, layer_chain_reference


def scaled(input, layers, share=0.6):
    """The layers with a scale behind each ReLU, so that the largest outputs are above the last level."""
    made = []
    for layer in layers:
        output = layer_chain_reference(input, [*made, layer])
        scale = float((output.detach().abs().max() * share / 255).float())
        made.append(layer._replace(output_scale=scale) if layer.relu and scale > 0 else layer)
    return made


@pytest.mark.sanitized
@pytest.mark.parametrize("images", [1, 3, 33])
@pytest.mark.parametrize("name", PLANS)
def test_float64(name, images):
    """Values and gradients are those of torch: none flows to outputs above the last level.

    Torch rounds the values of levels to float32, which the tolerance allows.
    """
    input, layers = make(*PLANS[name], torch.float64, images)
    layers = scaled(input, layers)
    assert any(layer.output_scale for layer in layers) or not any(layer.relu for layer in layers)
    for actual, expected in zip(
        results(native_chain, input, layers), results(layer_chain_reference, input, layers), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@given(
    channels=st.integers(1, 40),
    size=st.tuples(st.integers(4, 9), st.integers(4, 9)),
    pool=st.booleans(),
    images=st.integers(1, 5),
    seed=st.integers(0, 1000),
    share=st.floats(0.05, 1.5),
)
def test_levels(channels, size, pool, images, seed, share):
    """In float32, too, outputs are whole multiples of the scale from 0 to 255, as torch rounds the plain outputs."""
    input, (layer,) = make((3, *size), [(channels, (3, 3), (1, 1), pool, True, True)], torch.float32, images, seed)
    plain = layer_chain(input, [layer])
    scale = float(plain.max()) * share / 255 or 1.0
    scale = float(torch.tensor(scale))
    rounded = layer_chain(input, [layer._replace(output_scale=scale)])
    assert torch.equal(rounded, torch.fake_quantize_per_tensor_affine(plain, scale, 0, 0, 255))


def test_nan_stays():
    """Rounding keeps NaN, whose cause is then seen in the loss."""
    layer = ChainLayer(torch.ones(1, 1, 1, 1), None, output_scale=0.1)
    output = layer_chain(torch.tensor([math.nan, 1.04, 1000.0]).view(1, 1, 1, 3), [layer]).flatten()
    assert output[0].isnan() and output[1:].tolist() == pytest.approx([1.0, 25.5])


def test_second_derivative():
    """With create_graph=True the gradients are the same ones, and differentiable."""
    input, layers = make(*PLANS["cnn"], torch.float64, 2)
    layers = scaled(input, layers)
    x, layers, leaves = leaves_of(input, layers)
    output = layer_chain(x, layers).square().sum()
    once = torch.autograd.grad(output, leaves, retain_graph=True)
    again = torch.autograd.grad(output, leaves, create_graph=True)
    for actual, expected in zip(again, once, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert all(g.isfinite().all() for g in torch.autograd.grad(sum(g.square().sum() for g in again), leaves))


def test_opcheck():
    """The schema with scales is registered rightly: fake tensors, autograd and functionalization."""
    input, layers = make(*PLANS["padded"], torch.float32, 2)
    torch.library.opcheck(torch.ops.lightkit.layer_chain.default, chain_arguments(input, scaled(input, layers)))


@pytest.mark.parametrize(
    ("scale", "relu", "message"),
    [
        (-0.1, True, "a scale must be 0, or positive and finite"),
        (math.nan, True, "a scale must be 0, or positive and finite"),
        (math.inf, True, "a scale must be 0, or positive and finite"),
        (1e-45, True, "a scale must be 0, or positive and finite"),
        (0.1, False, "layer 0: a layer without a ReLU has no scale"),
    ],
)
def test_wrong_scales(scale, relu, message):
    """A scale that no level has is refused: its inverse would be infinite."""
    layer = ChainLayer(torch.ones(1, 1, 1, 1), None, relu=relu, output_scale=scale)
    with pytest.raises(ArgumentError, match=message):
        layer_chain(torch.ones(1, 1, 2, 2), [layer])


def test_wrong_number_of_scales():
    """The op itself refuses a list that would be read beyond its end."""
    input, layers = make(*PLANS["cnn"], torch.float32, 1)
    weights = [layer.weight for layer in layers]
    with pytest.raises(ValueError, match="scales must be empty or have a number for each"):
        torch.ops.lightkit.layer_chain(input, weights, [None] * len(weights), settings_of(layers), [0.1])
