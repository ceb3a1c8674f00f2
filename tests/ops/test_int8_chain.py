"""Chains of 8-bit layers: every bit against sums of int64, in any memory, on any number of threads."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import replace

import int8_chains
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.threads import assert_same_with_any_threads

import lightkit.native
from lightkit.errors import ArgumentError
from lightkit.ops import Int8Chain, Int8Layer, int8_chain_reference

# For torch.ops.lightkit.
lightkit.native.load()

# Values of the images reach beyond 0 and 255.
SCALE = 0.03


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 1.5


def check(layers: list[Int8Layer], input: torch.Tensor, zero_point: int = 128) -> None:
    """Fails unless kernel and reference have the bits of the exact sums."""
    expected = int8_chains.exact(input, layers, SCALE, zero_point)
    found = Int8Chain(layers, SCALE, zero_point)(input)
    assert found.dtype == torch.float32 and found.shape == expected.shape
    assert torch.equal(found, expected)
    assert torch.equal(int8_chain_reference(input, layers, SCALE, zero_point), expected)


def identity(channels: int = 1) -> Int8Layer:
    """A last layer that returns its inputs minus their zero point: a convolution of each channel by 1."""
    weight = torch.ones(channels, 1, 1, 1, dtype=torch.int8)
    return Int8Layer(weight, torch.zeros(channels, dtype=torch.int32), torch.ones(channels), groups=channels)


@pytest.mark.sanitized
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 33, 48, 49, 63, 64, 65, 70, 129])
@pytest.mark.parametrize("axis", ["in", "out"])
def test_channels(size, axis):
    """Quads of inputs and vectors and blocks of outputs end at every place, in a middle layer and in the last."""
    generator = torch.Generator().manual_seed(size)
    channels, out = (size, 3) if axis == "in" else (3, size)
    first = int8_chains.layer(generator, out, channels, 3, 3, relu=True, output_zero_point=7)
    check([first], images(2, channels, 6, 5))
    check([first, identity(out)], images(2, channels, 6, 5))
    linear = int8_chains.layer(generator, out, channels, output_zero_point=200)
    check([linear, int8_chains.layer(generator, 4, out)], images(3, channels))


@pytest.mark.sanitized
@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("count", [*range(1, 14), 25])
def test_positions(count, pool):
    """Register tiles of every number of positions, of one to four vectors of channels."""
    generator = torch.Generator().manual_seed(count)
    side = 2 if pool else 1
    for out in (16, 32, 48, 64):
        convolution = int8_chains.layer(generator, out, 5, 1, 1, pool=pool)
        check([convolution, identity(out)], images(1, 5, side, side * count))


@pytest.mark.sanitized
@pytest.mark.parametrize("kernel", [(1, 1), (1, 5), (2, 3), (4, 1), (5, 5)])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"stride": (2, 1)},
        {"stride": (1, 3), "pool": True},
        {"padding": (2, 1)},
        {"padding": (0, 4), "pool": True, "relu": True},
        {"dilation": (2, 1)},
        {"dilation": (1, 2), "padding": (3, 3), "stride": (2, 2)},
        {"groups": 3},
        {"groups": 3, "dilation": (1, 2), "pool": True},
    ],
    ids=str,
)
def test_windows(kernel, settings):
    """Kernels, strides, padding with the zero point, dilation, groups and pools of odd sizes."""
    generator = torch.Generator().manual_seed(1)
    groups = settings.get("groups", 1)
    first = int8_chains.layer(generator, 6, 6 // groups, *kernel, output_zero_point=31, **settings)
    second = int8_chains.layer(generator, 5, 6, 1, 1, padding=(1, 0), relu=True)
    check([first], images(2, 6, 12, 11))
    check([first, second], images(2, 6, 12, 11), zero_point=200)


@st.composite
def chains(draw):
    """Returns up to four convolutions and two linear layers, and an input that is large enough, or barely."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    channels, height, width = draw(st.integers(1, 20)), draw(st.integers(1, 14)), draw(st.integers(1, 14))
    input = images(draw(st.integers(0, 5)), channels, height, width, seed=draw(st.integers(0, 99)))
    layers: list[Int8Layer] = []
    for _ in range(draw(st.integers(1, 4))):
        sides = [draw(st.integers(1, 5)) for _ in range(2)]
        padding = (draw(st.integers(0, 3)), draw(st.integers(0, 3)))
        dilation = (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
        stride = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
        pool = draw(st.booleans())
        groups = draw(st.sampled_from([g for g in (1, 1, 2, 3, channels) if channels % g == 0]))
        out = groups * draw(st.integers(1, 40 // groups + 1))
        height, width = (
            ((size + 2 * p - d * (k - 1) - 1) // s + 1) // (2 if pool else 1)
            for size, p, d, k, s in zip((height, width), padding, dilation, sides, stride, strict=True)
        )
        if height < 1 or width < 1:
            break
        layers.append(
            int8_chains.layer(
                generator,
                *(out, channels // groups, *sides),
                padding=padding,
                dilation=dilation,
                stride=stride,
                groups=groups,
                pool=pool,
                relu=draw(st.booleans()),
                output_zero_point=draw(st.integers(0, 255)),
            )
        )
        channels, features = out, out * height * width
    if layers:
        for _ in range(draw(st.integers(0, 2))):
            out = draw(st.integers(1, 20))
            settings = {"relu": draw(st.booleans()), "output_zero_point": draw(st.integers(0, 255))}
            layers.append(int8_chains.layer(generator, out, features, **settings))
            features = out
    return layers, input, draw(st.integers(0, 255))


@given(chains())
def test_random_chains(case):
    """Any layers behind each other, with any zero points; a linear layer reads (C, H, W) behind a convolution."""
    layers, input, zero_point = case
    if layers:
        check(layers, input, zero_point)


@pytest.mark.parametrize("batch", [0, 1, 2, 5, 32])
def test_cnn(batch):
    """The documented network, at batch sizes below and above a group of images."""
    check(int8_chains.cnn(), images(batch, 1, 28, 28))


@pytest.mark.parametrize("weight", [127, -127])
@pytest.mark.parametrize("value", [0, 255])
@pytest.mark.parametrize("zero_point", [0, 255])
def test_largest_products(zero_point, value, weight):
    """Pairs of the largest products exceed 16 bits, where vpmaddubsw saturates; 2^31 is barely not reached."""
    features = (2**31 - 1) // (255 * 127)
    layers = [
        Int8Layer(
            torch.full((17, features), weight, dtype=torch.int8),
            torch.full((17,), 0, dtype=torch.int32),
            torch.ones(17),
        )
    ]
    input = torch.full((1, features), (value - zero_point) * SCALE)
    expected = (value - zero_point) * weight * features
    found = Int8Chain(layers, SCALE, zero_point)(input)
    assert torch.equal(found, torch.full((1, 17), expected, dtype=torch.int32).float())


def test_input_is_quantized_as_in_torch():
    """Every step and every tie of the input's rounding, as torch.fake_quantize_per_tensor_affine does it."""
    for scale, zero_point in ((0.5, 128), (0.1, 0), (1 / 3, 255), (7.3, 64)):
        steps = torch.arange(-300, 301) * scale
        input = torch.cat([steps, steps + scale / 2, torch.nextafter(steps + scale / 2, torch.tensor(math.inf))])
        expected = torch.fake_quantize_per_tensor_affine(input, scale, zero_point, 0, 255)
        found = Int8Chain([identity()], scale, zero_point)(input.view(1, 1, 1, -1)).flatten()
        assert torch.equal(found * torch.tensor(scale), expected)


def test_input_that_is_not_finite():
    """Infinite values and those beyond int32 are clamped, and NaN becomes 0, in kernel and reference."""
    values = torch.tensor([math.inf, -math.inf, math.nan, 3e38, -3e38, 1e10, 1e-45])
    for input in (values.view(1, 1, 1, -1), values.repeat(6).view(1, 1, 6, 7)):
        for function in (Int8Chain([identity()], 0.5, 100), lambda x: int8_chain_reference(x, [identity()], 0.5, 100)):
            assert function(input).flatten()[:7].tolist() == [155, -100, -100, 155, -100, 155, 0]


def test_ties_are_rounded_to_even():
    """A sum half-way between two integers becomes the even one, on both sides of zero."""
    halves = replace(identity(), multiplier=torch.tensor([0.5]), output_zero_point=128)
    found = Int8Chain([halves, identity()], 1.0, 128)(torch.arange(-7.0, 8).view(1, 1, 1, -1))
    assert found.flatten().tolist() == [-4, -3, -2, -2, -2, -1, 0, 0, 0, 1, 2, 2, 2, 3, 4]


def test_sums_above_24_bits_are_rounded_once():
    """The float of a sum of more than 24 bits is the nearest one, as torch's conversion gives it."""
    bias = torch.tensor([2**24 + 1, 2**24 + 3, -(2**30) - 65, 2**31 - 256 * 255], dtype=torch.int32)
    layers = [Int8Layer(torch.ones(4, 1, dtype=torch.int8), bias, torch.tensor([1.0, 1.0, 0.1, 3e-9]))]
    check(layers, torch.tensor([[0.0], [0.3]]))


@pytest.mark.sanitized
@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize("padding", [0, 1])
def test_strides_of_the_input(channels, padding):
    """Any strides and a pending negation give the result of a contiguous input, without reading beyond it."""
    generator = torch.Generator().manual_seed(0)
    layers = [int8_chains.layer(generator, 8, channels, 3, 3, padding=(padding, padding))]
    chain = Int8Chain(layers, SCALE, 100)
    input = images(3, channels, 7, 300)
    expected = chain(input)
    wide = torch.full((3, channels, 9, 700), math.nan)
    wide[:, :, 1:8, 50:650:2] = input
    for strided in (
        input.to(memory_format=torch.channels_last),
        input.transpose(2, 3).contiguous().transpose(2, 3),
        wide[:, :, 1:8, 50:650:2],
        torch._neg_view(-input),
    ):
        assert torch.equal(chain(strided), expected)
    expanded = input[:1, :1, :1, :1].expand(2, channels, 4, 9)
    assert torch.equal(chain(expanded), chain(expanded.contiguous()))


@pytest.mark.sanitized
def test_bit_identical_across_threads():
    """The result does not depend on the threads, whose shares are groups of images."""
    chain, input = Int8Chain(int8_chains.cnn(), SCALE, 128), images(37, 1, 28, 28)
    assert_same_with_any_threads(lambda: [chain(input), chain(input[:3]), chain(input[:1])])


def test_memory_format_of_the_output():
    """A convolution's output is channels-last; that of a linear layer is contiguous."""
    generator = torch.Generator().manual_seed(0)
    convolution = int8_chains.layer(generator, 8, 3, 3, 3)
    output = Int8Chain([convolution], SCALE, 0)(images(2, 3, 6, 6))
    assert output.shape == (2, 8, 4, 4) and output.is_contiguous(memory_format=torch.channels_last)
    both = Int8Chain([convolution, int8_chains.layer(generator, 5, 128)], SCALE, 0)
    assert both(images(2, 3, 6, 6)).is_contiguous()


def test_linear_layer_flattens_images():
    """A chain that begins with a linear layer takes images, too, in the order (C, H, W)."""
    chain = Int8Chain([int8_chains.layer(torch.Generator().manual_seed(0), 4, 30)], SCALE, 9)
    input = images(2, 5, 3, 2)
    assert torch.equal(chain(input), chain(input.flatten(1)))


def test_copies():
    """A pickle and a deep copy compute the same; they have layers, scale and zero point."""
    chain, input = Int8Chain(int8_chains.cnn(), SCALE, 128), images(2, 1, 28, 28)
    for other in (pickle.loads(pickle.dumps(chain)), copy.deepcopy(chain), copy.copy(chain)):
        assert torch.equal(other(input), chain(input))
        assert (other.input_scale, other.input_zero_point, len(other.layers)) == (SCALE, 128, 5)


def test_without_native_library(monkeypatch):
    """Without kernels, the reference computes the same bits and raises the same errors."""
    native_chain = Int8Chain(int8_chains.cnn(), SCALE, 128)
    monkeypatch.setattr(lightkit.native, "available", lambda device="cpu": False)
    chain, input = Int8Chain(int8_chains.cnn(), SCALE, 128), images(2, 1, 28, 28)
    assert chain._packed is None
    assert torch.equal(chain(input), native_chain(input))
    for wrong in (input.double(), input[0], images(2, 2, 28, 28), images(2, 1, 28, 32), images(2, 1, 28, 3)):
        errors = []
        for each in (chain, native_chain):
            with pytest.raises(ArgumentError) as raised:
                each(wrong)
            errors.append(str(raised.value)[:40])
        assert errors[0] == errors[1]


def test_no_gradient():
    """An input that requires a gradient gets none: the result is a constant."""
    chain = Int8Chain(int8_chains.cnn(), SCALE, 128)
    assert not chain(images(2, 1, 28, 28).requires_grad_()).requires_grad


def test_opcheck():
    """Schemas and fake tensors are consistent, of a network with a linear layer and one without."""
    convolution = int8_chains.layer(torch.Generator().manual_seed(0), 4, 1, 3, 3, pool=True)
    for layers in (int8_chains.cnn(), [convolution]):
        chain = Int8Chain(layers, SCALE, 128)
        parameters = [[getattr(item, name) for item in layers] for name in ("weight", "bias", "multiplier")]
        torch.library.opcheck(torch.ops.lightkit.int8_chain_pack.default, (*parameters, chain._plan))
        call = (images(2, 1, 28, 28), chain._packed, chain._plan, SCALE)
        torch.library.opcheck(torch.ops.lightkit.int8_chain.default, call)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic):
    """The chain is no break in a compiled graph, with sizes fixed or not."""
    torch._dynamo.reset()
    chain = Int8Chain(int8_chains.cnn(), SCALE, 128)
    compiled = torch.compile(lambda x: chain(x) + 1, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (3, 4):
        input = images(batch, 1, 28, 28)
        assert torch.equal(compiled(input), chain(input) + 1)


def test_vmap():
    """A batch of batches is computed one by one."""
    chain, input = Int8Chain(int8_chains.cnn(), SCALE, 128), images(3, 2, 1, 28, 28)
    assert torch.equal(torch.func.vmap(chain)(input), torch.stack([chain(x) for x in input]))
