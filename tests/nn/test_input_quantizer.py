"""The rounding of a layer's input: its ranges, and that the chain of layers rounds as the layers one by one."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightkit.nn import FusedSequential
from lightkit.nn.input_quantizer import InputQuantizer, affine, attach, detach, quantizer_of


class Ops(TorchDispatchMode):
    """The names of the operations that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def layers():
    torch.manual_seed(0)
    return [
        *(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(16 * 9, 12), nn.ReLU(), nn.Linear(12, 3)),
    ]


def observed(net, x):
    """The net with quantizers that have seen ``x``, and saturate a little."""
    for layer in net:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            attach(layer, InputQuantizer())
            quantizer_of(layer).is_observing = True
    net.train()
    net(x)
    for layer in net:
        if (quantizer := quantizer_of(layer)) is not None:
            quantizer.freeze()
            quantizer.scale = float(torch.tensor(0.7 * quantizer.scale))
    return net


@pytest.mark.parametrize("signed", [False, True])
def test_chain_rounds_as_the_layers(signed):
    """One operation computes all layers, with the values and gradients of torch's layers and hooks."""
    fused, plain = FusedSequential(*layers()).double(), nn.Sequential(*layers()).double()
    x = torch.rand(4, 1, 12, 12, dtype=torch.float64) - (0.5 if signed else 0)
    observed(plain, x)
    for mine, theirs in zip(fused, plain, strict=True):
        if (quantizer := quantizer_of(theirs)) is not None:
            attach(mine, copy.copy(quantizer))
    outputs, gradients = [], []
    for module in (fused, plain):
        output = module(x)
        outputs.append(output)
        gradients.append(torch.autograd.grad(output.square().sum(), list(module.parameters())))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_one_operation():
    """Rounding does not cut the chain: the convolutions do not run one by one."""
    net = observed(FusedSequential(*layers()), torch.rand(4, 1, 12, 12))
    with Ops() as ops:
        net(torch.rand(4, 1, 12, 12))
    assert not any("convolution" in name or "addmm" in name for name in ops.names)


def test_other_hooks_run():
    """A hook of the user's beside a quantizer is still called, and sees the rounded input."""
    net, seen = observed(FusedSequential(*layers()), torch.rand(4, 1, 12, 12)), []
    net[3].register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    net(torch.rand(4, 1, 12, 12))
    levels = seen[0] / quantizer_of(net[3]).scale
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)


def test_only_training_is_observed():
    """Validation data do not change a range: nothing is recorded in evaluation, or without gradients."""
    layer, quantizer = nn.Linear(2, 2), InputQuantizer()
    attach(layer, quantizer)
    quantizer.is_observing = True
    layer.eval()(torch.full((1, 2), 9.0))
    with torch.no_grad():
        layer.train()(torch.full((1, 2), 9.0))
    layer(torch.tensor([[-1.0, 3.0]]))
    layer(torch.tensor([[-3.0, 1.0]]))
    layer(torch.tensor([[float("nan"), 1.0]]))
    quantizer.freeze()
    # The means of the extremes are -2 and 2.
    assert quantizer.scale == pytest.approx(4 / 255, rel=1e-6) and quantizer.zero_point == 127


@given(low=st.floats(-1e30, 1e30), high=st.floats(-1e30, 1e30))
def test_range_has_zero(low, high):
    """0 has a level of its own, since padding and ReLU make zeros, and both ends are within half a level."""
    low, high = min(low, high), max(low, high)
    scale, zero_point = affine(low, high)
    assert scale > 0 and 0 <= zero_point <= 255
    # The slack is that of a scale in float32.
    slack = 0.51 * scale + 1e-6 * max(abs(low), abs(high))
    assert -zero_point * scale <= min(low, 0) + slack and (255 - zero_point) * scale >= max(high, 0) - slack
    if low >= 0:
        assert zero_point == 0


def test_without_a_range():
    """A layer whose quantizer has seen nothing computes as before; so does a detached one, and integers pass."""
    layer, x = nn.Linear(2, 2), torch.rand(1, 2)
    expected = layer(x)
    attach(layer, InputQuantizer())
    assert torch.equal(layer(x), expected)
    attach(layer, InputQuantizer(0.5))
    assert len(layer._forward_pre_hooks) == 1 and not torch.equal(layer(x), expected)
    detach(layer)
    assert torch.equal(layer(x), expected) and quantizer_of(layer) is None
    embedding = nn.Embedding(4, 2)
    attach(embedding, InputQuantizer(0.5))
    assert torch.equal(embedding(torch.tensor([3])), embedding.weight[3:])


def test_exported():
    """torch.export records the rounding in torch's operations, for runtimes without lightkit."""
    net = observed(FusedSequential(*layers()), torch.rand(4, 1, 12, 12)).eval()
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(net, (torch.rand(2, 1, 12, 12),), dynamic_shapes=({0: batch},))
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum("aten.round" in name for name in names) == 4 and all(name.startswith("aten.") for name in names)
    x = torch.rand(5, 1, 12, 12)
    torch.testing.assert_close(program.module()(x), net(x), rtol=0, atol=0.02)
