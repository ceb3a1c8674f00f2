"""``kfold``: a training for each fold, each in its directory, resumable, in sweeps and in several processes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from support import commands

import lightkit.app.training
from lightkit._util import directory_lock
from lightkit.callbacks import Checkpoint
from lightkit.checkpoints import load_checkpoint
from lightkit.train import main

pytestmark = pytest.mark.slow

JOB = [
    *("+experiment=cnn", "logger=csv", "data.batch_size=100", "trainer.max_epochs=1", "trainer.limit_train_batches=3"),
    *(
        "trainer.limit_val_batches=1",
        "trainer.limit_test_batches=1",
        "trainer.accelerator=cpu",
        "~callbacks.throughput",
    ),
]


class Killed(BaseException):
    """Ends a job like a kill; no handler of the program catches it."""


@pytest.fixture
def train(tmp_path, monkeypatch, capsys):
    """Returns a function that runs `lightkit.train` in ``tmp_path`` and returns status, standard output and error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    # The figures of each fold take longer than these jobs.
    monkeypatch.setattr(lightkit.app.training.report, "write", lambda *arguments: None)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["train", *JOB, *arguments])
        capsys.readouterr()
        return main(), *capsys.readouterr()

    return run


def die_at_fold(monkeypatch, train, number, *arguments):
    """Runs a job that is killed when the fold ``number`` saves its first checkpoint."""
    saved = []
    save = Checkpoint._save_last_checkpoint

    def dying(*args, **options):
        saved.append(1)
        if len(saved) == number + 1:
            raise Killed
        return save(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Checkpoint, "_save_last_checkpoint", dying)
        train(*arguments)
    # The end of a process would release the locks.
    for held in list(directory_lock._held):
        directory_lock.release(held)


def folds(directory):
    return json.loads((Path(directory) / "folds.json").read_text())


@pytest.mark.parametrize("key", ["kfold=3", "+kfold=3"])
def test_each_fold_has_a_directory(train, key):
    """Both ways of typing the key train three models, and write the means, the deviations and links."""
    status, out, err = train(key, "hydra.run.dir=runs/cnn/a")
    assert status == 0, err
    found = folds("runs/cnn/a")
    each = [json.loads(Path(f"runs/cnn/a/fold_{n}/metrics.json").read_text()) for n in range(3)]
    losses = torch.tensor([fold["val/loss"] for fold in each], dtype=torch.float64)
    assert found["mean"]["val/loss"] == pytest.approx(losses.mean().item())
    assert found["standard_deviation"]["val/loss"] == pytest.approx(losses.std().item())
    assert [fold["metrics"]["test/loss"] for fold in found["folds"]] == [fold["test/loss"] for fold in each]
    assert json.loads(Path("runs/cnn/a/metrics.json").read_text())["val/loss"] == found["mean"]["val/loss"]
    assert len(set(losses.tolist())) == 3 and "mean ± standard deviation of 3 folds" in out
    page = Path("runs/cnn/a/report.html").read_text()
    assert "standard deviation" in page and "fold_2" in page


