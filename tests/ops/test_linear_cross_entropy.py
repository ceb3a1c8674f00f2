"""The fused linear cross-entropy against float64, next to torch's own error, and as an op of torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from linear_problems import OPTIONS, Problem, assert_as_exact_as_torch, evaluate, make
from support.commands import run_python
from support.threads import assert_same_with_any_threads
from torch.func import functional_call, vmap

from lightkit.nn import LinearCrossEntropyLoss
from lightkit.ops import cross_entropy, linear_cross_entropy, linear_cross_entropy_reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

# Rows: a vector of any type and one off it, a tile of 128, two of them and one more.
# Features: one; odd, for which bfloat16 has no pairs; a block of 512 and one more.
# Classes: one; a tile of 64 and one off it; 256 of a weight gradient; 1024 of a sum and one more.
SHAPES = [
    (1, 1, 1),
    (1, 2, 3),
    (2, 3, 63),
    (31, 16, 64),
    (32, 17, 65),
    (33, 2, 257),
    (127, 64, 100),
    (128, 20, 1024),
    (129, 513, 1025),
    (257, 514, 300),
    (40, 30, 2100),
]


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape, dtype):
    """Every edge of the tiles, in every type, with and without a bias, weights and rows that are ignored."""
    for extras in ({}, {"bias": True, "weight": True}, {"ignored": shape[0] > 2, "bias": True}):
        assert_as_exact_as_torch(make(*shape, dtype, **extras), {})


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, dtype):
    """Every term of the loss, with all that may come with it."""
    assert_as_exact_as_torch(make(70, 36, 1100, dtype, bias=True, weight=True, ignored=True), OPTIONS[name])
    assert_as_exact_as_torch(make(70, 36, 1100, dtype), OPTIONS[name])


# For 300 rows of 1,500 float32 logits, 1.8 MB: chunks of 128 rows and of 64; less than a chunk, so that logits are
# computed twice slice by slice; next to nothing; and half of what bfloat16 takes, of which some is kept.
LIMITS = [900_000, 450_000, 300_000, 1, 700_000]


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("limit", LIMITS)
def test_memory_limits(limit, dtype):
    """However the rows and the classes are cut into parts, the result is as exact."""
    problem = make(300, 40, 1500, dtype, bias=True, ignored=True)
    assert_as_exact_as_torch(problem, {}, memory_limit=limit)
    assert_as_exact_as_torch(problem, OPTIONS["all"], memory_limit=limit)
    assert_as_exact_as_torch(problem, OPTIONS["none"], memory_limit=limit)


@pytest.mark.parametrize("level", ["AVX2", "AVX512_CORE"])
def test_processors_whose_bfloat16_onednn_refuses(level):
    """Where oneDNN has no micro-kernel for bfloat16, in torch's check or after it, the loss is computed without it."""
    code = (
        "import torch; from linear_problems import assert_as_exact_as_torch, make; "
        "assert_as_exact_as_torch(make(70, 36, 100, torch.bfloat16, bias=True), {})"
    )
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    run_python("-c", code, environment={"ONEDNN_MAX_CPU_ISA": level, "PYTHONPATH": path}, status=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("limit", [64 << 20, 200_000])
def test_result_does_not_depend_on_threads(dtype, limit):
    """Bit for bit the same with any number of threads, and again."""
    problem = make(200, 130, 1700, dtype, bias=True)
    options = {"label_smoothing": 0.1, "memory_limit": limit}
    assert_same_with_any_threads(lambda: evaluate(problem, linear_cross_entropy, options))


def test_half_precision_gradients_are_rounded_once():
    """Thousands of small terms in bfloat16 do not get lost, as they do where the sum is kept in bfloat16."""
    rows = 4096
    hidden = torch.ones(rows, 2, dtype=torch.bfloat16)
    head = torch.zeros(8, 2, dtype=torch.bfloat16, requires_grad=True)
    linear_cross_entropy(hidden, head, torch.zeros(rows, dtype=torch.long), reduction="sum").backward()
    expected = torch.full((8, 2), rows / 8)
    expected[0] -= rows
    assert torch.equal(head.grad.float(), expected)


def test_confident_rows_keep_small_gradients():
    """Where a row is nearly certain its gradient is within 0.5 %: a difference p - 1 in float32 is off by up to 7 %."""
    hidden = torch.eye(2) * 14
    head = torch.eye(2, requires_grad=True)
    linear_cross_entropy(hidden, head, torch.tensor([0, 1]), reduction="sum").backward()
    exact = head.detach().double().requires_grad_()
    F.cross_entropy(hidden.double() @ exact.t(), torch.tensor([0, 1]), reduction="sum").backward()
    torch.testing.assert_close(head.grad.double(), exact.grad, rtol=5e-3, atol=0)


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_logits(dtype):
    """Large logits, and classes that a bias of -inf rules out, give what torch gives: no overflow, no NaN."""
    problem = make(40, 8, 300, dtype, bias=True)
    problem.head *= 30
    assert_as_exact_as_torch(problem, {})
    problem = make(40, 8, 1200, dtype, bias=True)
    problem.bias[10:] = -torch.inf
    problem.target %= 10
    assert_as_exact_as_torch(problem, {})


def test_nan_comes_through():
    """A NaN in a hidden state makes the loss and its row's gradient NaN, and no other row's."""
    problem = make(130, 8, 100)
    problem.hidden[3] = torch.nan
    losses = linear_cross_entropy(problem.hidden, problem.head, problem.target, reduction="none")
    assert losses.isnan().nonzero().flatten().tolist() == [3]
    assert linear_cross_entropy(problem.hidden, problem.head, problem.target).isnan()


@pytest.mark.sanitized
def test_ignored_rows_are_not_even_read():
    """What stands in ignored rows, as padding may be anything, does not matter to loss or gradients."""
    problem = make(50, 8, 100, ignored=True)
    clean = evaluate(problem, linear_cross_entropy, {})
    problem.hidden[problem.target == -100] = torch.nan
    dirty = evaluate(problem, linear_cross_entropy, {})
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    assert torch.equal(dirty[1][problem.target == -100], torch.zeros(17, 8))


@pytest.mark.sanitized
def test_nothing_counts():
    """All rows ignored, or none there: the loss is what torch's is, the gradients are 0."""
    for rows in (3, 0):
        problem = make(rows, 4, 6)
        problem.target[:] = -100
        loss, *gradients = evaluate(problem, linear_cross_entropy, {})
        assert loss.isnan()
        assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)
        assert evaluate(problem, linear_cross_entropy, {"reduction": "sum"})[0] == 0
        assert evaluate(problem, linear_cross_entropy, {"reduction": "none"})[0].shape == (rows,)


