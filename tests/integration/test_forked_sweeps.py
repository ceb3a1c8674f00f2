"""Sweeps with forked jobs on the command line: equal results, failures and signals."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
import yaml
from support import commands
from support.commands import run_python, with_modules
from support.processes import is_alive, wait_for

from lightkit.checkpoints import load_checkpoint

pytestmark = pytest.mark.slow

FORK = "hydra/launcher=fork"
SHORT = ["+experiment=cnn", "trainer.accelerator=cpu", "trainer.limit_train_batches=4", "trainer.limit_val_batches=1"]
QUICK = ["+experiment=cnn", "+debug=quick", "trainer.accelerator=cpu", "test=false", "logger=none"]

# Metrics that depend on time differ from run to run.
TIMED = ("second", "(ms)", "fraction")

needs_optuna = pytest.mark.skipif(
    find_spec("hydra_plugins.hydra_optuna_sweeper") is None, reason="needs the extra sweep"
)


def run(*arguments, cwd, status=0):
    """Runs a command to its end and returns its output. Its configuration may name the callbacks of this folder."""
    result = commands.run("train", *arguments, cwd=cwd, environment=with_modules("faulty"), status=status)
    return result.stdout, result.stderr


def faulty(what, directory):
    """Returns the overrides for a callback that makes a job fail and writes its process id to ``directory``."""
    callback = "+callbacks.faulty"
    return [f"{callback}._target_=faulty.Faulty", f"{callback}.directory={directory}", f"{callback}.rank=0"] + (
        [f"{callback}.what={what}"] if what else []
    )


def results(directory):
    """Returns the weights of a run, and its metrics except those that depend on time."""
    weights = load_checkpoint(directory / "checkpoints" / "last.ckpt")["state_dict"]
    metrics = json.loads((directory / "metrics.json").read_text())
    with open(directory / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    untimed = [
        {key: value for key, value in row.items() if not any(word in key for word in TIMED)} for row in (metrics, *rows)
    ]
    return weights, untimed


def test_the_same_bits(tmp_path):
    """A forked job, a job in the sweep's process and a separate job have equal weights, metrics and files."""
    two = ["trainer.max_epochs=2", "-m", "seed=0,1"]
    output, errors = run(*SHORT, FORK, "hydra.sweep.dir=fork", *two, cwd=tmp_path)
    # Each line is printed once: a job would print a full buffer of its parent again.
    assert [output.index(f"#{number} :") for number in (0, 1)] == sorted(output.index(f"#{n} :") for n in (0, 1))
    assert output.count("forked from this process") == 1 and output.count("epoch 2/2") == 2
    assert output.index("epoch 2/2") < output.index("#1 :")
    assert "Warning" not in errors
    run(*SHORT, "hydra.sweep.dir=basic", *two, cwd=tmp_path)
    run(*SHORT, "hydra.run.dir=fresh/1", "trainer.max_epochs=2", "seed=1", cwd=tmp_path)
    for one, other in (("fork/0", "basic/0"), ("fork/1", "basic/1"), ("fork/1", "fresh/1")):
        weights, figures = results(tmp_path / one)
        expected, expected_figures = results(tmp_path / other)
        assert weights.keys() == expected.keys() and all(torch.equal(weights[key], expected[key]) for key in expected)
        assert figures == expected_figures
        names = [sorted(path.name for path in (tmp_path / run_dir).iterdir()) for run_dir in (one, other)]
        assert names[0] == names[1]
        logs = [(tmp_path / run_dir / "train.log").read_text().splitlines() for run_dir in (one, other)]
        # The rates differ, and the lines of the epochs do not.
        epochs = [[line for line in log if line.startswith("epoch ")] for log in logs]
        assert epochs[0] == epochs[1] and len(epochs[0]) == 2


