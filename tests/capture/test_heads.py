"""Means over the image behind a residual block, and GELU behind linear layers: found however they are written."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from captured import IMAGES, Captured
from programs import Headed
from torch import nn

MEANS = {
    "method": lambda x: x.mean((2, 3)),
    "list of negative dimensions": lambda x: torch.mean(x, [-1, -2]),
    "kept dimensions": lambda x: x.mean(dim=(2, 3), keepdim=True).flatten(1),
    "adaptive function": lambda x: F.adaptive_avg_pool2d(x, 1).view(x.size(0), -1),
    "adaptive module": nn.Sequential(nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten()),
    "window of the image's size": lambda x: F.avg_pool2d(x, x.size()[2:]).flatten(1),
    "module of the image's size": nn.Sequential(nn.AvgPool2d(18), nn.Flatten()),
}


@pytest.mark.parametrize("name", MEANS)
@pytest.mark.parametrize("train", [True, False])
def test_mean_of_the_image(name, train):
    """The global mean behind a residual block joins its batch norm, however it is written."""
    both = Captured(Headed(MEANS[name]))
    both.ours.train(train), both.torchs.train(train)
    for _ in range(2):
        both.check(IMAGES)
    found = [region.operations for region in both.capture.regions if region.replacement is not None]
    assert found == [("conv2d", "batch_norm", "relu"), ("conv2d", "batch_norm", "add", "relu", "mean")]
    both.undo()


@pytest.mark.parametrize(
    "pool",
    [
        lambda x: F.avg_pool2d(x, 9).amax((2, 3)),
        lambda x: F.avg_pool2d(x, 18, divisor_override=300).flatten(1),
        lambda x: F.avg_pool2d(x, 18, padding=1, count_include_pad=False).flatten(1),
        lambda x: x.mean(3).mean(2),
        lambda x: x.mean((2, 3)) + x.amax((2, 3)),
    ],
)
def test_other_means_are_torchs(pool):
    """A mean of windows, with another divisor, with padding, or beside another reader of its input stays torch's."""
    both = Captured(Headed(pool))
    both.check(IMAGES)
    found = [region.operations for region in both.capture.regions if region.replacement is not None]
    assert found[1] == ("conv2d", "batch_norm", "add", "relu")
    both.undo()


class Perceptron(nn.Module):
    """Linear layers with an activation function between them, of vectors or sequences."""

    def __init__(self, function):
        super().__init__()
        self.first, self.function, self.second = nn.Linear(18, 96), function, nn.Linear(96, 5)

    def forward(self, x):
        return self.second(self.function(self.first(x.flatten(1, 2))))


SEQUENCES = IMAGES.repeat(2, 1, 2, 1)


def replaced_gelu(function, images=SEQUENCES) -> list[tuple[str, ...]]:
    """Checks a perceptron on 12 sequences of 36 vectors, and returns the operations that lightkit computed."""
    # The dropout has the calls captured, whatever the function is.
    both = Captured(nn.Sequential(nn.Dropout(0.0), Perceptron(function)))
    for _ in range(2):
        both.check(images)
    both.undo()
    return [region.operations for region in both.capture.regions if region.replacement is not None]


def test_gelu_of_linear_layers():
    """GELU approximated by tanh of many values runs on a kernel, as a module and as a function."""
    assert replaced_gelu(lambda x: F.gelu(x, approximate="tanh")) == [("gelu",)]
    both = Captured(Perceptron(nn.GELU("tanh")))
    both.check(SEQUENCES)
    assert [region.replacement for region in both.capture.regions] == ["lightkit.ops.norm_act"]
    both.undo()


def test_gelu_that_stays_torchs():
    """Torch computes the exact GELU, that of few values, of narrow rows, of views with gaps, and under autocast."""
    assert replaced_gelu(nn.GELU()) == []
    assert replaced_gelu(nn.GELU("tanh"), IMAGES) == []
    tanh = nn.GELU("tanh")
    assert replaced_gelu(nn.Sequential(nn.Unflatten(-1, (3, 32)), tanh, nn.Flatten(-2))) == []
    assert replaced_gelu(lambda x: F.gelu(x.transpose(0, 1), approximate="tanh").transpose(0, 1)) == []
    both = Captured(Perceptron(tanh))
    with torch.autocast("cpu", torch.bfloat16):
        assert both.ours(SEQUENCES).dtype == torch.bfloat16
    assert both.capture.regions == ()
    both.undo()
