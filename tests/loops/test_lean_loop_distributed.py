"""Compares the lean loop in two processes with Lightning's loop to the bit, for each supported strategy."""

from __future__ import annotations

import lean_scenarios
import pytest
import torch
from support.commands import python_path, run_python

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Returns the outcome of each scenario on both ranks."""
    directory = tmp_path_factory.mktemp("lean")
    run_python(lean_scenarios.__file__, directory, environment=python_path(), status=0)
    return [torch.load(directory / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", [name for name in lean_scenarios.SCENARIOS if name != "skipping"])
def test_same_to_the_bit(ranks, name, rank):
    """Weights after every step, the optimizer's state, logged values and the number of sent bytes are the same."""
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
    """Each rank raises an error, and none waits for the other."""
    for outcome in ranks[rank]["skipping"]:
        assert outcome["error"].startswith("RuntimeError: ")
