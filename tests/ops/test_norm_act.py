"""Normalization, residual, ReLU and pool in one op: against float64 and torch's own operations, and autograd."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.threads import assert_same_with_any_threads
from torch._dynamo.testing import AotEagerAndRecordGraphs

import lightkit.native
from lightkit.ops import ACTIVATIONS, Activation, norm_act, norm_act_is_faster, norm_act_reference

# For torch.ops.lightkit.
lightkit.native.load()

LAST = torch.channels_last


def relu_if(relu: bool) -> str | None:
    return "relu" if relu else None


class Problem:
    """Tensors and settings of a call."""

    def __init__(self, shape, dtype=torch.float64, seed=0, affine=True, residual=False, mean=0.5, **options) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*sizes):
            return torch.randn(sizes, generator=generator, dtype=torch.float64)

        channels = shape[1]
        self.input = (draw(*shape) + mean).to(dtype)
        self.weight, self.bias = (draw(channels).to(dtype), draw(channels).to(dtype)) if affine else (None, None)
        self.residual = draw(*shape).to(dtype) if residual else None
        self.running = [draw(channels).to(dtype), (draw(channels).square() + 0.5).to(dtype)]
        self.upstream = draw(*shape).to(dtype)
        self.options = {"training": True, "activation": "relu", "pool": None, **options}

    def to(self, dtype) -> Problem:
        """Returns the same problem in another dtype."""
        other = Problem.__new__(Problem)
        for name, value in vars(self).items():
            is_tensor = isinstance(value, torch.Tensor)
            setattr(other, name, value.to(dtype) if is_tensor else value)
        other.running = [tensor.to(dtype) for tensor in self.running]
        return other

    def results(self, function, memory_format=LAST) -> dict[str, torch.Tensor]:
        """Returns output, gradients and updated statistics."""
        leaves = {}
        for name in ("input", "weight", "bias", "residual"):
            tensor = getattr(self, name)
            if tensor is not None:
                tensor = tensor.contiguous(memory_format=memory_format) if tensor.dim() == 4 else tensor
                leaves[name] = tensor.detach().clone().requires_grad_()
        running = [tensor.clone() for tensor in self.running]
        arguments = [leaves.get(name) for name in ("input", "weight", "bias")]
        output = function(*arguments, *running, leaves.get("residual"), **self.options)
        upstream = self.upstream[tuple(slice(size) for size in output.shape)]
        gradients = torch.autograd.grad(output, list(leaves.values()), upstream)
        found = {"output": output.detach(), "running_mean": running[0], "running_var": running[1]}
        return found | {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}


def assert_accurate(problem: Problem) -> None:
    """Fails unless each result is at most twice as far from float64 as torch's, but for a few roundings.

    In float64 each is torch's to 1e-12 of the largest value.
    """
    ours, torchs = problem.results(norm_act), problem.results(norm_act_reference)
    if problem.input.dtype == torch.float64:
        # Torch's hardsigmoid has a derivative that was rounded to float32.
        limit = 1e-7 if problem.options["activation"] == "hardsigmoid" else 1e-12
        for name, truth in torchs.items():
            assert (ours[name] - truth).abs().max() <= limit * (truth.abs().max() + 1), name
        return
    exact = problem.to(torch.float64).results(norm_act_reference)
    eps = torch.finfo(problem.input.dtype).eps
    for name, truth in exact.items():
        error, other = ((result[name] - truth).abs().max() for result in (ours, torchs))
        assert ours[name].shape == truth.shape
        assert error <= 2 * other + 8 * eps * (truth.abs().max() + 1), f"{name}: {error} against torch's {other}"


POOLS = [None, "max", "mean"]

# The edges of vectors and groups of channels, of images and windows, and of blocks of rows.
SHAPES = [
    (2, 1, 5, 7),
    (3, 3, 4, 4),
    (2, 8, 3, 2),
    (2, 15, 6, 5),
    (3, 16, 2, 3),
    (2, 17, 5, 4),
    (2, 33, 3, 3),
    (1, 64, 4, 6),
    (2, 100, 4, 4),
    (2, 4, 19, 16),
    (9, 5, 16, 17),
]


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("pool", POOLS)
def test_images(relu, pool, shape, dtype):
    """Values, gradients and updates of every combination of settings are as accurate as torch's."""
    for residual, training, affine in itertools.product((False, True), repeat=3):
        assert_accurate(
            Problem(
                shape, dtype, affine=affine, residual=residual, training=training, activation=relu_if(relu), pool=pool
            )
        )


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(2, 1), (7, 3), (64, 33), (300, 16), (1000, 5)], ids=str)
def test_vectors(shape, dtype):
    """An input of two dimensions is normalized over the batch."""
    for relu, residual, training in itertools.product((False, True), repeat=3):
        assert_accurate(Problem(shape, dtype, residual=residual, training=training, activation=relu_if(relu)))