@pytest.mark.sanitized
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_gradients_that_are_not_wanted_are_left_out(wanted, reduction):
    """A frozen head, or frozen features: the others get the same gradient, the frozen ones none."""
    problem = make(40, 12, 70, bias=True)
    everything = evaluate(problem, linear_cross_entropy, {"reduction": reduction})[1:]
    leaves = [t.detach().requires_grad_(w) for t, w in zip(problem.leaves(), wanted, strict=True)]
    loss = linear_cross_entropy(leaves[0], leaves[1], problem.target, linear_bias=leaves[2], reduction=reduction)
    loss.backward(torch.linspace(0.5, 2, loss.numel()).reshape(loss.shape) if reduction == "none" else loss * 0 + 0.5)
    for leaf, expected, is_wanted in zip(leaves, everything, wanted, strict=True):
        assert (leaf.grad is not None) == is_wanted
        if is_wanted:
            torch.testing.assert_close(leaf.grad, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.sanitized
def test_shapes_of_hidden_states():
    """One hidden state, or batches of sequences of them, with a target for each."""
    head = torch.randn(9, 4)
    single = linear_cross_entropy(torch.ones(4), head, torch.tensor(3))
    torch.testing.assert_close(single, F.cross_entropy(head.sum(1), torch.tensor(3)))
    hidden, target = torch.randn(2, 5, 4, requires_grad=True), torch.randint(9, (2, 5), dtype=torch.int32)
    losses, lse = linear_cross_entropy(hidden, head, target, reduction="none", return_lse=True)
    logits = hidden @ head.t()
    torch.testing.assert_close(
        losses, F.cross_entropy(logits.flatten(0, 1), target.flatten().long(), reduction="none").view(2, 5)
    )
    torch.testing.assert_close(lse, logits.logsumexp(-1))
    losses.sum().backward()
    assert hidden.grad.shape == hidden.shape


@pytest.mark.sanitized
def test_layouts():
    """Transposed and strided inputs are taken as they are meant."""
    problem = make(30, 12, 70)
    hidden, head = problem.hidden.t().contiguous().t(), torch.stack([problem.head] * 2, 1)[:, 0]
    assert not hidden.is_contiguous() and not head.is_contiguous()
    expected = evaluate(problem, linear_cross_entropy, {})
    found = evaluate(Problem(hidden, head, torch.stack([problem.target] * 2, 1)[:, 0]), linear_cross_entropy, {})
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_probabilities_as_targets():
    """Class probabilities go through the logits as a whole, with the same result as cross_entropy."""
    problem = make(6, 4, 9)
    probabilities = torch.rand(6, 9).softmax(1)
    found = linear_cross_entropy(problem.hidden, problem.head, probabilities, label_smoothing=0.1)
    expected = cross_entropy(problem.hidden @ problem.head.t(), probabilities, label_smoothing=0.1)
    torch.testing.assert_close(found, expected)


@given(
    rows=st.integers(1, 140),
    features=st.integers(1, 40),
    classes=st.integers(1, 200),
    limit=st.integers(1, 1 << 17),
    smoothing=st.sampled_from([0.0, 0.3]),
    shift=st.floats(-50, 50),
)
def test_properties(rows, features, classes, limit, smoothing, shift):
    """For any shape and limit: a bias for all classes changes nothing, and the gradient of the bias sums to 0."""
    problem = make(rows, features, classes, torch.float64)
    options = {"label_smoothing": smoothing, "memory_limit": limit}
    plain = evaluate(problem, linear_cross_entropy, options)
    problem.bias = torch.full((classes,), shift, dtype=torch.float64)
    shifted = evaluate(problem, linear_cross_entropy, options)
    for a, b in zip(plain, shifted, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert abs(float(shifted[3].sum())) < 1e-10


# ---- errors


@pytest.mark.sanitized
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"target": torch.tensor([0, 7, 1])}, IndexError, "Target 7 is out of bounds: row 1"),
        ({"target": torch.tensor([0, -1, 1])}, IndexError, "Target -1 is out of bounds: row 1"),
        ({"target": torch.tensor([0, 1])}, ValueError, "target"),
        ({"target": torch.tensor([True, False, True])}, RuntimeError, "bool"),
        ({"input": torch.zeros(3, 5)}, ValueError, r"\(3, 5\) and \(7, 4\)"),
        ({"linear_weight": torch.zeros(7)}, ValueError, r"\(C, D\)"),
        ({"linear_weight": torch.zeros(0, 4)}, IndexError, "Target 0 is out of bounds"),
        ({"linear_weight": torch.zeros(7, 4, dtype=torch.float64)}, RuntimeError, "dtype"),
        ({"linear_bias": torch.zeros(6)}, RuntimeError, "linear_bias"),
        ({"weight": torch.zeros(6)}, RuntimeError, "weight"),
        ({"reduction": "median"}, ValueError, "reduction must be one of"),
        ({"label_smoothing": 1.5}, RuntimeError, "label_smoothing"),
        ({"softcap": -1.0}, ValueError, "softcap"),
        ({"memory_limit": 0}, ValueError, "memory_limit"),
        ({"dtype": torch.int32}, ValueError, "dtype"),
    ],
)
def test_bad_arguments(change, error, message):
    """Each says which argument, what it was and what was expected; nothing is read out of bounds."""
    arguments = {"input": torch.zeros(3, 4), "linear_weight": torch.zeros(7, 4), "target": torch.tensor([0, 6, 1])}
    with pytest.raises(error, match=message):
        linear_cross_entropy(**{**arguments, **change})


