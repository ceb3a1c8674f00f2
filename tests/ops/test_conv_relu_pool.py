"""Convolution, ReLU and pool in one op: against float64, torch's own answers, autograd, compile and threads."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import lightkit.native
from lightkit.ops import conv_relu_pool, conv_relu_pool_reference

# For torch.ops.lightkit.
lightkit.native.load()

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

# A vector has 4, 8 or 16 lanes; a tile has 2 or 4 vectors of output channels.
CHANNELS = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 65]


def native(input, weight, bias=None, padding=0, pool=True):
    """The op itself: the public function may hand the work to torch where that is faster."""
    padding = (padding, padding) if isinstance(padding, int) else padding
    return torch.ops.lightkit.conv_relu_pool(input, weight, bias, padding, pool)


def forward(input, weight, bias=None, padding=0, pool=True):
    """Output and argmax of the inner op, the argmax as (images, channels, rows, columns)."""
    padding = (padding, padding) if isinstance(padding, int) else padding
    op = torch.ops.lightkit._layer_chain_forward
    output, _, argmax = op(input, [weight], [bias], [*padding, True, pool], True)
    return output, argmax.view(output.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)


def problem(images=2, channels=3, out_channels=4, height=9, width=8, kernel=(3, 3), bias=True, dtype=torch.float32):
    """Random input, weight and bias, the same for the same arguments; sums of about 1."""
    seed = hash((images, channels, out_channels, height, width, kernel))
    generator = torch.Generator().manual_seed(seed)
    input = torch.randn(images, channels, height, width, generator=generator).to(dtype)
    scale = (channels * kernel[0] * kernel[1]) ** -0.5
    weight = torch.randn(out_channels, channels, *kernel, generator=generator) * scale
    return input, weight.to(dtype), torch.randn(out_channels, generator=generator).to(dtype) if bias else None


def results(function, input, weight, bias, padding, pool):
    """The output and the gradients of a sum of it, weighted differently everywhere, all in float64."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (input, weight, bias)]
    output = function(*leaves, padding, pool)
    # Multiples of 1/8: the same in every dtype.
    upstream = torch.arange(output.numel()).reshape(output.shape).mul(0.7).cos().mul(8).round().div(8)
    output.backward(upstream.to(output.dtype))
    return {
        "output": output.detach().double(),
        "gradient of input": leaves[0].grad.double(),
        "gradient of weight": leaves[1].grad.double(),
        **({} if bias is None else {"gradient of bias": leaves[2].grad.double()}),
    }