# Each function with its default arguments, and those with arguments with others.
ACTIVATED = [
    *(name for name in ACTIVATIONS if name != "relu"),
    *(Activation("leaky_relu", 0.2), Activation("hardtanh", 0.0, 6.0), Activation("elu", 0.5)),
    Activation("softplus", 2.0, 1.5),
]


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("activation", ACTIVATED, ids=str)
def test_activations(activation, dtype):
    """Values and gradients of every activation function are as accurate as torch's, with all that is around it."""
    cases = [((2, 5, 5, 7), "max"), ((3, 17, 4, 6), "max"), ((3, 17, 4, 3), None), ((20, 37), None)]
    for shape, pool in (*cases, ((3, 17, 4, 3), "mean"), ((2, 5, 9, 70), "mean")):
        for residual, training in itertools.product((False, True), repeat=2):
            options = {"residual": residual, "training": training, "affine": training or not residual}
            assert_accurate(Problem(shape, dtype, activation=activation, pool=pool, **options))


def activated(function, x: torch.Tensor, activation) -> dict[str, torch.Tensor]:
    """Returns an activation of ``x``, of shape (values, 1), and its derivative; the normalization changes nothing."""
    leaf = x.clone().requires_grad_()
    running = x.new_zeros(1), x.new_ones(1)
    output = function(leaf, None, None, *running, training=False, eps=0.0, activation=activation)
    return {"output": output.detach(), "derivative": torch.autograd.grad(output.sum(), leaf)[0]}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("activation", ACTIVATED, ids=str)
