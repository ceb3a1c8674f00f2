"""The documented CNN."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._dynamo.testing import AotEagerAndRecordGraphs

from lightkit.models import CNN
from lightkit.nn import fused_sequential
from lightkit.ops import layer_chain


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


@pytest.mark.parametrize(
    ("channels", "classes", "size"),
    [(1, 10, 28), (3, 7, 32), (1, 2, 18), (2, 1, 45), (3, 2, (40, 51)), (1, 3, [18, 90])],
)
def test_any_image_size(channels, classes, size):
    """The dense layers follow the size of the image."""
    height, width = (size, size) if isinstance(size, int) else size
    assert CNN(channels, classes, size)(torch.randn(4, channels, height, width)).shape == (4, classes)


@pytest.mark.parametrize("shape", [(4, 28, 28), (4, 3, 28, 28), (4, 1, 27, 28), (28, 28)])
def test_wrong_input(shape):
    """The error names the shape of the image and the expected one."""
    with pytest.raises(ValueError, match=r"\(N, 1, 28, 28\), got"):
        CNN()(torch.zeros(shape))


@pytest.mark.parametrize(
    "arguments",
    [
        *({"image_size": size} for size in (17, (28, 17), (28,), (28, 28, 3), (28, 28.5), "28", None)),
        *({"in_channels": 0}, {"num_classes": -1}, {"blocks": "fast"}),
    ],
)
def test_wrong_arguments(arguments):
    """The constructor rejects impossible arguments."""
    with pytest.raises(ValueError, match=next(iter(arguments))):
        CNN(**arguments)


def twins(**arguments) -> tuple[CNN, CNN]:
    """Returns a CNN of fused blocks and one of torch's layers with the same weights."""
    fused, plain = CNN(**arguments, blocks="fused"), CNN(**arguments, blocks="torch")
    plain.load_state_dict(fused.state_dict())
    return fused, plain


@pytest.mark.parametrize(("channels", "size"), [(1, (28, 28)), (3, (33, 33)), (3, (40, 51)), (1, (66, 20))])
def test_blocks_agree(channels, size):
    """Fused blocks and torch's layers give the same logits and gradients from one state dict, in both directions."""
    torch.manual_seed(0)
    fused, plain = twins(in_channels=channels, image_size=size)
    assert fused.state_dict().keys() == plain.state_dict().keys()
    images, labels = torch.randn(5, channels, *size), torch.randint(0, 10, (5,))
    losses = []
    for model in (fused, plain):
        losses.append(nn.functional.cross_entropy(model(images), labels))
        losses[-1].backward()
    torch.testing.assert_close(*losses)
    for (name, ours), torchs in zip(fused.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, torchs.grad, rtol=1e-4, atol=1e-5, msg=name)
        assert ours.grad.stride() == ours.stride(), name


def test_fused_blocks_are_used(monkeypatch):
    """One operation runs all layers; with "torch" none does."""
    calls = []

    def recorded(input, layers):
        calls.append([(layer.relu, layer.pool) for layer in layers])
        return layer_chain(input, layers)

    monkeypatch.setattr(fused_sequential, "layer_chain", recorded)
    fused, plain = twins()
    plain(torch.zeros(1, 1, 28, 28))
    assert calls == []
    fused(torch.zeros(1, 1, 28, 28))
    assert calls == [[(True, True), (True, True), (True, False), (True, False), (False, False)]]


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
def test_trace():
    """torch.jit.trace records torch's layers."""
    model, images = CNN(), torch.randn(3, 1, 28, 28)
    torch.testing.assert_close(torch.jit.trace(model, images)(images), model(images))


def test_compile_fullgraph():
    """The whole network is one compiled graph that contains the fused blocks."""
    torch._dynamo.reset()
    recorder = AotEagerAndRecordGraphs()
    model = CNN()
    images = torch.randn(3, 1, 28, 28)
    compiled = torch.compile(model, fullgraph=True, backend=recorder)
    torch.testing.assert_close(compiled(images), model(images))
    assert recorder.fw_graphs[0].code.count("lightkit._layer_chain_forward") == 1


@pytest.mark.parametrize("package", ["models", "nn", "ops", "optim"])
def test_usable_without_lightning(package):
    """Models, losses, optimizers and ops import neither Lightning nor Hydra."""
    script = (
        f"import sys, lightkit.{package}; print(sorted({{'lightning', 'hydra', 'omegaconf'}} & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
