"""Layers one after the other in one op: against the layers one by one, in float64 and float32, and autograd."""

from __future__ import annotations

import pytest
import torch
from chains import PLANS, leaves_of, make, native_chain, results, settings_of
from hypothesis import assume, given
from hypothesis import strategies as st

from lightkit.ops import ChainLayer, conv_relu_pool, layer_chain, layer_chain_reference
from lightkit.ops.layer_chain import is_faster


@pytest.mark.sanitized
@pytest.mark.parametrize("images", [1, 2, 3, 33, 200])
@pytest.mark.parametrize("name", PLANS)
def test_float64(name, images):
    """Values and gradients are those of torch's layers: of one image, of less than a piece of work, and of many."""
    input, layers = make(*PLANS[name], torch.float64, images)
    for actual, expected in zip(
        results(native_chain, input, layers), results(layer_chain_reference, input, layers), strict=True
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
        results(native_chain, input, layers), results(layer_chain_reference, input, layers), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["cnn", "padded"])
def test_float32_is_the_layers_one_by_one(name):
    """To the bit what its layers compute alone, which test_conv_relu_pool.py compares with float64."""

    def one_by_one(input, layers):
        x = input
        for layer in layers:
            x = native_chain(x, [layer])
        return x

    shape, plan = PLANS[name]
    # Flattened, a linear layer adds up in another order.
    input, layers = make(shape, [step for step in plan if len(step) > 3], images=37)
    for chained, alone in zip(results(native_chain, input, layers), results(one_by_one, input, layers), strict=True):
        assert torch.equal(chained, alone)


@pytest.mark.sanitized
@pytest.mark.parametrize(
    ("features", "out", "image"), [(1, 1, None), (15, 16, None), (17, 33, None), (36, 70, (6, 6)), (320, 64, (2, 5))]
)
@pytest.mark.parametrize("relu", [True, False])
def test_linear_layer_against_float64(features, out, image, relu):
    """A linear layer, of values or of an image, is as accurate as torch's but for a few roundings."""
    shape = (features,) if image is None else (features // (image[0] * image[1]), *image)
    input, layers = make(shape, [(out, relu, True)], images=19)
    ours, torchs = results(native_chain, input, layers), results(layer_chain_reference, input, layers)
    double = [layer._replace(weight=layer.weight.double(), bias=layer.bias.double()) for layer in layers]
    truth = results(layer_chain_reference, input.double(), double)
    for own, other, exact in zip(ours, torchs, truth, strict=True):
        eps = torch.finfo(torch.float32).eps
        assert (own - exact).abs().max() <= (other - exact).abs().max() + 16 * eps * (exact.abs().max() + 1)


@pytest.mark.sanitized
def test_only_wanted_gradients_are_made():
    """The others have no elements."""
    input, layers = make(*PLANS["cnn"], images=4)
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    settings = settings_of(layers)
    output, activations, argmax = torch.ops.lightkit._layer_chain_forward(input, weights, biases, settings, True)
    wanted = [0] * 11
    wanted[5] = 1
    gradients = torch.ops.lightkit._layer_chain_backward(
        torch.ones_like(output), input, weights, activations, argmax, settings, wanted
    )
    assert [gradient.numel() for gradient in gradients] == [0] * 5 + [640] + [0] * 5


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    """Rounded once: nearer to float64 than torch's layers, each of which rounds."""
    input, layers = make(*PLANS["cnn"], dtype, images=16)
    double = [layer._replace(weight=layer.weight.double(), bias=layer.bias.double()) for layer in layers]
    exact = layer_chain_reference(input.double(), double)
    output = native_chain(input, layers)
    assert output.dtype == dtype
    assert (output - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()
    for gradient, tensor in zip(results(native_chain, input, layers)[1:], leaves_of(input, layers)[2], strict=True):
        assert gradient.dtype == dtype and gradient.shape == tensor.shape and gradient.isfinite().all()
    with torch.autocast("cpu", dtype):
        singles = [layer._replace(weight=layer.weight.float(), bias=layer.bias.float()) for layer in layers]
        assert torch.equal(layer_chain(input.float(), singles), output)


def test_same_tensor_in_two_places():
    """A weight that two layers share gets both gradients; a weight that was made of the input none twice."""
    input, layers = make((6, 9, 9), [(6, (3, 3), (1, 1), False, True, True)], torch.float64)
    twice = layers * 2
    for actual, expected in zip(
        results_shared(native_chain, input, twice), results_shared(layer_chain_reference, input, twice), strict=True
    ):
        torch.testing.assert_close(actual, expected)
    x = input.clone().requires_grad_()
    ends = []
    for function in (native_chain, layer_chain_reference):
        made = [layers[0]._replace(weight=layers[0].weight * x.mean())]
        (first,) = torch.autograd.grad(function(x, made).square().sum(), x, create_graph=True)
        ends.append((first, *torch.autograd.grad(first.square().sum(), x)))
    torch.testing.assert_close(*ends)


def results_shared(function, input, layers):
    weight = layers[0].weight.clone().requires_grad_()
    output = function(input, [layer._replace(weight=weight) for layer in layers])
    return [output, *torch.autograd.grad(output.square().sum(), weight)]


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


@pytest.mark.sanitized
def test_op_called_directly_is_safe():
    """The inner ops check what they are given: nothing reads beyond a tensor, whatever an argmax says."""
    input, layers = make(*PLANS["cnn"], images=2)
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    settings = settings_of(layers)
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


@pytest.mark.sanitized
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


@pytest.mark.sanitized
def test_negative_views():
    """A tensor whose sign is a bit is read with it, wherever it stands."""
    input, layers = make(*PLANS["padded"])
    negative = [
        layer._replace(
            weight=torch._neg_view(-layer.weight), bias=None if layer.bias is None else torch._neg_view(-layer.bias)
        )
        for layer in layers
    ]
    assert torch.equal(native_chain(torch._neg_view(-input), negative), native_chain(input, layers))


def test_who_is_faster():
    """Large linear layers are torch's; what of convolutions is, test_conv_relu_pool.py says."""
    assert is_faster(1, torch.ones(64, 576), torch.float32)
    assert not is_faster(1, torch.ones(1024, 1024), torch.float32)


def test_a_chain_of_one_is_conv_relu_pool():
    """Both names give the same bits."""
    input, layers = make((3, 12, 11), [(8, (3, 3), (1, 0), True, True, True)])
    (layer,) = layers
    assert torch.equal(layer_chain(input, layers), conv_relu_pool(input, layer.weight, layer.bias, (1, 0)))
