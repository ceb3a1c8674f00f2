"""Convolution in one op: against float64 beside torch's own error, its statistics, autograd, compile and threads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.threads import assert_same_with_any_threads
from torch._dynamo.testing import AotEagerAndRecordGraphs

import lightkit.native
from lightkit.errors import ArgumentError
from lightkit.ops import conv2d, conv2d_is_faster, conv2d_reference

# For torch.ops.lightkit.
lightkit.native.load()

LAST = torch.channels_last


def make(input, weight, dtype=torch.float32, bias=True, seed=0):
    """Random input, weight and bias of these shapes, with sums of about 1."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    fan_in = weight[1] * weight[2] * weight[3]
    tensors = [draw(*input), draw(*weight) * fan_in**-0.5, draw(weight[0]) if bias else None]
    return [None if t is None else t.to(dtype) for t in tensors]


def results(function, tensors, *settings):
    """The output and the gradients of a sum of it, weighted differently everywhere."""
    leaves = [None if t is None else t.detach().clone(memory_format=torch.preserve_format) for t in tensors]
    leaves = [None if t is None else t.requires_grad_() for t in leaves]
    output = function(*leaves, *settings)
    # Multiples of 1/8: the same in every dtype.
    upstream = torch.arange(output.numel()).reshape(output.shape).mul(0.7).cos().mul(8).round().div(8)
    output.backward(upstream.to(output.dtype))
    return [output.detach(), *(t.grad for t in leaves if t is not None)]


def assert_accurate(tensors, *settings):
    """Fails unless output and gradients in float32 have at most about twice torch's error against float64.

    Sums of few terms have errors of single roundings, so each result may also be some roundings of its largest value
    away, growing with the root of the number of terms.
    """
    exact = results(F.conv2d, [None if t is None else t.double() for t in tensors], *settings)
    ours, torchs = results(conv2d, tensors, *settings), results(F.conv2d, tensors, *settings)
    terms = max(tensors[1][0].numel(), exact[0][:, 0].numel())
    for own, other, truth in zip(ours, torchs, exact, strict=True):
        assert own.shape == truth.shape
        few = torch.finfo(torch.float32).eps * truth.abs().max() * (2 + terms**0.5 / 4)
        assert (own - truth).abs().max() <= 2 * (other - truth).abs().max() + few


