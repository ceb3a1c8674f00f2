"""Names of the previous release: each works, and its warning says the new name."""

from __future__ import annotations

import pytest
import torch

import lightkit.checkpoints
import lightkit.data
import lightkit.parameter_server
from lightkit.callbacks import LeanLoop
from lightkit.checkpoints import load_checkpoint, to_cpu
from lightkit.flops import FlopCounter
from lightkit.loops.slicing import fetch_slices
from lightkit.parameter_server import Client, OptimizerSpec, TrainingSpec
from lightkit.strategies import DataParallel, DiLoCo, LocalSGD, ParameterServer, TorchTPU


@pytest.mark.parametrize("cls", [DataParallel, DiLoCo, LocalSGD, ParameterServer, TorchTPU])
def test_takes_lean_steps(cls):
    with pytest.warns(DeprecationWarning, match=r"takes_lean_steps is now \w+\.traits\.supports_lean_loop"):
        assert cls.takes_lean_steps is True


def test_evaluates_everything():
    with pytest.warns(DeprecationWarning, match=r"is now ParameterServer\.traits\.replicates_evaluation"):
        assert ParameterServer().evaluates_everything is True


def test_survives_lost_workers():
    with pytest.warns(DeprecationWarning, match=r"is now ParameterServer\.traits\.tolerates_worker_loss"):
        assert ParameterServer.survives_lost_workers is True


@pytest.mark.parametrize(("old", "new"), [("Job", TrainingSpec), ("Table", OptimizerSpec)])
def test_classes_of_the_parameter_server(old, new):
    with pytest.warns(DeprecationWarning, match=rf"parameter_server\.{old} is now .*\.{new.__name__}"):
        assert getattr(lightkit.parameter_server, old) is new


def specification() -> OptimizerSpec:
    parameter = torch.nn.Parameter(torch.zeros(3))
    return OptimizerSpec.from_optimizer(torch.optim.SGD([parameter], lr=0.1), {parameter: "weight"})


def test_optimizer_spec():
    spec = specification()
    parameter = torch.nn.Parameter(torch.zeros(3))
    with pytest.warns(DeprecationWarning, match=r"OptimizerSpec\.of is now OptimizerSpec\.from_optimizer"):
        assert OptimizerSpec.of(torch.optim.SGD([parameter], lr=0.1), {parameter: "weight"}) == spec
    with pytest.warns(DeprecationWarning, match=r"OptimizerSpec\.numbers is now OptimizerSpec\.hyperparameters"):
        assert spec.numbers is spec.hyperparameters
    with pytest.warns(DeprecationWarning, match="OptimizerSpec: numbers is now hyperparameters"):
        assert OptimizerSpec(spec.optimizer, spec.parameters, numbers=spec.hyperparameters) == spec


def test_training_spec():
    with pytest.warns(DeprecationWarning, match="TrainingSpec: tables is now optimizers"):
        spec = TrainingSpec(tables=[specification()], mode="async")
    assert spec == TrainingSpec([specification()], mode="async")
    with pytest.warns(DeprecationWarning, match=r"TrainingSpec\.tables is now TrainingSpec\.optimizers"):
        assert spec.tables is spec.optimizers
    with pytest.warns(DeprecationWarning, match=r"TrainingSpec\.parts is now TrainingSpec\.shards"):
        assert spec.parts(2) == spec.shards(2)
    with pytest.warns(DeprecationWarning, match=r"most_bytes is now TrainingSpec\.max_message_bytes"):
        assert spec.most_bytes == spec.max_message_bytes


def test_client():
    with pytest.warns(DeprecationWarning, match="Client: job is now spec"):
        client = Client(["127.0.0.1:1"], "secret", 0, job=TrainingSpec([specification()]))
    with pytest.warns(DeprecationWarning, match=r"Client\.parameters: table is now optimizer_index"):
        assert torch.equal(client.parameters(table=0)[0], torch.zeros(3))
    with pytest.warns(DeprecationWarning, match=r"Client\.push: table is now optimizer_index"):
        with pytest.raises(IndexError):
            client.push(table=7, gradients=[], groups=[])
    client.abandon()
    with pytest.warns(DeprecationWarning, match=r"Client\.pull: table is now optimizer_index"):
        with pytest.raises(RuntimeError, match="after shutdown"):
            client.pull(table=0)


def test_fetch_slices():
    with pytest.warns(DeprecationWarning, match=r"lightkit\.data\.fetch_slices is now lightkit\.loops\.slicing"):
        assert lightkit.data.fetch_slices is fetch_slices


def test_on_cpu():
    with pytest.warns(DeprecationWarning, match=r"lightkit\.checkpoints\.on_cpu is now lightkit\.checkpoints\.to_cpu"):
        assert lightkit.checkpoints.on_cpu is to_cpu


@pytest.mark.parametrize("untrusted", [True, False])
def test_is_strangers_of_load_checkpoint(tmp_path, untrusted):
    """The old parameter has the effect of the new one: a global that is no plain data is rejected."""
    torch.save({"state_dict": {}, "buffer": bytearray(1)}, tmp_path / "x.ckpt")
    with pytest.warns(DeprecationWarning, match="is_strangers is now untrusted"):
        if untrusted:
            with pytest.raises(lightkit.errors.CheckpointError, match="bytearray"):
                load_checkpoint(tmp_path / "x.ckpt", is_strangers=True)
        else:
            load_checkpoint(tmp_path / "x.ckpt", is_strangers=False)


def test_obstacles_of_lean_loop():
    callback = LeanLoop()
    callback.unsupported_reason = "no GPU"
    with pytest.warns(DeprecationWarning, match=r"LeanLoop\.obstacle is now LeanLoop\.unsupported_reason"):
        assert callback.obstacle == "no GPU"
    with pytest.warns(DeprecationWarning, match=r"LeanLoop\.graph_obstacle is now LeanLoop\.graph_unsupported"):
        assert callback.graph_obstacle is None


def test_obstacle_of_flop_counter():
    with pytest.warns(DeprecationWarning, match=r"FlopCounter\.obstacle is now FlopCounter\.unsupported_reason"):
        assert FlopCounter().obstacle is None
