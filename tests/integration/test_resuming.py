"""Resumption of interrupted jobs: the right run, the right checkpoint, and complete logs.

The tests run `lightkit.train` in this process. For a kill an exception ends the job; the files are then those that a
kill at the same point would leave.
"""

from __future__ import annotations

import csv
import json
import os
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml
from hydra._internal.hydra import Hydra
from support.series import write_wave

import lightkit.app.cli
import lightkit.app.training
from lightkit._util import directory_lock
from lightkit.callbacks import Checkpoint
from lightkit.checkpoints import load_checkpoint
from lightkit.train import main

pytestmark = pytest.mark.slow

JOB = [
    *("+experiment=cnn", "logger=csv", "data.batch_size=100", "trainer.max_epochs=2", "trainer.limit_train_batches=3"),
    *("trainer.limit_val_batches=1", "trainer.limit_test_batches=1", "trainer.log_every_n_steps=1"),
    *("trainer.accelerator=cpu", "~callbacks.throughput"),
]
CLOCK = ("per_second", "matmul_rate", "wall_seconds", "(ms)")


class Killed(BaseException):
    """Ends a job like a kill; no handler of the program catches it."""


@pytest.fixture
def train(tmp_path, monkeypatch, capsys):
    """Returns a function that runs `lightkit.train` in ``tmp_path`` and returns status, standard output and error."""
    monkeypatch.chdir(tmp_path)
    # The command sets the variable for its process.
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    # Drawing the figures, and composing a configuration for its keys or for `hydra.mode`, take longer than these jobs.
    monkeypatch.setattr(lightkit.app.training.report, "write", lambda *arguments: None)
    monkeypatch.setattr(Hydra, "get_mode", lambda *arguments, **options: None)
    monkeypatch.setattr(lightkit.app.cli, "check_top_level", lambda *arguments: None)

    def run(*arguments, directory=None, killed=False, job=JOB):
        places = [] if directory is None else [f"hydra.run.dir={directory}"]
        monkeypatch.setattr(sys, "argv", ["train", *job, *places, *arguments])
        capsys.readouterr()
        if killed:
            with pytest.raises(Killed):
                main()
            # The end of a process would release the locks.
            for held in list(directory_lock._held):
                directory_lock.release(held)
            return None
        return main(), *capsys.readouterr()

    return run


@pytest.fixture
def kill(monkeypatch):
    """Returns a function that makes the nth call of ``owner.name`` end the job."""

    def at(owner, name, call=1, after=False):
        calls, function = [], getattr(owner, name)

        def killer(*arguments, **options):
            calls.append(name)
            if len(calls) == call and not after:
                raise Killed
            result = function(*arguments, **options)
            if len(calls) == call:
                raise Killed
            return result

        patch = pytest.MonkeyPatch()
        patch.setattr(owner, name, killer)
        patches.append(patch)

    patches: list[pytest.MonkeyPatch] = []
    at.over = lambda: [patch.undo() for patch in patches]
    yield at
    at.over()


def rows(directory):
    with open(Path(directory) / "metrics.csv", newline="") as file:
        found = [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]
    return [{name: value for name, value in row.items() if not any(c in name for c in CLOCK)} for row in found]


def steps(directory):
    return [int(row["step"]) for row in rows(directory) if "train/loss_step" in row]


def figures(directory):
    content = json.loads((Path(directory) / "metrics.json").read_text())
    return {name: value for name, value in content.items() if not any(part in name for part in CLOCK)}


def weights(directory, name="last"):
    return load_checkpoint(Path(directory) / "checkpoints" / f"{name}.ckpt")["state_dict"]


