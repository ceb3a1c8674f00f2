"""Layers one after the other in one op: against the layers one by one, in float64 and float32, and autograd."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import lightkit.native
from lightkit.ops import ChainLayer, conv_relu_pool, layer_chain, layer_chain_reference
from lightkit.ops.layer_chain import is_faster

# For torch.ops.lightkit.
lightkit.native.load()


def native(input, layers):
    """The op itself."""
    settings = [number for layer in layers for number in (*layer.padding, layer.relu, layer.pool)]
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    return torch.ops.lightkit.layer_chain(input, weights, biases, settings)


def make(input_shape, plan, dtype=torch.float32, images=3, seed=0):
    """Input and layers of a plan, with sums of about 1.

    The plan has (channels, kernel, padding, pool, relu, bias) of a convolution, (features, relu, bias) of a linear one.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    input, layers = draw(images, *input_shape).to(dtype), []
    channels, *size = input_shape
    for step in plan:
        if len(step) == 3:
            out, relu, bias = step
            fan_in = channels * (size[0] * size[1] if size else 1)
            weight, padding, pool = draw(out, fan_in), (0, 0), False
            size = []
        else:
            out, kernel, padding, pool, relu, bias = step
            fan_in = channels * kernel[0] * kernel[1]
            weight = draw(out, channels, *kernel)
            size = [s + 2 * p - k + 1 for s, p, k in zip(size, padding, kernel, strict=True)]
            size = [s // 2 for s in size] if pool else size
            if min(size) < 1:
                raise ValueError("nothing is left of the images")
        weight = (weight * fan_in**-0.5).to(dtype)
        layers.append(ChainLayer(weight, draw(out).mul(0.3).to(dtype) if bias else None, padding, relu, pool))
        channels = out
    return input, layers


def leaves_of(input, layers):
    """Copies of all tensors that want gradients, and the layers of these."""
    input = input.detach().clone().requires_grad_()
    layers = [
        layer._replace(
            weight=layer.weight.detach().clone().requires_grad_(),
            bias=None if layer.bias is None else layer.bias.detach().clone().requires_grad_(),
        )
        for layer in layers
    ]
    tensors = [input, *(layer.weight for layer in layers), *(x.bias for x in layers if x.bias is not None)]
    return input, layers, tensors


def results(function, input, layers):
    """Output and gradients of a sum of it, weighted differently everywhere."""
    input, layers, tensors = leaves_of(input, layers)
    output = function(input, layers)
    upstream = torch.arange(output.numel()).reshape(output.shape).mul(0.7).cos()
    return [output, *torch.autograd.grad(output, tensors, upstream.to(output.dtype))]


CNN = [
    (32, (3, 3), (0, 0), True, True, True),
    (64, (3, 3), (0, 0), True, True, True),
    (64, (3, 3), (0, 0), False, True, True),
    (64, True, True),
    (10, False, True),
]
PADDED = [
    (16, (3, 3), (1, 1), True, True, True),
    (17, (3, 3), (1, 1), True, True, False),
    (8, (5, 3), (2, 0), False, True, True),
    (9, (2, 2), (0, 1), True, False, True),
]
LINEAR = [(7, True, True), (33, False, False), (5, True, True)]
PLANS = {"cnn": ((1, 28, 28), CNN), "padded": ((3, 19, 16), PADDED), "linear": ((20,), LINEAR)}


@pytest.mark.parametrize("images", [1, 2, 3, 33, 200])
@pytest.mark.parametrize("name", PLANS)
def test_float64(name, images):
    """Values and gradients are those of torch's layers: of one image, of less than a piece of work, and of many."""
    input, layers = make(*PLANS[name], torch.float64, images)
    for actual, expected in zip(
        results(native, input, layers), results(layer_chain_reference, input, layers), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


STEPS = st.one_of(
    st.tuples(
        st.integers(1, 20),
        st.tuples(st.integers(1, 4), st.integers(1, 7)),
        st.tuples(st.integers(0, 2), st.integers(0, 2)),
        st.booleans(),
        st.booleans(),
        st.booleans(),
    ),
    st.tuples(st.integers(1, 40), st.booleans(), st.booleans()),
)


@given(
    channels=st.integers(1, 18),
    size=st.tuples(st.integers(3, 14), st.integers(3, 14)),
    plan=st.lists(STEPS, min_size=1, max_size=5),
    images=st.integers(1, 9),
    seed=st.integers(0, 1000),
)
def test_any_chain_in_float64(channels, size, plan, images, seed):
    """Whatever the layers: those of torch. A convolution does not come after a linear layer."""
    plan = sorted(plan, key=lambda step: len(step) == 3)
    try:
        input, layers = make((channels, *size), plan, torch.float64, images, seed)
    except ValueError:
        assume(False)
    for actual, expected in zip(
        results(native, input, layers), results(layer_chain_reference, input, layers), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["cnn", "padded"])
def test_float32_is_the_layers_one_by_one(name):
    """To the bit what its layers compute alone, which test_conv_relu_pool.py compares with float64."""

    def one_by_one(input, layers):
        x = input
        for layer in layers:
            x = native(x, [layer])
        return x

    shape, plan = PLANS[name]
    # Flattened, a linear layer adds up in another order.
    input, layers = make(shape, [step for step in plan if len(step) > 3], images=37)
    for chained, alone in zip(results(native, input, layers), results(one_by_one, input, layers), strict=True):
        assert torch.equal(chained, alone)


@pytest.mark.parametrize(
    ("features", "out", "image"), [(1, 1, None), (15, 16, None), (17, 33, None), (36, 70, (6, 6)), (320, 64, (2, 5))]
)
@pytest.mark.parametrize("relu", [True, False])
def test_linear_layer_against_float64(features, out, image, relu):
    """A linear layer, of values or of an image, is as accurate as torch's but for a few roundings."""
    shape = (features,) if image is None else (features // (image[0] * image[1]), *image)
    input, layers = make(shape, [(out, relu, True)], images=19)
    ours, torchs = results(native, input, layers), results(layer_chain_reference, input, layers)
    double = [layer._replace(weight=layer.weight.double(), bias=layer.bias.double()) for layer in layers]
    truth = results(layer_chain_reference, input.double(), double)
    for own, other, exact in zip(ours, torchs, truth, strict=True):
        eps = torch.finfo(torch.float32).eps
        assert (own - exact).abs().max() <= (other - exact).abs().max() + 16 * eps * (exact.abs().max() + 1)


@pytest.mark.parametrize("wanted", range(1, 32))
def test_requires_grad_of_some(wanted):
    """Each gradient is there if and only if it is wanted, and is the same whatever else is."""
    shape, plan = PLANS["padded"]
    input, layers = make(shape, plan[:2] + [(6, True, True)])
    everything = results(native, input, layers)[1:]
    input, layers, tensors = leaves_of(input, layers)
    # Input, first weight, second weight, linear weight and the last bias, in all combinations.
    chosen = [0, 1, 2, 3, len(tensors) - 1]
    for tensor in tensors:
        tensor.requires_grad_(False)
    for bit, place in enumerate(chosen):
        tensors[place].requires_grad_(bool(wanted >> bit & 1))
    output = native(input, layers)
    output.backward(torch.arange(output.numel()).reshape(output.shape).mul(0.7).cos())
    for place, tensor in enumerate(tensors):
        assert (tensor.grad is not None) == tensor.requires_grad
        if tensor.requires_grad:
            assert torch.equal(tensor.grad, everything[place])


def test_no_grad_gives_the_same():
    """Inference keeps nothing and gives the same bits, with padding between the layers too."""
    for name in PLANS:
        input, layers = make(*PLANS[name], images=70)
        with torch.inference_mode():
            inferred = native(input, layers)
        assert torch.equal(results(native, input, layers)[0], inferred)


def test_only_wanted_gradients_are_made():
    """The others have no elements."""
    input, layers = make(*PLANS["cnn"], images=4)
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    settings = [number for layer in layers for number in (*layer.padding, layer.relu, layer.pool)]
    output, activations, argmax = torch.ops.lightkit._layer_chain_forward(input, weights, biases, settings, True)
    wanted = [0] * 11
    wanted[5] = 1
    gradients = torch.ops.lightkit._layer_chain_backward(
        torch.ones_like(output), input, weights, activations, argmax, settings, wanted
    )
    assert [gradient.numel() for gradient in gradients] == [0] * 5 + [640] + [0] * 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    """Rounded once: nearer to float64 than torch's layers, each of which rounds."""
    input, layers = make(*PLANS["cnn"], dtype, images=16)
    double = [layer._replace(weight=layer.weight.double(), bias=layer.bias.double()) for layer in layers]
    exact = layer_chain_reference(input.double(), double)
    output = native(input, layers)
    assert output.dtype == dtype
    assert (output - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()
    for gradient, tensor in zip(results(native, input, layers)[1:], leaves_of(input, layers)[2], strict=True):
        assert gradient.dtype == dtype and gradient.shape == tensor.shape and gradient.isfinite().all()
    with torch.autocast("cpu", dtype):
        singles = [layer._replace(weight=layer.weight.float(), bias=layer.bias.float()) for layer in layers]
        assert torch.equal(layer_chain(input.float(), singles), output)


def test_empty_batch():
    """No image: an empty output, and gradients that are 0."""
    for name in PLANS:
        input, layers = make(*PLANS[name], images=0)
        for actual, expected in zip(
            results(native, input, layers), results(layer_chain_reference, input, layers), strict=True
        ):
            torch.testing.assert_close(actual, expected)


def test_memory_format():
    """Images come out as channels-last, linear layers' values dense, whatever goes in."""
    input, layers = make(*PLANS["padded"])
    expected = native(input, layers)
    assert expected.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(native(input.contiguous(memory_format=torch.channels_last), layers), expected)
    input, layers = make(*PLANS["cnn"])
    assert native(input, layers).is_contiguous()
    input, layers = make(*PLANS["linear"])
    assert torch.equal(native(input.t().contiguous().t(), layers), native(input, layers))


def test_same_tensor_in_two_places():
    """A weight that two layers share gets both gradients; a weight that was made of the input none twice."""
    input, layers = make((6, 9, 9), [(6, (3, 3), (1, 1), False, True, True)], torch.float64)
    twice = layers * 2
    for actual, expected in zip(
        results_shared(native, input, twice), results_shared(layer_chain_reference, input, twice), strict=True
    ):
        torch.testing.assert_close(actual, expected)
    x = input.clone().requires_grad_()
    ends = []
    for function in (native, layer_chain_reference):
        made = [layers[0]._replace(weight=layers[0].weight * x.mean())]
        (first,) = torch.autograd.grad(function(x, made).square().sum(), x, create_graph=True)
        ends.append((first, *torch.autograd.grad(first.square().sum(), x)))
    torch.testing.assert_close(*ends)


def results_shared(function, input, layers):
    weight = layers[0].weight.clone().requires_grad_()
    output = function(input, [layer._replace(weight=weight) for layer in layers])
    return [output, *torch.autograd.grad(output.square().sum(), weight)]


@pytest.mark.parametrize("name", ["padded", "linear"])
def test_gradcheck_and_gradgradcheck(name):
    """First and second derivatives against finite differences."""
    small = (2, 7, 6) if name == "padded" else (4,)
    plan = [(3, (3, 3), (1, 1), True, True, True), (2, (2, 2), (0, 1), False, True, False), (3, True, True)]
    input, layers = make(small, plan if name == "padded" else LINEAR[:2], torch.float64, images=2)
    _, layers, tensors = leaves_of(input, layers)

    def function(x, *parameters):
        rest = list(parameters[len(layers) :])
        chain = [
            layer._replace(weight=weight, bias=None if layer.bias is None else rest.pop(0))
            for layer, weight in zip(layers, parameters, strict=False)
        ]
        return native(x, chain)

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


def test_opcheck():
    """Schema, fake tensors and autograd registration are consistent, for the inner ops as well."""
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for name in PLANS:
        input, layers = make(*PLANS[name])
        input, layers, _ = leaves_of(input, layers)
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
        settings = [int(number) for layer in layers for number in (*layer.padding, layer.relu, layer.pool)]
        arguments = (input, weights, biases, settings)
        torch.library.opcheck(torch.ops.lightkit.layer_chain.default, arguments, test_utils=checks)
        detached = (
            input.detach(),
            [weight.detach() for weight in weights],
            [None if bias is None else bias.detach() for bias in biases],
            settings,
        )
        inner = ("test_schema", "test_faketensor")
        forward = torch.ops.lightkit._layer_chain_forward.default
        for keep in (True, False):
            torch.library.opcheck(forward, (*detached, keep), test_utils=inner)
        output, activations, argmax = forward(*detached, True)
        backward = torch.ops.lightkit._layer_chain_backward.default
        for wanted in ([1] * (1 + 2 * len(layers)), [0, 1] * len(layers) + [0]):
            arguments = (output, detached[0], detached[1], activations, argmax, settings, wanted)
            torch.library.opcheck(backward, arguments, test_utils=inner)


def test_compile_fullgraph():
    """The op is no break in a compiled graph, with sizes fixed or not."""
    torch._dynamo.reset()
    for dynamic in (False, True):
        compiled = torch.compile(layer_chain, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for images in (4, 5):
            input, layers = make(*PLANS["cnn"], images=images)
            for actual, expected in zip(results(compiled, input, layers), results(native, input, layers), strict=True):
                torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_functional_transforms():
    """torch.func goes through the reference."""
    input, layers = make(*PLANS["padded"])
    per_image = torch.func.vmap(lambda x: layer_chain(x.unsqueeze(0), layers)[0])(input)
    torch.testing.assert_close(per_image, layer_chain(input, layers))


WEIGHT, IMAGES = torch.zeros(4, 3, 3, 3), torch.zeros(2, 3, 9, 9)


@pytest.mark.parametrize(
    ("input", "layers", "error", "message"),
    [
        (IMAGES, [], ValueError, "at least one layer"),
        (IMAGES[0], [ChainLayer(WEIGHT, None)], ValueError, "input must have 4 dimensions, or 2"),
        (IMAGES, [ChainLayer(WEIGHT[0], None)], ValueError, "layer 0: the weight must have 4 dimensions, or 2"),
        (IMAGES, [ChainLayer(WEIGHT, None)] * 2, ValueError, "layer 1: the weight is for 3 channels .* has 4"),
        (
            IMAGES,
            [ChainLayer(WEIGHT, None), ChainLayer(torch.zeros(5, 100), None)],
            ValueError,
            "layer 1: the weight is for 100 values but the input has 196",
        ),
        (
            IMAGES,
            [ChainLayer(torch.zeros(5, 243), None), ChainLayer(torch.zeros(5, 5, 1, 1), None)],
            ValueError,
            "layer 1: a convolution cannot follow a linear layer",
        ),
        (torch.zeros(2, 3), [ChainLayer(torch.zeros(5, 3, 1, 1), None)], ValueError, "cannot follow a linear layer"),
        (torch.zeros(2, 3), [ChainLayer(torch.zeros(5, 3), None, pool=True)], ValueError, "neither padding nor a pool"),
        (IMAGES, [ChainLayer(WEIGHT, None, (-1, 0))], ValueError, "padding must be two numbers from 0 up"),
        (IMAGES, [ChainLayer(WEIGHT, torch.zeros(3))], ValueError, "each of the 4 output channels"),
        (IMAGES, [ChainLayer(torch.zeros(4, 3, 9, 8), None, pool=True)], ValueError, "too small for a kernel of 9x8"),
        (IMAGES, [ChainLayer(WEIGHT[:0], None)], ValueError, "must not be empty"),
        (IMAGES, [ChainLayer(WEIGHT.double(), None)], RuntimeError, "weight must be of the dtype"),
        (IMAGES, [ChainLayer(WEIGHT, torch.zeros(4).double())], RuntimeError, "bias must be of the dtype"),
    ],
)
def test_wrong_arguments(input, layers, error, message):
    """The error names the layer, and what does not fit."""
    with pytest.raises(error, match=message):
        layer_chain(input, layers)


def test_op_called_directly_is_safe():
    """The inner ops check what they are given: nothing reads beyond a tensor, whatever an argmax says."""
    input, layers = make(*PLANS["cnn"], images=2)
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    settings = [number for layer in layers for number in (*layer.padding, layer.relu, layer.pool)]
    with pytest.raises(ValueError, match="four numbers of settings"):
        torch.ops.lightkit.layer_chain(input, weights, biases, settings[:-1])
    with pytest.raises(ValueError, match="four numbers of settings"):
        torch.ops.lightkit.layer_chain(input, weights, biases[:-1], settings)
    output, activations, argmax = torch.ops.lightkit._layer_chain_forward(input, weights, biases, settings, True)
    backward = torch.ops.lightkit._layer_chain_backward
    wanted = [1] * 11
    for arguments in (
        (output[:1], input, weights, activations, argmax),
        (output, input, weights, activations[:-1], argmax),
        (output, input, weights, activations, argmax[:-1]),
        (output, input, weights, activations.double(), argmax),
        (output, input, weights, activations, argmax.int()),
    ):
        with pytest.raises(ValueError, match="must have the shape of the output"):
            backward(*arguments, settings, wanted)
    with pytest.raises(ValueError, match="a flag for the input and two for each layer"):
        backward(output, input, weights, activations, argmax, settings, wanted[1:])
    for byte in (1, 2, 3, 5, 7, 255):
        backward(output, input, weights, activations, torch.full_like(argmax, byte), settings, wanted)
    assert all(g.numel() == 0 for g in backward(output, input, weights, activations, argmax, settings, [0] * 11))


def test_sizes_beyond_any_number():
    """Paddings and sizes whose products wrap around are refused: nothing is written beyond a tensor."""
    image = torch.ones(1, 1, 8, 8)
    one, three, linear = torch.ones(1, 1, 1, 1), torch.ones(1, 1, 3, 3), torch.ones(1, 36)
    for padding in ((2**61, 2**61), (2**62, 0), (2**30, 0)):
        with pytest.raises(ValueError, match=r"less than 2\^30"):
            layer_chain(image, [ChainLayer(one, None), ChainLayer(three, None, padding), ChainLayer(linear, None)])
    for padding in ((2**20, 2**20), (2**29, 2**29)):
        with pytest.raises(ValueError, match=r"images of less than 2\^30 values"):
            layer_chain(image, [ChainLayer(one, None), ChainLayer(three, None, padding)])
    assert not is_faster(4096 * 4096, torch.ones(64, 64, 3, 3), torch.float32, True)


def test_negative_views():
    """A tensor whose sign is a bit is read with it, wherever it stands."""
    input, layers = make(*PLANS["padded"])
    negative = [
        layer._replace(
            weight=torch._neg_view(-layer.weight), bias=None if layer.bias is None else torch._neg_view(-layer.bias)
        )
        for layer in layers
    ]
    assert torch.equal(native(torch._neg_view(-input), negative), native(input, layers))


def test_who_is_faster():
    """Large linear layers are torch's; what of convolutions is, test_conv_relu_pool.py says."""
    assert is_faster(1, torch.ones(64, 576), torch.float32)
    assert not is_faster(1, torch.ones(1024, 1024), torch.float32)


def test_a_chain_of_one_is_conv_relu_pool():
    """Both names give the same bits."""
    input, layers = make((3, 12, 11), [(8, (3, 3), (1, 0), True, True, True)])
    (layer,) = layers
    assert torch.equal(layer_chain(input, layers), conv_relu_pool(input, layer.weight, layer.bias, (1, 0)))


def test_bit_identical_across_threads():
    """Output and gradients do not depend on the number of threads, nor on who took which images."""
    script = """
import torch, lightkit.native
from hashlib import sha256
lightkit.native.load()
torch.manual_seed(0)
for channels, first in ((1, 32), (3, 20)):
    x = torch.randn(53, channels, 28, 27).requires_grad_()
    shapes = [(first, channels, 3, 3), (80, first, 3, 3), (70, 80, 2, 3), (11, 70 * 5 * 3), (7, 11)]
    weights = [torch.randn(*shape) / (shape[1] * 9) ** 0.5 for shape in shapes]
    weights = [w.requires_grad_() for w in weights]
    biases = [torch.randn(len(w)).requires_grad_() for w in weights]
    settings = [0, 0, 1, 1, 1, 0, 1, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0]
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        y = torch.ops.lightkit.layer_chain(x, weights, biases, settings)
        parts = [y, *torch.autograd.grad(y.sin().sum(), (x, *weights, *biases))]
        print(channels, sha256(b"".join(p.detach().contiguous().numpy().tobytes() for p in parts)).hexdigest())
"""
    lines = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert len(lines) == 8 and len(set(lines)) == 2
