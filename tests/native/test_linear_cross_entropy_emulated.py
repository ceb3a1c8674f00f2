"""The CUDA kernels of the fused linear cross-entropy, run slice by slice on the emulated GPU, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

# One worker builds the emulator, for a minute.
pytestmark = [pytest.mark.slow, pytest.mark.group("emulator")]

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAUNCH_FAILURE = 719
ROWS = 5
IGNORED = 2
# Less than a warp, a block and one more, one class, and several rounds of a block.
SLICES = [20, 257, 1, 700]
CLASSES = sum(SLICES)

OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "weight": {"weight": True},
    "smoothing": {"smoothing": 0.2, "weight": True},
    "softcap": {"softcap": 3.0, "bias": True},
    "all": {"smoothing": 0.1, "softcap": 5.0, "bias": True, "weight": True, "z_loss": 0.01},
}


def call(emulator, function: str, dtype: torch.dtype, logits: Tensor, begin: int, buffers, options, order=0):
    settings = {
        "type": DTYPES.index(dtype),
        "rows": len(logits),
        "begin": begin,
        "classes": logits.shape[1],
        "all_classes": CLASSES,
        "smooth": int(options.get("smoothing", 0) > 0),
        "softcap": options.get("softcap", 0.0),
        "order": order,
    }
    return emulator.call(function, buffers | {"logits": logits}, settings)


class Exact:
    """Everything in float64."""

    def __init__(self, logits: Tensor, target: Tensor, bias: Tensor | None, weight: Tensor | None, options):
        u = logits.double() + (0 if bias is None else bias.double())
        cap = options.get("softcap", 0.0)
        u = cap * torch.tanh(u / cap) if cap else u
        weight = torch.ones(CLASSES, dtype=torch.float64) if weight is None else weight.double()
        smoothing, z_loss = options.get("smoothing", 0.0), options.get("z_loss", 0.0)
        share = smoothing / CLASSES
        self.lse = u.logsumexp(1)
        self.target_logit = u.gather(1, target.clamp_min(0)[:, None]).squeeze(1)
        self.soft = (weight * u).sum(1)
        target_weight = weight[target.clamp_min(0)]
        rest = share * weight.sum() + 2 * z_loss * self.lse
        self.maximum = u.amax(1)
        total = (1 - smoothing) * target_weight + rest
        self.factor = total * (self.maximum - self.lse).exp()
        self.soft_factor = torch.full((len(target),), share, dtype=torch.float64)
        hard = torch.nn.functional.one_hot(target.clamp_min(0), CLASSES) * ((1 - smoothing) * target_weight)[:, None]
        self.gradient = (u - self.lse[:, None]).exp() * total[:, None] - share * weight - hard
        if cap:
            self.gradient *= 1 - (u / cap).square()
        self.gradient[IGNORED] = 0
        self.target_gradient = self.gradient.gather(1, target.clamp_min(0)[:, None]).squeeze(1)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_slices_against_float64(emulator, dtype, name):
    """Sums, target logits and gradients of the slices together are those of the logits as a whole."""
    options = OPTIONS[name]
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(ROWS, CLASSES, generator=generator) * 3).to(acc)
    # The first and the last class of slices, a slice of one class, one row that counts for nothing.
    target = torch.tensor([0, 20 + 257, -100, CLASSES - 1, 300])
    bias = torch.randn(CLASSES, generator=generator).to(acc) if options.get("bias") else None
    weight = (torch.rand(CLASSES, generator=generator) + 0.5).to(acc) if options.get("weight") else None
    exact = Exact(logits, target, bias, weight, options)

    shared = (
        {"target": target} | ({} if bias is None else {"bias": bias}) | ({} if weight is None else {"weight": weight})
    )
    sums = {key: torch.full((ROWS,), -7.0, dtype=acc) for key in ("maximum", "sum", "soft", "target_logit")}
    parts = logits.split(SLICES, dim=1)
    begins = [sum(SLICES[:i]) for i in range(len(SLICES))]
    for order, (part, begin) in enumerate(zip(parts, begins, strict=True)):
        error, launches = call(
            emulator, "add_slice", dtype, part.contiguous(), begin, shared | sums, options, order % 3
        )
        assert (error, launches) == (0, 1)
    counted = target != -100
    eps = torch.finfo(acc).eps
    lse = sums["maximum"] + sums["sum"].log()
    torch.testing.assert_close(lse.double()[counted], exact.lse[counted], rtol=4 * eps, atol=4 * eps)
    torch.testing.assert_close(
        sums["target_logit"].double()[counted], exact.target_logit[counted], rtol=8 * eps, atol=8 * eps
    )
    assert [sums[key][IGNORED].item() for key in ("maximum", "sum", "soft", "target_logit")] == [0, 1, 0, 0]
    if options.get("smoothing"):
        torch.testing.assert_close(sums["soft"].double()[counted], exact.soft[counted], rtol=1e-5, atol=1e-3)

    of_row = {key: getattr(exact, key).to(acc) for key in ("maximum", "factor", "soft_factor", "target_gradient")}
    found = []
    for part, begin in zip(parts, begins, strict=True):
        # Where the types agree the gradient takes the place of the logits.
        gradient = torch.full(part.shape, -7.0, dtype=dtype)
        buffers = shared | of_row | {"gradient": gradient}
        assert call(emulator, "slice_gradient", dtype, part.contiguous(), begin, buffers, options) == (0, 1)
        found.append(gradient)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(torch.cat(found, 1).double(), exact.gradient, rtol=16 * eps, atol=4 * eps)


def test_classes_that_a_bias_rules_out(emulator):
    """-inf in the bias, even for whole slices, leaves the sums of the other classes as they are."""
    logits = torch.randn(3, CLASSES, generator=torch.Generator().manual_seed(0))
    bias = torch.zeros(CLASSES)
    bias[:300] = -torch.inf
    target = torch.tensor([400, 500, 600])
    sums = {key: torch.zeros(3) for key in ("maximum", "sum", "soft", "target_logit")}
    begin = 0
    for part in logits.split(SLICES, dim=1):
        buffers = sums | {"target": target, "bias": bias}
        assert call(emulator, "add_slice", torch.float32, part.contiguous(), begin, buffers, {})[0] == 0
        begin += part.shape[1]
    expected = (logits + bias).logsumexp(1)
    torch.testing.assert_close(sums["maximum"] + sums["sum"].log(), expected)


@pytest.mark.parametrize("bad", [-1, CLASSES])
def test_target_out_of_range(emulator, bad):
    """A target that names no class stops the kernel, and says where, before anything is read through it."""
    sums = {key: torch.zeros(2) for key in ("maximum", "sum", "soft", "target_logit")}
    buffers = sums | {"target": torch.tensor([0, bad])}
    assert call(emulator, "add_slice", torch.float32, torch.zeros(2, 20), 0, buffers, {})[0] == LAUNCH_FAILURE
    assert f"Target {bad} is out of bounds: row 1" in emulator.said()
