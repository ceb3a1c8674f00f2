"""Calls of modules as people write them: captured, they compute what torch computes, and leave what torch leaves."""

from __future__ import annotations

import copy
import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from captured import IMAGES, Captured
from programs import PROGRAMS, WAYS, Activated, Functions, Layers, Methods, Normalized, Sequences
from torch import nn
from torch.autograd import Function

from lightkit.capture import Capture, capture_calls, chain, is_captured
from lightkit.capture.deferred import Deferred
from lightkit.nn.input_quantizer import InputQuantizer, attach
from lightkit.ops import _thresholds

pytestmark = pytest.mark.filterwarnings("ignore:.*use_reentrant|.*None of the inputs have requires_grad")


@pytest.fixture(autouse=True)
def nothing_stays():
    """Checks that no test leaves a deferred tensor or torch's method replaced."""
    apply = vars(Function)["apply"]
    yield
    gc.collect()
    assert vars(Function)["apply"] is apply
    left = [thing for thing in gc.get_objects() if type(thing) is Deferred]
    assert all(thing.node.kind == "none" for thing in left)


@pytest.mark.parametrize("network", WAYS)
def test_every_way_to_write_a_network_is_one_chain(network):
    """Modules, functions, methods and loops give one call of the chain for all layers, in training and without it."""
    both = Captured(network())
    for _ in range(2):
        both.check(IMAGES)
    both.ours.eval(), both.torchs.eval()
    with torch.no_grad():
        both.check(IMAGES, backward=False)
    (region,) = both.capture.regions
    assert region.replacement == "lightkit.ops.layer_chain" and region.operations[-1] == "linear"
    assert region.operations.count("conv2d") == region.operations.count("max_pool2d") == 2
    both.undo()
    assert not any(map(is_captured, both.ours.modules()))


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("mode", ["train", "eval", "no_grad", "inference"])
def test_any_program(program, mode):
    """Results, gradients, buffers and random state are torch's for code of any kind, call after call."""
    both = Captured(program())
    for network in (both.torchs, both.ours):
        network.train(mode == "train")
    context = {"no_grad": torch.no_grad, "inference": torch.inference_mode}.get(mode, torch.enable_grad)
    with context():
        for _ in range(3):
            both.check(IMAGES, backward=mode in ("train", "eval"))
    both.undo()


