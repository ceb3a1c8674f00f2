"""The lean loop in two real processes against Lightning's own, to the bit, with each strategy that it knows."""

from __future__ import annotations

import lean_scenarios
import pytest
import torch
from support.commands import python_path, run_python

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of the two ranks has of each scenario."""
    directory = tmp_path_factory.mktemp("lean")
    run_python(lean_scenarios.__file__, directory, environment=python_path(), status=0)
    return [torch.load(directory / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", [name for name in lean_scenarios.SCENARIOS if name != "skipping"])
def test_same_to_the_bit(ranks, name, rank):
    """Weights after every step, the optimizer's state, logged values and the bytes that were sent."""
    stock, lean = ranks[rank][name]
    assert "error" not in stock and "error" not in lean, (stock, lean)
    assert stock["lean"] == 0 and lean["lean"] > 0
    assert len(stock["steps"]) == len(lean["steps"]) > 0
    assert all(torch.equal(a, b) for a, b in zip(stock["steps"], lean["steps"], strict=True))
    for part in ("state", "optimizer"):
        torch.testing.assert_close(stock[part], lean[part], rtol=0, atol=0)
    assert stock["metrics"] == lean["metrics"]
    assert stock["communication"] == lean["communication"]


@pytest.mark.parametrize("rank", [0, 1])
def test_no_batch_can_be_left_out(ranks, rank):
    """An error on each rank, and not one that waits for the other."""
    for outcome in ranks[rank]["skipping"]:
        assert outcome["error"].startswith("RuntimeError: ")