@needs_optuna
def test_optuna(tmp_path):
    """The objectives of forked jobs, two at a time, reach the sweeper, which chooses the next jobs by them."""
    optuna = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "+hydra.sweeper.sampler.seed=1"]
    two = ["hydra.sweeper.n_jobs=2", "hydra.launcher.jobs=2"]
    values = "optim.lr=tag(log,interval(0.0001,0.01))"
    run(*QUICK, FORK, *optuna, *two, "hydra.sweep.dir=sweep", "-m", values, cwd=tmp_path)
    found = {}
    for number in ("0", "1", "2"):
        metrics = json.loads((tmp_path / "sweep" / number / "metrics.json").read_text())
        config = yaml.safe_load((tmp_path / "sweep" / number / "config.yaml").read_text())
        found[config["optim"]["lr"]] = metrics["val/loss"]
    best = yaml.safe_load((tmp_path / "sweep" / "optimization_results.yaml").read_text())
    assert best["best_params"] == {"optim.lr": min(found, key=found.get)}
    assert best["best_value"] == pytest.approx(min(found.values()))
    threads = json.loads((tmp_path / "sweep" / "0" / "environment.json").read_text())["threads"]
    assert threads == max(1, len(os.sched_getaffinity(0)) // 2)


@pytest.mark.parametrize(
    ("what", "expected", "others"),
    [
        ("data", "error: sample 7 is damaged", False),
        ("kill", "error: job 0 was ended by SIGKILL; the machine may be out of memory", True),
        ("terminate", "error: job 0 was ended by SIGTERM", True),
    ],
)
def test_a_job_fails(tmp_path, what, expected, others):
    """Wrong input ends the sweep with one error; after a killed job the other jobs run."""
    batches = ["trainer.limit_train_batches=5", "hydra.sweep.dir=sweep"]
    kinds = f"+callbacks.faulty.what={what},nothing"
    arguments = [*QUICK, *batches, FORK, *faulty(None, tmp_path), "-m", kinds]
    _, errors = run(*arguments, cwd=tmp_path, status=1)
    assert [line.startswith(expected) for line in errors.splitlines() if line.startswith("error: ")] == [True], errors
    assert "Traceback" not in errors
    assert (tmp_path / "sweep" / "1" / "metrics.json").exists() == others


def test_a_fault_of_the_program(tmp_path):
    """The sweep prints the traceback of a failed job after the other jobs have run."""
    batches = ["trainer.limit_train_batches=5", "hydra.sweep.dir=sweep"]
    arguments = [*QUICK, *batches, FORK, *faulty(None, tmp_path), "-m", "+callbacks.faulty.what=fault,nothing"]
    _, errors = run(*arguments, cwd=tmp_path, status=1)
    assert errors.splitlines()[-1].endswith("JobError: job 0: RuntimeError: a fault of the program")
    assert "in on_train_batch_start" in errors
    assert (tmp_path / "sweep" / "1" / "metrics.json").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_sweep_is_ended(tmp_path, number):
    """The running job ends with the sweep and keeps its checkpoint; ``ckpt_path=last`` resumes."""
    sweep = [*SHORT, "trainer.max_epochs=4", "test=false", "logger=none", FORK, *faulty("wait", tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "lightkit.train", *sweep, "-m", "seed=0,1"],
        cwd=tmp_path,
        env={**os.environ, **with_modules("faulty")},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A background job of a script ignores SIGINT, and its children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_for(lambda: list(tmp_path.glob("runs/cnn/*/0/checkpoints/last.ckpt")), process)
    process.send_signal(number)
    try:
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "Traceback" not in errors
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert errors.splitlines()[-1] == "interrupted: ckpt_path=last goes on from the last checkpoint"
    if number == signal.SIGTERM:
        assert process.returncode == 143
        assert errors.splitlines()[-1] == "ended by SIGTERM: ckpt_path=last goes on from the last checkpoint"
    job = int((tmp_path / "rank0.pid").read_text())
    assert job != process.pid
    wait_for(lambda: not is_alive(job), seconds=10)
    (found,) = tmp_path.glob("runs/cnn/*/0/checkpoints/last.ckpt")
    assert load_checkpoint(found)["epoch"] < 3
    # The launcher does not change results, so that a sweep may resume with another launcher.
    sweep.remove(FORK)
    output, _ = run(*sweep, "ckpt_path=last", "-m", "seed=0,1", cwd=tmp_path)
    assert output.count("continuing") == 2
    (directory,) = (tmp_path / "runs" / "cnn").iterdir()
    for job in ("0", "1"):
        assert load_checkpoint(directory / job / "checkpoints" / "last.ckpt")["epoch"] == 3


def test_goes_on_with_what_was_done(tmp_path):
    """A resumed sweep repeats the killed job and skips the finished one."""
    arguments = [*QUICK, "trainer.limit_train_batches=5", FORK, *faulty(None, tmp_path), "ckpt_path=last"]
    kinds = ["-m", "+callbacks.faulty.what=nothing,kill"]
    (tmp_path / "runs" / "cnn").mkdir(parents=True)
    first = [word for word in arguments if word != "ckpt_path=last"]
    run(*first, *kinds, cwd=tmp_path, status=1)
    output, _ = run(*arguments, *kinds, cwd=tmp_path, status=1)
    assert output.count("done before the restart") == 1 and output.count("beginning again") == 1


def test_jobs_of_two_processes(tmp_path):
    """A forked job starts one process for each device, as any other job does."""
    arguments = [*QUICK, "trainer.devices=2", "strategy=ddp", FORK, "hydra.sweep.dir=sweep", "-m", "seed=0,1"]
    run(*arguments, cwd=tmp_path)
    for number in ("0", "1"):
        assert json.loads((tmp_path / "sweep" / number / "metrics.json").read_text())["steps"] == 1


def test_under_torchrun(tmp_path):
    """torchrun's processes connect before the first job, so that they cannot fork."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m", "lightkit.train"]
    result = run_python(*torchrun, *QUICK, FORK, "-m", "seed=0,1", cwd=tmp_path, status=1)
    assert result.stderr.count("error: hydra/launcher=fork cannot run under torchrun") == 1