def as_winners(input, weight, bias, padding, pool):
    """The reference in float64 that takes, in a pool and a ReLU, the positions that the op takes.

    Where two values of a pool differ by less than their rounding, or one is that near to 0, either choice is right,
    and the gradients of the two are not near each other at all.
    """
    _, argmax = forward(input, weight, bias, padding, pool)

    def function(input, weight, bias, padding, pool):
        convolved = F.conv2d(input, weight, bias, padding=padding)
        if not pool:
            return convolved * (argmax == 0)
        rows, columns = (size // 2 for size in convolved.shape[2:])
        windows = convolved[..., : rows * 2, : columns * 2].unflatten(2, (rows, 2)).unflatten(4, (columns, 2))
        windows = windows.transpose(3, 4).flatten(4)
        chosen = windows.gather(4, (argmax.long() & 3).unsqueeze(4)).squeeze(4)
        return chosen * (argmax != 4)

    return function


def assert_as_accurate_as_torch(input, weight, bias=None, padding=0, pool=True):
    """Our error against float64 is within torch's, but for a few roundings."""
    double = [None if t is None else t.double() for t in (input, weight, bias)]
    exact = results(as_winners(input, weight, bias, padding, pool), *double, padding, pool)
    torchs = results(conv_relu_pool_reference, input, weight, bias, padding, pool)
    ours = results(native, input, weight, bias, padding, pool)
    truth_output = conv_relu_pool_reference(*double, padding, pool)
    torch.testing.assert_close(exact["output"], truth_output, rtol=1e-2, atol=2e-2)
    accumulator = torch.finfo(torch.float64 if input.dtype == torch.float64 else torch.float32).eps
    for name, truth in exact.items():
        assert ours[name].shape == truth.shape, name
        if truth.numel() == 0:
            continue
        # Sums of many products: the error grows with their size, not with that of the sum.
        scale = truth.abs().max() + 1
        allowed = (torchs["output"] - truth_output).abs().max() if name == "output" else 0
        allowed = allowed + truth.abs() * torch.finfo(input.dtype).eps + 16 * accumulator * scale
        error = (ours[name] - truth).abs()
        assert (error <= allowed).all(), (name, error.max(), scale)


# One axis at a time, at both its edges of a vector, for each way through the kernels: one channel, a few, whole vectors
# (Winograd's under a pool) and vectors with a rest. `test_any_shape_is_as_accurate_as_torch` mixes the axes.
WAYS = [(1, 5), (3, 16), (16, 16), (17, 33)]
PAIRS = sorted(
    {(channels, out) for _, out in WAYS for channels in CHANNELS if channels <= 33}
    | {(channels, out) for channels, _ in WAYS for out in CHANNELS}
)


@pytest.mark.sanitized
@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize(("channels", "out_channels"), PAIRS)
def test_error_against_float64_over_channels(channels, out_channels, pool):
    """Every count of channels at an edge of a vector or a tile, on either side, forward and backward."""
    assert_as_accurate_as_torch(*problem(3, channels, out_channels), pool=pool)


RUNS = sorted({(channels, 3) for channels in CHANNELS} | {(c, width) for c in (1, 3, 8, 17) for width in (1, 2, 4, 5)})


@pytest.mark.sanitized
@pytest.mark.parametrize(("channels", "kernel_width"), RUNS)
def test_error_against_float64_over_runs(channels, kernel_width):
    """Every length of what is read in a row: less than half a vector, a part of one, whole ones, many."""
    assert_as_accurate_as_torch(*problem(3, channels, 5, kernel=(2, kernel_width)))


@pytest.mark.sanitized
@pytest.mark.parametrize("channels", [160, 230])
def test_error_against_float64_with_many_channels(channels):
    """A row of the kernel that registers cannot hold at once, summed in parts that do not divide it."""
    assert_as_accurate_as_torch(*problem(2, channels, 9, height=5, width=5))


# Kernel and padding decide which rows are read, in every dtype the same; a dtype decides how values are read.
KERNELS = [
    *itertools.product([(1, 1), (2, 3), (3, 3), (4, 1), (5, 5), (7, 2)], [0, 1, (2, 0), (0, 3)], DTYPES[:1]),
    *itertools.product([(3, 3), (5, 5)], [0, (0, 3)], DTYPES[1:]),
]


@pytest.mark.sanitized
@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize(("kernel", "padding", "dtype"), KERNELS, ids=str)
def test_error_against_float64_over_kernels(kernel, padding, pool, dtype):
    """Kernels, with more rows than are summed at once too, and paddings, in every dtype."""
    for channels in (1, 6):
        assert_as_accurate_as_torch(*problem(2, channels, 10, kernel=kernel, dtype=dtype), padding, pool)


# Images are dealt out to threads, whatever their size.
SIZES = [
    *itertools.product([(3, 3), (4, 4), (4, 5), (5, 4), (7, 7), (28, 28), (40, 31), (3, 300)], [2]),
    *itertools.product([(4, 5), (28, 28)], [1, 17, 40]),
]


@pytest.mark.sanitized
@pytest.mark.parametrize(("size", "images"), SIZES, ids=str)
@pytest.mark.parametrize("channels", [1, 5, 16])
def test_error_against_float64_over_sizes(size, images, channels):
    """Rows and columns that the pool drops, images too small for one block or larger than a list, many and one."""
    pool = min(size) > 3
    assert_as_accurate_as_torch(*problem(images, channels, 6, *size), pool=pool)


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("out", [1, 2, 4, 8])
def test_windows_that_share_a_vector(out, dtype):
    """Few output channels: rows of 1 to 10 windows, in whole and partly filled tiles; and a row too long for pairs."""
    for kernel in ((1, 1), (3, 2), (5, 5)):
        for columns in range(1, 11):
            size = kernel[0] + 4, kernel[1] - 1 + 2 * columns + columns % 3 // 2
            assert_as_accurate_as_torch(*problem(3, 3, out, *size, kernel=kernel, dtype=dtype), pool=True)
    assert_as_accurate_as_torch(*problem(1, 6, out, 4, 400, dtype=dtype), pool=True)


@given(
    images=st.integers(1, 5),
    channels=st.integers(1, 40),
    out_channels=st.integers(1, 70),
    size=st.tuples(st.integers(1, 15), st.integers(1, 15)),
    kernel=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    pool=st.booleans(),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape_is_as_accurate_as_torch(images, channels, out_channels, size, kernel, padding, pool, bias, dtype):
    """Whatever the shape: as accurate as torch, or refused as too small."""
    arguments = problem(images, channels, out_channels, *size, kernel, bias, dtype)
    least = 2 if pool else 1
    if any(s + 2 * p - k + 1 < least for s, p, k in zip(size, padding, kernel, strict=True)):
        for function in (conv_relu_pool, native):
            with pytest.raises(ValueError, match="too small"):
                function(*arguments, padding, pool)
    else:
        assert_as_accurate_as_torch(*arguments, padding, pool)


@pytest.mark.sanitized
def test_upstream_gradient_in_any_layout():
    """The gradient may arrive contiguous, expanded or channels-last."""
    input, weight, bias = problem(2, 3, 8)
    weight.requires_grad_()
    output = native(input, weight, bias)
    upstream = torch.randn_like(output)
    expected = torch.autograd.grad(output, weight, upstream, retain_graph=True)
    assert torch.equal(torch.autograd.grad(output, weight, upstream.contiguous(), retain_graph=True)[0], expected[0])
    ones = torch.autograd.grad(output, weight, torch.ones_like(output), retain_graph=True)
    assert torch.equal(torch.autograd.grad(output.sum(), weight)[0], ones[0])


@pytest.mark.sanitized
@pytest.mark.parametrize("channels", [1, 6])
def test_ties_go_to_the_first_and_dead_units_get_nothing(channels):
    """Equal values in a pool: the gradient goes where torch sends it. A unit at exactly 0 is dead, as in torch."""
    generator = torch.Generator().manual_seed(0)
    input = torch.randint(0, 2, (3, channels, 12, 12), generator=generator).float()
    weight = torch.randint(-1, 2, (16, channels, 3, 3), generator=generator).float()
    bias = torch.zeros(16)
    for pool in (True, False):
        # Whole numbers: no rounding, so equality is exact.
        actual = results(native, input, weight, bias, 0, pool)
        expected = results(conv_relu_pool_reference, input, weight, bias, 0, pool)
        assert torch.equal(actual["output"], expected["output"])
        torch.testing.assert_close(actual, expected)
    assert (expected["output"] == 0).any()


@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_inputs_as_torch(value, pool):
    """NaN goes through ReLU and pool, Inf is a large number, and neither reaches an output that does not see it."""
    input, weight, bias = problem(2, 3, 17)
    input[1, 1, 4, 3] = value
    expected = conv_relu_pool_reference(input, weight, bias, 1, pool)
    torch.testing.assert_close(native(input, weight, bias, 1, pool), expected, equal_nan=True)


def test_dead_units_stop_gradients_that_are_not_finite():
    """A product with a gradient that ReLU stopped is left out, not multiplied by 0."""
    input, weight, bias = problem(2, 3, 9)
    bias = bias - 100
    bias[2] = 100
    leaves = [t.clone().requires_grad_() for t in (input, weight, bias)]
    output = native(*leaves)
    upstream = torch.full_like(output, float("nan"))
    upstream[:, 2] = 1
    output.backward(upstream)
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
    assert (leaves[1].grad[3] == 0).all()


@pytest.mark.parametrize(
    ("input", "weight", "bias", "padding", "error", "message"),
    [
        ((3, 9, 9), (4, 3, 3, 3), None, 0, ValueError, r"must have 4 dimensions.*got .3, 9, 9"),
        ((2, 3, 9, 9), (4, 3, 3), None, 0, ValueError, "must have 4 dimensions"),
        ((2, 3, 9, 9), (4, 2, 3, 3), None, 0, ValueError, "for 2 channels but the input has 3"),
        ((2, 3, 9, 9), (4, 3, 3, 3), (3,), 0, ValueError, r"each of the 4 output channels, got shape .3,?.$"),
        ((2, 3, 9, 9), (4, 3, 3, 3), (1, 4), 0, ValueError, r"each of the 4 output channels"),
        ((2, 3, 9, 9), (4, 3, 3, 3), None, -1, ValueError, "padding must not be negative, got -1"),
        ((2, 3, 9, 9), (4, 3, 3, 3), None, (1, 2, 3), ValueError, r"one or two whole numbers, got \(1, 2, 3\)"),
        ((2, 3, 9, 9), (4, 3, 3, 3), None, 0.5, ValueError, "one or two whole numbers, got 0.5"),
        ((2, 3, 9, 3), (4, 3, 3, 3), None, 0, ValueError, "9x3 .*too small for a kernel of 3x3 and a pool"),
        ((2, 3, 9, 9), (4, 3, 10, 3), None, 0, ValueError, "too small for a kernel of 10x3"),
        ((2, 3, 9, 9), (0, 3, 3, 3), None, 0, ValueError, "must not be empty"),
    ],
)
def test_wrong_shapes(input, weight, bias, padding, error, message):
    """The error names what does not fit."""
    tensors = [None if shape is None else torch.zeros(shape) for shape in (input, weight, bias)]
    with pytest.raises(error, match=message):
        conv_relu_pool(*tensors, padding)


def test_wrong_dtypes():
    """Mixed and integer dtypes are refused in words, by the op itself as well."""
    input, weight, bias = problem()
    for function in (conv_relu_pool, native):
        with pytest.raises(RuntimeError, match="dtype"):
            function(input, weight.double(), bias)
        with pytest.raises(RuntimeError, match="bias must be of the dtype"):
            function(input, weight, bias.double())
    with pytest.raises(RuntimeError, match="floating point"):
        conv_relu_pool(input.long(), weight.long())


def has_been_called(operation):
    """Whether some call of the block in `operation` went to the kernel."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        operation()
    return any(event.key == "lightkit::conv_relu_pool" for event in profile.key_averages())


@pytest.mark.parametrize(
    ("channels", "size", "kernel_size", "pool", "dtype", "multiplies_bfloat16", "kernel"),
    [
        (64, 40, 3, True, torch.float32, True, True),
        (64, 5, 3, False, torch.float32, True, True),
        (8, 33, 3, False, torch.float32, True, False),  # too many pixels
        (96, 5, 3, False, torch.float32, True, False),  # too large a weight
        (8, 5, 1, False, torch.float32, True, False),  # a matrix product
        (32, 21, 3, True, torch.bfloat16, True, True),
        (32, 23, 3, True, torch.bfloat16, True, False),
        (32, 23, 3, True, torch.bfloat16, False, True),
        (8, 33, 3, False, torch.bfloat16, True, False),
        (32, 23, 3, True, torch.float16, True, True),
    ],
)
def test_who_does_the_work(channels, size, kernel_size, pool, dtype, multiplies_bfloat16, kernel, monkeypatch):
    """The faster one, so that nobody's network becomes slower."""
    module = sys.modules["lightkit.ops.layer_chain"]
    monkeypatch.setattr(module, "_multiplies_bfloat16", lambda: multiplies_bfloat16)
    input = torch.ones(1, channels, size, size, dtype=dtype)
    weight = torch.ones(channels, channels, kernel_size, kernel_size, dtype=dtype)
    assert has_been_called(lambda: conv_relu_pool(input, weight, pool=pool)) == kernel


@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_export_with_open_sizes(pool, dtype):
    """Who does the work is decided by sizes that torch.export leaves open, and makes no constants of them."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution = torch.nn.Conv2d(3, 8, 3, dtype=dtype)

        def forward(self, x):
            return conv_relu_pool(x, self.convolution.weight, self.convolution.bias, pool=pool)

    block = Block()
    open_sizes = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    exported = torch.export.export(block, (torch.randn(2, 3, 12, 11, dtype=dtype),), dynamic_shapes=(open_sizes,))
    other = torch.randn(5, 3, 9, 14, dtype=dtype)
    torch.testing.assert_close(exported.module()(other), block(other))


def test_tensors_on_several_devices():
    """Are an error that says so, not one of the dispatcher's."""
    input, weight, bias = problem()
    with pytest.raises(RuntimeError, match="the weight must be of the dtype and on the device of the input"):
        conv_relu_pool(input, weight.to("meta"), bias)
    with pytest.raises(RuntimeError, match="the bias must be of the dtype and on the device of the input"):
        conv_relu_pool(input, weight, bias.to("meta"))


@pytest.mark.sanitized
def test_op_called_directly_is_safe():
    """The op checks what it is given: nothing reads beyond a tensor."""
    input, weight, _ = problem()
    with pytest.raises(ValueError, match="too small"):
        native(input, torch.zeros(1, 3, 12, 1))
    with pytest.raises(ValueError, match="padding"):
        native(input, weight, None, (-1, 0))


def test_backward_twice_and_in_place_use_of_the_output():
    """The graph can be kept, and what is done to the output in place does no harm: backward does not need it."""
    input, weight, bias = problem()
    weight.requires_grad_()
    output = native(input, weight, bias)
    first = torch.autograd.grad(output.sum(), weight, retain_graph=True)[0]
    output.mul_(2)
    assert torch.equal(torch.autograd.grad(output.sum(), weight)[0], 2 * first)


def test_meta_tensors():
    """Shapes can be asked for without data."""
    output = native(*(t.to("meta") for t in problem(2, 3, 4, 9, 8)))
    assert output.shape == (2, 4, 3, 3)
    assert conv_relu_pool(*(t.to("meta") for t in problem(2, 3, 4, 9, 8)), pool=False).shape == (2, 4, 7, 6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """Under autocast the result has its dtype, as that of torch's convolution has."""
    input, weight, bias = problem()
    with torch.autocast("cpu", dtype):
        output = conv_relu_pool(input, weight, bias)
        expected = conv_relu_pool_reference(input, weight, bias)
    assert output.dtype == expected.dtype == dtype
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_public_function_agrees_with_reference(dtype):
    """Both faces give the same, whoever does the work: a 1x1 kernel without a pool is torch's."""
    for kernel in ((3, 3), (1, 1)):
        input, weight, bias = problem(3, 9, 17, kernel=kernel, dtype=dtype)
        for padding in (1, (0, 2)):
            for pool in (True, False):
                actual = conv_relu_pool(input, weight, bias, padding, pool)
                torch.testing.assert_close(actual, conv_relu_pool_reference(input, weight, bias, padding, pool))
