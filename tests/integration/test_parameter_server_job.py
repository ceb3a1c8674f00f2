"""Jobs with a parameter server on the command line: one directory, checkpoints, and recovery from faults."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from support.commands import run, run_python, the_error, with_modules
from support.processes import servers_of

pytestmark = pytest.mark.slow

TWO = ["trainer.accelerator=cpu", "trainer.devices=2", "strategy=parameter_server"]
SGD = ["+experiment=cnn", "optim=sgd", "trainer.max_epochs=1", "data.batch_size=50"]


def command(module, *arguments):
    return [sys.executable, "-m", module, *arguments]


def metrics_of(directory):
    return json.loads((directory / "metrics.json").read_text())


def with_fault(what, directory, rank=1):
    """Returns the arguments and the environment of a job with a fault in one worker."""
    callback = ["+callbacks.faulty._target_=faulty.Faulty", f"+callbacks.faulty.what={what}"]
    callback += [f"+callbacks.faulty.directory={directory}", f"+callbacks.faulty.rank={rank}"]
    return callback, with_modules("faulty")


def test_same_as_data_parallel(tmp_path):
    """The weights equal those of strategy=ddp, the servers leave no files, and evaluate gives the same metrics."""
    run("train", *SGD, *TWO, "strategy.servers=2", "hydra.run.dir=servers", cwd=tmp_path, status=0)
    run("train", *SGD, *TWO[:2], "strategy=ddp", "hydra.run.dir=ddp", cwd=tmp_path, status=0)
    paths = [tmp_path / name / "checkpoints" / "last.ckpt" for name in ("servers", "ddp")]
    ours, theirs = (torch.load(path, weights_only=True) for path in paths)
    for key, value in ours["state_dict"].items():
        torch.testing.assert_close(value, theirs["state_dict"][key], rtol=0, atol=1e-5)
    assert not (tmp_path / "servers" / "parameter_servers").exists()
    metrics = metrics_of(tmp_path / "servers")
    assert metrics["steps"] == 36 and metrics["communication/bytes_per_step"] > 4 * 93322
    run("evaluate", f"ckpt_path={paths[0].with_name('best.ckpt')}", "output=figures.json", cwd=tmp_path, status=0)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["test/accuracy"] == pytest.approx(metrics["test/accuracy"])


@pytest.mark.parametrize("mode", ["sync", "bounded"])
def test_a_worker_is_killed(tmp_path, mode):
    """The other workers print a message and finish the job."""
    callback, environment = with_fault("kill", tmp_path)
    arguments = [*SGD, *TWO, f"strategy.mode={mode}", "hydra.run.dir=out", *callback]
    result = run("train", *arguments, cwd=tmp_path, environment=environment, status=0)
    assert "process 1 of 2 was ended by SIGKILL: going on without it" in result.stderr
    assert metrics_of(tmp_path / "out")["steps"] == 36


def test_the_first_worker_is_killed(tmp_path):
    """The first worker starts the servers, so that its end ends the job with one error and no orphans."""
    callback, environment = with_fault("kill", tmp_path, rank=0)
    result = run("train", *SGD, *TWO, *callback, cwd=tmp_path, environment=environment)
    assert "process 0 of 2 was ended by SIGKILL" in the_error(result)
    pid = int((tmp_path / "rank0.pid").read_text())
    assert not servers_of(pid)


def test_a_server_is_killed(tmp_path):
    """The restarted server recovers every acknowledged update, and the job continues unchanged."""
    callback, environment = with_fault("server", tmp_path, rank=0)
    arguments = [*SGD, *TWO, "strategy.servers=2", "trainer.limit_train_batches=30", "hydra.run.dir=out", *callback]
    result = run("train", *arguments, cwd=tmp_path, environment=environment, status=0)
    assert "recovered at versions [3], 3 of them from the log" in result.stderr
    assert metrics_of(tmp_path / "out")["steps"] == 30
    arguments = [*SGD, *TWO, "strategy.servers=2", "trainer.limit_train_batches=30", "hydra.run.dir=whole"]
    run("train", *arguments, "test=false", cwd=tmp_path, status=0)
    one, two = (
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("out", "whole")
    )
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_started_one_by_one(tmp_path):
    """Servers and workers that separate commands start, as on different machines, find each other."""
    environment = {"LIGHTKIT_SECRET": "of this test"}
    server = subprocess.Popen(
        command("lightkit.parameter_server", "--port", "0"),
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        address = server.stdout.readline().split()[-1]
        base = [*SGD, *TWO[2:], "trainer.accelerator=cpu", f"strategy.addresses={address}", "strategy.workers=2"]
        second = subprocess.Popen(
            command("lightkit.train", *base, "strategy.worker=1", "hydra.run.dir=two"),
            cwd=tmp_path,
            env={**os.environ, **environment},
            stdout=subprocess.DEVNULL,
        )
        run("train", *base, "strategy.worker=0", "hydra.run.dir=one", cwd=tmp_path, environment=environment, status=0)
        assert second.wait(60) == 0 and server.wait(60) == 0
    finally:
        server.kill()
    assert metrics_of(tmp_path / "one")["steps"] == 36
    # Only worker 0 writes files.
    assert not (tmp_path / "two" / "metrics.json").exists()


def test_a_wrong_secret(tmp_path):
    """A wrong secret ends the worker with one error within seconds."""
    server = subprocess.Popen(
        command("lightkit.parameter_server", "--port", "0"),
        env={**os.environ, "LIGHTKIT_SECRET": "one"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        address = server.stdout.readline().split()[-1]
        arguments = [*SGD, *TWO[2:], "trainer.accelerator=cpu", f"strategy.addresses=['{address}']"]
        environment = {"LIGHTKIT_SECRET": "another"}
        result = run("train", *arguments, cwd=tmp_path, environment=environment)
    finally:
        server.kill()
    assert "the secret is not that of the server (LIGHTKIT_SECRET)" in the_error(result)


def test_the_server_needs_a_secret(monkeypatch):
    """A server without a secret does not start."""
    monkeypatch.delenv("LIGHTKIT_SECRET", raising=False)
    result = run_python("-m", "lightkit.parameter_server", "--port", "0", timeout=60, status=2)
    assert "LIGHTKIT_SECRET is not set" in result.stderr