# Of each: the shapes of input and weight, stride, padding, dilation, groups. They walk the algorithms, and the edges of
# vectors (4, 8 or 16 lanes), tiles of positions (4 to 16), blocks of 48 tiles, bands and parts, one axis at a time.
CASES = {
    **{f"{c} -> 16": ((2, c, 9, 8), (16, c, 3, 3), 1, 1, 1, 1) for c in (1, 2, 3, 4, 8, 15, 16, 17, 32, 33)},
    **{f"16 -> {o}": ((2, 16, 9, 8), (o, 16, 3, 3), 1, 1, 1, 1) for o in (1, 3, 8, 17, 31, 32, 48, 65, 130)},
    **{f"{h}x{w}": ((2, 16, h, w), (32, 16, 3, 3), 1, 1, 1, 1) for h, w in [(1, 1), (2, 3), (3, 17), (31, 33)]},
    "one channel, unpadded": ((3, 1, 28, 28), (32, 1, 3, 3), 1, 0, 1, 1),
    "image, many bands": ((1, 3, 70, 200), (8, 3, 3, 3), 1, 1, 1, 1),
    "many parts": ((40, 16, 32, 16), (16, 16, 3, 3), 1, 1, 1, 1),
    "many blocks": ((5, 32, 17, 19), (48, 32, 3, 3), 1, 1, 1, 1),
    "1x1": ((3, 24, 7, 9), (40, 24, 1, 1), 1, 0, 1, 1),
    "1x1, stride 2": ((3, 16, 8, 9), (32, 16, 1, 1), 2, 0, 1, 1),
    "1x1, stride 4, padded": ((2, 16, 3, 3), (8, 16, 1, 1), 4, 1, 1, 1),
    "stride 2": ((3, 16, 16, 15), (32, 16, 3, 3), 2, 1, 1, 1),
    "stride 3": ((2, 20, 14, 11), (37, 20, 3, 3), 3, 1, 1, 1),
    "strides (1, 2)": ((2, 16, 9, 9), (16, 16, 3, 3), (1, 2), 1, 1, 1),
    "stem": ((2, 3, 23, 30), (64, 3, 7, 7), 2, 3, 1, 1),
    "5x5": ((2, 6, 12, 13), (16, 6, 5, 5), 1, 0, 1, 1),
    "2x4": ((2, 16, 6, 7), (16, 16, 2, 4), 1, (2, 1), 1, 1),
    "dilation 2": ((2, 16, 11, 12), (32, 16, 3, 3), 1, 2, 2, 1),
    "dilation (1, 3), stride 2": ((2, 16, 11, 12), (32, 16, 3, 3), 2, (1, 4), (1, 3), 1),
    "padding larger than the kernel": ((2, 16, 4, 5), (32, 16, 3, 3), 1, 5, 1, 1),
    "taps beyond the image": ((2, 4, 2, 2), (4, 4, 3, 3), 1, 9, 9, 1),
    "unpadded by one row": ((2, 16, 3, 9), (16, 16, 3, 3), 1, (0, 1), 1, 1),
    "2 groups": ((2, 32, 9, 8), (48, 16, 3, 3), 1, 1, 1, 2),
    "3 groups, stride 2": ((2, 12, 9, 8), (18, 4, 3, 3), 2, 1, 1, 3),
    "depthwise": ((2, 24, 10, 9), (24, 1, 3, 3), 1, 1, 1, 24),
    "depthwise, stride 2, 5x5": ((2, 17, 11, 12), (17, 1, 5, 5), 2, 2, 1, 17),
    "depthwise, two outputs each": ((2, 8, 7, 7), (16, 1, 3, 3), 1, 1, 1, 8),
}


@pytest.mark.sanitized
@pytest.mark.parametrize("name", CASES)
def test_float64(name):
    """Output and gradients are torch's to a few roundings, whatever way through the kernels a shape takes."""
    input, weight, *settings = CASES[name]
    tensors = make(input, weight, torch.float64)
    for layout in (torch.contiguous_format, LAST):
        tensors[0] = tensors[0].contiguous(memory_format=layout)
        ours, torchs = results(conv2d, tensors, *settings), results(F.conv2d, tensors, *settings)
        for own, other in zip(ours, torchs, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-10)


@pytest.mark.sanitized
@pytest.mark.parametrize("name", CASES)
def test_float32(name):
    """The error against float64 is at most about twice torch's, also of Winograd's algorithms."""
    input, weight, *settings = CASES[name]
    assert_accurate(make(input, weight), *settings)


PAIRS = st.tuples(st.integers(1, 3), st.integers(1, 3))


