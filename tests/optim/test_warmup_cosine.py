"""WarmupCosine raises the rates along a line and lowers them along a cosine, whatever the lengths are."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightkit.optim import WarmupCosine


def rates(steps, **options):
    """Returns the rates of two groups, with 1.0 and 0.5, at the start and after each of the steps."""
    groups = [{"params": [torch.zeros(1)], "lr": lr} for lr in (1.0, 0.5)]
    optimizer = torch.optim.SGD(groups)
    scheduler = WarmupCosine(optimizer, **options)
    found = []
    for _ in range(steps + 1):
        found.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return found


def test_shape():
    """The rate rises in equal parts to the optimizer's, is halfway down in the middle, and stays at eta_min."""
    found = [one for one, _ in rates(14, total_steps=12, warmup=4, eta_min=0.1)]
    assert found[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert found[8] == pytest.approx(0.55)
    assert found[12:] == pytest.approx([0.1, 0.1, 0.1])


@given(
    total=st.integers(1, 60),
    warmup=st.one_of(st.floats(0, 1, exclude_max=True), st.integers(1, 80)),
    eta_min=st.floats(0, 0.5),
)
def test_bounds(total, warmup, eta_min):
    """The rate rises up to the end of the warm-up and falls after it; no length divides by zero."""
    found = [one for one, _ in rates(total + 2, total_steps=total, warmup=warmup, eta_min=eta_min)]
    steps = round(warmup * total) if warmup < 1 else warmup
    assert all(math.isfinite(lr) and 0 <= lr <= 1 for lr in found)
    assert all(a <= b for a, b in pairwise(found[:steps]))
    assert all(a >= b - 1e-12 for a, b in pairwise(found[steps:]))
    if steps < total:
        assert found[-1] == pytest.approx(eta_min)


def test_state():
    """A loaded state continues the schedule."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    first = WarmupCosine(optimizer, 10, warmup=3)
    for _ in range(5):
        optimizer.step()
        first.step()
    other = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    second = WarmupCosine(other, 20)
    second.load_state_dict(first.state_dict())
    for scheduler in (first, second):
        scheduler.optimizer.step()
        scheduler.step()
    assert first.get_last_lr() == second.get_last_lr()
    assert second.total_steps == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": 0}, "total_steps must be a whole number from 1, got 0"),
        ({"total_steps": 2.5}, "got 2.5"),
        ({"total_steps": 9, "warmup": -0.1}, "warmup must be a share from 0 to 1 or a whole number of steps, got -0.1"),
        ({"total_steps": 9, "warmup": 1.5}, "got 1.5"),
        ({"total_steps": 9, "warmup": math.nan}, "got nan"),
        ({"total_steps": 9, "eta_min": -1.0}, "eta_min must be at least 0, got -1.0"),
    ],
)
def test_wrong_arguments(options, message):
    """The error has the argument, its value and what was expected."""
    with pytest.raises(ValueError, match=message):
        rates(0, **options)