def assert_same(one, other):
    """Asserts that both directories have the same checkpoints, rows and metrics."""
    for name in ("last", "best"):
        ours, theirs = weights(one, name), weights(other, name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert rows(one) == rows(other)
    assert figures(one) == figures(other)


QUIET = [
    *("logger=csv", "test=false", "~callbacks.throughput", "trainer.accelerator=cpu", "trainer.max_epochs=2"),
    # The limit of steps stands for a kill, and must not shorten the schedule.
    "scheduler.T_max=2",
]
LANGUAGE_MODEL = [
    *("+experiment=language_model", "data.path=text.txt", "data.test_share=0.2", "data.validation_share=0.2"),
    *(
        "model.dim=32",
        "model.num_layers=1",
        "data.context=32",
        "data.batch_size=8",
        "data.eval_batch_size=64",
        "model.dropout=0.1",
    ),
]
FORECAST = [
    *("+experiment=forecast", "data=series", "data.path=wave.csv", "data.column=price", "data.history=12"),
    *("data.horizon=4", "data.season=12", "model.hidden_size=8"),
]


# An epoch of the three experiments has 18, 37 and 4 steps.
@pytest.mark.parametrize(
    ("experiment", "stops", "every"),
    [
        (["+experiment=cnn", "data.batch_size=200", "scheduler=cosine"], [18, 25], 5),
        ([*LANGUAGE_MODEL, "trainer.limit_val_batches=2"], [55], 10),
        (FORECAST, [4], 2),
    ],
    ids=["cnn", "language_model", "forecast"],
)
def test_resume_is_bit_identical(train, experiment, stops, every):
    """A run that stopped after or within an epoch and resumed has the weights of an uninterrupted run."""
    Path("text.txt").write_text("the quick brown fox jumps over the lazy dog <&>\n" * 400)
    write_wave(Path("wave.csv"))
    job = [*experiment, *QUIET]
    checkpoints = ["callbacks.checkpoint.monitor=null", f"+callbacks.checkpoint.every_n_train_steps={every}"]
    assert train(directory="whole", job=job)[0] == 0
    whole = weights("whole")
    for stop in stops:
        # The callback writes a checkpoint at the end of an epoch by default.
        settings = [] if stop == 18 else checkpoints
        assert train(f"trainer.max_steps={stop}", *settings, directory=f"{stop}", job=job)[0] == 0
        stopped = weights(f"{stop}")
        resume = f"ckpt_path={stop}/checkpoints/last.ckpt"
        assert train(resume, directory=f"from_{stop}", job=job)[0] == 0
        resumed = weights(f"from_{stop}")
        assert whole.keys() == resumed.keys()
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)
        assert not all(torch.equal(whole[key], stopped[key]) for key in whole)


RATES = ["+callbacks.rates._target_=lightning.pytorch.callbacks.LearningRateMonitor", "scheduler=cosine"]


def rates(directory):
    """Returns the learning rate of each epoch."""
    # The monitor logs the rate at the first step of an epoch.
    return [float(row[name]) for row in rows(directory) for name in row if name.startswith("lr-")]


def test_resume_with_other_settings(train):
    """A resumed run applies what its command line gives, takes the rest from the checkpoint, and records both."""
    assert train(*RATES, "optim.lr=0.01", "trainer.max_epochs=1", directory="runs/cnn/a")[0] == 0
    status, out, _ = train(*RATES, "trainer.max_epochs=4", "ckpt_path=last", directory="runs/cnn/b")
    assert status == 0 and "from the checkpoint: optim.lr=0.01" in out.splitlines()
    # A cosine over four epochs, from the second on.
    assert rates("runs/cnn/b")[-3:] == pytest.approx([0.0085355, 0.005, 0.0014645], rel=1e-4)
    for record in ("config.yaml", ".hydra/config.yaml"):
        assert yaml.safe_load((Path("runs/cnn/b") / record).read_text())["optim"]["lr"] == 0.01
    given = ["optim.lr=0.02", "optim.weight_decay=0.1", "optim.ema_decay=0.9"]
    status, *_ = train(
        *RATES, *given, "trainer.max_epochs=4", "ckpt_path=runs/cnn/a/checkpoints/last.ckpt", directory="c"
    )
    assert status == 0 and rates("c")[-3:] == pytest.approx([0.017071, 0.01, 0.0029289], rel=1e-4)
    checkpoint = load_checkpoint("c/checkpoints/last.ckpt")
    (group,) = checkpoint["optimizer_states"][0]["param_groups"]
    recorded = yaml.safe_load(Path("c/config.yaml").read_text())["optim"]
    assert (
        (group["weight_decay"], group["ema_decay"]) == (0.1, 0.9) == (recorded["weight_decay"], recorded["ema_decay"])
    )
    assert "current_model_state" in checkpoint
    # A run that resumes in turn has what this one was given.
    status, out, _ = train("trainer.max_epochs=5", "ckpt_path=c/checkpoints/last.ckpt", directory="d")
    assert status == 0 and "optim.lr=0.02, optim.weight_decay=0.1, optim.ema_decay=0.9" in out


