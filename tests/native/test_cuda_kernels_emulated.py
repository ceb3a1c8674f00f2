"""The CUDA kernels, run on a CPU by the emulation in ``cuda_emulation``, against float64.

What they cost on a GPU cannot be seen here. What can: results, barriers, shared memory, every memory access.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from cuda_emulation import EmulationError
from torch import Tensor

# One worker builds the emulator, for a minute.
pytestmark = [pytest.mark.slow, pytest.mark.group("emulator")]

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# The order in which threads and blocks get their turn: a missing barrier shows in one of them.
FORWARD, BACKWARD, SHUFFLED = range(3)
LAUNCH_FAILURE = 719
GARBAGE = -7.0


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- the emulation itself


@pytest.mark.parametrize("order", [FORWARD, BACKWARD, SHUFFLED])
def test_emulation_runs_a_kernel_without_a_fault(emulator, order):
    """Two rounds through shared memory between barriers give what they would on a GPU."""
    out = torch.zeros(64)
    assert emulator.call("none", {"out": out}, {"order": order}) == (0, 1)
    assert out.tolist() == [_shifted(i) for i in range(64)]


def _shifted(i: int) -> float:
    return 2 * ((i + 1) % 64) + 1


@pytest.mark.parametrize("fault", ["no_barrier_before_reading", "no_barrier_before_writing_again"])
def test_emulation_shows_a_missing_barrier(emulator, fault):
    """Without one of its barriers the same kernel is wrong in at least one order of its threads."""
    results = []
    for order in (FORWARD, BACKWARD, SHUFFLED):
        out = torch.zeros(64)
        emulator.call(fault, {"out": out}, {"order": order})
        results.append(out.tolist() == [_shifted(i) for i in range(64)])
    assert not all(results)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("divergent_barrier", "deadlock|ended before __syncthreads"),
        ("different_barriers", "wait at different barriers"),
        ("divergent_shuffle", "deadlock"),
        ("shared_overflow", "index 64 out of bounds"),
        ("global_overflow", "heap-buffer-overflow"),
        ("misaligned", "misaligned address"),
        ("bounds", "launch_bounds"),
        ("peer_not_started", "before it is known to have started"),
        ("peer_ended", "after its end"),
    ],
)
def test_emulation_finds_a_fault(emulator, fault, message):
    """What no kernel may do ends the emulation with a message, in whatever order the threads run."""
    for order in (FORWARD, BACKWARD, SHUFFLED):
        with pytest.raises(EmulationError, match=message):
            emulator.call(fault, {"out": torch.zeros(64)}, {"order": order})


def test_emulation_refuses_what_a_device_refuses(emulator):
    """Too large a block, too large a cluster, and anything after a trap gives a CUDA error."""
    out = torch.zeros(64)
    assert emulator.call("block_too_large", {"out": out}, {}) == (1, 0)
    assert emulator.call("cluster_too_large", {"out": out}, {}) == (1, 0)
    assert emulator.call("cluster", {"out": out}, {"largest_cluster": 0}) == (1, 0)
    assert emulator.call("trap", {"out": out}, {})[0] == LAUNCH_FAILURE
    assert "thread 3 gives up" in emulator.said()
    assert emulator.call("cluster", {"out": out}, {}) == (0, 1)


# ---- cross-entropy


@dataclass
class Result:
    error: int
    launches: int
    losses: Tensor
    lse: Tensor
    gradient: Tensor
    total: Tensor


def run_cross_entropy(
    emulator,
    logits,
    target,
    *,
    weight=None,
    ignore_index=-100,
    smoothing=0.0,
    z_loss=0.0,
    softcap=0.0,
    mean=True,
    reduced=True,
    with_gradient=True,
    inplace=False,
    order=FORWARD,
    largest_cluster=16,
    offset=0,
    gradient_offset=None,
    total_dtype=torch.float64,
) -> Result:
    """What the kernels make of the arguments; ``offset`` is where in 16 bytes the logits begin."""
    rows, classes = logits.shape
    acc = accumulator(logits.dtype)
    by_index = not target.is_floating_point()
    buffers = {
        "logits": logits.clone(),
        "losses": torch.full((rows,), GARBAGE, dtype=acc),
        "lse": torch.full((rows,), GARBAGE, dtype=acc),
        "target" if by_index else "probabilities": target.to(torch.int64 if by_index else logits.dtype),
    }
    if weight is not None:
        buffers["weight"] = weight.to(acc)
    if with_gradient and not inplace:
        buffers["gradient"] = torch.full_like(logits, GARBAGE)
    if reduced:
        buffers["total"] = torch.full((1,), GARBAGE, dtype=total_dtype)
    settings = {
        "type": DTYPES.index(logits.dtype),
        "rows": rows,
        "classes": classes,
        "ignore_index": ignore_index,
        "smoothing": smoothing,
        "z_loss": z_loss,
        "softcap": softcap,
        "mean": int(mean),
        "inplace": int(inplace),
        "order": order,
        "largest_cluster": largest_cluster,
        "total_type": DTYPES.index(total_dtype),
    }
    moved = {
        "logits": offset,
        "probabilities": offset,
        "gradient": offset if gradient_offset is None else gradient_offset,
    }
    error, launches = emulator.call("cross_entropy", buffers, settings, offsets=moved)
    gradient = buffers.get("gradient", buffers["logits"])
    return Result(error, launches, buffers["losses"], buffers["lse"], gradient, buffers.get("total"))


def exact_cross_entropy(logits, target, *, weight=None, ignore_index=-100, smoothing=0.0, z_loss=0.0, softcap=0.0):
    """Losses, lse, denominator and the gradient of the summed losses, all by autograd in float64."""
    z = logits.double().clone().requires_grad_()
    u = softcap * torch.tanh(z / softcap) if softcap else z
    classes = z.shape[1]
    w = torch.ones(classes, dtype=torch.float64) if weight is None else weight.double()
    lse = u.logsumexp(1)
    log_p = u.log_softmax(1)
    if target.is_floating_point():
        counts = torch.ones(len(z), dtype=torch.bool)
        soft = w * ((1 - smoothing) * target.double() + smoothing / classes)
        losses = -(soft * log_p).sum(1)
        denominator = torch.tensor(float(len(z)), dtype=torch.float64)
    else:
        counts = target != ignore_index
        index = target.where(counts, torch.zeros_like(target))
        losses = -(1 - smoothing) * w[index] * log_p.gather(1, index[:, None])[:, 0]
        if smoothing:
            losses = losses - smoothing / classes * (w * log_p).sum(1)
        denominator = (w[index] * counts).sum()
    if z_loss:
        losses = losses + z_loss * lse.square()
    losses = losses.where(counts, 0)
    losses.sum().backward()
    return losses.detach(), lse.detach().where(counts, 0), denominator, z.grad


def check(emulator, logits, target, *, mean=True, reduced=True, **options) -> Result:
    """Runs the kernels and compares all they give with float64."""
    exact = {k: v for k, v in options.items() if k in ("weight", "ignore_index", "smoothing", "z_loss", "softcap")}
    # A probability is rounded to the type of the logits before the kernel sees it.
    seen = target.to(logits.dtype) if target.is_floating_point() else target
    losses, lse, denominator, gradient = exact_cross_entropy(logits, seen, **exact)
    result = run_cross_entropy(emulator, logits, target, mean=mean, reduced=reduced, **options)
    assert result.error == 0
    scale = 1 / denominator if mean else 1
    # Some roundings of the accumulator; the float64 that it is compared with has some of its own.
    slack = 64 * torch.finfo(accumulator(logits.dtype)).eps
    size = 1 + logits.double().abs().amax()
    torch.testing.assert_close(result.losses.double(), losses, rtol=slack, atol=slack * float(size))
    torch.testing.assert_close(result.lse.double(), lse, rtol=slack, atol=slack)
    if reduced:
        rounding = torch.finfo(result.total.dtype).eps
        total = losses.sum() * scale
        torch.testing.assert_close(result.total[0].double(), total, rtol=slack + rounding, atol=slack * float(size))
    if options.get("with_gradient", True):
        eps = torch.finfo(logits.dtype).eps
        smallest = torch.finfo(logits.dtype).tiny if logits.dtype == torch.float16 else 0
        torch.testing.assert_close(
            result.gradient.double(),
            gradient * scale,
            rtol=eps + slack,
            atol=float(slack * scale) + smallest * eps,
        )
    return result


def problem(rows, classes, dtype, seed=0, spread=4.0):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, classes, generator=generator) * spread).to(dtype)
    target = torch.randint(0, classes, (rows,), generator=generator)
    return logits, target


# Around a pack of 2, 4 or 8, the 256 bytes of a row in a tile, and the 64 packs that the lanes of a warp hold.
NARROW = [1, 2, 3, 4, 5, 7, 8, 9, 10, 16, 17, 24, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 255, 256, 257, 511, 512]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 129, 513, 769])
def test_narrow_rows(emulator, dtype, rows):
    """Every width at an edge of a pack, a tile or a warp is right, with one row to more than one block takes."""
    for classes in NARROW if rows < 513 else [1, 2, 3, 4, 10, 16, 64]:
        logits, target = problem(rows, classes, dtype, seed=classes)
        target[-1] = classes - 1
        if rows > 1:
            target[rows // 2] = -100
        check(emulator, logits, target)


# Around what 32, 64 and 512 threads hold, the most of one block, in packs; and rows with odd ends.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packs", [65, 256, 513, 4096])
def test_wide_rows(emulator, dtype, packs):
    """Every width at an edge of what some threads hold is right, and with it those one class less and more."""
    width = 16 // dtype.itemsize
    for classes in (packs * width - 1, packs * width, packs * width + 1):
        logits, target = problem(3, classes, dtype, seed=classes)
        target[0], target[1], target[2] = 0, classes - 1, -100
        check(emulator, logits, target)


@pytest.mark.parametrize(
    ("dtype", "cluster", "largest_cluster"),
    [
        *[(dtype, 2, largest) for dtype in DTYPES for largest in (0, 2)],
        (torch.float32, 4, 2),
        (torch.float32, 4, 8),
        (torch.float64, 16, 8),
        (torch.float64, 16, 16),
        (torch.bfloat16, 8, 16),
    ],
)
def test_rows_wider_than_a_block(emulator, dtype, cluster, largest_cluster):
    """Rows for a cluster are right on devices that have it, that have smaller ones, and that have none."""
    full = cluster * 4096 * 16 // dtype.itemsize
    for classes in (full // 2 + 16 // dtype.itemsize, full + 1):
        logits, target = problem(1, classes, dtype, seed=classes)
        target[0] = classes - 1
        check(emulator, logits, target, largest_cluster=largest_cluster)


def test_cluster_of_ignored_and_target_rows(emulator):
    """A cluster whose row is ignored writes zeros; the target may lie in any block's share or at either end."""
    classes = 16384 + 19
    logits, _ = problem(6, classes, torch.float32)
    target = torch.tensor([0, -100, 1, 2048, 9000, classes - 1])
    for order in (FORWARD, BACKWARD, SHUFFLED):
        result = check(emulator, logits, target, order=order)
        assert result.gradient[1].count_nonzero() == 0


