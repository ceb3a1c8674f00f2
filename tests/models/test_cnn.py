"""The documented CNN."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from lightkit.models import CNN


def test_layers_and_parameters():
    """The layers are those of the document, in order, with 93,322 parameters."""
    model = CNN()
    layers = [type(layer).__name__ for layer in [*model.features, *model.classifier]]
    assert layers == [
        *("Conv2d", "ReLU", "MaxPool2d", "Conv2d", "ReLU", "MaxPool2d", "Conv2d", "ReLU"),
        *("Flatten", "Linear", "ReLU", "Linear"),
    ]
    assert sum(p.numel() for p in model.parameters()) == 93_322
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert [(c.out_channels, c.kernel_size, c.padding) for c in convolutions] == [
        (32, (3, 3), (0, 0)),
        (64, (3, 3), (0, 0)),
        (64, (3, 3), (0, 0)),
    ]


@pytest.mark.parametrize(("channels", "classes", "size"), [(1, 10, 28), (3, 7, 32), (1, 2, 18), (2, 1, 45)])
def test_any_image_size(channels, classes, size):
    """The dense layers follow the size of the image."""
    assert CNN(channels, classes, size)(torch.randn(4, channels, size, size)).shape == (4, classes)


@pytest.mark.parametrize("shape", [(4, 28, 28), (4, 3, 28, 28), (4, 1, 27, 28), (28, 28)])
def test_wrong_input(shape):
    """An image of another shape is named with what was expected."""
    with pytest.raises(ValueError, match=r"\(N, 1, 28, 28\), got"):
        CNN()(torch.zeros(shape))


@pytest.mark.parametrize("arguments", [{"image_size": 17}, {"in_channels": 0}, {"num_classes": -1}])
def test_wrong_arguments(arguments):
    """A network that cannot be is refused when it is made."""
    with pytest.raises(ValueError, match=next(iter(arguments))):
        CNN(**arguments)


@pytest.mark.parametrize("package", ["models", "nn", "ops", "optim"])
def test_usable_without_lightning(package):
    """Models, losses, optimizers and ops import neither Lightning nor Hydra."""
    script = (
        f"import sys, lightkit.{package}; print(sorted({{'lightning', 'hydra', 'omegaconf'}} & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
