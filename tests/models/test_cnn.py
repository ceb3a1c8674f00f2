"""The documented CNN."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._dynamo.testing import AotEagerAndRecordGraphs
from torch.nn.utils import parametrizations, prune

from lightkit.models import CNN, blocks
from lightkit.ops import conv_relu_pool


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


@pytest.mark.parametrize("arguments", [{"image_size": 17}, {"in_channels": 0}, {"num_classes": -1}, {"blocks": "fast"}])
def test_wrong_arguments(arguments):
    """A network that cannot be is refused when it is made."""
    with pytest.raises(ValueError, match=next(iter(arguments))):
        CNN(**arguments)


def twins(**arguments) -> tuple[CNN, CNN]:
    """A network on fused blocks and one of torch's layers, with the same weights."""
    fused, plain = CNN(**arguments, blocks="fused"), CNN(**arguments, blocks="torch")
    plain.load_state_dict(fused.state_dict())
    return fused, plain


@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 33)])
def test_blocks_agree(channels, size):
    """Fused blocks and torch's layers give the same logits and gradients from one state dict, either way round."""
    torch.manual_seed(0)
    fused, plain = twins(in_channels=channels, image_size=size)
    assert fused.state_dict().keys() == plain.state_dict().keys()
    images, labels = torch.randn(5, channels, size, size), torch.randint(0, 10, (5,))
    losses = []
    for model in (fused, plain):
        losses.append(nn.functional.cross_entropy(model(images), labels))
        losses[-1].backward()
    torch.testing.assert_close(*losses)
    for (name, ours), torchs in zip(fused.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, torchs.grad, rtol=1e-4, atol=1e-5, msg=name)
        assert ours.grad.stride() == ours.stride(), name


def test_fused_blocks_are_used(monkeypatch):
    """The three convolutions go through the operation, with a pool after the first two; as "torch" none does."""
    calls = []

    def recorded(input, weight, bias, padding, pool):
        calls.append(pool)
        return conv_relu_pool(input, weight, bias, padding, pool)

    monkeypatch.setattr(blocks, "conv_relu_pool", recorded)
    fused, plain = twins()
    plain(torch.zeros(1, 1, 28, 28))
    assert calls == []
    fused(torch.zeros(1, 1, 28, 28))
    assert calls == [True, True, False]


def assert_runs_layer_by_layer(monkeypatch, model: CNN) -> None:
    def never(*_):
        raise AssertionError("the fused operation was called")

    monkeypatch.setattr(blocks, "conv_relu_pool", never)
    images = torch.randn(2, 1, 28, 28)
    assert torch.equal(model(images), model.classifier(model.features(images)))


@pytest.mark.parametrize("layer", [0, 1, 2, None])
@pytest.mark.parametrize(
    "kind", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook", "global"]
)
def test_hooks_are_called(monkeypatch, kind, layer):
    """A hook on a layer, on the sequence of layers or on all modules is not passed over."""
    model, called = CNN(), []

    def hook(*_):
        called.append(kind)

    target = model.features if layer is None else model.features[layer]
    register = (
        nn.modules.module.register_module_forward_hook if kind == "global" else getattr(target, f"register_{kind}")
    )
    handle = register(hook)
    try:
        assert_runs_layer_by_layer(monkeypatch, model)
        # torch calls no backward hook for an input that needs no gradient, but warns.
        model(torch.randn(2, 1, 28, 28, requires_grad=True)).sum().backward()
    finally:
        handle.remove()
    assert called


class Doubled(nn.Conv2d):
    """A stand-in for a convolution that does something else."""

    def forward(self, input):
        return 2 * super().forward(input)


def replace(layer: int, module: nn.Module):
    """A change of a network: another module in place of a layer."""
    return lambda model: model.features.__setitem__(layer, module)


@pytest.mark.parametrize(
    "change",
    [
        replace(0, Doubled(1, 32, 3)),
        replace(1, nn.GELU()),
        replace(2, nn.AvgPool2d(2)),
        replace(2, nn.MaxPool2d(3, 2, 1)),
        replace(2, nn.Identity()),
        replace(3, nn.Conv2d(32, 64, 3, padding="same", padding_mode="reflect")),
        replace(6, nn.Conv2d(64, 64, 3, groups=2)),
        lambda model: model.features.append(nn.Dropout(0.0)),
        lambda model: prune.l1_unstructured(model.features[3], "weight", 0.5),
        lambda model: parametrizations.weight_norm(model.features[3]),
        lambda model: setattr(model.features[1], "forward", torch.tanh),
    ],
)
def test_changed_layers_are_respected(monkeypatch, change):
    """What is not a plain block of convolution, ReLU and pool runs as it stands, pruned or parametrized too."""
    model = CNN(image_size=28)
    change(model)
    side = model.features(torch.zeros(1, 1, 28, 28)).shape[-1]
    model.classifier[1] = nn.Linear(64 * side * side, 64)
    assert_runs_layer_by_layer(monkeypatch, model)


def test_a_relu_must_follow(monkeypatch):
    """A convolution without its ReLU at the end is none of the blocks."""
    model = CNN()
    del model.features[7]
    assert_runs_layer_by_layer(monkeypatch, model)


def test_compile_fullgraph():
    """The whole network is one compiled graph, and the fused blocks are in it."""
    torch._dynamo.reset()
    recorder = AotEagerAndRecordGraphs()
    model = CNN()
    images = torch.randn(3, 1, 28, 28)
    compiled = torch.compile(model, fullgraph=True, backend=recorder)
    torch.testing.assert_close(compiled(images), model(images))
    assert recorder.fw_graphs[0].code.count("lightkit._conv_relu_pool_forward") == 3


@pytest.mark.parametrize("package", ["models", "nn", "ops", "optim"])
def test_usable_without_lightning(package):
    """Models, losses, optimizers and ops import neither Lightning nor Hydra."""
    script = (
        f"import sys, lightkit.{package}; print(sorted({{'lightning', 'hydra', 'omegaconf'}} & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
