"""A fused Sequential gives what a plain one gives, whatever its layers are, and passes over nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from lightkit.nn import FusedSequential, can_fuse, fused_sequential
from lightkit.ops import layer_chain


def layers():
    torch.manual_seed(0)
    return [
        nn.Conv2d(2, 8, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.Dropout(0.0),
        nn.Conv2d(8, 4, 3, bias=False),
    ]


@pytest.fixture
def fused(monkeypatch) -> list[nn.Parameter]:
    """The weights that went through the fused operation, in order."""
    weights = []

    def recorded(input, layers):
        weights.extend(layer.weight for layer in layers)
        return layer_chain(input, layers)

    monkeypatch.setattr(fused_sequential, "layer_chain", recorded)
    return weights


def assert_same_as_plain(model: FusedSequential) -> None:
    images = torch.randn(3, 2, 14, 14, generator=torch.Generator().manual_seed(1))
    results = []
    for cls in (FusedSequential, nn.Sequential):
        model.__class__ = cls
        model.zero_grad()
        torch.manual_seed(2)
        x = images.clone().requires_grad_()
        y = model(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in model.parameters())])
        results[-1].append(torch.tensor(y.stride()))
    model.__class__ = FusedSequential
    for own, other in zip(*results, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)


def test_runs_of_layers_are_fused(fused):
    """Convolution, ReLU and pool; convolution and ReLU; not a convolution that no ReLU follows."""
    model = FusedSequential(*layers())
    model(torch.zeros(1, 2, 14, 14))
    assert [w is model[i].weight for w, i in zip(fused, (0, 3), strict=True)] == [True, True]
    assert_same_as_plain(model)


def test_it_is_a_sequential():
    """Names, slices, state dict and class tests are those of torch's."""
    model, plain = FusedSequential(*layers()), nn.Sequential(*layers())
    assert isinstance(model, nn.Sequential) and list(model.state_dict()) == list(plain.state_dict())
    assert type(model[:3]) is FusedSequential and can_fuse(model) and can_fuse(plain)
    assert not can_fuse(nn.Sequential(nn.Conv2d(1, 1, 3), nn.BatchNorm2d(1), nn.ReLU()))
    assert not can_fuse(nn.Sequential())


@pytest.mark.parametrize("layer", [0, 1, 2, None])
@pytest.mark.parametrize(
    "kind", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook", "global"]
)
def test_hooks_are_called(fused, kind, layer):
    """A hook on a layer keeps its block from being fused, one on all modules keeps all; one on the whole is called."""
    model, called = FusedSequential(*layers()), []

    def hook(module, *_):
        called.append(module)

    target = model if layer is None else model[layer]
    register = (
        nn.modules.module.register_module_forward_hook if kind == "global" else getattr(target, f"register_{kind}")
    )
    handle = register(hook)
    try:
        model(torch.randn(2, 2, 14, 14, requires_grad=True)).sum().backward()
    finally:
        handle.remove()
    assert target in called
    assert not any(w is model[0].weight for w in fused) or (layer is None and kind != "global") or layer == 2
    if kind == "global":
        assert fused == [] and len(called) == 8


class Doubled(nn.Conv2d):
    """A stand-in for a convolution that does something else."""

    def forward(self, input):
        return 2 * super().forward(input)


class Viewing(nn.Module):
    """A layer of somebody who knows how their tensors lie in memory."""

    def forward(self, input):
        return input.view(len(input), -1).view(input.shape)


def replace(layer: int, module: nn.Module):
    """A change of a network: another module in place of a layer."""
    return lambda model: model.__setitem__(layer, module)


