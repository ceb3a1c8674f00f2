"""What chains of 8-bit layers refuse: one error for each wrong argument, and no access outside of memory."""

from __future__ import annotations

import math
from dataclasses import replace

import int8_chains
import pytest
import torch

import lightkit.native
from lightkit.errors import ArgumentError
from lightkit.ops import Int8Chain, Int8Layer

# For torch.ops.lightkit.
lightkit.native.load()

SCALE = 0.03


def images(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def convolution(**changes: object) -> Int8Layer:
    return replace(int8_chains.layer(torch.Generator().manual_seed(0), 4, 2, 3, 3), **changes)


def linear(**changes: object) -> Int8Layer:
    return replace(int8_chains.layer(torch.Generator().manual_seed(0), 3, 8), **changes)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], "there must be at least one layer"),
        (
            [convolution(weight=torch.ones(4, 2, 3, 3))],
            "layer 0: weight must be torch.int8 on the CPU, got torch.float",
        ),
        (
            [convolution(bias=torch.ones(4, device="meta"))],
            "bias must be torch.int32 on the CPU, got torch.float32 on m",
        ),
        ([convolution(multiplier=None)], "multiplier must be torch.float32 on the CPU, got None"),
        ([convolution(weight=torch.ones(4, 2, 3, dtype=torch.int8))], "weight must have 4 dimensions"),
        ([convolution(weight=torch.ones(4, 0, 3, 3, dtype=torch.int8))], "and values, got .4, 0, 3, 3."),
        ([convolution(bias=torch.ones(3, dtype=torch.int32))], "bias must have shape .4,., got .3,."),
        (
            [convolution(weight=torch.full((4, 2, 3, 3), -128).to(torch.int8))],
            "weight must be from -127 to 127, got -128",
        ),
        ([convolution(multiplier=torch.tensor([1, 2, 0.0, 1]))], "multiplier must be positive and finite, got 0.0"),
        (
            [convolution(multiplier=torch.tensor([1, math.nan, 1, 1]))],
            "multiplier must be positive and finite, got nan",
        ),
        (
            [convolution(multiplier=torch.tensor([1, math.inf, 1, 1]))],
            "multiplier must be positive and finite, got inf",
        ),
        (
            [convolution(bias=torch.full((4,), 2**31 - 9, dtype=torch.int32))],
            "sums must fit 32 bits, but .* from .* to 21",
        ),
        ([convolution(stride=(0, 1))], "stride must be a pair of ints from 1 up, got .0, 1."),
        ([convolution(stride=2)], "stride must be a pair of ints from 1 up, got 2"),
        ([convolution(padding=(0, -1))], "padding must be a pair of ints from 0 up"),
        ([convolution(dilation=(1, 1.0))], "dilation must be a pair of ints"),
        ([convolution(groups=3)], "groups must divide the 4 output channels, got 3"),
        ([convolution(output_zero_point=256)], "output_zero_point must be an int from 0 to 255, got 256"),
        ([linear(pool=True)], "a linear layer has no stride, padding, dilation, groups or pool"),
        ([linear(), convolution()], "layer 1: a convolution cannot follow a linear layer"),
        ([convolution(), convolution()], "layer 1: the number of input channels must be 4, got 2"),
        ([linear(), linear()], "layer 1: the number of input channels must be 3, got 8"),
        ([convolution(), linear(weight=torch.ones(3, 9, dtype=torch.int8))], "must be a multiple of 4, got 9"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_wrong_layers(layers, message):
    """One error names the layer, the argument, its value and what was expected."""
    with pytest.raises(ArgumentError, match=f"Int8Chain: .*{message}"):
        Int8Chain(layers, SCALE, 0)


@pytest.mark.parametrize("zero_point", [0, 100, 255])
@pytest.mark.parametrize("sign", [1, -1])
def test_range_of_the_sums(sign, zero_point):
    """The extreme sums that fit 32 bits are taken, for weights of both signs, and the next bias is refused."""
    weight = torch.tensor([[127, -3, 50, -127]], dtype=torch.int8)
    up, down = (177, 130) if sign > 0 else (130, 177)
    reach = up * (255 - zero_point) + down * zero_point
    bias = 2**31 - 1 - reach if sign > 0 else reach - 2**31
    chosen = torch.where(weight.float() * sign > 0, 255.0, 0.0) - zero_point
    for offset in (0, sign):
        item = Int8Layer(weight, torch.tensor([bias + offset], dtype=torch.int32), torch.ones(1))
        if offset:
            with pytest.raises(ArgumentError, match="sums must fit 32 bits"):
                Int8Chain([item], 1.0, zero_point)
        else:
            extreme = 2**31 - 1 if sign > 0 else -(2**31)
            expected = torch.tensor([[extreme]], dtype=torch.int32).float()
            assert torch.equal(Int8Chain([item], 1.0, zero_point)(chosen), expected)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf, 1e-50, 1e39, 1e-39])
def test_wrong_scale(scale):
    """A scale that float32 has not, or whose inverse it has not."""
    with pytest.raises(ArgumentError, match="input_scale must be positive and finite in float32"):
        Int8Chain([convolution()], scale, 0)


