"""The choice of units: the least important for their cost go first, until the multiply-adds are few enough."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from lightkit.compress.importance import squared_derivatives
from lightkit.compress.selection import choose_units, smallest_macs
from lightkit.compress.surgery import remove_units
from lightkit.compress.tracing import trace


def traced(*sizes):
    """Returns linear layers of the given sizes with ReLUs in between, their graph, and inputs."""
    torch.manual_seed(0)
    layers = [layer for pair in itertools.pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
    net, x = nn.Sequential(*layers[:-1]), torch.randn(16, sizes[0])
    return net, trace(net, [x]), x


def test_least_important_first():
    """Of equal cost, the units with the least importance are removed, and no more than needed."""
    _, graph, _ = traced(8, 10, 2)
    importance = torch.tensor([5.0, 1, 7, 2, 9, 3, 8, 4, 6, 10, 0, 0])[: graph.count]
    removed = choose_units(graph, importance, 0.6 * graph.macs())
    assert removed.nonzero().flatten().tolist() == [1, 3, 5, 7]
    assert graph.macs(removed) == 0.6 * graph.macs()


def test_cost_counts():
    """Of equal importance, the units of the layer that takes more multiply-adds are removed."""
    _, graph, _ = traced(64, 16, 16, 2)
    removed = choose_units(graph, torch.ones(graph.count), 0.8 * graph.macs())
    first, second = (sum(bool(removed[u]) for u in group.units) for group in graph.groups)
    assert first > 0 and second == 0


def test_a_layer_keeps_some():
    """A layer without importance keeps a sixteenth of its units."""
    _, graph, _ = traced(64, 32, 16, 2)
    importance = torch.ones(graph.count)
    importance[list(graph.groups[0].units)] = 0
    removed = choose_units(graph, importance, 0.0)
    assert [sum(not bool(removed[u]) for u in group.units) for group in graph.groups] == [2, 1]
    assert graph.macs(removed) == smallest_macs(graph)


@pytest.mark.parametrize("target", [0.8, 0.5, 0.3])
def test_multiples(target):
    """Wide layers keep a multiple, or a half more; narrow ones any number. The target holds."""
    net, graph, _ = traced(40, 50, 64, 20, 2)
    torch.manual_seed(1)
    removed = choose_units(graph, torch.rand(graph.count), target * graph.macs(), multiple=16)
    remove_units(net, graph, removed)
    widths = [layer.out_features for layer in net if isinstance(layer, nn.Linear)]
    assert all(width % 8 == 0 or width == dense for width, dense in zip(widths[:2], (50, 64), strict=True))
    assert graph.macs(removed) <= target * graph.macs()
    assert smallest_macs(graph, 16) >= smallest_macs(graph)


def test_what_multiples_leave_unused():
    """Halves of a multiple come back where they fit, the most important units first."""
    _, graph, _ = traced(64, 64, 2)
    importance = torch.arange(graph.count, dtype=torch.float32)
    # 26.5 hidden units fit: 16 of them as a multiple, and 8 more.
    removed = choose_units(graph, importance, 26.5 * 66, multiple=16)
    kept = [unit for unit in graph.groups[0].units if not bool(removed[unit])]
    assert kept == list(graph.groups[0].units)[-24:]
    assert graph.macs(removed) == 24 * 66


def test_importance_is_the_derivative():
    """The importance of a unit is the squared derivative of the loss by a factor on its output."""
    net, graph, x = traced(5, 6, 4, 3)
    net(x).square().mean().backward()
    found = squared_derivatives(net, graph)
    factors = torch.ones(6, requires_grad=True)
    hidden = net[1](net[0](x)) * factors
    net[4](net[3](net[2](hidden))).square().mean().backward()
    torch.testing.assert_close(found[list(graph.groups[0].units)], factors.grad.square())


def test_importance_of_recurrent_units():
    """The derivative by a factor on a recurrent unit's state counts each step that reads it."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.core, self.head = nn.RNN(2, 4, batch_first=True), nn.Linear(4, 1)

        def forward(self, x):
            return self.head(self.core(x)[1][-1])

    net, x = Net().double(), torch.randn(3, 5, 2, dtype=torch.float64)
    graph = trace(net, [x])
    net(x).square().mean().backward()
    found = squared_derivatives(net, graph)
    factors = torch.ones(4, dtype=torch.float64, requires_grad=True)
    state = torch.zeros(3, 4, dtype=torch.float64)
    core = net.core
    for step in range(5):
        inputs = x[:, step] @ core.weight_ih_l0.T + core.bias_ih_l0 + core.bias_hh_l0
        state = torch.tanh(inputs + (state * factors) @ core.weight_hh_l0.T)
    net.head(state * factors).square().mean().backward()
    torch.testing.assert_close(found[list(graph.groups[0].units)].double(), factors.grad.square(), rtol=1e-5, atol=0)