def test_resume_with_another_optimizer(train):
    """Another algorithm, and limits that the checkpoint has reached, are refused in one line."""
    assert train("trainer.max_epochs=1", directory="a")[0] == 0
    checkpoint = "ckpt_path=a/checkpoints/last.ckpt"
    for options, message in {
        ("optim=sgd",): "optim=SGD cannot go on with the states in a/checkpoints/last.ckpt, which are those of Adam",
        ("trainer.max_epochs=1",): "has completed 1 epochs and trainer.max_epochs is 1: nothing is left to train",
        ("trainer.max_steps=3",): "has completed 3 steps and trainer.max_steps is 3: nothing is left to train",
        ("+trainer.max_time=1", "trainer.max_epochs=-1", "scheduler=cosine"): "the scheduler needs the length of the",
    }.items():
        status, _, err = train(*options, checkpoint, directory="b")
        assert status == 1 and message in err.splitlines()[-1], err


def test_last_has_the_same_seed(train):
    """``ckpt_path=last`` ignores newer runs of another seed and debugging runs."""
    train("seed=0", "trainer.max_epochs=1", directory="runs/cnn/a")
    train("seed=1", "trainer.max_epochs=1", directory="runs/cnn/b")
    train("seed=0", "+debug=quick", "trainer.max_epochs=1", directory="runs/cnn/c")
    status, out, _ = train("seed=0", "optim.lr=0.01", "ckpt_path=last", directory="runs/cnn/d")
    assert status == 0 and "continuing runs/cnn/a/checkpoints/last.ckpt" in out
    # A debugging run may resume another debugging run.
    status, out, _ = train("seed=0", "+debug=quick", "ckpt_path=last", "trainer.max_epochs=2", directory="runs/cnn/e")
    assert status == 0 and "continuing runs/cnn/c/checkpoints/last.ckpt" in out


def test_nearest_run(train):
    """Without a matching run the error has the nearest run and the differences with both values."""
    train("seed=1", "trainer.max_epochs=1", directory="runs/cnn/a")
    train("seed=1", "trainer.max_epochs=1", "data.batch_size=50", "data.eval_batch_size=400", directory="runs/cnn/b")
    status, _, err = train("seed=2", "ckpt_path=last", directory="runs/cnn/c")
    assert status == 1
    assert err.splitlines()[-1].endswith("the nearest is runs/cnn/a: seed=1 there and 2 here")
    # This run is as near as the first one, and newer.
    status, _, err = train("seed=1", "data.eval_batch_size=400", "ckpt_path=last", directory="runs/cnn/d")
    assert err.splitlines()[-1].endswith("runs/cnn/b: data.batch_size=50 there and 100 here")


@pytest.mark.parametrize("swept", ["seed=0,1", "optim.lr=0.01,0.001"])
def test_jobs_of_another_sweep(train, swept):
    """Each job of a sweep over more epochs resumes its own run of the earlier sweep."""
    train("trainer.max_epochs=1", "hydra.sweep.dir=runs/cnn/one", "-m", swept)
    status, out, err = train("hydra.sweep.dir=runs/cnn/two", "ckpt_path=last", "-m", swept)
    assert status == 0, err
    assert [line for line in out.splitlines() if line.startswith("continuing")] == [
        f"continuing runs/cnn/one/{number}/checkpoints/last.ckpt" for number in (0, 1)
    ]
    assert [figures(f"runs/cnn/two/{number}")["epochs"] for number in (0, 1)] == [2, 2]


