"""Compression in two processes: both remove the same units, round alike and go on with the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.commands import python_path, run_python

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pruned")
    script = Path(__file__).with_name("two_pruned_processes.py")
    run_python(script, directory, environment=python_path(), status=0)
    return [torch.load(directory / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("name", ["ddp", "data_parallel", "powersgd", "whole", "resumed"])
def test_same_weights(ranks, name):
    """Both processes have the same smaller model after the last step."""
    first, second = (rank[name]["state"] for rank in ranks)
    assert first["net.0.weight"].shape[0] < 8
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert ranks[0][name]["metrics"].get("same", 1.0) == 1.0


def test_quantized(ranks):
    """Processes that see different samples have the same ranges and weights, which are those of all samples."""
    first, second = (rank["quantized"] for rank in ranks)
    assert first["ranges"] and first["ranges"] == second["ranges"]
    assert all(torch.equal(value, second["state"][key]) for key, value in first["state"].items())


def test_resumed(ranks):
    """A training of two processes resumes to the bit between two rounds."""
    whole, resumed = (ranks[0][name]["state"] for name in ("whole", "resumed"))
    assert all(torch.equal(value, whole[key]) for key, value in resumed.items())
