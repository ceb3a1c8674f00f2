"""The CUDA kernels, run on a CPU by the emulation in ``cuda_emulation``, against float64.

What they cost on a GPU cannot be seen here. What can: results, barriers, shared memory, every memory access.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from cuda_emulation import EmulationError, Emulator, build
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# The order in which threads and blocks get their turn: a missing barrier shows in one of them.
FORWARD, BACKWARD, SHUFFLED = range(3)
LAUNCH_FAILURE = 719
GARBAGE = -7.0


@pytest.fixture(scope="module")
def emulator(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulator]:
    emulator = Emulator(build(compiler, tmp_path_factory.mktemp("emulation")))
    yield emulator
    emulator.close()


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
        "denominator": torch.full((1,), GARBAGE, dtype=torch.float64),
    }
    if weight is not None:
        buffers["weight"] = weight.to(acc)
    if smoothing > 0:
        buffers["smooth"] = smoothing / classes * (torch.ones(classes, dtype=acc) if weight is None else weight.to(acc))
    if with_gradient and not inplace:
        buffers["gradient"] = torch.full_like(logits, GARBAGE)
    if reduced:
        buffers["total"] = torch.full((1,), GARBAGE, dtype=torch.float64)
    settings = {
        "type": DTYPES.index(logits.dtype),
        "rows": rows,
        "classes": classes,
        "ignore_index": ignore_index,
        "confidence": repr(1 - smoothing),
        "z_loss": z_loss,
        "softcap": softcap,
        "mean": int(mean),
        "inplace": int(inplace),
        "order": order,
        "largest_cluster": largest_cluster,
    }
    moved = {name: offset for name in ("logits", "probabilities", "gradient")}
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
    log_p = u - lse[:, None]
    if target.is_floating_point():
        counts = torch.ones(len(z), dtype=torch.bool)
        soft = w * ((1 - smoothing) * target.double() + smoothing / classes)
        losses = -(soft * log_p).sum(1)
        denominator = torch.tensor(float(len(z)))
    else:
        counts = target != ignore_index
        index = target.where(counts, torch.zeros_like(target))
        losses = -(1 - smoothing) * w[index] * log_p.gather(1, index[:, None])[:, 0]
        if smoothing:
            losses = losses - smoothing / classes * (w * log_p).sum(1)
        denominator = (w[index] * counts).sum()
    losses = (losses + z_loss * lse.square()).where(counts, 0)
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
        torch.testing.assert_close(result.total[0].double(), losses.sum() * scale, rtol=slack, atol=slack * float(size))
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


# Around a pack of 2, 4 or 8, a warp, the packs that a thread holds.
NARROW = [1, 2, 3, 4, 5, 7, 8, 9, 10, 16, 17, 31, 32, 33, 47, 48, 49, 64, 65, 100, 127, 128, 129, 255, 256, 257]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_narrow_rows(emulator, dtype):
    """Every width at an edge of a pack or a warp, with one row, some, and more than a block takes."""
    for classes in NARROW:
        for rows in (1, 5, 130):
            logits, target = problem(rows, classes, dtype, seed=classes)
            target[rows // 2] = -100
            if rows == 1:
                target[0] = classes - 1
            check(emulator, logits, target)
