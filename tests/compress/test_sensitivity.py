"""The bits of each weight by its measured sensitivity: the layer that matters least loses its bits first."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightkit.compress import QuantizationScheme
from lightkit.compress.calibration import Calibration
from lightkit.compress.sensitivity import measure_losses, order_of_bits
from lightkit.errors import ConfigError
from lightkit.models import CNN


def test_the_layer_that_matters_less_goes_first():
    """A layer whose outputs the next one hardly reads loses all its bits before the others lose one."""
    torch.manual_seed(0)
    net = nn.ModuleDict({"faint": nn.Linear(16, 16), "loud": nn.Linear(16, 16)})
    x = torch.randn(256, 16)

    def forward():
        return 1e-3 * net["faint"](x) + net["loud"](x)

    wanted = forward().detach()
    before = {name: p.clone() for name, p in net.named_parameters()}
    formats = QuantizationScheme(2, edge_bits=2, group_size=0).formats(net)
    calibration = Calibration(net, QuantizationScheme(8), forward, 2)
    losses = measure_losses(net, calibration, formats, lambda: float((forward() - wanted).square().mean()))
    assert all(torch.equal(before[name], p) for name, p in net.named_parameters())
    assert losses["loud.weight"][8] == 0 and losses["loud.weight"][2] > losses["loud.weight"][4] > 0
    order = order_of_bits(losses, {"faint.weight": 256, "loud.weight": 256})
    assert order[0] == {"faint.weight": 8, "loud.weight": 8} and order[-1] == {"faint.weight": 2, "loud.weight": 2}
    faint_is_done = order.index({"faint.weight": 2, "loud.weight": 8})
    assert all(bits["loud.weight"] == 8 for bits in order[:faint_is_done])
    totals = [sum(bits.values()) for bits in order]
    assert totals == sorted(totals, reverse=True) and len(set(totals)) == len(totals)


def test_large_weights_first():
    """Of the same loss, the weight that saves more bytes goes first."""
    losses = {"small": {8: 0.0, 4: 1.0, 3: 2.0, 2: 3.0}, "large": {8: 0.0, 4: 1.0, 3: 2.0, 2: 3.0}}
    order = order_of_bits(losses, {"small": 10, "large": 1000})
    assert order[1] == {"small": 8, "large": 4} and order[3] == {"small": 8, "large": 2}


def test_a_loss_without_bound_comes_last():
    """A rounding after which the loss is not finite waits for the end, and leaves no NaN in the comparison."""
    losses = {"a": {8: 0.0, 4: float("inf"), 3: float("inf"), 2: float("inf")}, "b": {8: 0.0, 4: 9.0, 3: 9.0, 2: 9.0}}
    order = order_of_bits(losses, {"a": 1, "b": 1})
    assert order[-1] == {"a": 4, "b": 2} and order[-2] == {"a": 8, "b": 2}


def test_bits_by_patterns():
    """Patterns choose the bits of weights, the last one that matches decides, and edges need no exception."""
    scheme = QuantizationScheme(8, layers={"features.*": 4, "features.3": 2})
    formats = scheme.formats(CNN())
    found = {name: value.bits for name, value in formats.items()}
    assert found == {
        "features.0.weight": 4,
        "features.3.weight": 2,
        "features.6.weight": 4,
        "classifier.1.weight": 8,
        "classifier.3.weight": 8,
    }
    assert scheme.least_bits == 2


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ({"features.3": 5}, "layers must have one of 2, 3, 4, 8 for each pattern"),
        ({3: 4}, "layers must have one of"),
        ([4], "layers must have bits by patterns"),
    ],
)
def test_wrong_patterns(layers, expected):
    """A value that is no mapping from patterns to bits is one line."""
    with pytest.raises(ConfigError, match=expected):
        QuantizationScheme(8, layers=layers)


def test_a_pattern_without_a_weight():
    """A pattern that matches nothing is an error with the nearest names, and no silence."""
    with pytest.raises(ConfigError, match=r"'feature.3' matches no parameter or module.*features.3"):
        QuantizationScheme(8, layers={"feature.3": 4}).formats(CNN())
