"""Rounding without a training: ranges from samples, and errors that later weights make up for."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightkit.compress import QUANTIZATION_KEY, QuantizationScheme, apply_quantization, calibrate
from lightkit.compress.error_compensation import InputProducts, compensated
from lightkit.compress.packing import PACKED_KEY, weight_of
from lightkit.compress.weight_formats import WeightFormat
from lightkit.models import Transformer
from lightkit.nn.input_quantizer import quantizer_of


def correlated(count, size):
    """Samples whose values depend on each other, as those of images and hidden states do."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 4, generator=generator) @ torch.randn(4, size, generator=generator) + 0.1 * torch.randn(
        count, size, generator=generator
    )


def nearest(layer, bits, group_size=0):
    """A copy of a layer whose weights are rounded to the nearest level."""
    rounded = copy.deepcopy(layer)
    spec = {"weights": {"0.weight": [bits, group_size]}, "inputs": {}}
    apply_quantization(nn.Sequential(rounded), {QUANTIZATION_KEY: spec})
    return rounded


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [0, 16])
def test_outputs_change_less(bits, group_size):
    """Where inputs depend on each other, the outputs are much nearer than with the nearest levels."""
    torch.manual_seed(0)
    layer, x = nn.Linear(32, 24), correlated(500, 32)
    products = InputProducts(layer)
    products.observe(x[:250].view(5, 50, 32))
    products.observe(x[250:])
    better = copy.deepcopy(layer)
    better.weight.data = weight_of(*compensated(layer.weight, WeightFormat(bits, group_size), products.total))
    with torch.no_grad():
        errors = [float((net(x) - layer(x)).square().mean()) for net in (better, nearest(layer, bits, group_size))]
    assert errors[0] < 0.5 * errors[1]


def test_independent_inputs_are_rounded_to_the_nearest():
    """Without dependence there is nothing to make up for."""
    layer = nn.Linear(16, 8)
    rounded = weight_of(*compensated(layer.weight, WeightFormat(4), torch.eye(16, dtype=torch.float64)))
    assert torch.equal(rounded, nearest(layer, 4).weight)


def test_products_on_another_device():
    """A trainer moves the weight to the CPU after its run; the products, which it does not know, follow."""

    class OnAccelerator:
        def to(self, device):
            assert device == torch.device("cpu")
            return torch.eye(16, dtype=torch.float64)

    layer = nn.Linear(16, 8)
    rounded = weight_of(*compensated(layer.weight, WeightFormat(4), OnAccelerator()))
    assert torch.equal(rounded, nearest(layer, 4).weight)


@pytest.mark.parametrize("padding", [0, 1])
def test_convolutions(padding):
    """The inputs of a convolution's output are the values under its kernel; those that are always 0 do no harm."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Identity(), nn.Conv2d(3, 16, 3, stride=2, padding=padding), nn.ReLU(), nn.Conv2d(16, 4, 1))
    x = correlated(60, 3 * 64).view(60, 3, 8, 8)
    x[:, 2] = 0
    spec = calibrate(net, QuantizationScheme(4, edge_bits=4), lambda: net(x))
    assert spec[PACKED_KEY].keys() == {"1.weight", "3.weight"} and spec["inputs"].keys() == {"1", "3"}
    rounded = copy.deepcopy(net)
    apply_quantization(rounded, {QUANTIZATION_KEY: spec})
    plain = {**spec}
    plain.pop(PACKED_KEY)
    other = copy.deepcopy(net)
    apply_quantization(other, {QUANTIZATION_KEY: plain})
    with torch.no_grad():
        errors = [float((each(x) - net(x)).square().mean()) for each in (rounded, other)]
    assert errors[0] < errors[1]
    assert quantizer_of(net[1]) is None and not net[1]._forward_pre_hooks


def test_language_model():
    """Linear layers of a transformer are compensated; its tied embedding, which tokens index, is rounded."""
    torch.manual_seed(0)
    model = Transformer(20, 32, 2, 4, 16).eval()
    tokens = torch.randint(20, (32, 16))
    spec = calibrate(model, QuantizationScheme(4), lambda: model(tokens))
    assert spec["inputs"] == {} and len(spec[PACKED_KEY]) == 8
    before = model(tokens)
    apply_quantization(model, {QUANTIZATION_KEY: spec})
    assert 0 < float((model(tokens) - before).abs().max()) < float(before.abs().max())


def test_eight_bits_are_rounded_to_the_nearest():
    """Errors of 8 bits do not matter: the entry has ranges alone."""
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())
    spec = calibrate(net, QuantizationScheme(8), lambda: net(torch.rand(2, 1, 5, 5)))
    assert PACKED_KEY not in spec and spec["inputs"]["0"][1] == 0
