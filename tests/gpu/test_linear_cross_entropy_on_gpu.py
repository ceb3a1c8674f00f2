"""The fused linear cross-entropy on a GPU, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightkit.ops import linear_cross_entropy, linear_cross_entropy_reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

# One of everything; odd sizes; a slice of 256 classes and one more; a block of 256 threads and one more row.
SHAPES = [(1, 1, 1), (2, 3, 63), (33, 17, 257), (129, 64, 1025), (257, 130, 300), (1000, 256, 5000)]
OPTIONS = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 1e-2, "reduction": "none"},
    "softcap": {"softcap": 4.0},
    "all": {"label_smoothing": 0.2, "z_loss": 1e-3, "softcap": 6.0},
}


@pytest.fixture(autouse=True)
def exact_products(gpu):
    """Peers and we multiply float32 as float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def evaluate(function, tensors: list[Tensor], target: Tensor, options: dict) -> list[Tensor]:
    """Loss and gradients, the rows of an unreduced loss with upstream gradients of their own."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    hidden, head, bias = (*leaves, None)[:3]
    loss = function(hidden, head, target, linear_bias=bias, **options)
    upstream = torch.linspace(0.5, 2, max(loss.numel(), 1), dtype=torch.float64)[: loss.numel()].reshape(loss.shape)
    loss.backward(upstream.to(loss.dtype))
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


def assert_as_exact_as_torch(tensors: list[Tensor], target: Tensor, options: dict, **ours) -> None:
    """The error against float64 is not larger than that of torch's operations by more than rounding."""
    exact = evaluate(linear_cross_entropy_reference, [t.double() for t in tensors], target, options)
    theirs = evaluate(linear_cross_entropy_reference, tensors, target, options)
    found = evaluate(linear_cross_entropy, tensors, target, {**options, **ours})
    dtype = tensors[0].dtype
    rounding = (256 if dtype == torch.float64 else 8) * torch.finfo(dtype).eps
    for name, mine, its, true in zip(("loss", "hidden", "head", "bias"), found, theirs, exact, strict=False):
        assert mine.dtype == its.dtype and mine.shape == its.shape
        scale = max(float(true.abs().max()), float(exact[0].abs().max()) * 1e-3, 1e-30)
        difference = float((mine.double() - true).abs().max()) / scale
        allowed = 1.5 * float((its.double() - true).abs().max()) / scale + rounding
        assert difference <= allowed, (name, difference, allowed)


def problem(rows: int, features: int, classes: int, dtype: torch.dtype, bias: bool = True):
    torch.manual_seed(rows + features + classes)
    tensors = [torch.randn(rows, features), torch.randn(classes, features) * 3 / features**0.5]
    target = torch.randint(classes, (rows,))
    target[1::3] = -100
    return [t.to(dtype) for t in (*tensors, *([torch.randn(classes)] if bias else []))], target


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_shapes(bias, shape, dtype):
    """Odd sizes and edges of slices, whatever memory there is."""
    tensors, target = problem(*shape, dtype, bias)
    for limit in (1, 1 << 20, 1 << 30):
        assert_as_exact_as_torch(tensors, target, {}, memory_limit=limit)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options, dtype):
    """Every term of the loss, in one slice and in several."""
    tensors, target = problem(129, 64, 1025, dtype)
    for limit in (1, 1 << 30):
        assert_as_exact_as_torch(tensors, target, options, memory_limit=limit)
        assert_as_exact_as_torch(tensors, target, {**options, "weight": torch.rand(1025) + 0.5}, memory_limit=limit)


def test_memory():
    """A call stays near its limit, where the logits would take thirty times as much."""
    tensors, target = problem(4096, 256, 131_072, torch.bfloat16, bias=False)
    leaves = [t.requires_grad_() for t in tensors]
    torch.autograd.grad(linear_cross_entropy(*leaves, target), leaves)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients = torch.autograd.grad(linear_cross_entropy(*leaves, target), leaves)
    extra = torch.cuda.max_memory_allocated() - before - sum(g.nbytes for g in gradients)
    assert extra < 100 << 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opcheck_and_gradcheck(dtype):
    """What torch asks of an operator, and finite differences."""
    tensors, target = problem(7, 5, 9, dtype)
    leaves = [t.requires_grad_() for t in tensors]
    arguments = (leaves[0], leaves[1], target, leaves[2], None, 1, -100, 0.1, 0.0, 0.0, None, 1 << 20)
    with torch.device("cpu"):
        torch.library.opcheck(torch.ops.lightkit.linear_cross_entropy.default, arguments)
    if dtype == torch.float64:

        def function(hidden, head, bias):
            return linear_cross_entropy(hidden, head, target, linear_bias=bias, label_smoothing=0.1, softcap=3.0)

        assert torch.autograd.gradcheck(function, leaves)


def test_graph_of_a_step():
    """Forward and backward are captured in a CUDA graph."""
    tensors, target = problem(300, 64, 2000, torch.float32, bias=False)
    leaves = [t.requires_grad_() for t in tensors]

    def step():
        loss = linear_cross_entropy(*leaves, target)
        return loss, *torch.autograd.grad(loss, leaves)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        leaves[0].normal_()
    graph.replay()
    torch.testing.assert_close(captured, step())
