"""Names of the previous release: each works, and its warning says the new name."""

from __future__ import annotations

import pytest
import torch

import lightkit.checkpoints
import lightkit.data
from lightkit.callbacks import LeanLoop
from lightkit.checkpoints import load_checkpoint, to_cpu
from lightkit.flops import FlopCounter
from lightkit.loops.slicing import fetch_slices
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
