"""The strategy in two real processes, next to Lightning's data parallel training of the same module."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import StrategyRegistry

from lightkit.errors import ConfigError
from lightkit.strategies import ParameterServer

sys.path.insert(0, str(Path(__file__).parent))
import scenarios
from scenarios import Module, dealt

SCRIPT = Path(scenarios.__file__).with_name("parameter_server_scenarios.py")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("parameter_server")


def one_device(**options):
    nothing = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return pl.Trainer(accelerator="cpu", devices=1, **{"max_epochs": 1, **nothing, **options})


@pytest.fixture(scope="module")
def ranks(directory):
    """What each of the two ranks has of each scenario."""
    trainer = one_device()
    trainer.fit(Module(), dealt())
    trainer.save_checkpoint(directory / "one.ckpt")
    result = subprocess.run(
        [sys.executable, str(SCRIPT), str(directory)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ,
        cwd=directory,
    )
    assert result.returncode == 0, result.stderr
    return [torch.load(directory / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]


def weights(outcome):
    assert "error" not in outcome, outcome["error"]
    return torch.cat([value.flatten() for value in outcome["state"].values()])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stock"),
    [
        ("sync", "stock"),
        ("two servers", "stock"),
        ("clipped", "stock, clipped"),
        ("fused", "stock, clipped"),
        ("scheduled", "stock, scheduled"),
        ("manual", "stock, manual"),
    ],
)
def test_sync_is_data_parallel_training(ranks, name, stock):
    """The same weights to rounding, in every process: with clipping, schedulers and manual optimization too."""
    ours, theirs = ranks[0][name], ranks[0][stock]
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=0, atol=2e-6)
    assert torch.equal(weights(ours), weights(ranks[1][name]))
    assert not torch.equal(weights(ranks[0]["clipped"]), weights(ranks[0]["sync"]))


@pytest.mark.slow
def test_state_of_the_optimizer(ranks):
    """After the training the optimizer has what the servers had, averages among it."""
    ours, theirs = ranks[0]["sync"]["optimizer"], ranks[0]["stock"]["optimizer"]
    assert ours["param_groups"] == theirs["param_groups"] and ours["state"].keys() == theirs["state"].keys()
    for index, entry in ours["state"].items():
        torch.testing.assert_close(entry["momentum_buffer"], theirs["state"][index]["momentum_buffer"])
    assert all({"momentum_buffer", "average"} <= e.keys() for e in ranks[0]["fused"]["optimizer"]["state"].values())


@pytest.mark.slow
def test_traffic(ranks):
    """Each step sends the gradients and receives the parameters, once."""
    count = sum(p.numel() for p in Module().parameters())
    sent = ranks[1]["sync"]["communication"]
    assert 4 * count < sent["communication/bytes_per_step"] < 4 * count + 200
    # And once more at the beginning.
    steps = len(ranks[1]["sync"]["steps"])
    assert sent["communication/received_megabytes"] == pytest.approx(4e-6 * count * (steps + 1))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["async", "bounded", "manual, async", "accumulated", "loader"])
def test_workers_end_with_the_same(ranks, name):
    """Whatever they did meanwhile, all workers end with what the servers have."""
    one, two = (weights(rank[name]) for rank in ranks)
    assert torch.equal(one, two) and torch.isfinite(one).all()
    assert name == "manual, async" or not torch.equal(one, weights(ranks[0]["sync"]))


@pytest.mark.slow
def test_validation_is_of_all_data(ranks):
    """Every worker measures on all samples: in sync all measure the same."""
    assert ranks[0]["two servers"]["metrics"]["loss"] == ranks[1]["two servers"]["metrics"]["loss"]


@pytest.mark.slow
def test_resumes_exactly(ranks):
    """From a checkpoint in the middle of an epoch: the same steps again, bit for bit, momentum included."""
    for rank in ranks:
        assert torch.equal(weights(rank["resumed"]), weights(rank["whole"]))
        resumed = rank["resumed"]["steps"]
        assert all(map(torch.equal, resumed, rank["whole"]["steps"][-len(resumed) :]))


@pytest.mark.slow
def test_checkpoints_are_ordinary(ranks, directory):
    """One device goes on from it, with the momentum; and a checkpoint of one device goes on here."""
    checkpoint = torch.load(directory / "whole" / "step=8.ckpt", weights_only=True)
    (state,) = checkpoint["optimizer_states"]
    assert all("momentum_buffer" in entry for entry in state["state"].values())
    module = Module()
    one_device(max_epochs=3).fit(module, dealt(), ckpt_path=directory / "whole" / "step=8.ckpt")
    assert torch.isfinite(weights(ranks[0]["from one device"])).all()


@pytest.mark.slow
def test_lbfgs_is_refused(ranks):
    """It evaluates the model several times in a step."""
    assert "LBFGS evaluates the model several times" in ranks[0]["lbfgs"]["error"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"mode": "asnyc"}, "mode must be one of sync, async, bounded, got 'asnyc'; did you mean async"),
        ({"compression": "fp8"}, "compression must be one of none, bf16, topk"),
        ({"mode": "bounded", "staleness": -1}, "staleness must be a whole number, at least 0"),
        ({"fraction": 0.0}, "fraction must be above 0"),
        ({"servers": 0}, "servers must be a whole number, at least 1"),
        ({"snapshot_every": True}, "snapshot_every must be a whole number"),
        ({"overlap": True}, "overlap=True: in mode sync"),
        ({"timeout": 0.0}, "timeout must be a number of seconds above 0"),
        ({"worker": 1}, "worker, workers and addresses belong together"),
        ({"worker": 2, "workers": 2, "addresses": ["h:1"]}, "worker must be from 0 to workers - 1"),
    ],
)
def test_bad_arguments(arguments, expected):
    """Said when the strategy is made."""
    with pytest.raises(ConfigError, match=expected):
        ParameterServer(**arguments)


@pytest.mark.parametrize(
    ("name", "mode"),
    [("parameter_server", "sync"), ("parameter_server_async", "async"), ("parameter_server_bounded", "bounded")],
)
def test_registered(name, mode):
    """By name for anybody's Trainer."""
    assert StrategyRegistry[name]["init_params"].get("mode", "sync") == mode


def test_addresses_need_a_secret(monkeypatch):
    """Without it nothing is connected to."""
    monkeypatch.delenv("LIGHTKIT_SECRET", raising=False)
    strategy = ParameterServer(addresses=["127.0.0.1:29600"], worker=0, workers=1)
    with pytest.raises(ConfigError, match="LIGHTKIT_SECRET"):
        one_device(strategy=strategy).fit(Module(), dealt())


def test_mixed_precision_with_a_scaler_is_refused():
    """Each worker would scale its gradients by a factor of its own."""
    strategy = ParameterServer()
    strategy._precision_plugin = type("Scaled", (), {"scaler": object()})()
    strategy._lightning_module = Module()
    strategy._lightning_module.trainer = one_device()
    strategy.model = strategy._lightning_module
    with pytest.raises(ConfigError, match="16-mixed"):
        strategy.setup_optimizers(strategy._lightning_module.trainer)
