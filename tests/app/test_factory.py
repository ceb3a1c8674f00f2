"""The objects of a job: entries of a group that the command line removes."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_module

from lightkit.app.checks import check
from lightkit.app.factory import build
from lightkit.callbacks import Progress, Throughput
from lightkit.errors import ConfigError
from lightkit.loggers import CSVLogger


def job(tmp_path, *words):
    with initialize_config_module("lightkit.conf", version_base="1.3"):
        config = compose("train", ["+experiment=cnn", "trainer=cpu", f"run_dir={tmp_path}", *words])
    check(config)
    return build(config)


def kinds(objects):
    return {type(entry) for entry in objects}


def test_null_removes_an_entry(tmp_path):
    """``GROUP.ENTRY=null`` removes a callback, a logger or a metric, and leaves the others."""
    assert {Progress, Throughput} <= kinds(job(tmp_path).trainer.callbacks)
    built = job(tmp_path, "callbacks.progress=null", "logger.tensorboard=null", "task.metrics.accuracy=null")
    assert Throughput in kinds(built.trainer.callbacks) and Progress not in kinds(built.trainer.callbacks)
    assert kinds(built.trainer.loggers) == {CSVLogger}
    assert len(built.task.val_metrics) == 0
    built = job(tmp_path, "callbacks.progress._target_=null", "logger.tensorboard=null", "logger.csv=null")
    assert Progress not in kinds(built.trainer.callbacks) and built.trainer.loggers == []


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (
            "callbacks.progress=false",
            "callbacks.progress must be null or have a _target_ that is a Callback, got False",
        ),
        ("+callbacks.stop.monitor=val/loss", "callbacks.stop must be null or have a _target_"),
        ("logger.tensorboard=no", "logger.tensorboard must be null or have a _target_ that is a Logger, got 'no'"),
        ("+logger.x._target_=lightkit.callbacks.Progress", "logger.x must be .* a Logger"),
    ],
)
def test_entries_that_are_none(tmp_path, word, expected):
    """The error for an entry that Lightning could not call names the entry."""
    with pytest.raises(ConfigError, match=expected):
        job(tmp_path, word)