def test_activations_of_extreme_values(activation, dtype):
    """Of kinks, large, infinite and NaN values each result is as accurate as torch's, but for some roundings."""
    values = [0.0, -0.0, 1e-20, -1e-5, 0.5, -0.5, 3, -3, 6, -6, -1, 1, 20, -20, 90, -90, 1e3, -1e3, 1e30, -1e30]
    x = torch.tensor([*values, math.inf, -math.inf, math.nan], dtype=dtype)[:, None]
    ours, torchs = activated(norm_act, x, activation), activated(norm_act_reference, x, activation)
    eps = torch.finfo(dtype).eps
    if dtype == torch.float64 and activation == "hardsigmoid":
        # Torch's hardsigmoid has a derivative that was rounded to float32.
        eps = torch.finfo(torch.float32).eps
    for name, truth in activated(norm_act_reference, x.double(), activation).items():
        # Torch's own GELU of an infinite value is NaN on some processors, and infinite on others. The derivative of its
        # GELU by tanh is NaN where the cube of x overflows.
        told = x.isnan() | ~(truth.isnan() | torchs[name].isnan())
        actual, expected, truth = ours[name][told].double(), torchs[name][told].double(), truth[told]
        finite = truth.isfinite()
        torch.testing.assert_close(actual[~finite], truth[~finite], equal_nan=True, rtol=0, atol=0)
        # The functions take the sum of 1 and a rounded number times x: GELU of -3 is what is left of 1 - 0.9973.
        roundings = 4 * eps * (truth.abs() + x[told].double().abs().clamp(max=1).nan_to_num())
        worse = finite & ~((actual - truth).abs() <= 2 * (expected - truth).abs() + roundings)
        assert not worse.any(), f"{name} of {x[told][worse]}: {actual[worse]}, torch has {expected[worse]}"


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("activation", ["silu", "leaky_relu", "gelu"])
def test_gradients_that_are_not_wanted(activation, pool):
    """Each subset of the gradients is that of all of them."""
    problem = Problem((3, 5, 4, 5), residual=True, activation=activation, pool=pool)
    expected = problem.results(norm_act)
    for wanted in itertools.product((False, True), repeat=4):
        tensors = (problem.input, problem.weight, problem.bias, problem.residual)
        leaves = [t.clone().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]
        output = norm_act(*leaves[:3], None, None, leaves[3], **problem.options)
        chosen = [leaf for leaf in leaves if leaf.requires_grad]
        upstream = problem.upstream[tuple(slice(size) for size in output.shape)]
        found = torch.autograd.grad(output, chosen, upstream) if chosen else ()
        names = [n for n, w in zip(("input", "weight", "bias", "residual"), wanted, strict=True) if w]
        for name, gradient in zip(names, found, strict=True):
            torch.testing.assert_close(gradient, expected[f"gradient of {name}"])


@given(
    shape=st.tuples(st.integers(2, 5), st.integers(1, 70), st.integers(2, 9), st.integers(2, 9)),
    flags=st.tuples(*[st.booleans()] * 3),
    pool=st.sampled_from(POOLS),
    seed=st.integers(0, 1000),
)
def test_any_image_in_float64(shape, flags, pool, seed):
    """Whatever the sizes: torch's results, to the rounding of float64."""
    relu, residual, training = flags
    problem = Problem(shape, seed=seed, residual=residual, activation=relu_if(relu), pool=pool, training=training)
    ours, torchs = problem.results(norm_act), problem.results(norm_act_reference)
    torch.testing.assert_close(ours, torchs, rtol=1e-10, atol=1e-10)


def statistics_of(input: torch.Tensor) -> torch.Tensor:
    """Returns mean and inverse standard deviation of each channel, as the op keeps them."""
    settings = (True, 0.1, 1e-5, 0, 0.0, 0.0, 0)
    return torch.ops.lightkit._norm_act_forward(input, *[None] * 6, *settings, False)[1]


@pytest.mark.parametrize("mean", [0.0, 100.0, -3e4])
def test_large_means(mean):
    """The variance loses nothing to a mean that is much larger, in many blocks and parts of the rows."""
    problem = Problem((40, 3, 32, 32), torch.float32, mean=mean, activation=None)
    assert_accurate(problem)
    variance = problem.input.double().var((0, 2, 3), unbiased=False)
    kept = statistics_of(problem.input)
    assert ((kept[1].double() ** -2 - 1e-5) / variance - 1).abs().max() < 2e-6


@pytest.mark.parametrize("pool", POOLS)
def test_equal_gradients(pool):
    """Gradients that are equal in an image, as behind a mean, add up without the error of a long chain of additions."""
    problem = Problem((4, 64, 16, 16), torch.float32, pool=pool)
    problem.upstream = problem.upstream[:, :, :1, :1].expand_as(problem.input).contiguous()
    ours = problem.results(norm_act)
    exact = problem.to(torch.float64).results(norm_act_reference)
    for name in ("gradient of bias", "gradient of weight"):
        assert (ours[name] - exact[name]).norm() <= 2.5e-7 * exact[name].norm()


