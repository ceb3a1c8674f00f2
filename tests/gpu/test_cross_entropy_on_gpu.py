"""The cross-entropy kernels on a GPU, against float64: every kernel, every edge, graphs, streams and wrong labels.

What holds on any device is tested on a CPU (tests/ops), barriers and memory accesses by emulation (tests/native).
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightkit.ops import cross_entropy, cross_entropy_reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

# Around a pack of 16 bytes, the 256 bytes of a row in a tile, and the 64 packs that the lanes of a warp hold.
NARROW = [1, 2, 3, 4, 5, 7, 8, 9, 10, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513]
# In packs, around what 32, 64 and 512 threads hold, and around what clusters of 2, 4, 8 and 16 blocks do; beyond that
# a row is read twice.
WIDE = [65, 256, 512, 4096, 8192, 16384, 32768, 65536, 65537]


def evaluate(function, logits: Tensor, target: Tensor, weight: Tensor | None, **options) -> tuple[Tensor, Tensor]:
    """The loss and the gradient of its sum."""
    logits = logits.detach().clone().requires_grad_()
    loss = function(logits, target, weight, **options)
    loss.sum().backward()
    return loss.detach(), logits.grad


def assert_exact(logits: Tensor, target: Tensor, weight: Tensor | None = None, **options) -> None:
    """Loss and gradient are those of float64, but for roundings of the accumulator and of the result."""
    soft = target.double() if target.is_floating_point() else target
    wide = None if weight is None else weight.double()
    exact = evaluate(cross_entropy_reference, logits.double(), soft, wide, **options)
    ours = evaluate(cross_entropy, logits, target, weight, **options)
    accumulator = torch.float64 if logits.dtype == torch.float64 else torch.float32
    slack = 64 * torch.finfo(accumulator).eps
    eps = torch.finfo(logits.dtype).eps
    largest = float(logits.double().abs().nan_to_num(0).amax()) if logits.numel() else 0.0
    # A probability is at most 1, and a mean divides by what counts.
    counted = int((target != options.get("ignore_index", -100)).sum()) if target.dim() == 1 else len(logits)
    scales = (largest + 1, 1 / max(counted, 1) if options.get("reduction", "mean") == "mean" else 1.0)
    smallest = torch.finfo(logits.dtype).smallest_normal if logits.dtype == torch.float16 else 0.0
    for own, true, scale in zip(ours, exact, scales, strict=True):
        atol = slack * scale + smallest * eps
        torch.testing.assert_close(own.double(), true, rtol=eps + slack, atol=atol, equal_nan=True)


def problem(rows: int, classes: int, dtype: torch.dtype = torch.float32, spread: float = 4.0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(rows * 7919 + classes)
    return (torch.randn(rows, classes) * spread).to(dtype), torch.randint(classes, (rows,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 129, 513, 4097])
def test_narrow_rows(rows, dtype):
    """Every width at an edge of a pack, a tile or a warp, with one row to more than a few blocks take."""
    for classes in NARROW:
        logits, target = problem(rows, classes, dtype)
        target[-1] = classes - 1
        if rows > 1:
            target[rows // 2] = -100
        assert_exact(logits, target)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packs", WIDE)
def test_wide_rows(packs, dtype):
    """Every width at an edge of what threads, blocks and clusters hold, and those one class less and more."""
    width = 16 // dtype.itemsize
    for classes in (packs * width - 1, packs * width, packs * width + 1):
        logits, target = problem(5, classes, dtype)
        target[0], target[1], target[2] = 0, classes - 1, -100
        assert_exact(logits, target)


# One of each kernel: one block alone, a tile, a part of a warp, a warp, warps, a cluster, two passes.
SHAPES = [(40, 10), (530, 10), (530, 16), (900, 67), (900, 1001), (90, 9001), (9, 70001), (3, 600_001)]
OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 0.01},
    "softcap": {"softcap": 5.0},
    "all": {"label_smoothing": 0.2, "z_loss": 0.02, "softcap": 3.0},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "ignored": {"ignore_index": 1},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_options(weighted, dtype, options):
    """Every option is right in every kernel, for class indices and for probabilities."""
    for rows, classes in SHAPES:
        logits, target = problem(rows, classes, dtype)
        target[0], target[1] = 1, 0
        weight = (torch.rand(classes) + 0.5).to(dtype) if weighted else None
        assert_exact(logits, target, weight, **options)
        if "ignore_index" not in options:
            assert_exact(logits, torch.randn(rows, classes).softmax(1).to(dtype), weight, **options)


@given(
    rows=st.integers(0, 700),
    classes=st.integers(1, 3000),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
    shift=st.sampled_from([0.0, -500.0, 1e4]),
    smoothing=st.sampled_from([0.0, 0.3]),
    ignored=st.sampled_from([0.0, 0.2, 1.0]),
    start=st.integers(0, 9),
)
@settings(max_examples=300)
def test_any_problem(rows, classes, dtype, scale, shift, smoothing, ignored, start):
    """Logits of any size and offset, that begin anywhere in memory."""
    torch.manual_seed(rows + classes)
    memory = (torch.randn(rows * classes + start) * scale + shift).to(dtype)
    logits = memory[start:].view(rows, classes)
    target = torch.randint(classes, (rows,))
    target[torch.rand(rows) < ignored] = -100
    assert_exact(logits, target, reduction="sum", label_smoothing=smoothing)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_and_extreme_logits(dtype):
    """Masks of -inf and of the lowest number, rows of nothing else, and NaN come out as torch has them."""
    for classes in (10, 1001, 40_000, 300_000):
        logits, target = problem(6, classes, dtype)
        target[:] = classes - 1
        logits[0, : classes - 1] = -torch.inf
        logits[1, ::2] = -torch.inf
        logits[1, -1] = 0
        logits[2, : classes // 2] = torch.finfo(dtype).min
        logits[3] = torch.finfo(dtype).min
        logits[4] = -torch.inf
        logits[5, 3] = torch.nan
        ours = evaluate(cross_entropy, logits, target, None, reduction="none")
        exact = evaluate(F.cross_entropy, logits.double(), target, None, reduction="none")
        eps = max(1e-5, torch.finfo(dtype).eps)
        for own, true in zip(ours, exact, strict=True):
            torch.testing.assert_close(own.double(), true, rtol=eps, atol=eps, equal_nan=True)


@pytest.mark.parametrize("shape", [(3,), (5, 3), (2, 3, 4), (2, 70, 3, 3), (0, 3), (0, 3, 4), (2, 3, 0)])
def test_shapes_and_layouts(shape):
    """(C), (N, C) and (N, C, d1, ...), empty ones too, strided ones too."""
    logits = torch.randn(shape, dtype=torch.float64)
    batch = shape[:0] if len(shape) == 1 else (shape[0], *shape[2:])
    target = torch.randint(shape[0] if len(shape) == 1 else shape[1], batch)
    for reduction in ("mean", "sum", "none"):
        expected = evaluate(F.cross_entropy, logits, target, None, reduction=reduction)
        turned = logits.mT.contiguous().mT if logits.dim() > 1 else logits
        for like in (logits, turned, logits.repeat_interleave(2, 0)[::2]):
            expected = evaluate(F.cross_entropy, like, target, None, reduction=reduction)
            actual = evaluate(cross_entropy, like, target, None, reduction=reduction)
            torch.testing.assert_close(actual, expected, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place(dtype):
    """The gradient takes the logits' place and is the same to the bit."""
    for rows, classes in SHAPES:
        logits, target = problem(rows, classes, dtype)
        base = logits.clone().requires_grad_()
        cross_entropy(base * 1, target, inplace=True).backward()
        assert torch.equal(base.grad, evaluate(cross_entropy, logits, target, None)[1])


