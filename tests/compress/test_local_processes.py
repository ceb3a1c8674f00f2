"""Compression in two processes that have weights of their own, or a part of them: zeros stay, both have one model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.commands import python_path, run_python
from support.trainers import bare_trainer
from support.two_processes import Module, Recorder, dealt

from lightkit.compress import Sparsify
from lightkit.strategies.diloco import OUTER_KEY

pytestmark = pytest.mark.slow

MASKED = ["ddp", "local_sgd", "local_sgd, lean", "local_sgd, averages", "uneven", "uneven diloco", "diloco", "resumed"]
SERVED = ["sync", "sync, resumed", "sync, resumed between", "two servers", "async"]
QUANTIZED = ["quantized", "quantized, resumed", "quantized diloco", "quantized uneven", "quantized ddp"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("local")


@pytest.fixture(scope="module")
def ranks(directory):
    """Returns the outcome of each training on each of the two ranks."""
    script = Path(__file__).with_name("local_processes.py")
    run_python(script, directory, environment=python_path(), status=0)
    return [torch.load(directory / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())


@pytest.mark.parametrize("name", MASKED)
def test_zeros_stay(ranks, name):
    """From the first round on no step, average or outer step moves a masked weight, in either process."""
    for rank in ranks:
        assert rank[name]["masked_steps"] >= 10 and rank[name]["violations"] == 0
        zeros = sum(int((rank[name]["state"][key][~mask] == 0).sum()) for key, mask in rank[name]["masks"].items())
        # 0.7 of 40 and 24 weights.
        assert zeros == 44


@pytest.mark.parametrize("name", MASKED)
def test_same_masks_and_weights(ranks, name):
    """Both processes end with the same masks and the same weights, to the bit."""
    first, second = (rank[name] for rank in ranks)
    assert same(first["masks"], second["masks"]) and same(first["state"], second["state"])


def zeros_of(weights):
    """Counts the zeros among the two layers' weights in the weights of all layers."""
    return int((weights[:40] == 0).sum() + (weights[48:72] == 0).sum())


@pytest.mark.parametrize("name", SERVED)
def test_servers_keep_zeros(ranks, name):
    """Both workers get weights with more and more zeros, as many as asked for, and end with the same ones."""
    for rank in ranks:
        zeros = [zeros_of(weights) for weights in rank[name]["steps"]]
        assert zeros == sorted(zeros) and zeros[-1] == 44
    assert same(ranks[0][name]["state"], ranks[1][name]["state"])


def test_servers_mask_at_the_same_step(ranks):
    """In sync both workers get the zeros in the same step: that after worker 0 has chosen them."""
    counts = [[zeros_of(weights) for weights in rank["sync"]["steps"]] for rank in ranks]
    assert counts[0] == counts[1]
    # Chosen after 8, 14 and 20 of 28 steps.
    assert [index for index in range(1, 28) if counts[0][index] > counts[0][index - 1]] == [8, 14, 20]


def test_servers_and_the_dense_teacher(ranks):
    """Masks come to a worker without a notice, so that the dense model cannot teach: one line says so."""
    assert "give Distil a teacher" in ranks[0]["distilled"]["error"]


def test_outer_momentum_is_masked(ranks, directory):
    """The outer momentum of DiLoCo, from before the masks, is zero where they are, and nowhere else."""
    outer = torch.load(directory / "whole" / "step=24.ckpt", weights_only=False)[OUTER_KEY]["state"][0]
    state, masks = ranks[0]["diloco"]["state"], ranks[0]["diloco"]["masks"]
    kept = torch.cat([masks.get(name, torch.ones(value.shape)).bool().flatten() for name, value in state.items()])
    momentum = outer["momentum_buffer"]
    assert bool((momentum[~kept] == 0).all()) and float((momentum[kept] != 0).float().mean()) > 0.9


@pytest.mark.parametrize(
    ("whole", "resumed"),
    [
        ("diloco", "resumed"),
        ("sync", "sync, resumed"),
        ("sync", "sync, resumed between"),
        ("quantized", "quantized, resumed"),
        ("pruned diloco", "pruned diloco, resumed"),
        ("quantized ddp", "quantized ddp, resumed"),
    ],
)
def test_resumed(ranks, whole, resumed):
    """A resumed training is the uninterrupted one, to the bit, between rounds and while ranges are observed."""
    assert all(same(rank[whole]["state"], rank[resumed]["state"]) for rank in ranks)


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized(ranks, name):
    """Processes that see different samples have the same ranges and weights."""
    first, second = (rank[name] for rank in ranks)
    assert first["ranges"][-1] and first["ranges"][-1] == second["ranges"][-1]
    assert all(scale is not None for scale, _ in first["ranges"][-1])
    assert same(first["state"], second["state"]) and first["metrics"]["same"] == 1.0


@pytest.mark.parametrize("name", ["sharded", "sharded, lightkit's"])
def test_shards_are_masked_like_whole_weights(ranks, name):
    """The smallest weights of all shards are those of the whole weights in one process; zeros stay."""
    module, sparsify, recorder = Module(), Sparsify(0.7, start=0.3, end=0.7, rounds=3), Recorder()
    bare_trainer(sparsify, recorder, max_epochs=4).fit(module, dealt())
    expected = {sparsify._names[p]: mask for p, mask in sparsify.masks.items()}
    found = ranks[0][name]
    assert same(found["masks"], expected) and same(found["masks"], ranks[1][name]["masks"])
    for steps in found["steps"][-10:]:
        assert all(bool((steps[key][~mask] == 0).all()) for key, mask in expected.items())
    last = torch.cat([value.flatten() for value in found["steps"][-1].values()])
    torch.testing.assert_close(last, recorder.steps[-1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["pruned", "pruned uneven", "pruned diloco", "pruned diloco, resumed"])
def test_pruned(ranks, name):
    """Processes with weights of their own remove the same units, and end with one smaller model."""
    first, second = (rank[name] for rank in ranks)
    assert "error" not in first, first["error"]
    width = first["state"]["net.0.weight"].shape[0]
    assert width < 5 and first["state"]["net.2.weight"].shape == (3, width)
    assert same(first["state"], second["state"])


def test_outer_momentum_of_pruned_weights(ranks, directory):
    """The outer momentum of DiLoCo keeps that of the units which are left."""
    before, after = (torch.load(directory / "p" / f"step={step}.ckpt", weights_only=False) for step in (15, 18))
    assert before["state_dict"]["net.0.weight"].shape[0] > after["state_dict"]["net.0.weight"].shape[0]
    momentum = after[OUTER_KEY]["state"][0]["momentum_buffer"]
    assert momentum.shape == (sum(value.numel() for value in after["state_dict"].values()),)
    assert float((momentum != 0).float().mean()) > 0.8


def test_shards_resume(ranks):
    """A sharded training resumes with its masks, to the bit."""
    whole, resumed = ranks[0]["sharded"], ranks[0]["sharded, resumed"]
    assert same(whole["masks"], resumed["masks"]) and same(whole["steps"][-1], resumed["steps"][-1])
    assert same(whole["state"]["masks"], resumed["state"]["masks"])