@given(
    groups=st.sampled_from([1, 1, 1, 2, 5]),
    channels=st.integers(1, 20),
    out_channels=st.integers(1, 36),
    size=st.tuples(st.integers(1, 14), st.integers(1, 14)),
    kernel=st.one_of(st.just((3, 3)), st.tuples(st.integers(1, 5), st.integers(1, 5))),
    stride=st.one_of(st.just((1, 1)), PAIRS),
    padding=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    dilation=st.one_of(st.just((1, 1)), PAIRS),
    images=st.integers(1, 5),
    bias=st.booleans(),
    last=st.booleans(),
)
def test_any_shape(groups, channels, out_channels, size, kernel, stride, padding, dilation, images, bias, last):
    """Whatever the shape: torch's output and gradients, and the moments of the output."""
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    size = [max(s, r - 2 * p) for s, r, p in zip(size, reach, padding, strict=True)]
    shapes = (images, groups * channels, *size), (groups * out_channels, channels, *kernel)
    tensors = make(*shapes, torch.float64, bias)
    tensors[0] = tensors[0].contiguous(memory_format=LAST if last else torch.contiguous_format)
    settings = (stride, padding, dilation, groups)
    ours, torchs = results(conv2d, tensors, *settings), results(F.conv2d, tensors, *settings)
    for own, other in zip(ours, torchs, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-9)
    output, moments = conv2d(*tensors, *settings, statistics=True)
    assert torch.equal(output, ours[0])
    expected = torch.stack([output.mean((0, 2, 3)), output.var((0, 2, 3), correction=0)])
    torch.testing.assert_close(moments, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.sanitized
@pytest.mark.parametrize("name", CASES)
def test_statistics(name):
    """Mean and variance are those of the output in float64 to float32's rounding, and the output stays the same."""
    input, weight, *settings = CASES[name]
    tensors = make(input, weight)
    output, moments = conv2d(*tensors, *settings, statistics=True)
    assert torch.equal(output, conv2d(*tensors, *settings))
    exact = output.double()
    expected = torch.stack([exact.mean((0, 2, 3)), exact.var((0, 2, 3), correction=0)])
    assert moments.dtype == torch.float32
    torch.testing.assert_close(moments.double(), expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("channels", [3, 16, 32])
def test_statistics_of_a_large_mean(channels):
    """A mean that is 1000 times the deviation leaves the variance its digits: squares are not subtracted."""
    input, weight, _ = make((8, channels, 24, 20), (32, channels, 3, 3))
    output, moments = conv2d(input, weight, torch.full((32,), 1000.0), padding=0, statistics=True)
    exact = output.double()
    torch.testing.assert_close(moments[0].double(), exact.mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(moments[1].double(), exact.var((0, 2, 3), correction=0), rtol=1e-4, atol=0)


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_empty_batch(dtype):
    """No image: an empty output of the right shape, gradients that are 0, and statistics that are NaN as torch's."""
    tensors = make((0, 16, 9, 8), (32, 16, 3, 3), dtype)
    torch.testing.assert_close(results(conv2d, tensors, 2, 1), results(F.conv2d, tensors, 2, 1), check_stride=False)
    output, moments = conv2d(*tensors, 2, 1, statistics=True)
    assert output.shape == (0, 32, 5, 4) and moments.shape == (2, 32) and moments.isnan().all()


@pytest.mark.sanitized
@pytest.mark.parametrize("channels", [3, 16])
def test_memory_formats(channels):
    """Transposed, sliced, strided, expanded and negated tensors are read right; images come out as channels-last."""
    input, weight, bias = make((3, channels, 9, 8), (20, channels, 3, 3))
    expected = conv2d(input, weight, bias, padding=1)
    assert expected.is_contiguous(memory_format=LAST)
    wide = torch.zeros(3, channels + 5, 12, 16).contiguous(memory_format=LAST)
    wide[:, 2 : 2 + channels, 1:10, ::2] = input
    for other in (
        input.contiguous(memory_format=LAST),
        input.transpose(2, 3).contiguous().transpose(2, 3),
        torch.stack([input] * 2, -1)[..., 0],
        wide[:, 2 : 2 + channels, 1:10, ::2],
        torch._neg_view(-input),
    ):
        assert torch.equal(conv2d(other, weight, bias, padding=1), expected)
        assert torch.equal(conv2d(other, weight.contiguous(memory_format=LAST), bias, padding=1), expected)
    expanded = input[:1].expand(4, -1, -1, -1)
    assert torch.equal(conv2d(expanded, weight, bias), conv2d(expanded.contiguous(), weight, bias))
    upstream = torch.ones(()).expand(expected.shape)
    leaf = weight.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(conv2d(input, leaf, bias, padding=1), leaf, upstream)
    (whole,) = torch.autograd.grad(conv2d(input, leaf, bias, padding=1), leaf, torch.ones_like(expected))
    assert torch.equal(gradient, whole)


@pytest.mark.sanitized
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("shape", "settings"),
    [((24, 3, 3, 3), (1, 1)), ((24, 16, 3, 3), (2, 1)), ((24, 16, 1, 1), (1, 0)), ((24, 16, 3, 3), (1, 1))],
    ids=["3 channels", "stride 2", "1x1", "Winograd"],
)
def test_values_that_are_not_finite(shape, settings, value):
    """They reach every output that depends on them, and no others, except those of the same Winograd tile."""
    input, weight, bias = make((2, shape[1], 12, 11), shape)
    input[1, 2, 5, 6] = value
    output, expected = conv2d(input, weight, bias, *settings), F.conv2d(input, weight, bias, *settings)
    wrong = ~expected.isfinite()
    assert wrong.any() and not output[wrong].isfinite().any()
    if shape[1:] == (16, 3, 3) and settings == (1, 1):
        # Tiles of 2x2 results begin at even rows and columns.
        near = torch.zeros(2, 1, 12, 11, dtype=torch.bool)
        near[1, :, 4:8, 4:8] = True
        wrong = near.expand_as(wrong)
    assert output[~wrong].isfinite().all()


@pytest.mark.sanitized
@pytest.mark.parametrize("wanted", [(i >> 2 & 1, i >> 1 & 1, i & 1) for i in range(1, 8)], ids=str)
@pytest.mark.parametrize("name", ["16 -> 17", "16 -> 32", "stride 2", "3 -> 16", "depthwise"])
def test_gradients_of_some(name, wanted):
    """Each gradient is there if and only if it is wanted, and is the same whatever else is.

    The bias alone is summed in another order than beside the weight.
    """
    input, weight, *settings = CASES[name]
    tensors = make(input, weight)
    everything = results(conv2d, tensors, *settings)
    leaves = [t.clone().requires_grad_(bool(w)) for t, w in zip(tensors, wanted, strict=True)]
    output = conv2d(*leaves, *settings)
    upstream = torch.arange(output.numel()).reshape(output.shape).mul(0.7).cos().mul(8).round().div(8)
    output.backward(upstream)
    for leaf, gradient in zip(leaves, everything[1:], strict=True):
        assert (leaf.grad is not None) == leaf.requires_grad
        if leaf.grad is not None and leaf.dim() == 1:
            torch.testing.assert_close(leaf.grad, gradient, rtol=1e-5, atol=1e-5)
        elif leaf.grad is not None:
            assert torch.equal(leaf.grad, gradient)


def test_statistics_take_no_part_in_autograd():
    """They need no gradient, and inference gives the same bits."""
    input, weight, bias = make((3, 16, 9, 8), (32, 16, 3, 3))
    output, moments = conv2d(input, weight.requires_grad_(), bias, 1, 1, statistics=True)
    assert output.requires_grad and not moments.requires_grad
    with torch.inference_mode():
        inferred = conv2d(input, weight, bias, 1, 1, statistics=True)
    assert torch.equal(output, inferred[0]) and torch.equal(moments, inferred[1])


SMALL = {
    "3x3": ((2, 8, 4, 5), (3, 8, 3, 3), 1, 1, 1, 1),
    "16 channels": ((1, 16, 3, 4), (2, 16, 3, 3), 1, 1, 1, 1),
    "stride 2": ((2, 2, 5, 6), (3, 2, 3, 2), 2, 1, 1, 1),
    "groups, dilation": ((2, 4, 5, 6), (2, 2, 2, 2), 1, 0, 2, 2),
    "depthwise": ((2, 3, 5, 4), (3, 1, 3, 3), 1, 1, 1, 3),
}


@pytest.mark.parametrize("name", SMALL)
def test_gradcheck_and_gradgradcheck(name):
    """First and second derivatives against finite differences."""
    input, weight, *settings = SMALL[name]
    tensors = [t.requires_grad_() for t in make(input, weight, torch.float64)]
    assert torch.autograd.gradcheck(lambda *t: conv2d(*t, *settings), tensors)
    assert torch.autograd.gradgradcheck(lambda *t: conv2d(*t, *settings), tensors)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("statistics", [True, False])
def test_opcheck(statistics, bias):
    """Schema, fake tensors and autograd registration are consistent, for the inner op as well."""
    tensors = make((2, 16, 9, 8), (20, 16, 3, 3), bias=bias)
    settings = ([2, 1], [1, 1], [1, 1], 1)
    leaves = [None if t is None else t.requires_grad_() for t in tensors]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.lightkit.conv2d.default, (*leaves, *settings, statistics), test_utils=checks)
    with torch.no_grad():
        output = conv2d(*tensors, *settings)
        for wanted in ([True] * 3, [False, True, False]):
            arguments = (output, tensors[0].detach(), tensors[1].detach(), *settings, wanted)
            backward = torch.ops.lightkit._conv2d_backward.default
            torch.library.opcheck(backward, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic):
    """The op is no break in a compiled graph, forward or backward, with sizes fixed or not, and is in it."""
    torch._dynamo.reset()
    recorder = AotEagerAndRecordGraphs()
    compiled = torch.compile(conv2d, fullgraph=True, dynamic=dynamic, backend=recorder)
    for images, size in ((4, 9), (5, 10)):
        tensors = make((images, 16, size, size), (32, 16, 3, 3))
        actual, expected = results(compiled, tensors, 1, 1), results(conv2d, tensors, 1, 1)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert "lightkit.conv2d" in recorder.fw_graphs[0].code
    assert "lightkit._conv2d_backward" in recorder.bw_graphs[0].code


THREADED = {
    name: CASES[name] for name in ["many parts", "many blocks", "image, many bands", "stride 2", "5x5", "depthwise"]
}


@pytest.mark.parametrize("name", THREADED)
def test_bit_identical_across_threads(name):
    """Output, gradients and statistics do not depend on the number of threads."""
    input, weight, *settings = THREADED[name]
    tensors = make((30, *input[1:]), weight)

    def compute():
        return [*results(conv2d, tensors, *settings), conv2d(*tensors, *settings, statistics=True)[1]]

    assert_same_with_any_threads(compute)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, w, b: conv2d(x.bfloat16(), w.bfloat16(), b.bfloat16(), statistics=True),
        lambda x, w, b: conv2d(x, w, b, padding="same", statistics=True),
        lambda x, w, b: conv2d(x[0], w, b, statistics=True),
    ],
    ids=["bfloat16", "padding as a string", "one image"],
)
def test_reference_takes_the_rest(call):
    """What has no kernel is torch's output with the moments of it, in float32."""
    output, moments = call(*make((3, 16, 9, 8), (32, 16, 3, 3)))
    axes = (0, 2, 3) if output.dim() == 4 else (1, 2)
    expected = torch.stack([output.float().mean(axes), output.float().var(axes, correction=0)])
    torch.testing.assert_close(moments, expected)
    assert output.dim() == 3 or output.is_contiguous(memory_format=LAST)