def test_upstream_gradients():
    """A factor for all rows, one for each, and second derivatives."""
    for classes in (10, 1001):
        logits, target = problem(50, classes, torch.float64)
        leaves = [logits.clone().requires_grad_() for _ in range(2)]
        for leaf, function in zip(leaves, (cross_entropy, F.cross_entropy), strict=True):
            losses = function(leaf, target, reduction="none")
            (losses * torch.linspace(-1, 2, 50, dtype=torch.float64)).sum().backward()
            (3 * function(leaf, target)).backward()
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    target = torch.randint(7, (5,))
    assert torch.autograd.gradcheck(lambda z: cross_entropy(z, target, label_smoothing=0.1), (logits,))
    assert torch.autograd.gradgradcheck(lambda z: cross_entropy(z, target, label_smoothing=0.1), (logits,), atol=1e-4)


def test_opcheck():
    """What torch asks of an operator: schema, fake tensors, autograd, compilation."""
    logits, target = torch.randn(6, 5, requires_grad=True), torch.randint(5, (6,))
    arguments = (logits, target, torch.rand(5), 1, -100, 0.1, 0.1, 5.0, None, True)
    with torch.device("cpu"):
        torch.library.opcheck(torch.ops.lightkit.cross_entropy.default, arguments)


def test_same_bits_in_every_run():
    """Nothing depends on which block or thread comes first."""
    for rows, classes in [*SHAPES, (70_000, 3)]:
        logits, target = problem(rows, classes)
        first = evaluate(cross_entropy, logits, target, None, label_smoothing=0.1)
        for _ in range(3):
            again = evaluate(cross_entropy, logits, target, None, label_smoothing=0.1)
            assert all(map(torch.equal, first, again))


