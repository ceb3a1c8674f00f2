"""The layers of a quantized model as one operation on integers: the labels and outputs of the rounded float layers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightkit.compress import QuantizationScheme, apply_quantization, calibrate
from lightkit.compress.weight_formats import QUANTIZATION_KEY
from lightkit.models import CNN
from lightkit.nn import FusedSequential
from lightkit.nn.input_quantizer import attach, detach, quantizer_of
from lightkit.nn.int8_layers import find_int8_chain, int8_chain_of
from lightkit.nn.weight_levels import levels_of


def quantized(net, x, bits=8):
    """The net in evaluation, with few bits, whose ranges come from ``x``."""
    net.eval()
    spec = calibrate(net, QuantizationScheme(bits), lambda: net(x))
    apply_quantization(net, {QUANTIZATION_KEY: spec})
    return net


def with_norms():
    """Layers with batch norms whose statistics and factors, some negative and one 0, are not those of the start."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 12, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU()),
        *(nn.Conv2d(12, 20, 3, padding=(0, 1), groups=2), nn.BatchNorm2d(20), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(20, 8, 1), nn.Dropout(0.5), nn.Flatten(), nn.Linear(8 * 3 * 4, 16), nn.ReLU(), nn.Linear(16, 5)),
    )
    for norm in net:
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(0, 0.3)
            norm.running_var.uniform_(0.3, 2)
            with torch.no_grad():
                norm.weight.normal_()
                norm.weight[3] = 0
                norm.bias.normal_()
    return net


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("name", ["norms", "cnn"])
def test_outputs_are_those_of_float(name, bits):
    """The integers give the outputs of the rounded layers in float64, within a few levels that rounding moves."""
    torch.manual_seed(0)
    net, shape = (CNN(), (1, 28, 28)) if name == "cnn" else (with_norms(), (3, 17, 15))
    x = torch.rand(64, *shape) * 2 - (0 if name == "cnn" else 1)
    quantized(net, x, bits)
    layers = (net.features, net.classifier) if name == "cnn" else (net,)
    chain = find_int8_chain(layers)
    exact = copy.deepcopy(net).double()(x.double())
    actual = chain(x)
    spread = float(exact.detach().std())
    assert float((actual - exact).abs().max()) < 0.1 * spread
    assert float((actual - exact).abs().mean()) < 0.01 * spread


def test_evaluation_runs_on_integers():
    """A model of lightkit's in evaluation computes exactly what the chain does, and float otherwise."""
    torch.manual_seed(0)
    x = torch.rand(8, 1, 28, 28)
    net = quantized(CNN(), x)
    with torch.no_grad():
        chain = int8_chain_of((net.features, net.classifier), x)
        assert torch.equal(net(x), chain(x))
        assert int8_chain_of((net.features, net.classifier), x) is chain
        assert int8_chain_of((net.features, net.classifier), x.double()) is None
    assert int8_chain_of((net.features, net.classifier), x) is None
    with torch.no_grad():
        net.train()
        assert int8_chain_of((net.features, net.classifier), x) is None
        net.eval()
        # A copy has the integers, too; a weight that changes has none, and a range that changes makes another chain.
        copied = copy.deepcopy(net)
        assert torch.equal(copied(x), net(x))
        quantizer_of(net.features[3]).scale *= 2
        assert int8_chain_of((net.features, net.classifier), x) is not chain
        net.classifier[3].weight.mul_(1.5)
        assert levels_of(net.classifier[3]) is None
        assert int8_chain_of((net.features, net.classifier), x) is None
        assert torch.equal(copied(x), chain(x))


@pytest.mark.parametrize(
    "change",
    [
        lambda net: detach(net[0]),
        lambda net: net.append(nn.Softmax(1)),
        lambda net: net.insert(1, nn.Tanh()),
        lambda net: net.pop(4),
        lambda net: net[0].register_forward_hook(lambda *arguments: None),
        lambda net: net.__setitem__(2, nn.MaxPool2d(3)),
        lambda net: setattr(net[0], "padding_mode", "reflect"),
        lambda net: net.insert(4, nn.Flatten(2)),
    ],
    ids=["float input", "softmax", "tanh", "no flatten", "hook", "pool of 3", "reflect", "flatten of 2"],
)
def test_other_layers_stay_in_float(change):
    """A net with a layer that integers do not compute has no chain, instead of a wrong one."""
    torch.manual_seed(0)
    x = torch.rand(4, 1, 8, 8)
    net = FusedSequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Identity(), nn.Flatten(), nn.Linear(36, 2))
    quantized(net, x)
    assert find_int8_chain((net,)) is not None
    change(net)
    assert find_int8_chain((net,)) is None


def test_errors_are_torchs():
    """An input that does not fit raises the error of torch's layers, as it does in float."""
    torch.manual_seed(0)
    net = FusedSequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    quantized(net, torch.rand(4, 1, 8, 8))
    for wrong in (torch.rand(4, 2, 8, 8), torch.rand(4, 1, 9, 9), torch.rand(4, 1, 2, 2)):
        with torch.no_grad(), pytest.raises(RuntimeError):
            net(wrong)


def test_attached_again():
    """A quantizer that is attached twice counts once."""
    net = nn.Sequential(nn.Linear(4, 2))
    x = torch.rand(3, 4)
    spec = calibrate(net, QuantizationScheme(8, activations="int8"), lambda: net(x))
    apply_quantization(net, {QUANTIZATION_KEY: spec})
    attach(net[0], quantizer_of(net[0]))
    chain = find_int8_chain((net,))
    torch.testing.assert_close(chain(x), net(x).detach(), rtol=1e-5, atol=1e-5)
