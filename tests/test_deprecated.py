"""Names of the previous release: each works, and its warning says the new name."""

from __future__ import annotations

import pytest

import lightkit.data
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