def trained(monkeypatch):
    """Returns a list to which each training appends its directory."""
    found, function = [], lightkit.app.training.train
    monkeypatch.setattr(
        lightkit.app.training, "train", lambda config: (found.append(Path(config.run_dir).name), function(config))[1]
    )
    return found


@pytest.mark.parametrize("swept", ["seed=0,1,2", "seed=shuffle(range(5,8))"])
def test_a_killed_sweep_goes_on(train, kill, monkeypatch, swept):
    """A resumed sweep skips finished jobs, resumes the killed job, and starts the rest, all in one directory."""
    sweep = Path("runs/cnn/sweep")
    kill(Checkpoint, "_save_last_checkpoint", call=4)
    train(f"hydra.sweep.dir={sweep}", "-m", swept, killed=True)
    kill.over()
    done = (sweep / "0" / "metrics.json").read_bytes()
    places = trained(monkeypatch)
    # The directory of a new sweep does not matter.
    status, out, err = train("hydra.sweep.dir=runs/cnn/other", "-m", swept, "ckpt_path=last")
    assert status == 0, err
    assert "continuing the sweep runs/cnn/sweep" in out
    assert places == ["1", "2"] and not Path("runs/cnn/other").exists()
    assert (sweep / "0" / "metrics.json").read_bytes() == done
    seeds = [yaml.safe_load((sweep / number / "config.yaml").read_text())["seed"] for number in "012"]
    assert sorted(seeds) == ([0, 1, 2] if swept.endswith("2") else [5, 6, 7])
    train(f"seed={seeds[1]}", directory="whole")
    assert_same(sweep / "1", "whole")
    status, _, err = train("-m", swept, "ckpt_path=last")
    assert status == 1 and "the sweep with the same overrides, is finished" in err


def test_another_sweep_is_none_of_its_own(train, kill):
    """``ckpt_path=last`` ignores a sweep with other overrides; a new sweep prints that an unfinished one exists."""
    kill(Checkpoint, "_save_last_checkpoint", call=4)
    train("hydra.sweep.dir=runs/cnn/one", "-m", "seed=0,1", killed=True)
    kill.over()
    status, out, _ = train("hydra.sweep.dir=runs/cnn/two", "-m", "seed=0,1", "optim.lr=0.01")
    assert status == 0 and "unfinished" not in out
    status, out, _ = train("hydra.sweep.dir=runs/cnn/three", "-m", "seed=0,1")
    assert status == 0 and "runs/cnn/one is unfinished: ckpt_path=last goes on with that sweep\n" in out
    assert not (Path("runs/cnn/one/1") / "metrics.json").exists()


OPTUNA = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=1", "-m"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["optim.lr=tag(log,interval(1e-4,1e-2))"],
        ["hydra/sweeper/sampler=random", "+hydra.sweeper.sampler.seed=3", "optim.lr=interval(0.001,0.01)"],
        ["hydra/sweeper/sampler=grid", "optim.lr=0.001,0.002,0.003"],
    ],
)
def test_a_killed_sweep_by_optuna_goes_on(train, kill, monkeypatch, arguments):
    """The study is a file in the sweep's directory; finished trials count, and no trial runs twice."""
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    import optuna

    sweep = Path("runs/cnn/sweep").absolute()
    kill(Checkpoint, "_save_last_checkpoint", call=4)
    train(f"hydra.sweep.dir={sweep}", *OPTUNA, *arguments, killed=True)
    kill.over()
    known = [yaml.safe_load((sweep / number / "config.yaml").read_text())["optim"]["lr"] for number in "01"]
    places = trained(monkeypatch)
    status, _, err = train(*OPTUNA, *arguments, "ckpt_path=last")
    assert status == 0, err
    assert places == ["1", "2"]
    study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{sweep}/study.db")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 3
    values = [float(trial.params["optim.lr"]) for trial in study.trials]
    assert values[:2] == pytest.approx(known) and len(set(values)) == 3
    assert [trial.value for trial in study.trials] == [figures(sweep / number)["val/loss"] for number in "012"]
    best = yaml.safe_load((sweep / "optimization_results.yaml").read_text())
    assert best["best_value"] == min(trial.value for trial in study.trials)


