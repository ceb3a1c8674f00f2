"""``python -m lightkit.serve`` in processes of its own: concurrent requests, and the end of all processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image
from support.http import ask, send
from support.processes import children, is_alive, wait_for

from lightkit.app import untrusted
from lightkit.app.prediction import predict_from
from lightkit.checkpoints import CONFIG_KEY
from lightkit.serve import __main__ as command

pytest.importorskip("fastapi_offline")
pytestmark = pytest.mark.slow

CNN = {
    "data": {"_target_": "lightkit.data.MNIST5k"},
    "model": {"_target_": "lightkit.models.CNN"},
    "task": {"_target_": "lightkit.tasks.ClassificationTask"},
}
TEXT = {
    "data": {"_target_": "lightkit.data.Text", "path": "text.txt", "context": 16},
    "model": {
        "_target_": "lightkit.models.Transformer",
        **{"vocab_size": 256, "dim": 16, "num_layers": 1, "num_heads": 2, "context": 16},
    },
    "task": {"_target_": "lightkit.tasks.LanguageModelTask"},
}


def save(path, config, seed=0):
    """Writes a checkpoint with random weights."""
    torch.manual_seed(seed)
    task = untrusted.build("task", config["task"], model=untrusted.build("model", config["model"]))
    torch.save({"state_dict": task.state_dict(), CONFIG_KEY: config}, path)


@contextmanager
def serving(*arguments, cwd):
    """Runs the command until the end of the context; yields its process and its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "lightkit.serve", "port=0", *arguments],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        line = process.stdout.readline()
        assert line.startswith("serving at http://"), process.stderr.read()
        yield process, line.split()[2].rstrip(",")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def test_images_of_an_ensemble_by_two_workers(tmp_path):
    """Concurrent requests have the answers of lightkit.predict; a killed worker starts again; SIGTERM ends all."""
    for seed in range(2):
        save(tmp_path / f"{seed}.ckpt", CNN, seed)
    generator = np.random.default_rng(0)
    for index in range(8):
        Image.fromarray(generator.integers(0, 256, (28, 28), np.uint8)).save(tmp_path / f"{index}.png")
    ensemble = "ckpt_path=[0.ckpt,1.ckpt]"
    with serving(ensemble, "workers=2", "max_batch_size=4", "batch_timeout=0.02", cwd=tmp_path) as (process, url):
        workers = children(process.pid)
        assert len(workers) == 2
        contents = [(tmp_path / f"{index}.png").read_bytes() for index in range(8)]
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(lambda index: ask(url, contents[index % 8]), range(64)))
            assert ask(url, b"\x89PNG")[0] == 400

        for index in range(8):
            expected = _probabilities(tmp_path, index)
            for status, answer in found[index::8]:
                assert status == 200
                assert list(answer["probabilities"].values()) == pytest.approx(expected, rel=1e-5)
        os.kill(workers[0], signal.SIGKILL)
        wait_for(lambda: len(set(children(process.pid)) - {workers[0]}) == 2, process)
        assert all(send(url, body=content)[0] in (200, 500) for content in contents)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 143
        wait_for(lambda: not any(map(is_alive, [*workers, *children(process.pid)])), seconds=10)
        assert "ended by SIGTERM\n" in process.stderr.read()


def _probabilities(directory, index):
    members = [
        predict_from(directory / f"{seed}.ckpt", input=str(directory / f"{index}.png")).probabilities
        for seed in range(2)
    ]
    return torch.stack(members).mean(dim=0)[0].tolist()


def test_texts_and_the_end_of_a_killed_server(tmp_path):
    """Concurrent texts have the continuations of lightkit.predict; a server that is killed leaves no worker."""
    save(tmp_path / "text.ckpt", TEXT)
    with serving("ckpt_path=text.ckpt", "max_length=200", cwd=tmp_path) as (process, url):
        with ThreadPoolExecutor(8) as pool:
            bodies = [{"text": "the quick", "length": 20, "seed": seed} for seed in range(12)]
            found = list(pool.map(lambda body: ask(url, body), bodies))
        for body, (status, answer) in zip(bodies, found, strict=True):
            assert status == 200
            assert answer == predict_from(tmp_path / "text.ckpt", **body).entry()
        assert ask(url, {"text": "a", "length": 201})[0] == 400
        (worker,) = children(process.pid)
        process.kill()
        process.wait()
        wait_for(lambda: not is_alive(worker), seconds=10)


def test_ctrl_c_ends_a_server_that_computes(tmp_path):
    """Ctrl-C ends the processes within seconds, also in the middle of an answer."""
    save(tmp_path / "text.ckpt", TEXT)
    with serving("ckpt_path=text.ckpt", "max_length=100000000", cwd=tmp_path) as (process, url):
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(send, url, "/predict", {"text": "a", "length": 100_000_000})
            (worker,) = children(process.pid)
            assert send(url, "/health")[0] == 200
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 130
            assert not is_alive(worker)
            assert future.result() == (503, '{"error": "the server stops"}')
        assert process.stderr.read() == "interrupted\n"


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Returns a function that runs the command in this process, and returns its status and standard error."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["lightkit.serve", *arguments])
        # The command sets the variable.
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        capsys.readouterr()
        return command.main(), capsys.readouterr().err

    return call


def test_errors_of_the_command_are_one_line(run, tmp_path):
    """A file that is missing or damaged, and a wrong key, end the command with status 1 and one line."""
    (tmp_path / "bad.ckpt").write_bytes(b"x" * 100)
    save(tmp_path / "series.ckpt", {**CNN, "data": {"_target_": "lightkit.data.Text", "path": "x"}})
    for arguments, message in [
        (["ckpt_path=gone.ckpt"], "there is no checkpoint gone.ckpt"),
        (["ckpt_path=bad.ckpt", "port=0"], "bad.ckpt"),
        (["ckpt_path=series.ckpt", "port=0"], "a server has no images for a ClassificationTask of a Text"),
        (["ckpt_path=bad.ckpt", "port=http"], "port must be int, got 'http'"),
        (["ckpt_path=bad.ckpt", "wrokers=2"], "did you mean workers?"),
        ([], "ckpt_path"),
    ]:
        status, err = run(*arguments)
        assert status == 1 and message in err and err.startswith("error: ") and "Traceback" not in err
        assert len(err.strip().splitlines()) == 1