def test_autocast_and_transforms():
    """Under autocast the output has its dtype; torch.func goes through the reference."""
    input, weight, bias = make((3, 16, 9, 8), (32, 16, 3, 3))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(conv2d(input, weight, bias), F.conv2d(input, weight, bias))
    per_image = torch.func.vmap(lambda x: conv2d(x.unsqueeze(0), weight, bias, 1, 1)[0])(input)
    torch.testing.assert_close(per_image, conv2d_reference(input, weight, bias, 1, 1))
    gradient = torch.func.grad(lambda w: conv2d(input, w, bias).sum())(weight)
    torch.testing.assert_close(gradient, torch.func.grad(lambda w: F.conv2d(input, w, bias).sum())(weight))


def test_which_layers_are_faster():
    """Layers of small residual networks are the kernel's; other dtypes, large weights and narrow groups are torch's."""
    assert conv2d_is_faster((64, 16, 32, 32), (16, 16, 3, 3), 1, 1, 1, 1, torch.float32)
    assert conv2d_is_faster((64, 16, 32, 32), (32, 16, 1, 1), (2, 2), (0, 0), (1, 1), 1, torch.float32)
    assert not conv2d_is_faster((64, 16, 32, 32), (16, 16, 3, 3), 1, 1, 1, 1, torch.bfloat16)
    assert not conv2d_is_faster((64, 2048, 4, 4), (2048, 2048, 3, 3), 1, 1, 1, 1, torch.float32)
    assert not conv2d_is_faster((64, 16, 32, 32), (16, 4, 3, 3), 1, 1, 1, 4, torch.float32)
    assert not conv2d_is_faster((64, 16, 32, 32), (16, 16, 3, 3), 1, 1 << 29, 1, 1, torch.float32)