# ---- as an op of torch


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_opcheck(dtype, reduction):
    """Schema, shapes for tracing, autograd registration and AOT dispatch hold."""
    problem = make(5, 4, 9, dtype, bias=True)
    hidden, head, bias = problem.leaves()
    number = {"none": 0, "mean": 1}[reduction]
    arguments = (hidden, head, problem.target, bias, None, number, -100, 0.1, 0.0, 0.0, None, 1 << 20)
    torch.library.opcheck(torch.ops.lightkit.linear_cross_entropy.default, arguments)


@pytest.mark.parametrize("name", OPTIONS)
def test_gradcheck(name):
    """First and second derivatives are those of finite differences."""
    problem = make(4, 3, 6, torch.float64, bias=True, weight=True, ignored=True)
    leaves = problem.leaves()

    def function(hidden, head, bias):
        return linear_cross_entropy(
            hidden, head, problem.target, linear_bias=bias, weight=problem.weight.double(), **OPTIONS[name]
        )

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_backward_twice():
    """With retain_graph the second backward is the first again; without it there is a clear error."""
    for reduction in ("mean", "none"):
        hidden, head = make(5, 4, 9).leaves()
        loss = linear_cross_entropy(hidden, head, torch.arange(5), reduction=reduction).sum()
        loss.backward(retain_graph=True)
        first = head.grad.clone()
        loss.backward()
        torch.testing.assert_close(head.grad, 2 * first)
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()