def test_a_fold_alone_is_the_fold_of_all(train):
    """``fold=1`` trains the bits of the second fold, so that machines may share the folds."""
    assert train("kfold=2", "hydra.run.dir=all")[0] == 0
    assert train("kfold=2", "fold=1", "hydra.run.dir=alone")[0] == 0
    ours, theirs = (load_checkpoint(Path(d) / "checkpoints/last.ckpt")["state_dict"] for d in ("alone", "all/fold_1"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not Path("alone/fold_1").exists()


@pytest.mark.parametrize("resume", ["ckpt_path=last", "ckpt_path=runs/cnn/a"])
def test_a_killed_run_goes_on(train, monkeypatch, resume):
    """``ckpt_path=last`` and the directory skip finished folds, and train the rest in the same directory."""
    die_at_fold(monkeypatch, train, 1, "+kfold=3", "hydra.run.dir=runs/cnn/a")
    before = Path("runs/cnn/a/fold_0/metrics.json").read_bytes()
    assert not Path("runs/cnn/a/folds.json").exists()
    status, out, err = train("kfold=3", resume)
    assert status == 0, err
    assert "continuing the folds in runs/cnn/a" in out and out.count("done before the restart") == 1
    assert Path("runs/cnn/a/fold_0/metrics.json").read_bytes() == before
    assert [path.name for path in Path("runs/cnn").iterdir()] == ["a"]
    assert train("kfold=3", "hydra.run.dir=whole")[0] == 0
    assert folds("whole")["mean"]["test/loss"] == folds("runs/cnn/a")["mean"]["test/loss"]
    status, _, err = train("kfold=3", "ckpt_path=last")
    assert status == 1 and "runs/cnn/a, with the same overrides, is finished" in err


def test_other_runs_are_left_alone(train, monkeypatch):
    """Neither a run without folds nor other overrides go on with the folds, and a hint names unfinished ones."""
    die_at_fold(monkeypatch, train, 1, "kfold=2", "hydra.run.dir=runs/cnn/a")
    status, _, err = train("ckpt_path=last", "trainer.max_epochs=2")
    assert status == 1 and "kfold=2 there and null here" in err
    status, _, err = train("kfold=2", "optim.lr=0.5", "ckpt_path=last")
    assert status == 1 and "same overrides; runs/cnn/a has nothing there and optim.lr=0.5 here" in err
    status, out, _ = train("kfold=2", "hydra.run.dir=runs/cnn/b")
    assert status == 0 and "runs/cnn/a is unfinished: ckpt_path=last goes on with it" in out
    status, _, err = train("kfold=2", "optim.lr=0.1", "hydra.run.dir=runs/cnn/a")
    assert status == 1 and "holds another run already" in err


def test_sweep(train, monkeypatch):
    """A job of a sweep trains all folds, its objective is their mean, and a killed sweep goes on within a job."""
    die_at_fold(monkeypatch, train, 3, "kfold=2", "hydra.sweep.dir=runs/cnn/s", "-m", "optim.lr=0.01,0.001")
    record = json.loads(Path("runs/cnn/s/0/.hydra/run.json").read_text())
    assert record["is_finished"] and record["result"] == pytest.approx(folds("runs/cnn/s/0")["mean"]["val/loss"])
    status, out, err = train("kfold=2", "ckpt_path=last", "-m", "optim.lr=0.01,0.001")
    assert status == 0, err
    # The whole first job, and the first fold of the second.
    assert out.count("done before the restart") == 2
    assert folds("runs/cnn/s/1")["mean"]["val/loss"] != record["result"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kfold=1"], "kfold must be at least 2, or null for one training, got 1"),
        (["kfold=2", "fold=2"], "fold must be from 0 to 1, or null for all folds, got 2"),
        (["fold=0"], "fold=0 is one of several folds: kfold=COUNT must give their number"),
        (["kfold=two"], "kfold must be int or null, got 'two'"),
        (["kfold=9000"], "9000 folds need at least 9000 samples outside the test set, got 4000"),
        (["kfold=2", "ckpt_path=last"], "there is no run with kfold=2 below"),
        (["kfold=2", "ckpt_path=a.ckpt"], "ckpt_path must be null, last, or the directory of an unfinished run"),
        (["kfold=2", "data={_target_: lightning.pytorch.LightningDataModule}"], "LightningDataModule serves no folds"),
    ],
)
def test_one_line_says_what_is_wrong(train, arguments, message):
    """Wrong values end before a training, with one line."""
    status, _, err = train(*arguments)
    assert status == 1 and err.splitlines()[-1].startswith("error: ") and message in err.splitlines()[-1]


@pytest.mark.parametrize("strategy", ["ddp", "parameter_server"])
def test_several_processes(tmp_path, strategy):
    """Each fold starts its processes anew, as each job of a sweep does."""
    commands.run("train", *JOB, "kfold=2", f"strategy={strategy}", "trainer.devices=2", cwd=tmp_path, status=0)
    (run,) = (tmp_path / "runs" / "cnn").iterdir()
    assert len(folds(run)["folds"]) == 2


@pytest.mark.parametrize("job", [["+experiment=forecast", "data=sunspots"], ["+experiment=rnn"]])
def test_other_data(tmp_path, job):
    """Series and rows of images have folds, too."""
    short = ["trainer.max_epochs=1", "trainer.limit_train_batches=2", "trainer.accelerator=cpu", "logger=csv"]
    commands.run("train", *job, *short, "kfold=3", "hydra.run.dir=out", cwd=tmp_path, status=0)
    assert len(folds(tmp_path / "out")["folds"]) == 3