IMAGES, WEIGHT = torch.zeros(2, 4, 9, 9), torch.zeros(6, 4, 3, 3)


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "message"),
    [
        ((IMAGES, torch.zeros(6, 3, 3, 3)), {}, ArgumentError, r"\[6, 3, 3, 3\] in 1 groups .* 4 channels"),
        ((IMAGES, WEIGHT), {"groups": 0}, ArgumentError, "in 0 groups"),
        ((IMAGES, WEIGHT), {"groups": 4}, ArgumentError, "in 4 groups"),
        ((IMAGES, WEIGHT), {"stride": 0}, ArgumentError, r"stride must be two numbers from 1 up .*\[0, 0\]"),
        ((IMAGES, WEIGHT), {"stride": (1, 2, 3)}, ArgumentError, r"stride must be an int or a pair.*\(1, 2, 3\)"),
        ((IMAGES, WEIGHT), {"padding": (-1, 0)}, ArgumentError, r"padding must be two numbers from 0 up .*\[-1, 0\]"),
        ((IMAGES, WEIGHT), {"padding": 1 << 40}, ArgumentError, r"less than 2\^30"),
        ((IMAGES, WEIGHT), {"padding": 1 << 20}, ArgumentError, r"images of less than 2\^30 values"),
        ((IMAGES, WEIGHT), {"dilation": 0}, ArgumentError, "dilation must be two numbers from 1 up"),
        ((IMAGES, WEIGHT), {"dilation": 5}, ArgumentError, "too small for a weight"),
        ((IMAGES[:, :, :0], WEIGHT), {"padding": 2}, ArgumentError, "too small for a weight"),
        ((IMAGES, WEIGHT, torch.zeros(4)), {}, ArgumentError, "each of the 6 output channels"),
        ((IMAGES, WEIGHT.double()), {}, RuntimeError, "weight must be of the dtype"),
        ((IMAGES, WEIGHT, torch.zeros(6).double()), {}, RuntimeError, "bias must be of the dtype"),
    ],
)
def test_wrong_arguments(arguments, settings, error, message):
    """The error names the argument, its value, and what was expected."""
    with pytest.raises(error, match=message):
        conv2d(*arguments, **settings)


