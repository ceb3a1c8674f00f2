"""Problems for the fused linear cross-entropy, and how exact it must be: on a CPU and on a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightkit.ops import linear_cross_entropy, linear_cross_entropy_reference

OPTIONS = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 1e-2, "reduction": "none"},
    "softcap": {"softcap": 4.0},
    "all": {"label_smoothing": 0.2, "z_loss": 1e-3, "softcap": 6.0},
}


@dataclass
class Problem:
    hidden: Tensor
    head: Tensor
    target: Tensor
    bias: Tensor | None = None
    weight: Tensor | None = None

    def leaves(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        tensors = [self.hidden, self.head] + ([] if self.bias is None else [self.bias])
        return [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]


def make(rows, features, classes, dtype=torch.float32, bias=False, weight=False, ignored=False) -> Problem:
    generator = torch.Generator("cpu").manual_seed(rows * 7919 + features * 31 + classes)

    # The same on every device.
    def randn(*sizes):
        return torch.randn(*sizes, generator=generator, device="cpu").to(torch.get_default_device())

    target = torch.randint(classes, (rows,), generator=generator, device="cpu").to(torch.get_default_device())
    if ignored:
        target[::3] = -100
    return Problem(
        randn(rows, features).to(dtype),
        (randn(classes, features) * 3 / features**0.5).to(dtype),
        target,
        randn(classes).to(dtype) if bias else None,
        torch.rand(classes, generator=generator, device="cpu").to(target.device) + 0.5 if weight else None,
    )


def evaluate(problem: Problem, function, options, dtype=None) -> list[Tensor]:
    """Loss and gradients; an unreduced loss gets another upstream gradient for each row."""
    leaves = problem.leaves(dtype)
    hidden, head, bias = (*leaves, None)[:3]
    weight = problem.weight if problem.weight is None or dtype is None else problem.weight.to(dtype)
    loss = function(hidden, head, problem.target, linear_bias=bias, weight=weight, **options)
    upstream = torch.linspace(0.5, 2, max(loss.numel(), 1), dtype=torch.float64)[: loss.numel()].reshape(loss.shape)
    loss.backward(upstream.to(loss.dtype))
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


def assert_as_exact_as_torch(problem: Problem, options, roundings_of_float64=128, **ours) -> None:
    """The error of loss and gradients against float64 is not larger than that of torch by more than rounding."""
    exact = evaluate(problem, linear_cross_entropy_reference, options, torch.float64)
    theirs = evaluate(problem, linear_cross_entropy_reference, options)
    found = evaluate(problem, linear_cross_entropy, {**options, **ours})
    # float64 has nothing to be measured against but another order of the same sums.
    rounding = (roundings_of_float64 if problem.hidden.dtype == torch.float64 else 8) * torch.finfo(
        problem.hidden.dtype
    ).eps
    for name, mine, its, true in zip(("loss", "hidden", "head", "bias"), found, theirs, exact, strict=False):
        assert mine.dtype == its.dtype and mine.shape == its.shape
        scale = max(float(true.abs().max()), float(exact[0].abs().max()) * 1e-3)
        if scale == 0:
            continue
        difference = float((mine.double() - true).abs().max()) / scale
        allowed = 1.5 * float((its.double() - true).abs().max()) / scale + rounding
        assert difference <= allowed, (name, difference, allowed)