OPTIONS = {
    "plain": {},
    "weight": {"weight": True},
    "smoothing": {"smoothing": 0.1},
    "z_loss": {"z_loss": 0.01},
    "softcap": {"softcap": 5.0},
    "all": {"weight": True, "smoothing": 0.2, "z_loss": 0.02, "softcap": 3.0},
    "sum": {"mean": False},
    "none": {"mean": False, "reduced": False},
    "no_gradient": {"with_gradient": False},
    "inplace": {"inplace": True},
    "ignored": {"ignore_index": 1},
    "total": {"total_dtype": torch.float32},
}
# One of each kernel for float: one block alone, a tile, a part of a warp, a warp, warps, and a cluster.
SHAPES = [(40, 10), (530, 10), (530, 16), (9, 67), (9, 1001), (1, 5001), (1, 17001)]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_options(emulator, dtype, options):
    """Every option is right in every kernel, for class indices and for probabilities."""
    for rows, classes in SHAPES:
        # Every type at every short row; of the long rows those of float and bfloat16.
        if classes > 5000 and dtype in (torch.float64, torch.float16):
            continue
        logits, target = problem(rows, classes, dtype, seed=3)
        if rows > 1:
            target[0], target[1] = 1, 0
        chosen = dict(options)
        if "weight" in chosen:
            chosen["weight"] = torch.rand(classes, generator=torch.Generator().manual_seed(1)) + 0.5
        check(emulator, logits, target, **chosen)
        if classes > 16384:
            check(emulator, logits, target, largest_cluster=0, **chosen)
        if chosen.get("ignore_index") is None:
            probabilities = problem(rows, classes, torch.float32, seed=4)[0].softmax(1)
            check(emulator, logits, probabilities, **chosen)