@pytest.mark.sanitized
def test_op_called_directly_is_safe():
    """The inner op checks what it is given: nothing reads beyond a tensor."""
    input, weight, _ = make((2, 16, 9, 8), (20, 16, 3, 3))
    settings = ([1, 1], [1, 1], [1, 1], 1)
    output, _ = torch.ops.lightkit.conv2d(input, weight, None, *settings, False)
    backward = torch.ops.lightkit._conv2d_backward
    with pytest.raises(ValueError, match="must have the shape of the output"):
        backward(output[:1], input, weight, *settings, [True] * 3)
    with pytest.raises(RuntimeError, match="gradient must be of the dtype"):
        backward(output.double(), input, weight, *settings, [True] * 3)
    with pytest.raises(RuntimeError, match="must be float32 or float64"):
        torch.ops.lightkit.conv2d(input.half(), weight.half(), None, *settings, False)
    short = torch.empty(0).set_(torch.zeros(8).untyped_storage(), 0, input.shape, input.stride())
    short.untyped_storage().resize_(32)
    with pytest.raises(ValueError, match="beyond its storage"):
        torch.ops.lightkit.conv2d(short, weight, None, *settings, False)
    assert [g.numel() for g in backward(output, input, weight, *settings, [False, False, True])] == [0, 0, 20]
