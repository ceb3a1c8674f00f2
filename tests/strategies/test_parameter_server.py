"""The strategy in two processes, beside Lightning's data parallel training of the same module."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, LearningRateFinder, StochasticWeightAveraging
from lightning.pytorch.strategies import StrategyRegistry
from support.commands import python_path, run_python
from support.processes import servers_of
from support.trainers import bare_trainer
from support.two_processes import Module, dealt

from lightkit.errors import ConfigError
from lightkit.optim import SGD
from lightkit.strategies import ParameterServer

SCRIPT = Path(__file__).with_name("parameter_server_scenarios.py")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("parameter_server")


@pytest.fixture(scope="module")
def ranks(directory):
    """Returns the outcome of each scenario on each of the two ranks."""
    trainer = bare_trainer(devices=1)
    trainer.fit(Module(), dealt())
    trainer.save_checkpoint(directory / "one.ckpt")
    run_python(SCRIPT, directory, cwd=directory, environment=python_path(), status=0)
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
    """All processes reach the weights of data parallel training, to rounding, with clipping and schedulers too."""
    ours, theirs = ranks[0][name], ranks[0][stock]
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=0, atol=2e-6)
    assert torch.equal(weights(ours), weights(ranks[1][name]))
    assert not torch.equal(weights(ranks[0]["clipped"]), weights(ranks[0]["sync"]))


@pytest.mark.slow
def test_state_of_the_optimizer(ranks):
    """After the training the optimizer has the servers' state, averages included."""
    ours, theirs = ranks[0]["sync"]["optimizer"], ranks[0]["stock"]["optimizer"]
    assert ours["param_groups"] == theirs["param_groups"] and ours["state"].keys() == theirs["state"].keys()
    for index, entry in ours["state"].items():
        torch.testing.assert_close(entry["momentum_buffer"], theirs["state"][index]["momentum_buffer"])
    assert all({"momentum_buffer", "average"} <= e.keys() for e in ranks[0]["fused"]["optimizer"]["state"].values())


@pytest.mark.slow
def test_traffic(ranks):
    """Each step sends the gradients once, and receives the parameters once."""
    count = sum(p.numel() for p in Module().parameters())
    sent = ranks[1]["sync"]["communication"]
    assert 4 * count < sent["communication/bytes_per_step"] < 4 * count + 200
    # The workers also receive the parameters at the beginning.
    steps = len(ranks[1]["sync"]["steps"])
    assert sent["communication/received_megabytes"] == pytest.approx(4e-6 * count * (steps + 1))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["async", "bounded", "manual, async", "accumulated", "loader", "saved last"])
def test_workers_end_with_the_same(ranks, name):
    """All workers end with the parameters of the servers."""
    one, two = (weights(rank[name]) for rank in ranks)
    assert torch.equal(one, two) and torch.isfinite(one).all()
    assert name == "manual, async" or not torch.equal(one, weights(ranks[0]["sync"]))


@pytest.mark.slow
def test_after_a_training_that_failed(ranks):
    """After a failed training the same Trainer trains to the usual result."""
    for rank in ranks:
        assert torch.equal(weights(rank["again"]), weights(ranks[0]["sync"]))


@pytest.mark.slow
def test_validation_is_of_all_data(ranks):
    """Every worker validates on all samples: in sync all workers get the same loss."""
    assert ranks[0]["two servers"]["metrics"]["loss"] == ranks[1]["two servers"]["metrics"]["loss"]


@pytest.mark.slow
def test_resumes_exactly(ranks):
    """A run from a checkpoint within an epoch repeats the same steps, bit for bit."""
    for rank in ranks:
        assert torch.equal(weights(rank["resumed"]), weights(rank["whole"]))
        resumed = rank["resumed"]["steps"]
        assert all(map(torch.equal, resumed, rank["whole"]["steps"][-len(resumed) :]))


@pytest.mark.slow
def test_checkpoints_are_ordinary(ranks, directory):
    """One device continues from a checkpoint of the strategy, and the strategy from one of one device."""
    checkpoint = torch.load(directory / "whole" / "step=8.ckpt", weights_only=True)
    (state,) = checkpoint["optimizer_states"]
    assert all("momentum_buffer" in entry for entry in state["state"].values())
    module = Module()
    bare_trainer(devices=1, max_epochs=3).fit(module, dealt(), ckpt_path=directory / "whole" / "step=8.ckpt")
    assert torch.isfinite(weights(ranks[0]["from one device"])).all()


@pytest.mark.slow
def test_lbfgs_is_refused(ranks):
    """The strategy rejects LBFGS, which evaluates the model several times in a step."""
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
    """The constructor raises the error."""
    with pytest.raises(ConfigError, match=expected):
        ParameterServer(**arguments)


@pytest.mark.parametrize(
    ("name", "mode"),
    [("parameter_server", "sync"), ("parameter_server_async", "async"), ("parameter_server_bounded", "bounded")],
)
def test_registered(name, mode):
    """Each mode has a name for the Trainer."""
    assert StrategyRegistry[name]["init_params"].get("mode", "sync") == mode


def test_addresses_need_a_secret(monkeypatch):
    """Without a secret the strategy connects to no server."""
    monkeypatch.delenv("LIGHTKIT_SECRET", raising=False)
    strategy = ParameterServer(addresses=["127.0.0.1:29600"], worker=0, workers=1)
    with pytest.raises(ConfigError, match="LIGHTKIT_SECRET"):
        bare_trainer(devices=1, strategy=strategy).fit(Module(), dealt())