@pytest.mark.parametrize("order", [BACKWARD, SHUFFLED])
@pytest.mark.parametrize("inplace", [False, True])
def test_result_does_not_depend_on_the_order_of_threads(emulator, order, inplace):
    """Whatever thread or block comes first, every kernel gives the same bits: no barrier is missing."""
    for rows, classes in [*SHAPES, (5000, 3), (1, 40000)]:
        logits, target = problem(rows, classes, torch.float32, seed=5)
        first = run_cross_entropy(emulator, logits, target, inplace=inplace, smoothing=0.1)
        other = run_cross_entropy(emulator, logits, target, inplace=inplace, smoothing=0.1, order=order)
        assert first.error == other.error == 0
        for name in ("losses", "lse", "gradient", "total"):
            assert torch.equal(getattr(first, name), getattr(other, name)), (name, rows, classes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_arrays_that_begin_anywhere(emulator, dtype):
    """Logits, probabilities and gradient need be aligned to no more than an element, and not alike."""
    for rows, classes in [(40, 10), (530, 16), (530, 10), (5, 301), (3, 1024), (1, 5000)]:
        logits, target = problem(rows, classes, dtype, seed=6)
        check(emulator, logits, target, offset=dtype.itemsize)
        check(emulator, logits, target, offset=16 - dtype.itemsize, gradient_offset=0)
        check(emulator, logits, target, offset=dtype.itemsize, inplace=True)
        check(emulator, logits, logits.float().softmax(1), offset=dtype.itemsize, smoothing=0.1)


# At the edge of one part, of all parts, and with uneven parts.
@pytest.mark.parametrize("rows", [2047, 2048, 2049, 6000, 128 * 2048 + 1])
def test_sums_over_many_rows(emulator, rows):
    """The denominator and the total are right however many blocks share the rows."""
    logits, target = problem(rows, 1 if rows > 10000 else 2, torch.float32, seed=7)
    weight = torch.tensor([0.25, 2.0])[: logits.shape[1]]
    target[::3] = -100
    check(emulator, logits, target, weight=weight, order=SHUFFLED if rows == 6000 else FORWARD)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_and_extreme_logits(emulator, dtype):
    """Masks of -inf and of the lowest number, rows of nothing else, and NaN come out as torch has them."""
    lowest = torch.finfo(dtype).min
    for classes in (10, 1001, 18000):
        logits, target = problem(6, classes, dtype, seed=8)
        target[:] = classes - 1
        logits[0, : classes - 1] = -torch.inf
        logits[1, ::2] = -torch.inf
        logits[1, -1] = 0
        logits[2, : classes // 2] = lowest
        logits[3] = lowest
        logits[4] = -torch.inf
        logits[5, 3] = torch.nan
        result = run_cross_entropy(emulator, logits, target, mean=False)
        losses, _, _, gradient = exact_cross_entropy(logits, target)
        tolerance = {"rtol": 1e-5, "atol": 1e-5, "equal_nan": True}
        torch.testing.assert_close(result.losses.double(), losses, **tolerance)
        tolerance["rtol"] = max(1e-5, torch.finfo(dtype).eps)
        torch.testing.assert_close(result.gradient.double(), gradient, **tolerance)


@pytest.mark.parametrize("bad", [-1, 7, -(2**40), 2**40])
@pytest.mark.parametrize(("rows", "classes"), [(3, 7), (600, 7), (3000, 7), (600, 7 * 64)])
def test_target_out_of_range(emulator, bad, rows, classes):
    """A label that names no class traps with its value and row, and no memory is touched through it."""
    logits, target = problem(rows, classes, torch.float32)
    bad = bad * 64 if bad == 7 and classes > 7 else bad
    target[rows - 2] = bad
    for reduced in (True, False):
        result = run_cross_entropy(emulator, logits, target, mean=reduced, reduced=reduced)
        assert result.error == LAUNCH_FAILURE
        assert f"Target {bad} is out of bounds: row {rows - 2}" in emulator.said()
        assert (result.gradient == GARBAGE).all()


def test_nothing_to_do(emulator):
    """No rows give the mean of nothing, which is NaN, and the sum of nothing, which is 0."""
    logits, target = torch.empty(0, 5), torch.empty(0, dtype=torch.int64)
    assert run_cross_entropy(emulator, logits, target).total.isnan().all()
    assert run_cross_entropy(emulator, logits, target, mean=False).total.item() == 0
    result = run_cross_entropy(emulator, torch.empty(3, 0), torch.full((3,), -100), mean=False)
    assert result.error == 0


def test_small_problem_is_one_launch(emulator):
    """A batch of few rows and classes, whose time is that of its launches, has one."""
    for rows in (1, 128, 512):
        assert check(emulator, *problem(rows, 10, torch.float32)).launches == 1
    assert check(emulator, *problem(513, 10, torch.float32)).launches == 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 1])
def test_scale_rows(emulator, dtype, offset):
    """The upstream gradient reaches every element once, whatever the rows' ends do to packs."""
    for rows, classes in [(1, 1), (1, 5), (5, 1), (3, 7), (4, 8), (1, 4097), (130, 513)]:
        gradient, _ = problem(rows, classes, dtype)
        for per_row in (False, True):
            factor = (torch.randn(rows if per_row else 1) * 2).to(accumulator(dtype))
            factor[0] = 1
            for scaled in (factor, torch.full_like(factor, -0.5)):
                out = gradient.clone()
                settings = {"type": DTYPES.index(dtype), "rows": rows, "classes": classes, "per_row": int(per_row)}
                buffers = {"gradient": out, "factor": scaled}
                assert emulator.call("scale_rows", buffers, settings, offsets={"gradient": offset * 8})[0] == 0
                assert torch.equal(out, (gradient.to(factor.dtype) * scaled.reshape(-1, 1)).to(dtype))
