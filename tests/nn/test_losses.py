"""Mean squared error and binary cross-entropy against their formulas in float64."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from lightkit.nn import BCEWithLogitsLoss, MSELoss

_REDUCE = {"none": lambda x: x, "mean": torch.mean, "sum": torch.sum}


def numbers(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("reduction", _REDUCE)
def test_squared_error_is_its_formula(reduction):
    """(x - y) squared, reduced as asked."""
    x, y = numbers(7, 3), numbers(7, 3, seed=1)
    torch.testing.assert_close(MSELoss(reduction=reduction)(x, y), _REDUCE[reduction]((x - y) ** 2))


def test_gradient_of_squared_error():
    """2 (x - y) / n, and gradcheck agrees."""
    x, y = numbers(7, 3).requires_grad_(), numbers(7, 3, seed=1)
    (gradient,) = torch.autograd.grad(MSELoss()(x, y), x)
    torch.testing.assert_close(gradient, 2 * (x - y).detach() / 21)
    assert gradcheck(MSELoss(), (x, y))


@pytest.mark.parametrize("reduction", _REDUCE)
@pytest.mark.parametrize("pos_weight", [None, torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64)])
def test_binary_cross_entropy_is_its_formula(reduction, pos_weight):
    """-(w y log p + (1 - y) log(1 - p)) with p the sigmoid of the logit, reduced as asked."""
    x, y = numbers(7, 3), torch.rand(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    p = 1 / (1 + torch.exp(-x))
    weight = 1.0 if pos_weight is None else pos_weight
    expected = -(weight * y * torch.log(p) + (1 - y) * torch.log(1 - p))
    loss = BCEWithLogitsLoss(reduction=reduction, pos_weight=pos_weight)
    torch.testing.assert_close(loss(x, y), _REDUCE[reduction](expected))


def test_binary_cross_entropy_of_extreme_logits():
    """Where log(1 - p) is minus infinity in the formula, the loss is the logit, and its gradient 1."""
    x = torch.tensor([1000.0, -1000.0, 1000.0, -1000.0], requires_grad=True)
    y = torch.tensor([0.0, 1.0, 1.0, 0.0])
    p = torch.sigmoid(x)
    assert not torch.isfinite(-(y * torch.log(p) + (1 - y) * torch.log(1 - p))).all()
    losses = BCEWithLogitsLoss(reduction="none")(x, y)
    torch.testing.assert_close(losses, torch.tensor([1000.0, 1000.0, 0.0, 0.0]))
    (gradient,) = torch.autograd.grad(losses.sum(), x)
    torch.testing.assert_close(gradient, torch.tensor([1.0, -1.0, 0.0, 0.0]))


def test_gradient_of_binary_cross_entropy():
    """(p - y) / n, and gradcheck agrees."""
    x = numbers(7, 3).requires_grad_()
    y = torch.rand(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad(BCEWithLogitsLoss()(x, y), x)
    torch.testing.assert_close(gradient, (torch.sigmoid(x) - y).detach() / 21)
    assert gradcheck(BCEWithLogitsLoss(), (x, y))