def test_means_that_drift():
    """Blocks with distant means, and a first block of outliers, leave the variance as accurate as a constant mean."""
    rows = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows[:, 0] += torch.linspace(-1e3, 1e3, len(rows))
    rows[:300, 1] += 1e4
    rows = rows.float()
    kept = statistics_of(rows)
    exact = rows.double().var(0, unbiased=False)
    assert ((kept[1].double() ** -2 - 1e-5) / exact - 1).abs().max() < 2e-6
    assert (kept[0] - rows.double().mean(0)).abs().max() < 1e-6 * exact.sqrt().max()


@pytest.mark.parametrize("momentum", [0.0, 0.3, 1.0])
def test_running_statistics(momentum):
    """They are updated as torch's, by any momentum, also where they are views with gaps; not without training."""
    problem = Problem((4, 6, 5, 5), torch.float32, momentum=momentum, eps=0.1)
    ours, torchs = problem.results(norm_act), problem.results(norm_act_reference)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(ours[name], torchs[name], rtol=1e-6, atol=1e-6)
    strided = torch.stack([tensor.clone() for tensor in problem.running for _ in range(2)], 1)
    before = strided.clone()
    norm_act(problem.input, None, None, strided[:, 0], strided[:, 2], **problem.options)
    torch.testing.assert_close(strided[:, 0], torchs["running_mean"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(strided[:, 2], torchs["running_var"], rtol=1e-6, atol=1e-6)
    assert torch.equal(strided[:, 1::2], before[:, 1::2])
    norm_act(problem.input, None, None, strided[:, 1], strided[:, 3], training=False)
    assert torch.equal(strided[:, 1::2], before[:, 1::2])


@pytest.mark.parametrize("residual", [False, True])
def test_given_statistics(residual):
    """Mean and variance that are given save the pass that computes them, and change neither values nor gradients."""
    problem = Problem((4, 20, 6, 6), residual=residual)
    expected = problem.results(norm_act)
    variance, mean = torch.var_mean(problem.input, (0, 2, 3), unbiased=False)
    problem.options["statistics"] = torch.stack([mean, variance])
    torch.testing.assert_close(problem.results(norm_act), expected, rtol=1e-12, atol=1e-12)
    problem.options["statistics"] = torch.stack([mean + 1, variance])
    assert not torch.allclose(problem.results(norm_act)["output"], expected["output"])


@pytest.mark.sanitized
@pytest.mark.parametrize("pool", POOLS)
def test_not_finite_values(pool):
    """NaN and infinite values of one channel go where torch's go, and into no other channel."""
    for value, training in itertools.product((math.nan, math.inf, -math.inf), (True, False)):
        problem = Problem((2, 20, 6, 7), torch.float32, pool=pool, training=training)
        problem.input[1, 3, 2, 1] = value
        ours, torchs = problem.results(norm_act), problem.results(norm_act_reference)
        for name in ("output", "gradient of input", "gradient of bias", "running_var"):
            torch.testing.assert_close(ours[name], torchs[name], equal_nan=True, rtol=1e-4, atol=1e-4)


def test_ties_and_zeros():
    """The first of equal values in a window takes the gradient, as in torch; an output of 0 has none."""
    problem = Problem((2, 20, 6, 6), training=False, pool=True)
    problem.input = problem.input.round()
    problem.bias.zero_()
    torch.testing.assert_close(problem.results(norm_act), problem.results(norm_act_reference))
    problem.weight = torch.zeros(20, dtype=torch.float64)
    ours, torchs = problem.results(norm_act), problem.results(norm_act_reference)
    torch.testing.assert_close(ours, torchs)
    assert not ours["gradient of bias"].any()


@pytest.mark.sanitized
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("relu", [False, True])
def test_memory_formats(relu, pool):
    """Contiguous, strided, expanded and negative tensors are read right; images come out as channels-last."""
    problem = Problem((3, 10, 6, 5), residual=True, activation=relu_if(relu), pool=pool)
    expected = problem.results(norm_act)
    assert expected["output"].is_contiguous(memory_format=LAST)
    assert expected["gradient of input"].is_contiguous(memory_format=LAST)
    contiguous = problem.results(norm_act, torch.contiguous_format)
    torch.testing.assert_close(contiguous, expected, rtol=0, atol=0)
    assert contiguous["output"].is_contiguous(memory_format=LAST)

    def call(change):
        tensors = [problem.input, problem.weight, problem.bias]
        changed = [change(tensor) for tensor in tensors]
        return norm_act(*changed, None, None, change(problem.residual), **problem.options)

    for change in (
        lambda t: torch.stack([t] * 2, -1)[..., 0],
        lambda t: torch._neg_view(-t),
        lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    ):
        assert torch.equal(call(change), expected["output"])
    ones = torch.ones((), dtype=torch.float64)
    torch.testing.assert_close(
        norm_act(problem.input, ones.expand(10), training=True), norm_act(problem.input, training=True)
    )


@pytest.mark.sanitized
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("training", [False, True])
def test_gradients_of_some(training, pool):
    """Each gradient is there if and only if it is wanted, and is the same whatever else is."""
    problem = Problem((3, 10, 6, 5), residual=True, pool=pool, training=training)
    expected = problem.results(norm_act)
    names = ("input", "weight", "bias", "residual")
    for relu in (False, True):
        problem.options["activation"] = relu_if(relu)
        expected = problem.results(norm_act)
        for wanted in itertools.product((False, True), repeat=4):
            tensors = [getattr(problem, name).detach().clone() for name in names]
            for tensor, is_wanted in zip(tensors, wanted, strict=True):
                tensor.requires_grad_(is_wanted)
            running = [tensor.clone() for tensor in problem.running]
            output = norm_act(*tensors[:3], *running, tensors[3], **problem.options)
            assert output.requires_grad == any(wanted)
            assert torch.equal(output, expected["output"])
            if any(wanted):
                output.backward(problem.upstream[tuple(slice(size) for size in output.shape)])
            for name, tensor in zip(names, tensors, strict=True):
                assert (tensor.grad is not None) == tensor.requires_grad
                assert tensor.grad is None or torch.equal(tensor.grad, expected[f"gradient of {name}"])


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 3, 5), (4, 3)], ids=str)
def test_gradcheck_and_gradgradcheck(shape, training, relu, pool):
    """First and second derivatives against finite differences."""
    if pool and len(shape) == 2:
        return
    problem = Problem(shape, residual=True, training=training, activation=relu_if(relu), pool=pool)
    leaves = [problem.input, problem.weight, problem.bias, problem.residual]
    leaves = [tensor.requires_grad_() for tensor in leaves]

    def function(input, weight, bias, residual):
        running = [tensor.clone() for tensor in problem.running]
        return norm_act(input, weight, bias, *running, residual, **problem.options)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("relu", "pool"), [(True, None), (True, "max"), (False, None), (True, "mean"), (False, "mean")]
)
def test_batched_and_second_gradients(relu, pool, training):
    """A batch of upstream gradients gives the gradients one by one; second derivatives are torch's."""
    check_derivatives(Problem((3, 4, 4, 5), residual=True, training=training, activation=relu_if(relu), pool=pool))