@pytest.mark.parametrize("moment", ["before the figures", "before the test", "before the report"])
def test_only_the_report_was_left(train, kill, moment):
    """A job that was killed after its last epoch runs the test and the report, with the metrics of an unkilled job."""
    train(directory="whole")
    if moment == "before the figures":
        kill(Checkpoint, "_save_last_checkpoint", call=2, after=True)
    elif moment == "before the test":
        kill(pl.Trainer, "test")
    else:
        kill(lightkit.app.training.report, "write")
    train(directory="runs/cnn/killed", killed=True)
    kill.over()
    status, out, err = train("ckpt_path=last", directory="runs/cnn/on")
    assert status == 0, err
    assert "continuing runs/cnn/killed/checkpoints/last.ckpt" in out
    assert_same("runs/cnn/on", "whole")


def test_nothing_is_left_of_a_run_with_a_report(train, kill):
    """Resuming a complete run by path is an error; a run without a report resumes by path too."""
    kill(pl.Trainer, "test")
    train(directory="runs/cnn/killed", killed=True)
    kill.over()
    by_path = "ckpt_path=runs/cnn/killed/checkpoints/last.ckpt"
    assert train(by_path, directory="runs/cnn/on")[0] == 0
    for last in ("last", "runs/cnn/on/checkpoints/last.ckpt"):
        status, _, err = train(f"ckpt_path={last}", directory="runs/cnn/again")
        assert status == 1 and "nothing is left to train; pass trainer.max_epochs=3 or more" in err


@pytest.mark.parametrize("directories", [("a", "b", "c"), ("a", "a", "a"), ("a", "b", "b")])
def test_no_row_is_lost(train, kill, directories):
    """A run that was killed twice within an epoch has the rows of an unkilled run, each once."""
    train("trainer.max_epochs=3", directory="whole")
    for number, directory in enumerate(directories[:2]):
        # The kill comes one epoch and two steps later.
        kill(Checkpoint, "on_train_batch_end", call=6)
        resume = ["ckpt_path=last"] if number else []
        train("trainer.max_epochs=3", *resume, directory=f"runs/cnn/{directory}", killed=True)
        kill.over()
    status, _, err = train("trainer.max_epochs=3", "ckpt_path=last", directory=f"runs/cnn/{directories[2]}")
    assert status == 0, err
    assert steps(f"runs/cnn/{directories[2]}") == list(range(9))
    assert_same(f"runs/cnn/{directories[2]}", "whole")


def test_rows_up_to_the_step_of_the_checkpoint(train):
    """A run that resumes from an earlier checkpoint omits the rows after that checkpoint and the old test's row."""
    train("trainer.max_epochs=1", directory="runs/cnn/a")
    early = Path("runs/cnn/a/checkpoints/last.ckpt").read_bytes()
    train("ckpt_path=last", directory="runs/cnn/b")
    Path("runs/cnn/b/checkpoints/early.ckpt").write_bytes(early)
    status, _, err = train("ckpt_path=runs/cnn/b/checkpoints/early.ckpt", directory="runs/cnn/c")
    assert status == 0, err
    assert rows("runs/cnn/c") == rows("runs/cnn/b")
    assert sum("test/loss" in row for row in rows("runs/cnn/c")) == 1


def test_only_best_was_written(train, kill):
    """After a kill between ``best.ckpt`` and ``last.ckpt`` of the first epoch the job resumes from ``best.ckpt``."""
    train(directory="whole")
    kill(Checkpoint, "_save_last_checkpoint")
    train(directory="runs/cnn/a", killed=True)
    kill.over()
    status, out, err = train("ckpt_path=last", directory="runs/cnn/b")
    assert status == 0, err
    assert "continuing runs/cnn/a/checkpoints/best.ckpt" in out
    assert_same("runs/cnn/b", "whole")