def test_saved_tensors_are_guarded():
    """Weights that change between forward and backward of a loss that reads them again are noticed."""
    hidden, head = make(5, 4, 9).leaves()
    losses = linear_cross_entropy(hidden, head, torch.arange(5), reduction="none")
    with torch.no_grad():
        head.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()


def test_compiles_into_the_graph():
    """torch.compile(fullgraph=True) takes the op, forward and backward, and finds the same numbers."""
    problem = make(12, 6, 40, bias=True)
    seen = []

    def backend(graph, _):
        seen.append(graph)
        return graph

    function = torch.compile(linear_cross_entropy, fullgraph=True, backend=backend)
    function(problem.hidden, problem.head, problem.target)
    assert "lightkit.linear_cross_entropy" in seen[0].print_readable(print_output=False)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    for options in ({}, {"reduction": "none"}):
        torch.testing.assert_close(
            evaluate(problem, compiled, options), evaluate(problem, linear_cross_entropy, options)
        )


def test_autocast():
    """Under autocast the product is computed in its type, as F.linear is, and the loss is float32."""
    problem = make(20, 8, 50, bias=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss, *gradients = evaluate(problem, linear_cross_entropy, {})
        expected, *theirs = evaluate(problem, linear_cross_entropy_reference, {"dtype": torch.float32})
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=1e-2)
    for mine, its in zip(gradients, theirs, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, its, rtol=5e-2, atol=5e-3)


def test_transforms_take_the_reference():
    """torch.func sees torch's own operations."""
    hidden, head = torch.randn(3, 5, 4), torch.randn(9, 4)
    target = torch.randint(9, (3, 5))
    found = vmap(lambda h, t: linear_cross_entropy(h, head, t))(hidden, target)
    expected = [linear_cross_entropy(h, head, t) for h, t in zip(hidden, target, strict=True)]
    torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.slow
def test_peak_memory():
    """Beyond inputs and gradients a step takes what it was told, not the 205 MB of its logits."""
    script = """
import resource, torch
from lightkit.ops import linear_cross_entropy
torch.set_num_threads(2)
def step(rows, limit):
    hidden, head = torch.randn(rows, 64, requires_grad=True), (torch.randn(50000, 64) / 8).requires_grad_()
    linear_cross_entropy(hidden, head, torch.randint(50000, (rows,)), memory_limit=limit).backward()
step(8, 1 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(1024, 16 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    # Twice 12.8 MB of head and gradient may be new, too.
    assert int(result.stdout) < (16 + 2 * 13 + 12) * 1024


# ---- the module


def test_module():
    """The module owns its layer, under the names of torch's, and passes its options on."""
    loss = LinearCrossEntropyLoss(4, 9, bias=True, label_smoothing=0.1, ignore_index=0, weight=torch.rand(9))
    assert list(loss.state_dict()) == ["weight", "linear.weight", "linear.bias"]
    hidden, target = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 8])
    expected = F.cross_entropy(loss.linear(hidden), target, weight=loss.weight, label_smoothing=0.1, ignore_index=0)
    torch.testing.assert_close(loss(hidden, target), expected)
    if hasattr(torch.nn, "LinearCrossEntropyLoss"):
        theirs = torch.nn.LinearCrossEntropyLoss(4, 9, bias=True, weight=torch.rand(9))
        assert theirs.state_dict().keys() == loss.state_dict().keys()
    with pytest.raises(ValueError, match=r"weight must have shape \(9,\)"):
        LinearCrossEntropyLoss(4, 9, weight=torch.rand(8))
    torch.testing.assert_close(functional_call(loss, dict(loss.named_parameters()), (hidden, target)), expected)