# Torch has no second derivative of hardsigmoid.
@pytest.mark.parametrize("activation", [a for a in ACTIVATED if a != "hardsigmoid"], ids=str)
def test_derivatives_of_activations(activation):
    """So are those of every activation function, with a pool and without, in training and not."""
    for training, pool in ((True, None), (False, "max"), (True, "mean")):
        check_derivatives(Problem((3, 4, 4, 5), residual=True, training=training, activation=activation, pool=pool))


def check_derivatives(problem: Problem) -> None:
    """Compares batches of gradients and second derivatives with torch's."""

    def ends(function):
        leaves = [problem.input, problem.weight, problem.residual]
        leaves = [tensor.detach().clone().requires_grad_() for tensor in leaves]
        running = [tensor.clone() for tensor in problem.running]
        output = function(leaves[0], leaves[1], problem.bias, *running, leaves[2], **problem.options)
        upstream = torch.stack([problem.upstream[tuple(slice(size) for size in output.shape)]] * 2)
        batched = torch.autograd.grad(output, leaves, upstream, is_grads_batched=True, retain_graph=True)
        first = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
        return [*batched, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)]

    torch.testing.assert_close(ends(norm_act), ends(norm_act_reference))


@pytest.mark.parametrize("activation", ["relu", "elu", "silu"])
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("shape", [(6, 16, 40, 41), (6, 70, 20, 20)], ids=str)
def test_bit_identical_across_threads(shape, pool, activation):
    """Output, gradients and statistics do not depend on the number of threads."""
    problem = Problem(shape, torch.float32, residual=True, pool=pool, activation=activation)
    assert_same_with_any_threads(lambda: list(problem.results(norm_act).values()))


