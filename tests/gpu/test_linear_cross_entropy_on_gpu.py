"""The fused linear cross-entropy on a GPU, against float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from linear_problems import OPTIONS, assert_as_exact_as_torch, make

from lightkit.ops import linear_cross_entropy

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

# One of everything; odd sizes; a slice of 256 classes and one more; a block of 256 threads and one more row.
SHAPES = [(1, 1, 1), (2, 3, 63), (33, 17, 257), (129, 64, 1025), (257, 130, 300), (1000, 256, 5000)]


@pytest.fixture(autouse=True)
def exact_products(gpu):
    """Peers and we multiply float32 as float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


# Sums in float64 are taken in another order again on a GPU.
assert_exact = partial(assert_as_exact_as_torch, roundings_of_float64=256)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_shapes(bias, shape, dtype):
    """Odd sizes and edges of slices, whatever memory there is."""
    problem = make(*shape, dtype, bias=bias, ignored=shape[0] > 2)
    for limit in (1, 1 << 20, 1 << 30):
        assert_exact(problem, {}, memory_limit=limit)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options, dtype):
    """Every term of the loss, in one slice and in several."""
    for weight in (False, True):
        problem = make(129, 64, 1025, dtype, bias=True, weight=weight, ignored=True)
        for limit in (1, 1 << 30):
            assert_exact(problem, options, memory_limit=limit)


def test_memory():
    """A call stays near its limit, where the logits would take thirty times as much."""
    problem = make(4096, 256, 131_072, torch.bfloat16)
    leaves, target = problem.leaves(), problem.target
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
    problem = make(7, 5, 9, dtype, bias=True)
    leaves, target = problem.leaves(), problem.target
    arguments = (leaves[0], leaves[1], target, leaves[2], None, 1, -100, 0.1, 0.0, 0.0, None, 1 << 20)
    with torch.device("cpu"):
        torch.library.opcheck(torch.ops.lightkit.linear_cross_entropy.default, arguments)
    if dtype == torch.float64:

        def function(hidden, head, bias):
            return linear_cross_entropy(hidden, head, target, linear_bias=bias, label_smoothing=0.1, softcap=3.0)

        assert torch.autograd.gradcheck(function, leaves)


def test_graph_of_a_step():
    """Forward and backward are captured in a CUDA graph."""
    problem = make(300, 64, 2000, torch.float32)
    leaves, target = problem.leaves(), problem.target

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