@pytest.mark.parametrize(
    ("change", "still_fused"),
    [
        (replace(0, Doubled(2, 8, 3)), [3]),
        (replace(1, nn.GELU()), [3]),
        (replace(1, nn.ReLU(inplace=True)), [0, 3]),
        (replace(2, nn.AvgPool2d(2)), [0, 3]),
        (replace(2, nn.MaxPool2d(3, 2, 1)), [0, 3]),
        (replace(2, nn.MaxPool2d((2, 2), (2, 2))), [0, 3]),
        (replace(2, nn.Identity()), [0, 3]),
        (replace(2, Viewing()), [0, 3]),
        (replace(2, nn.Sequential(Viewing())), [0, 3]),
        (replace(5, nn.Dropout(0.5)), [0, 3]),
        (replace(5, nn.RReLU()), [0, 3]),
        (replace(3, nn.Conv2d(8, 8, 3, padding="same", padding_mode="reflect")), [0]),
        (replace(3, nn.Conv2d(8, 8, 3, stride=2, padding=2)), [0]),
        (replace(3, nn.Conv2d(8, 8, 3, groups=2)), [0]),
        (lambda model: model.insert(4, nn.BatchNorm2d(8)), [0]),
        (lambda model: model.append(nn.Sigmoid()), [0, 3]),
        (lambda model: model.append(nn.ReLU()), [0, 3, 6]),
        (lambda model: prune.l1_unstructured(model[3], "weight", 0.5), [0]),
        (lambda model: parametrizations.weight_norm(model[3]), [0]),
        (lambda model: setattr(model[1], "forward", torch.tanh), [3]),
    ],
)
def test_other_layers_run_as_they_stand(fused, change, still_fused):
    """What is not a plain block of convolution, ReLU and pool is not fused, and the others are."""
    model = FusedSequential(*layers())
    change(model)
    model(torch.zeros(1, 2, 14, 14))
    weights = [model[i].weight for i in still_fused]
    assert len(fused) == len(weights) and all(a is b for a, b in zip(fused, weights, strict=True))
    assert_same_as_plain(model)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_format_of_the_result(memory_format):
    """It is that of the input, as with torch's layers: code that takes a view of the result works on."""
    model = FusedSequential(*layers()[:3])
    images = torch.randn(3, 2, 14, 14).contiguous(memory_format=memory_format)
    assert model(images).is_contiguous(memory_format=memory_format)
    if memory_format is torch.contiguous_format:
        assert model(images).view(3, -1).shape == (3, 288)


def test_one_image_without_a_batch():
    """As torch's convolutions, it takes a single image ``(C, H, W)``."""
    model = FusedSequential(*layers())
    image = torch.randn(2, 14, 14)
    torch.testing.assert_close(model(image), model(image.unsqueeze(0)).squeeze(0))


def classifier():
    torch.manual_seed(0)
    return [
        nn.Conv2d(2, 8, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(288, 20),
        nn.ReLU(),
        nn.Linear(20, 5),
    ]


def test_linear_layers_go_with_the_convolutions(fused):
    """The flattened images go on to the linear layers within the operation."""
    model = FusedSequential(*classifier())
    model(torch.zeros(1, 2, 14, 14))
    assert [w is model[i].weight for w, i in zip(fused, (0, 4, 6), strict=True)] == [True] * 3
    assert_same_as_plain(model)


@pytest.mark.parametrize(
    ("change", "still_fused"),
    [
        (lambda model: model.insert(4, nn.Dropout(0.5)), [0]),
        (lambda model: model.insert(6, nn.Dropout(0.5)), [0, 4]),
        (replace(3, nn.Flatten(2)), [0]),
        (replace(4, nn.LazyLinear(20)), [0, 4, 6]),
        (replace(4, nn.Linear(288, 20, bias=False)), [0, 4, 6]),
        (replace(5, nn.Tanh()), [0, 4]),
        (lambda model: parametrizations.weight_norm(model[4]), [0]),
        (lambda model: prune.l1_unstructured(model[6], "weight", 0.5), [0, 4]),
        (lambda model: model[5].register_forward_hook(lambda *_: None), [0, 4]),
        (lambda model: model[6].register_forward_hook(lambda *_: None), [0, 4]),
        (lambda model: model[3].register_forward_hook(lambda *_: None), [0]),
        (lambda model: model.append(nn.ReLU()), [0, 4, 6]),
        (lambda model: model.append(nn.Linear(5, 30_000)), [0, 4, 6]),
    ],
)
def test_other_layers_of_a_classifier_run_as_they_stand(fused, change, still_fused):
    """What is between them, or not of their kind, ends the operation; linear layers do not begin one."""
    model = FusedSequential(*classifier())
    change(model)
    if isinstance(model[3], nn.Flatten) and model[3].start_dim == 2:
        model[4] = nn.Linear(36, 20)
    model(torch.zeros(1, 2, 14, 14))
    fused.clear()
    model(torch.zeros(1, 2, 14, 14))
    weights = [model[i].weight for i in still_fused]
    assert len(fused) == len(weights) and all(a is b for a, b in zip(fused, weights, strict=True))
    # Sums over very many values are no measure.
    if model(torch.zeros(1, 2, 14, 14)).shape[1] < 1000:
        assert_same_as_plain(model)


def test_nested_sequentials(fused):
    """What a Sequential within has goes with what is outside; not where it has a hook, or is a class of its own."""

    class Own(nn.Sequential):
        pass

    convolutions, linear = nn.Sequential(*classifier()[:3]), nn.Sequential(nn.Sequential(*classifier()[3:]))
    model = FusedSequential(convolutions, linear)
    model(torch.zeros(1, 2, 14, 14))
    assert len(fused) == 3 and can_fuse(nn.Sequential(convolutions, linear))
    assert_same_as_plain(model)
    fused.clear()
    called = []
    linear.register_forward_hook(lambda *_: called.append(True))
    model(torch.zeros(1, 2, 14, 14))
    assert len(fused) == 1 and called == [True]
    fused.clear()
    model = FusedSequential(Own(*classifier()[:3]), nn.Sequential(*classifier()[3:]))
    model(torch.zeros(1, 2, 14, 14))
    assert len(fused) == 0
    assert_same_as_plain(model)


def test_linear_layers_alone_run_as_they_stand(fused):
    """They are faster in torch, and take the last dimension of whatever they get."""
    model = FusedSequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    plain = nn.Sequential(*model)
    for shape in ((6,), (2, 3, 6), (2, 3, 4, 6)):
        x = torch.randn(*shape)
        assert torch.equal(model(x), plain(x))
    assert fused == [] and not can_fuse(plain)


class Turned(nn.Module):
    """Channels last, as a recurrent layer takes them."""

    def forward(self, x):
        return x.permute(0, 2, 1)


class First(nn.Module):
    """Of a tuple."""

    def forward(self, values):
        return values[0]


def test_values_that_are_no_tensors():
    """Layers may hand on tuples, and take them."""
    plain = nn.Sequential(
        *layers()[:3], nn.Flatten(2), Turned(), nn.LSTM(8, 5, batch_first=True), First(), nn.Linear(5, 2)
    )
    fused = FusedSequential(*plain)
    x = torch.randn(3, 2, 14, 14)
    torch.testing.assert_close(fused(x), plain(x))
    plain = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.MaxPool2d(2, return_indices=True))
    torch.testing.assert_close(FusedSequential(*plain)(x), plain(x))
    plain = nn.Sequential(First(), *layers()[:3])
    torch.testing.assert_close(FusedSequential(*plain)((x, None)), plain((x, None)))