def arguments_of(problem: Problem, running=True) -> tuple:
    """Returns the arguments of the op."""
    given = problem.running if running else [None, None]
    options = {"momentum": 0.1, "eps": 1e-5, **problem.options}
    tensors = (problem.input, problem.weight, problem.bias, *given, problem.residual, None)
    code = 0 if options["activation"] is None else 1
    settings = tuple(options[name] for name in ("training", "momentum", "eps"))
    return (*tensors, *settings, code, 0.0, 0.0, POOLS.index(options["pool"]))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("relu", "pool"), [(True, None), (True, "max"), (False, None), (True, "mean")])
def test_opcheck(relu, pool, training):
    """Schema, mutation, fake tensors and autograd registration are consistent, for the inner ops as well."""
    problem = Problem(
        (3, 10, 6, 5), torch.float32, residual=True, pool=pool, training=training, activation=relu_if(relu)
    )
    ops = torch.ops.lightkit
    for name in ("input", "weight", "bias", "residual"):
        getattr(problem, name).requires_grad_()
    torch.library.opcheck(ops.norm_act.default, arguments_of(problem))
    torch.library.opcheck(ops.norm_act.default, arguments_of(Problem((8, 5))))
    with torch.no_grad():
        inner = ("test_schema", "test_faketensor")
        for keep in (True, False):
            torch.library.opcheck(ops._norm_act_forward.default, (*arguments_of(problem), keep), test_utils=inner)
        output, kept, live = ops._norm_act_forward(*arguments_of(problem), True)
        for wanted in itertools.product((False, True), repeat=3):
            settings = (training, int(relu), 0.0, 0.0, POOLS.index(pool), *wanted)
            arguments = (output, problem.input, problem.weight, kept, live, None, None, *settings)
            torch.library.opcheck(ops._norm_act_backward.default, arguments, test_utils=inner)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic):
    """The op is no break in a compiled graph, with sizes fixed or not; running statistics are updated."""
    torch._dynamo.reset()
    recorder = AotEagerAndRecordGraphs()
    compiled = torch.compile(norm_act, fullgraph=True, dynamic=dynamic, backend=recorder)
    for images in (4, 5):
        problem = Problem((images, 6, 6, 6), torch.float32, residual=True, pool=True)
        torch.testing.assert_close(problem.results(compiled), problem.results(norm_act), rtol=0, atol=0)
    assert "lightkit._norm_act_forward" in recorder.fw_graphs[0].code
    assert "lightkit._norm_act_backward" in recorder.bw_graphs[0].code