def test_graph_of_a_step():
    """Forward and backward are captured in a CUDA graph, and replayed on other logits."""
    for rows, classes in SHAPES:
        logits, target = problem(rows, classes)
        logits.requires_grad_()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.autograd.grad(cross_entropy(logits, target), logits)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = cross_entropy(logits, target)
            (gradient,) = torch.autograd.grad(loss, logits)
        with torch.no_grad():
            logits.copy_(torch.randn_like(logits))
            target.copy_(torch.randint_like(target, classes))
        graph.replay()
        expected = evaluate(cross_entropy, logits, target, None)
        assert torch.equal(loss, expected[0])
        assert torch.equal(gradient, expected[1])


def test_the_current_stream_is_used():
    """Work on another stream is ordered there: logits that arrive late are waited for."""
    logits, target = problem(4096, 1000)
    expected = cross_entropy(logits * 2, target)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        found = cross_entropy(logits * 2, target)
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(found, expected)


def test_more_elements_than_32_bits_count():
    """Offsets beyond 2^31 elements are right."""
    rows, classes = 70_000, 32_000
    logits = torch.zeros(rows, classes, dtype=torch.bfloat16)
    target = torch.randint(classes, (rows,))
    logits[-1] = torch.randn(classes)
    leaf = logits.requires_grad_()
    losses = cross_entropy(leaf, target, reduction="none", dtype=torch.float32)
    losses[-1].backward()
    expected = evaluate(F.cross_entropy, logits[-1:].double(), target[-1:], None)
    torch.testing.assert_close(losses[-1].double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(leaf.grad[-1].double(), expected[1][0], rtol=1e-2, atol=1e-6)
    assert leaf.grad[:-1].abs().amax() == 0


def test_compiles_into_a_graph():
    """torch.compile takes the operator as it is."""
    logits, target = problem(300, 1000)
    compiled = torch.compile(lambda z, t: cross_entropy(z * 2, t), fullgraph=True)
    expected = evaluate(lambda z, t, _: cross_entropy(z * 2, t), logits, target, None)
    torch.testing.assert_close(evaluate(lambda z, t, _: compiled(z, t), logits, target, None), expected)


WRONG_LABEL = """
import torch
from lightkit.ops import cross_entropy
target = torch.zeros({rows}, dtype=torch.long)
target[{rows} - 2] = {label}
try:
    cross_entropy(torch.randn({rows}, {classes}, device="cuda"), target.cuda())
    torch.cuda.synchronize()
except (RuntimeError, IndexError) as error:
    print("refused")
"""


@pytest.mark.parametrize(("rows", "classes"), [(3, 7), (600, 7), (600, 500), (30, 40_000)])
def test_wrong_label(rows, classes):
    """A label that names no class stops the process's work on the GPU and is named with its row."""
    script = WRONG_LABEL.format(rows=rows, classes=classes, label=classes)
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "refused" in said.stdout, said.stderr
    assert f"Target {classes} is out of bounds: row {rows - 2}" in said.stdout + said.stderr
