"""Convolution, ReLU and pool in one op: against float64, torch's own answers, autograd, compile and threads."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import AotEagerAndRecordGraphs

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


@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize("out_channels", CHANNELS)
@pytest.mark.parametrize("channels", [1, 2, 3, 8, 16, 17, 32, 33])
def test_error_against_float64_over_channels(channels, out_channels, pool):
    """Every count of channels at an edge of a vector or a tile, on either side, forward and backward.

    Whole vectors of them under a pool are Winograd's.
    """
    assert_as_accurate_as_torch(*problem(3, channels, out_channels), pool=pool)


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("kernel_width", [1, 2, 3, 4, 5])
def test_error_against_float64_over_runs(channels, kernel_width):
    """Every length of what is read in a row: less than half a vector, a part of one, whole ones, many."""
    assert_as_accurate_as_torch(*problem(3, channels, 5, kernel=(2, kernel_width)))


@pytest.mark.parametrize("channels", [160, 230])
def test_error_against_float64_with_many_channels(channels):
    """A row of the kernel that registers cannot hold at once, summed in parts that do not divide it."""
    assert_as_accurate_as_torch(*problem(2, channels, 9, height=5, width=5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize("padding", [0, 1, (2, 0), (0, 3)])
@pytest.mark.parametrize("kernel", [(1, 1), (2, 3), (3, 3), (4, 1), (5, 5), (7, 2)])
def test_error_against_float64_over_kernels(kernel, padding, pool, dtype):
    """Kernels, with more rows than are summed at once too, and paddings, in every dtype."""
    for channels in (1, 6):
        assert_as_accurate_as_torch(*problem(2, channels, 10, kernel=kernel, dtype=dtype), padding, pool)


@pytest.mark.parametrize("size", [(3, 3), (4, 4), (4, 5), (5, 4), (7, 7), (28, 28), (40, 31), (3, 300)])
@pytest.mark.parametrize("images", [1, 2, 17, 40])
@pytest.mark.parametrize("channels", [1, 5, 16])
def test_error_against_float64_over_sizes(size, images, channels):
    """Rows and columns that the pool drops, images too small for one block or larger than a list, many and one."""
    pool = min(size) > 3
    assert_as_accurate_as_torch(*problem(images, channels, 6, *size), pool=pool)


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


@pytest.mark.parametrize("channels", [1, 6])
@pytest.mark.parametrize("bias", [True, False])
def test_memory_formats(channels, bias):
    """Contiguous, channels-last, strided and expanded tensors are read right; the output is channels-last."""
    input, weight, b = problem(4, channels, 7, bias=bias)
    expected = results(native, input, weight, b, 1, True)
    strided = torch.zeros(8, channels, 9, 16)[::2, :, :, ::2].copy_(input)
    last = torch.channels_last
    for x in (input.to(memory_format=last), input.transpose(2, 3).contiguous().transpose(2, 3), strided):
        for w in (weight.to(memory_format=last), weight.transpose(0, 1).contiguous().transpose(0, 1)):
            torch.testing.assert_close(results(native, x, w, b, 1, True), expected, rtol=0, atol=0)
    assert native(input, weight, b).is_contiguous(memory_format=last)
    expanded = input[:1].expand(3, -1, -1, -1)
    torch.testing.assert_close(native(expanded, weight, b), native(expanded.contiguous(), weight, b))


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


@pytest.mark.parametrize("pool", [True, False])
def test_empty_batch(pool):
    """No image: an empty output of the right shape, and gradients that are 0."""
    input, weight, bias = problem(0, 3, 4)
    actual = results(native, input, weight, bias, 1, pool)
    expected = results(conv_relu_pool_reference, input, weight, bias, 1, pool)
    torch.testing.assert_close(actual, expected)


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
        (8, 17, 3, False, torch.float32, True, False),  # too many pixels
        (96, 5, 3, False, torch.float32, True, False),  # too large a weight
        (8, 5, 1, False, torch.float32, True, False),  # a matrix product
        (32, 21, 3, True, torch.bfloat16, True, True),
        (32, 23, 3, True, torch.bfloat16, True, False),
        (32, 23, 3, True, torch.bfloat16, False, True),
        (8, 17, 3, False, torch.bfloat16, True, False),
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


def test_op_called_directly_is_safe():
    """The op checks what it is given: nothing reads beyond a tensor."""
    input, weight, _ = problem()
    with pytest.raises(ValueError, match="too small"):
        native(input, torch.zeros(1, 3, 12, 1))
    with pytest.raises(ValueError, match="padding"):
        native(input, weight, None, (-1, 0))


@pytest.mark.parametrize("needed", [(i, w, b) for i in (0, 1) for w in (0, 1) for b in (0, 1)])
@pytest.mark.parametrize("channels", [1, 4])
def test_requires_grad_of_some(needed, channels):
    """Each gradient is there if and only if it is wanted, and does not depend on the others."""
    tensors = problem(2, channels, 5)
    expected = list(results(native, *tensors, 0, True).values())[1:]
    leaves = [t.clone().requires_grad_(bool(n)) for t, n in zip(tensors, needed, strict=True)]
    output = native(*leaves)
    assert output.requires_grad == any(needed)
    if any(needed):
        upstream = torch.arange(output.numel()).reshape(output.shape).mul(0.7).cos().mul(8).round().div(8)
        output.backward(upstream)
    for leaf, wanted, gradient in zip(leaves, needed, expected, strict=True):
        assert (leaf.grad is not None) == bool(wanted)
        if wanted:
            assert torch.equal(leaf.grad.double(), gradient)


def test_no_grad_gives_the_same():
    """Inference takes the same path and gives the same bits."""
    input, weight, bias = problem(5, 3, 20)
    with torch.inference_mode():
        inferred = native(input, weight, bias, 1)
    assert torch.equal(native(input, weight.requires_grad_(), bias, 1), inferred)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck_and_gradgradcheck(channels, pool, bias):
    """First and second derivatives against finite differences."""
    input, weight, b = problem(2, channels, 3, 6, 5, dtype=torch.float64, bias=bias)
    leaves = [t.requires_grad_() for t in (input, weight, b) if t is not None]
    assert torch.autograd.gradcheck(lambda *t: native(*t, padding=1, pool=pool), leaves)
    assert torch.autograd.gradgradcheck(lambda *t: native(*t, padding=1, pool=pool), leaves)


def test_backward_twice_and_in_place_use_of_the_output():
    """The graph can be kept, and what is done to the output in place does no harm: backward does not need it."""
    input, weight, bias = problem()
    weight.requires_grad_()
    output = native(input, weight, bias)
    first = torch.autograd.grad(output.sum(), weight, retain_graph=True)[0]
    output.mul_(2)
    assert torch.equal(torch.autograd.grad(output.sum(), weight)[0], 2 * first)


@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(pool, dtype):
    """Schema, fake tensors and autograd registration are consistent."""
    input, weight, bias = (t.requires_grad_() for t in problem(dtype=dtype))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for b in (bias, None):
        torch.library.opcheck(
            torch.ops.lightkit.conv_relu_pool.default, (input, weight, b, (1, 0), pool), test_utils=checks
        )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic):
    """The op is no break in a compiled graph, forward or backward, with sizes fixed or not, and is in it."""
    torch._dynamo.reset()
    recorder = AotEagerAndRecordGraphs()
    compiled = torch.compile(conv_relu_pool, fullgraph=True, dynamic=dynamic, backend=recorder)
    for images in (4, 5):
        input, weight, bias = problem(images, 3, 8)
        actual = results(compiled, input, weight, bias, 1, True)
        torch.testing.assert_close(actual, results(native, input, weight, bias, 1, True), rtol=0, atol=0)
    assert "lightkit._layer_chain_forward" in recorder.fw_graphs[0].code
    assert "lightkit._layer_chain_backward" in recorder.bw_graphs[0].code


def test_meta_tensors():
    """Shapes can be asked for without data."""
    output = native(*(t.to("meta") for t in problem(2, 3, 4, 9, 8)))
    assert output.shape == (2, 4, 3, 3)
    assert conv_relu_pool(*(t.to("meta") for t in problem(2, 3, 4, 9, 8)), pool=False).shape == (2, 4, 7, 6)


def test_functional_transforms_and_forward_mode():
    """torch.func and forward-mode AD go through the reference."""
    input, weight, bias = problem(3, 2, 4)
    per_image = torch.func.vmap(lambda x: conv_relu_pool(x.unsqueeze(0), weight, bias)[0])(input)
    torch.testing.assert_close(per_image, conv_relu_pool_reference(input, weight, bias))
    gradient = torch.func.grad(lambda w: conv_relu_pool(input, w, bias).sum())(weight)
    expected = torch.func.grad(lambda w: conv_relu_pool_reference(input, w, bias).sum())(weight)
    torch.testing.assert_close(gradient, expected)
    _, tangent = torch.func.jvp(lambda w: conv_relu_pool(input, w, bias), (weight,), (weight,))
    assert tangent.isfinite().all()


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


@pytest.mark.parametrize(("channels", "out_channels"), [(1, 32), (32, 64), (5, 7)])
@pytest.mark.parametrize("pool", [True, False])
def test_bit_identical_across_threads(channels, out_channels, pool):
    """Output and gradients do not depend on the number of threads, nor on the run."""
    script = f"""
import torch, lightkit.native
from hashlib import sha256
lightkit.native.load()
torch.manual_seed(0)
x = torch.randn(37, {channels}, 14, 15).requires_grad_()
w = torch.randn({out_channels}, {channels}, 3, 3).requires_grad_()
b = torch.randn({out_channels}).requires_grad_()
upstream = torch.randn(37, {out_channels}, *{(6, 6) if pool else (12, 13)})
for threads in (1, 2, 3, 7):
    torch.set_num_threads(threads)
    y = torch.ops.lightkit.conv_relu_pool(x, w, b, (0, 0), {pool})
    parts = [y, *torch.autograd.grad(y, (x, w, b), upstream)]
    print(sha256(b"".join(p.detach().contiguous().numpy().tobytes() for p in parts)).hexdigest())
"""
    digests = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert len(digests) == 4 and len(set(digests)) == 1