def test_functional_transforms():
    """torch.func and forward-mode AD go through the reference; so do other dtypes and devices."""
    problem = Problem((3, 4, 4, 4))
    arguments = (problem.input, problem.weight, problem.bias)
    options = {"training": True, "activation": "relu"}

    def loss(function):
        return lambda x: function(x, *arguments[1:], **options).square().sum()

    ours, torchs = (torch.func.grad(loss(f))(problem.input) for f in (norm_act, norm_act_reference))
    torch.testing.assert_close(ours, torchs)
    ours, torchs = (torch.func.jvp(loss(f), (problem.input,), (problem.input,)) for f in (norm_act, norm_act_reference))
    torch.testing.assert_close(ours, torchs)
    assert norm_act(problem.input.bfloat16(), training=True).dtype == torch.bfloat16
    assert norm_act(torch.empty(3, 4, 4, 4, device="meta"), training=True).shape == (3, 4, 4, 4)
    assert norm_act(torch.randn(5, 4, 3), training=True).shape == (5, 4, 3)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (0, 3), (2, 0)], ids=str)
def test_empty(shape):
    """Sizes of 0 give what torch gives, and leave the running statistics as they are."""
    for training in (True, False):
        input = torch.ones(shape, requires_grad=True)
        running = [torch.zeros(shape[1]), torch.ones(shape[1])]
        output = norm_act(input, None, None, *running, training=training, activation="relu")
        assert output.shape == shape
        assert torch.autograd.grad(output.sum(), input)[0].shape == shape
        assert not running[0].any() and running[1].eq(1).all()


