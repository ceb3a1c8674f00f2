"""``compress.max_drop`` of a training: which search its entries ask for, what is rejected, and how a search ends."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
from omegaconf import OmegaConf

from lightkit.app import compression_after_training
from lightkit.app.compression import build_compression, find_request
from lightkit.app.compression_after_training import check_job, compress_trained
from lightkit.errors import ConfigError
from lightkit.models import CNN
from lightkit.tasks import ClassificationTask, RegressionTask

PRUNE = {"prune": {"_target_": "lightkit.compress.Prune", "keep_macs": 0.5}}
SPARSE = {"sparse": {"_target_": "lightkit.compress.Sparsify", "zeros": 0.8}}
DISTIL = {"distil": {"_target_": "lightkit.compress.Distil", "weight": 0.7, "teacher": None}}
QUANTIZE = {"quantize": {"_target_": "lightkit.compress.Quantize", "bits": 8}}


def job(**compress):
    return OmegaConf.create({"compress": compress, "trainer": {"accelerator": "cpu"}, "seed": 3, "run_dir": "runs/a"})


@pytest.mark.parametrize(
    ("entries", "widths", "bits", "zeros", "distil"),
    [
        ({}, True, "auto", None, 0.0),
        (DISTIL, True, "auto", None, 0.7),
        (PRUNE, True, None, None, 0.0),
        (QUANTIZE, False, "auto", None, 0.0),
        ({**PRUNE, **QUANTIZE}, True, "auto", None, 0.0),
        ({**PRUNE, **SPARSE}, True, None, 0.8, 0.0),
    ],
)
def test_what_is_searched(entries, widths, bits, zeros, distil):
    request = find_request(job(max_drop=0.01, **entries))
    assert request is not None
    assert (request.keep_macs is not None, request.bits, request.zeros, request.distil) == (widths, bits, zeros, distil)
    assert request.max_drop == 0.01 and request.seed == 3 and request.accelerator == "cpu"
    assert request.output == "runs/a/compressed"


def test_the_training_before_is_dense():
    """The entries say what the search may change, and the training has none of their callbacks."""
    assert build_compression(job(max_drop=0.01, **PRUNE)) == []
    assert [type(callback).__name__ for callback in build_compression(job(max_drop=None, **PRUNE))] == ["Prune"]
    assert find_request(job(max_drop=None, **PRUNE)) is None and find_request(job()) is None


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"max_drop": "little"}, "compress.max_drop must be a share of the validation set.*'little'"),
        ({"max_drop": True}, "compress.max_drop must be a share.*True"),
        ({"max_drop": 1.5}, "max_drop must be a share.*1.5"),
        ({"max_drop": 0.1, **SPARSE}, r"compress=\[prune,sparse\] alone"),
        ({"max_drop": 0.1, **PRUNE, **QUANTIZE, **SPARSE}, r"compress=\[prune,sparse\] alone"),
        ({"max_drop": 0.1, "mine": {"_target_": "lightkit.callbacks.LeanLoop"}}, "does not search with LeanLoop"),
        ({"max_drop": 0.1, "prune": {"keep_macs": 0.5}}, "compress.prune must be null or have a _target_.*0.5"),
        ({"max_drop": 0.1, "distil": {**DISTIL["distil"], "teacher": "a.ckpt"}}, "takes the trained model"),
    ],
)
def test_mistakes(entries, message):
    with pytest.raises(ConfigError, match=message):
        find_request(job(**entries))


class OwnRegression(RegressionTask):
    """A task of a user's, derived from lightkit's."""


@pytest.mark.parametrize(
    ("task", "targets"),
    [
        ("lightkit.tasks.ClassificationTask", "classes"),
        ("lightkit.tasks.RegressionTask", "values"),
        ("lightkit.tasks.ForecastTask", "values"),
        (f"{__name__}.OwnRegression", "values"),
    ],
)
def test_distil_learns_what_the_task_predicts(task, targets, monkeypatch):
    """``targets=auto`` follows the class of the task, also that of a user's class."""
    monkeypatch.setenv("LIGHTKIT_TARGETS", __name__)
    config = job(distil={**DISTIL["distil"], "targets": "auto"})
    config.task = {"_target_": task}
    (callback,) = build_compression(config)
    assert callback.targets == targets


class Data(pl.LightningDataModule):
    """The loaders that a search needs."""

    def val_dataloader(self):
        return []

    def test_dataloader(self):
        return []


class OnlyValidation(pl.LightningDataModule):
    def val_dataloader(self):
        return []


class OnlyTest(pl.LightningDataModule):
    def test_dataloader(self):
        return []


def trained(best="", **changes):
    """A job that can be searched, but for the changes."""
    parts = {
        "trainer": SimpleNamespace(world_size=1, checkpoint_callback=SimpleNamespace(best_model_path=best)),
        "task": ClassificationTask(CNN()),
        "data": Data(),
        "config": OmegaConf.create({"task": {"metrics": {"accuracy": {"_target_": "torchmetrics.Accuracy"}}}}),
    }
    return SimpleNamespace(**{**parts, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainer": SimpleNamespace(world_size=2)}, "the job has 2 processes"),
        ({"task": pl.LightningModule()}, "LightningModule is no task of lightkit.tasks"),
        ({"config": OmegaConf.create({"task": {"metrics": {"f1": {}}}})}, "the task has no metric accuracy"),
        ({"config": OmegaConf.create({"task": {}})}, "the task has no metric accuracy"),
        ({"data": OnlyTest()}, "OnlyTest has no val_dataloader"),
        ({"data": OnlyValidation()}, "OnlyValidation has no test_dataloader"),
        ({"trainer": SimpleNamespace(world_size=1, checkpoint_callback=None)}, "leave callbacks=default in"),
    ],
)
def test_jobs_that_cannot_be_searched(changes, message):
    """One line before the training, which would otherwise be lost time."""
    check_job(trained())
    with pytest.raises(ConfigError, match=f"compress.max_drop: .*{message}"):
        check_job(trained(**changes))


def test_a_search_that_fails_does_not_end_a_training(tmp_path, monkeypatch):
    """A missing checkpoint, any error of the search and a directory that stays are each a warning."""
    request = SimpleNamespace(output=str(tmp_path / "compressed"))
    best = tmp_path / "best.ckpt"

    def fail(error):
        def function(*_):
            raise error

        return function

    with pytest.warns(UserWarning, match="no smaller model: the training has saved no best checkpoint"):
        assert compress_trained(trained(str(best)), request) is None
    best.write_bytes(b"")
    for error, message in (
        (ConfigError("too small"), "no smaller model: too small"),
        (RuntimeError("out of memory"), "no smaller model: RuntimeError: out of memory"),
    ):
        monkeypatch.setattr(compression_after_training, "compress_checkpoint", fail(error))
        with pytest.warns(UserWarning, match=message):
            assert compress_trained(trained(str(best)), request) is None
    Path(request.output).mkdir()
    monkeypatch.setattr(shutil, "rmtree", fail(PermissionError("read-only")))
    with pytest.warns(UserWarning, match="no smaller model: PermissionError: read-only"):
        assert compress_trained(trained(str(best)), request) is None