ACTIVATIONS = {
    "leaky_relu": nn.LeakyReLU(0.2),
    "leaky_relu in place": nn.LeakyReLU(inplace=True),
    "relu6": nn.ReLU6(inplace=True),
    "relu6 function": lambda x: F.relu6(x),
    "hardtanh": lambda x: F.hardtanh(x, max_val=0.5),
    "elu": nn.ELU(0.5, inplace=True),
    "silu": nn.SiLU(inplace=True),
    "gelu": nn.GELU(),
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "hardswish": nn.Hardswish(inplace=True),
    "hardsigmoid": lambda x: F.hardsigmoid(input=x, inplace=True),
    "tanh": lambda x: x.tanh_(),
    "sigmoid": torch.sigmoid,
    "softplus": nn.Softplus(2, threshold=1),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("train", [True, False])
def test_activation_functions(name, train):
    """Activation functions, in place or not, join a batch norm, a sum and a pool where the kernel is faster."""
    both = Captured(Activated(ACTIVATIONS[name]))
    both.ours.train(train), both.torchs.train(train)
    for _ in range(2):
        both.check(IMAGES)
    found = [region.operations for region in both.capture.regions if region.replacement is not None]
    assert found[0] == ("conv2d", "batch_norm", "activation", "max_pool2d")
    is_slow = name.split()[0] in _thresholds.SLOW_ACTIVATIONS
    assert found[1] == ("conv2d", "batch_norm", "add", *(() if is_slow else ("activation",)))
    is_pooled = name.split()[0] in _thresholds.POOLED_ACTIVATIONS
    assert found[2] == ("conv2d", *(("activation", "max_pool2d") if is_pooled else ()))
    both.undo()


def test_arguments_of_activation_functions():
    """Arguments that torch refuses, or that no kernel takes, are torch's, with torch's error."""

    class Odd(Layers):
        def forward(self, x):
            x = self.conv1(x)
            try:
                F.hardtanh(x, 1.0, -1.0)
            except ValueError as error:
                self.message = str(error)
            x = F.softplus(F.elu(F.leaky_relu(self.conv1.bias.sum() * x, -0.1), -1.0), -2.0)
            return self.head(self.pool(F.gelu(self.conv2(self.pool(x)), approximate="none")).flatten(1))

    both = Captured(Odd())
    both.check(IMAGES)
    assert both.ours.message == both.torchs.message
    both.undo()


def test_sequences():
    """Convolutions and batch norms of sequences run on the kernels of images; values that are seen are contiguous."""
    both = Captured(Sequences())
    for _ in range(2):
        both.check(IMAGES)
    found = [region.operations for region in both.capture.regions if region.replacement is not None]
    assert found[0] == ("conv1d", "batch_norm", "relu")
    assert found[1] == ("conv1d", "batch_norm", "add", "activation")
    assert both.ours.stride == both.torchs.stride
    assert "conv1" in both.replaced()
    both.undo()


@pytest.mark.parametrize("network", [Functions, Methods])
def test_rounded_inputs_stay_in_the_chain(network):
    """Layers whose inputs are rounded to 8 bits are still one call, which saturates and rounds as torch does.

    In float64 no sum is so near to the middle of two levels that the order of additions decides.
    """
    network = network().double()
    for layer, scale in ((network.conv1, 0.02), (network.conv2, 0.004), (network.head, 0.002)):
        attach(layer, InputQuantizer(scale, 128 if layer is network.conv1 else 0))
    both = Captured(network)
    for _ in range(2):
        both.check(IMAGES.double())
    (region,) = both.capture.regions
    assert region.replacement == "lightkit.ops.layer_chain" and region.operations.count("quantize") == 2
    assert region.operations[-1] == "linear" and region.operations.count("conv2d") == 2
    both.undo()


def test_a_chain_ends_with_a_rounding(monkeypatch):
    """The flattened input of a linear layer that torch computes has its two dimensions."""
    monkeypatch.setattr(_thresholds, "MAX_LINEAR_WEIGHTS", 0)
    network = Functions().double()
    attach(network.head, InputQuantizer(0.002))
    both = Captured(network)
    both.check(IMAGES.double())
    assert [region.operations[-1] for region in both.capture.regions if region.replacement] == ["quantize"]
    both.undo()


def test_shapes_change():
    """Batches of other sizes share a plan; images of other sizes have one of their own; plans are bounded."""

    class Convolutional(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3)

        def forward(self, x):
            return F.max_pool2d(F.relu(self.conv(x)), 2).mean((2, 3))

    both = Captured(Convolutional())
    for batch in (6, 1, 5):
        both.check(IMAGES[:batch])
    assert len(both.capture._plans) == 1
    for size in range(4, 18):
        both.check(IMAGES[:, :, :size])
    assert len(both.capture._plans) == 15
    both.check(IMAGES[:0])
    both.undo()


def test_hooks_are_called():
    """Hooks of modules, of tensors and of all modules see what torch shows them, forward and backward."""
    both, seen = Captured(Functions()), []

    def forward(module, args, output):
        seen.append((type(module).__name__, tuple(output.shape), round(float(output.sum()), 3)))

    def before(module, args):
        return (args[0] * 2,)

    def backward(module, grad_input, grad_output):
        seen.append((type(module).__name__, tuple(grad_output[0].shape)))

    results = []
    for network in (both.torchs, both.ours):
        seen.clear()
        handles = [
            network.pool.register_forward_hook(forward),
            network.conv1.register_forward_hook(forward),
            network.conv2.register_forward_pre_hook(before),
            network.conv2.register_full_backward_hook(backward),
            nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__)),
        ]
        network(IMAGES).sum().backward()
        for handle in handles:
            handle.remove()
        results.append((list(seen), [p.grad for p in network.parameters()]))
    assert results[0][0] == results[1][0]
    torch.testing.assert_close(results[0][1], results[1][1])
    both.undo()


def test_gradient_of_a_value_inside():
    """retain_grad, a hook of a tensor and torch.autograd.grad within forward find the value's place in the graph."""

    class Inside(Layers):
        def forward(self, x):
            inside = F.relu(self.conv1(x))
            inside.retain_grad()
            inside.register_hook(lambda gradient: gradient * 3)
            self.inside = inside
            (self.own,) = torch.autograd.grad(self.pool(inside).sum(), self.conv1.weight, retain_graph=True)
            return self.head(self.pool(F.relu(self.conv2(self.pool(inside)))).flatten(1))

    both = Captured(Inside())
    both.check(IMAGES)
    torch.testing.assert_close(both.ours.inside.grad, both.torchs.inside.grad)
    torch.testing.assert_close(both.ours.own, both.torchs.own)
    both.undo()


def test_transforms_see_torch():
    """functional_call, vmap, grad and jvp of torch.func, a trace and a dispatch mode get torch's layers."""
    both = Captured(Functions())
    parameters = {name: p.detach() for name, p in both.ours.named_parameters()}

    def loss(network, parameters, x):
        return torch.func.functional_call(network, parameters, (x,)).square().mean()

    for transform in (
        lambda f: torch.func.grad(f)(parameters, IMAGES),
        lambda f: torch.func.vmap(f, in_dims=(None, 0))(parameters, IMAGES[:, None]),
        lambda f: torch.func.jvp(lambda x: f(parameters, x), (IMAGES,), (IMAGES,)),
        lambda f: f({name: p * 2 for name, p in parameters.items()}, IMAGES),
    ):
        results = [transform(lambda p, x, network=network: loss(network, p, x)) for network in (both.torchs, both.ours)]
        torch.testing.assert_close(results[1], results[0])
    assert "lightkit" not in str(torch.jit.trace(both.ours, IMAGES).graph)
    both.undo()


