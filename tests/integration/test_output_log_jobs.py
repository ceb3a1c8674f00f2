"""``train.log`` and the record of a run: what a job printed, and the error that ended it."""

from __future__ import annotations

import json

import pytest
from support.commands import run, the_error

pytestmark = pytest.mark.slow

QUICK = ["+experiment=cnn", "+debug=quick", "trainer.accelerator=cpu"]


def test_train_log(tmp_path):
    """The log has what the job printed, of one process and of several, and a run that goes on begins with it."""
    first = run("train", *QUICK, "hydra.run.dir=a", cwd=tmp_path, status=0)
    printed = (tmp_path / "a" / "train.log").read_text()
    assert printed == first.stdout and "epoch 1/1" in printed and "test/accuracy" in printed
    second = run(
        *("train", *QUICK, "hydra.run.dir=b", "ckpt_path=a/checkpoints/last.ckpt", "trainer.max_epochs=2"),
        *("strategy=ddp", "trainer.devices=2"),
        cwd=tmp_path,
        status=0,
    )
    log = (tmp_path / "b" / "train.log").read_text()
    assert log.startswith(printed) and log.count("epoch 2/2") == 1
    assert log.removeprefix(printed) == second.stdout


def test_an_error(tmp_path):
    """The log has the traceback of an error that the terminal shows in one line, and the record has its message."""
    job = ("+experiment=language_model", "data.path=missing.txt", "hydra.run.dir=a")
    error = the_error(run("train", *job, cwd=tmp_path))
    log = (tmp_path / "a" / "train.log").read_text()
    assert log.startswith("Traceback") and "missing.txt" in log.splitlines()[-1]
    record = json.loads((tmp_path / "a" / ".hydra" / "run.json").read_text())
    assert record["error"].partition(": ")[2] in error and not record["is_finished"]
    # The directory of a run that failed at once may be taken, and the record is then that of the new run.
    (tmp_path / "missing.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 300)
    run("train", *job, "+debug=quick", "data.context=16", cwd=tmp_path, status=0)
    record = json.loads((tmp_path / "a" / ".hydra" / "run.json").read_text())
    assert record["error"] is None and record["is_finished"]


def test_the_log_of_another_run(tmp_path):
    """A job that is rejected, because the directory is another run's, leaves that run's log and record alone."""
    run("train", *QUICK, "hydra.run.dir=a", cwd=tmp_path, status=0)
    before = (tmp_path / "a" / "train.log").read_bytes()
    the_error(run("train", *QUICK, "seed=1", "run_dir=a", "hydra.run.dir=b", cwd=tmp_path))
    assert (tmp_path / "a" / "train.log").read_bytes() == before
