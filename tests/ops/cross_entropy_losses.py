"""The comparison of a cross-entropy with torch's and with float64."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from lightkit.ops import cross_entropy

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def available_gib() -> float:
    """Memory that this machine has to give, by Linux's account; 0 where there is none."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0.0
    return int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))) / 2**20


def loss_and_gradient(function, logits, target, weight=None, **options):
    """The loss, and the gradient of its sum, both in float64."""
    logits = logits.detach().clone().requires_grad_()
    loss = function(logits, target, weight, **options)
    loss.sum().backward()
    return loss.detach().double(), logits.grad.double()


def assert_as_accurate_as_torch(logits, target, weight=None, **options):
    """Our error against float64 is within torch's, but for roundings of the output."""
    exact = loss_and_gradient(
        F.cross_entropy, logits.double(), target.long(), None if weight is None else weight.double(), **options
    )
    torchs = loss_and_gradient(F.cross_entropy, logits, target.long(), weight, **options)
    ours = loss_and_gradient(cross_entropy, logits, target, weight, **options)
    # A few roundings of the accumulator; the truth for float64 is itself no more than float64.
    slack = 32 * torch.finfo(torch.float64).eps if logits.dtype == torch.float64 else 8 * torch.finfo(torch.float32).eps
    for name, own, other, truth in zip(("loss", "gradient"), ours, torchs, exact, strict=True):
        assert own.shape == truth.shape, name
        scale = truth.abs().nan_to_num()
        allowed = (other - truth).abs().max() if truth.numel() else 0
        allowed = allowed + scale * torch.finfo(logits.dtype).eps + slack * (1 + scale)
        assert ((own - truth).abs() <= allowed).all(), (name, (own - truth).abs().max(), allowed.max())