@pytest.mark.parametrize("zero_point", [-1, 256, 1.0, None])
def test_wrong_zero_point(zero_point):
    """A zero point that 8 bits do not hold."""
    with pytest.raises(ArgumentError, match="input_zero_point must be an int from 0 to 255"):
        Int8Chain([convolution()], SCALE, zero_point)


@pytest.mark.parametrize(
    ("input", "message"),
    [
        (images(1, 2, 6, 6).double(), "input must be float32, got Double"),
        (images(1, 2, 6, 6).to("meta"), "input must be on the CPU, got meta"),
        (images(2, 6, 6), "must have 4 dimensions and 2 channels, got shape .2, 6, 6."),
        (images(1, 3, 6, 6), "must have 4 dimensions and 2 channels, got shape .1, 3, 6, 6."),
        (images(1, 2, 3, 6), "layer 0: an input of 3x6 .* is too small for a kernel of .3, 3. .* and a pool"),
        (images(1, 2, 0, 6), "layer 0: an input of 0x6 .* is too small"),
        (images(1, 2, 8, 6), "layer 1: the input must have 8 features, got 4x3x2"),
    ],
)
def test_wrong_input(input, message):
    """A dtype, a device, a shape, an image that is too small, and one of another size than the linear layer's."""
    chain = Int8Chain([convolution(pool=True), linear()], SCALE, 0)
    with pytest.raises(ArgumentError, match=message):
        chain(input)


def op_arguments() -> tuple[list, tuple]:
    layers = int8_chains.cnn()
    chain = Int8Chain(layers, SCALE, 128)
    parameters = [[getattr(item, name) for item in layers] for name in ("weight", "bias", "multiplier")]
    return [*parameters, chain._plan], (images(2, 1, 28, 28), chain._packed, chain._plan, SCALE)


@pytest.mark.sanitized
def test_op_called_directly_is_safe():
    """The op checks its arguments itself: nothing is read beyond a tensor, whatever the plan says."""
    pack_arguments, (input, packed, plan, scale) = op_arguments()
    op, pack = torch.ops.lightkit.int8_chain.default, torch.ops.lightkit.int8_chain_pack.default
    expected = op(input, packed, plan, scale)
    misaligned = torch.cat([packed[:1], packed])[1:]
    assert torch.equal(op(input, misaligned, plan, scale), expected)
    assert torch.equal(op(input, torch.stack([packed, packed], 1)[:, 0], plan, scale), expected)
    short = images(2, 1, 28, 28)
    short.untyped_storage().resize_(100)
    short_packed = packed.clone()
    short_packed.untyped_storage().resize_(100)

    def changed(place: int, value: int) -> list[int]:
        return [*plan[:place], value, *plan[place + 1 :]]

    for arguments, message in (
        ((short, packed, plan, scale), "the input of shape .* reaches beyond its storage of 100 bytes"),
        ((input, short_packed, plan, scale), "packed of shape .* reaches beyond its storage"),
        ((input, packed[:-1], plan, scale), "packed must have .* bytes for this plan"),
        ((input, packed.to(torch.int8), plan, scale), "packed must be uint8"),
        ((input, packed, plan, 0.0), "input_scale must be positive"),
        ((input, packed, plan[:-1], scale), "the plan must have 1 number, and 15 numbers for each"),
        ((input, packed, plan[:1], scale), "the plan must have 1 number, and 15 numbers for each"),
        ((input, packed, changed(0, 256), scale), "input_zero_point must be from 0 to 255, got 256"),
        ((input, packed, changed(2, 2**62), scale), "the number of output channels must be from 1 to"),
        ((input, packed, changed(2, 2**29), scale), "weights of less than 2.26 values are supported"),
        (
            (input, packed, [0, 0, 2**25, 2**25, 1, 1, *[1, 1, 0, 0, 1, 1], 2**25, 0, 0, 0], scale),
            "less than 2.31 bytes",
        ),
        ((input, packed, changed(6, 0), scale), "stride must be from 1 to"),
        ((input, packed, changed(8, 2**30), scale), "images of less than 2.30 values"),
        ((input, packed, changed(10, 14), scale), "is too small for a kernel"),
        ((input, packed, changed(12, 5), scale), "groups must divide"),
        ((input, packed, changed(1, 1), scale), "a linear layer must have a 1x1 kernel"),
    ):
        with pytest.raises(ValueError, match=message):
            op(*arguments)
    for place, value, message in (
        (0, pack_arguments[0][:-1], "must have a weight, a bias and a multiplier each, got 4, 5 and 5"),
        (1, [b.long() for b in pack_arguments[1]], "layer 0: the bias must be Int of shape .32."),
        (2, [m[1:] for m in pack_arguments[2]], "layer 0: the multiplier must be Float of shape .32."),
    ):
        with pytest.raises(ValueError, match=message):
            pack(*pack_arguments[:place], value, *pack_arguments[place + 1 :])


@pytest.mark.sanitized
def test_any_packed_parameters_are_computed():
    """Whatever bytes the packed parameters have, such as NaN for a multiplier: the kernel returns."""
    _, (input, packed, plan, scale) = op_arguments()
    for seed in range(5):
        torch.manual_seed(seed)
        output = torch.ops.lightkit.int8_chain.default(input, torch.randint_like(packed, 256), plan, scale)
        assert output.shape == (2, 10)