def alone(strategy=None, module=None, callbacks=(), **options):
    """Trains with one worker; returns the module."""
    module = module or Module()
    trainer = bare_trainer(*callbacks, devices=1, strategy=strategy or ParameterServer(), **options)
    trainer.fit(module, dealt(), dealt())
    return module


class Does(Callback):
    """A callback with the given hooks."""

    def __init__(self, **hooks):
        for name, action in hooks.items():
            setattr(self, name, lambda trainer, module, *_, action=action: action(module))


def clamp(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.clamp_(-0.05, 0.05)


def thaw(module):
    module.optimizers().add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))]})


@pytest.mark.parametrize(
    ("hooks", "expected"),
    [
        ({"on_train_batch_end": clamp}, "somebody wrote to the parameters"),
        ({"on_train_batch_end": thaw}, "has got other parameters since the training began"),
    ],
)
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_changes_that_the_servers_do_not_know(mode, hooks, expected):
    """A change of the parameters between two steps is an error, and not silently lost."""
    with pytest.raises(ConfigError, match=expected):
        alone(ParameterServer(mode), callbacks=[Does(**hooks)])


def test_swapped_and_back():
    """Weights that are swapped for a validation and swapped back, as averages are, change nothing."""
    kept = {}

    def swap(module):
        kept.update({name: p.detach().clone() for name, p in module.named_parameters()})
        clamp(module)

    def back(module):
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(kept[name])

    swapping = Does(on_validation_start=swap, on_validation_end=back)
    options = {"val_check_interval": 3, "num_sanity_val_steps": 0}
    one, two = alone(callbacks=[swapping], **options), alone(**options)
    assert all(map(torch.equal, one.parameters(), two.parameters()))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"callbacks": [EMAWeightAveraging()]}, "EMAWeightAveraging writes to weights that are the servers'"),
        ({"callbacks": [StochasticWeightAveraging(0.1)]}, "StochasticWeightAveraging writes to weights"),
        ({"sync_batchnorm": True, "module": Module(norm=True)}, "sync_batchnorm makes the workers wait"),
    ],
)
def test_what_cannot_work_with_it(options, expected):
    """The error comes before the first step."""
    with pytest.raises(ConfigError, match=expected):
        alone(**options)


def test_nothing_is_left_behind(tmp_path):
    """A failed training and a search for the learning rate leave neither files nor servers."""

    def fail(module):
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        alone(callbacks=[Does(on_train_batch_end=fail)], default_root_dir=tmp_path)
    assert not list(tmp_path.iterdir()) and not servers_of(os.getpid())
    alone(
        module=WithRate(),
        callbacks=[LearningRateFinder(num_training_steps=5)],
        default_root_dir=tmp_path,
        enable_checkpointing=True,
    )
    assert not list(tmp_path.glob("parameter_servers*")) and not servers_of(os.getpid())


class WithRate(Module):
    """A module with an attribute ``lr``, which Lightning can search for, and lightkit's optimizer."""

    lr = 0.1

    def configure_optimizers(self):
        return SGD(self.parameters(), lr=self.lr, skip_nonfinite=True)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_skipped_steps_are_counted(mode):
    """The optimizer counts skipped steps, as it does without servers."""

    class Infinite(WithRate):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (float("inf") if batch_idx in (2, 5) else 1.0)

    module = alone(ParameterServer(mode), Infinite())
    assert module.optimizers(use_pl_optimizer=False).skipped_steps == 2
    assert all(torch.isfinite(p).all() for p in module.parameters())


@pytest.mark.parametrize("secret", [None, "of the user"])
def test_a_chosen_secret_is_not_broadcast(monkeypatch, secret):
    """Worker 0 does not broadcast a chosen secret: anyone can read the store."""
    told = []
    broadcast = ParameterServer.broadcast
    monkeypatch.setattr(ParameterServer, "broadcast", lambda self, x, src=0: told.append(x) or broadcast(self, x, src))
    if secret is None:
        monkeypatch.delenv("LIGHTKIT_SECRET", raising=False)
    else:
        monkeypatch.setenv("LIGHTKIT_SECRET", secret)
    alone()
    assert "of the user" not in str(told) and ("127.0.0.1" in str(told))


def test_several_machines_need_a_secret(monkeypatch):
    """A random secret would have to cross the network."""
    monkeypatch.delenv("LIGHTKIT_SECRET", raising=False)
    strategy = ParameterServer()
    strategy.num_nodes = 2
    with pytest.raises(ConfigError, match="needs a secret in the environment of all"):
        strategy._find_servers()


def test_mixed_precision_with_a_scaler_is_refused():
    """The strategy rejects 16-mixed: each worker would scale its gradients by a factor of its own."""
    strategy = ParameterServer()
    strategy._precision_plugin = type("Scaled", (), {"scaler": object()})()
    strategy._lightning_module = Module()
    strategy._lightning_module.trainer = bare_trainer(devices=1)
    strategy.model = strategy._lightning_module
    with pytest.raises(ConfigError, match="16-mixed"):
        strategy.setup_optimizers(strategy._lightning_module.trainer)