def test_a_damaged_checkpoint_is_passed_over(train, kill):
    """The newest undamaged checkpoint counts; without one the error names the file."""
    kill(pl.Trainer, "test")
    train(directory="runs/cnn/a", killed=True)
    kill.over()
    last = Path("runs/cnn/a/checkpoints/last.ckpt")
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content)
    status, out, err = train("ckpt_path=last", "test=false", directory="runs/cnn/b")
    assert status == 0 and "continuing runs/cnn/a/checkpoints/best.ckpt" in out
    assert "runs/cnn/a/checkpoints/last.ckpt is damaged" in err
    status, _, err = train("ckpt_path=runs/cnn/a/checkpoints/last.ckpt", directory="runs/cnn/c")
    assert status == 1 and "runs/cnn/a/checkpoints/last.ckpt is damaged or not a checkpoint: its checksum" in err


def test_a_plain_rerun_says_what_is_unfinished(train, kill):
    """A new run prints one line if the newest matching run is unfinished, and none otherwise."""
    kill(pl.Trainer, "test")
    train(directory="runs/cnn/a", killed=True)
    kill.over()
    line = "runs/cnn/a is unfinished: ckpt_path=last goes on with it\n"
    assert line not in train("seed=1", directory="runs/cnn/b")[1]
    assert train(directory="runs/cnn/c")[1].count(line) == 1
    assert "unfinished" not in train(directory="runs/cnn/d")[1]


def test_the_best_epoch_is_taken_along(train):
    """A run that resumes in another directory takes over the best epoch and its checkpoint."""
    # With mode=max on a falling loss the first epoch stays the best.
    mode = "callbacks.checkpoint.mode=max"
    train(mode, "trainer.max_epochs=1", directory="runs/cnn/a")
    status, _, err = train(mode, "trainer.max_epochs=3", "ckpt_path=last", directory="runs/cnn/b")
    assert status == 0, err
    before, after = (load_checkpoint(f"runs/cnn/{name}/checkpoints/best.ckpt") for name in "ab")
    assert after["global_step"] == before["global_step"] == 3
    assert figures("runs/cnn/b")["test/loss"] == pytest.approx(figures("runs/cnn/a")["test/loss"])


def test_leftovers_are_cleared(train):
    """A run in the directory of a killed run completes its logs and removes its unfinished files."""
    place = Path("runs/cnn/a")
    (place / "checkpoints").mkdir(parents=True)
    (place / ".hydra").mkdir()
    for name in (
        "checkpoints/.best.ckpt.a1b2c3d4",
        ".config.yaml.a1b2c3d4",
        ".curves.png.a_b2c3d4",
        ".hydra/.run.json.abcdefgh",
    ):
        (place / name).write_bytes(b"half")
    for name in ("config.yaml", "metrics.json", "environment.json", ".hydra/config.yaml", ".hydra/run.json"):
        (place / name).touch()
    (place / ".notes.txt").write_text("the user's own")
    assert train(directory=place)[0] == 0
    assert [path.name for path in place.rglob(".*.????????")] == []
    assert all(
        path.stat().st_size > 0 for path in place.rglob("*") if path.is_file() and path.suffix in (".json", ".yaml")
    )
    assert (place / ".notes.txt").exists()


def test_a_running_job_is_left_alone(train, monkeypatch):
    """A job neither resumes a sweep nor writes to a run directory that another process holds."""
    train("hydra.sweep.dir=runs/cnn/one", "-m", "seed=0,1")
    record = Path("runs/cnn/one/sweep.json")
    record.write_text(record.read_text().replace('"is_finished": true', '"is_finished": false'))
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        directory_lock.hold(Path("runs/cnn/one"))
        directory_lock.hold(Path("runs/cnn/one/0"))
        os.write(writer, b".")
        os.read(os.pipe()[0], 1)
    os.read(reader, 1)
    try:
        status, _, err = train("-m", "seed=0,1", "ckpt_path=last")
        assert status == 1 and "runs/cnn/one, the sweep with the same overrides, is still running" in err
        status, _, err = train(directory="runs/cnn/one/0")
        assert status == 1 and "another lightkit.train, which is still running, writes to runs/cnn/one/0" in err
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    assert train("-m", "seed=0,1", "ckpt_path=last")[0] == 0