def as_buffer(model, layer, name):
    tensor = getattr(model[layer], name).detach()
    delattr(model[layer], name)
    model[layer].register_buffer(name, tensor)


def without_bias(model, layer):
    del model[layer].bias
    model[layer].bias = None


@pytest.mark.parametrize(
    ("change", "still_fused"),
    [
        (lambda model: as_buffer(model, 0, "weight"), []),
        (lambda model: as_buffer(model, 0, "bias"), []),
        (lambda model: as_buffer(model, 4, "weight"), [0]),
        (lambda model: without_bias(model, 4), [0]),
        (lambda model: prune.l1_unstructured(model[0], "bias", 0.5), []),
        (lambda model: model[4].compile(backend="eager"), [0]),
    ],
)
def test_parameters_that_are_none(fused, change, still_fused):
    """A weight that is a buffer, or computed, and what was compiled, are for the layer to know about."""
    model = FusedSequential(*classifier())
    change(model)
    x = torch.randn(3, 2, 14, 14)
    torch.testing.assert_close(model(x), nn.Sequential(*model)(x))
    assert len(fused) == len(still_fused)
    assert all(weight is model[i].weight for weight, i in zip(fused, still_fused, strict=True))


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
def test_tracing():
    """torch.jit.trace and torch.fx see torch's layers."""
    model = FusedSequential(*classifier())
    x = torch.randn(3, 2, 14, 14)
    traced = torch.jit.trace(model, x)
    assert "lightkit::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), model(x))
    symbolic = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(symbolic(x), model(x))


def test_autocast_of_half_precision_weights():
    """Autocast casts whatever it is given, as with torch's layers."""
    x = torch.randn(3, 2, 14, 14)
    for weights, dtype in ((torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float16)):
        model = FusedSequential(*classifier()).to(weights)
        with torch.autocast("cpu", dtype):
            output, expected = model(x), nn.Sequential(*model)(x)
        assert output.dtype == expected.dtype == dtype
        torch.testing.assert_close(output, expected, rtol=0.05, atol=0.05)