IMAGES = torch.ones(2, 3, 4, 4)
THREE, FOUR = torch.ones(3), torch.ones(4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input": torch.ones(1, 3)}, ValueError, "Expected more than 1 value per channel when training"),
        ({"input": torch.ones(1, 3, 1, 1)}, ValueError, "Expected more than 1 value per channel when training"),
        ({"weight": FOUR}, ValueError, "weight must have one value for each of the 3 channels, got shape .4."),
        ({"bias": torch.ones(3, 1)}, ValueError, "bias must have one value for each of the 3 channels"),
        ({"running_mean": FOUR, "running_var": THREE}, ValueError, "running_mean must have one value for each"),
        ({"running_mean": THREE}, ValueError, "running_mean and running_var must either both be None or neither"),
        ({"training": False}, ValueError, "running_mean and running_var must be given if training is False"),
        ({"residual": torch.ones(2, 3, 4, 5)}, ValueError, "residual must have the shape of the input"),
        ({"statistics": torch.ones(2, 4)}, ValueError, r"statistics must have shape \[2, 3\], got \[2, 4\]"),
        (
            {"statistics": torch.ones(2, 3), "training": False, "running_mean": THREE, "running_var": THREE},
            ValueError,
            "statistics must be None if training is False",
        ),
        ({"input": torch.ones(2, 3), "pool": "mean"}, ValueError, "a pool takes an input of 4 dimensions"),
        ({"pool": "average"}, ValueError, "pool must be None, 'max', 'mean' or a bool, got 'average'"),
        ({"input": torch.ones(2, 3), "pool": True}, ValueError, "a pool takes an input of 4 dimensions"),
        ({"input": torch.ones(2, 3, 1, 4), "pool": True}, ValueError, "images of 1x4 are too small for a pool of 2x2"),
        ({"eps": 0.0}, ValueError, "eps must be positive"),
        ({"activation": "swish"}, ValueError, "activation must be None, an Activation or one of relu, .*, got 'swish'"),
        ({"activation": 3}, ValueError, "activation must be None, an Activation or one of relu, .*, got 3"),
        ({"activation": Activation("elu", math.inf)}, ValueError, "alpha and beta must be finite numbers"),
        ({"eps": math.nan}, ValueError, "eps must be positive"),
        ({"weight": THREE.double()}, RuntimeError, "Float"),
        ({"residual": IMAGES.to("meta")}, RuntimeError, "on device meta"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    """One error names the argument, what it was and what was expected."""
    with pytest.raises(error, match=message):
        norm_act(**{"input": IMAGES, "training": True, **arguments})


@pytest.mark.sanitized
def test_ops_called_directly_are_safe():
    """The ops check what they are given: nothing is read or written beyond a tensor, whatever an argmax says."""
    ops = torch.ops.lightkit
    short = torch.ones(2, 3, 4, 4)
    short.untyped_storage().resize_(40)
    options = (True, 0.1, 1e-5, 1, 0.0, 0.0, 1)
    with pytest.raises(ValueError, match=r"the input of shape .* reaches beyond its storage"):
        ops.norm_act(short, *[None] * 6, *options)
    with pytest.raises(ValueError, match=r"the residual of shape .* reaches beyond its storage"):
        ops.norm_act(IMAGES, *[None] * 4, short, None, *options)
    for code in (-1, 13):
        with pytest.raises(ValueError, match="activation must be a number from 0 to 12"):
            ops.norm_act(IMAGES, *[None] * 6, *options[:3], code, 0.0, 0.0, 1)
    for code in (-1, 3):
        with pytest.raises(ValueError, match="pool must be a number from 0 to 2"):
            ops.norm_act(IMAGES, *[None] * 6, *options[:-1], code)
    with pytest.raises(ValueError, match="must not be empty"):
        ops.norm_act(torch.ones(0, 3), *[None] * 6, *options[:-1], 0)
    for negative in ((torch._neg_view(-THREE), THREE), (THREE, torch._neg_view(-THREE))):
        with torch.inference_mode(), pytest.raises(ValueError, match="without negative bit"):
            ops.norm_act(IMAGES, None, None, *negative, None, None, *options)
    with pytest.raises(RuntimeError, match="must be float32 or float64"):
        ops.norm_act(IMAGES.half(), *[None] * 6, *options)
    with pytest.raises(ValueError, match="2 or 4 dimensions"):
        ops.norm_act(torch.ones(2, 3, 4), *[None] * 6, *options)
    output, kept, live = ops._norm_act_forward(IMAGES, *[None] * 6, *options, True)
    settings = (None, None, True, 1, 0.0, 0.0, 1, True, True, True)
    for arguments in (
        (output[:1], IMAGES, None, kept, live),
        (output, IMAGES, None, kept[:1], live),
        (output, IMAGES, None, kept, live[:-1]),
        (output, IMAGES, None, kept, live.int()),
        (output, IMAGES[:, :, :2], None, kept, live),
    ):
        with pytest.raises(ValueError, match="must have the shape of the output"):
            ops._norm_act_backward(*arguments, *settings)
    with pytest.raises(RuntimeError, match="the gradient must be of the dtype"):
        ops._norm_act_backward(output.double(), IMAGES, None, kept, live, *settings)
    for byte in (1, 3, 4, 5, 7, 255):
        ops._norm_act_backward(output, IMAGES, None, kept, torch.full_like(live, byte), *settings)


def test_who_is_faster():
    """The kernel takes float32 and float64 of two or four dimensions."""
    assert norm_act_is_faster((64, 16, 32, 32), torch.float32, activation="relu")
    assert norm_act_is_faster((64, 32, 32, 32), torch.float32, activation="relu", pool="max")
    assert norm_act_is_faster((64, 512, 7, 7), torch.float32, activation="relu", pool="mean", residual=True)
    assert not norm_act_is_faster((64, 512), torch.float32, activation="relu", pool="mean")
    assert not norm_act_is_faster((64, 16, 32, 32), torch.bfloat16, activation="relu")
    assert not norm_act_is_faster((64, 16, 32), torch.float32)


def test_module_that_is_called_twice():
    """The update of the running statistics is no change of a saved tensor: torch's node before it still runs."""
    problem = Problem((4, 6, 5, 5), torch.float32)
    x = problem.input.clone().requires_grad_()
    one = F.batch_norm(x, *problem.running, training=True)
    two = norm_act(x, None, None, *problem.running, training=True)
    torch.testing.assert_close(torch.autograd.grad(one.square().sum(), x), torch.autograd.grad(two.square().sum(), x))