def test_second_derivative():
    """The gradient of a gradient is torch's."""
    both, found = Captured(Functions()), []
    for network in (both.torchs, both.ours):
        x = IMAGES.double().requires_grad_()
        (first,) = torch.autograd.grad(network.double()(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), list(network.parameters())[:2]))
    torch.testing.assert_close(found[0], found[1])
    both.undo()


def test_errors_are_torchs():
    """An error has torch's class and message, in the line of the program, and the next call works."""

    class Wrong(Layers):
        width = 3

        def forward(self, x):
            x = F.relu(self.conv1(x))
            try:
                x = F.conv2d(x, self.conv1.weight)
            except RuntimeError as error:
                self.message = str(error)
            x = self.pool(F.relu(self.conv2(self.pool(x))))
            return self.head(x.view(x.shape[0], -1)[:, : self.width])

    both = Captured(Wrong())
    for network in (both.torchs, both.ours):
        with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
            network(IMAGES)
        network.width = 144
    both.check(IMAGES)
    assert both.ours.message == both.torchs.message
    both.undo()


def test_a_value_survives_an_error():
    """A program that keeps a value of a call that failed can still compute with it."""

    class Failing(Layers):
        def forward(self, x):
            self.kept = F.relu(self.conv1(x))
            raise KeyError("of the program")

    network = Failing()
    expected = F.relu(network.conv1(IMAGES))
    undo = capture_calls(network, Capture())
    for _ in range(2):
        with pytest.raises(KeyError, match="of the program"):
            network(IMAGES)
        torch.testing.assert_close(network.kept, expected)
    undo()


def test_code_that_modes_do_not_see_is_left_alone():
    """A module whose code hands a tensor to C++ is torch's from the first call on; nothing of that call stays."""

    class Escaping(Normalized):
        def forward(self, x):
            x = F.relu(self.conv1(x))
            with torch._C.DisableTorchFunction():
                x = x * 2
            return super().forward(x[:, :1])

    both = Captured(Escaping())
    for _ in range(2):
        both.check(IMAGES)
    assert "EscapeError" in both.ours._compiled_call_impl.reason
    both.undo()


def test_skipped_modules_are_torchs():
    """A module that is skipped runs on torch, with those in it, and so do neighbours that are not its business."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2))
            self.second = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.MaxPool2d(2))

        def forward(self, x):
            return self.second(self.first(x))

    both = Captured(Two(), skip=lambda name: name == "first")
    both.check(IMAGES)
    assert both.replaced() == ["second.0"]
    both.undo()


def test_copies_and_threads():
    """A copy made within a run is torch's; a call in another thread is captured in that thread."""
    both = Captured(Methods())
    copied = copy.deepcopy(both.ours)
    assert not any(map(is_captured, copied.modules())) and any(map(is_captured, both.ours.modules()))
    torch.testing.assert_close(copied(IMAGES), both.ours(IMAGES))
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda _: both.ours(IMAGES), range(8)))
    torch.testing.assert_close(results, [copied(IMAGES)] * 8)
    both.undo()


def test_a_wrong_kernel_is_found(monkeypatch):
    """A chain that is slightly wrong, in outputs or in gradients alone, is left to torch, with the figures."""
    right = chain.run_kernel

    def wrong_output(x, *layers):
        return right(x, *layers) * (1 + 1e-4)

    def wrong_gradient(x, *layers):
        y = right(x, *layers)
        return y.detach() + 1.001 * (y - y.detach())

    for wrong in (wrong_output, wrong_gradient):
        monkeypatch.setattr(chain, "run_kernel", wrong)
        both = Captured(Functions())
        both.check(IMAGES)
        (region, *_) = both.capture.regions
        assert region.replacement is None and "more than twice torch's" in region.reason
        both.undo()


def test_layers_of_channels_last_networks():
    """A network in channels-last gives channels-last values, as torch does."""

    class Formats(Layers):
        def forward(self, x):
            x = self.pool(F.relu(self.conv1(x)))
            self.format = x.is_contiguous(), x.is_contiguous(memory_format=torch.channels_last)
            return F.relu(self.conv2(x)).mean((2, 3))

    for memory_format in (torch.contiguous_format, torch.channels_last):
        both = Captured(Formats().to(memory_format=memory_format))
        both.check(IMAGES.expand(6, 1, 18, 18).to(memory_format=memory_format))
        both.undo()
        assert both.ours.format == both.torchs.format
