"""Jobs of several processes on the command line: one configuration, one directory, and a common end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from support.commands import run, run_python, the_error, with_modules
from support.processes import is_alive, wait_for

from lightkit.app.processes import count_processes, with_processes_of_torchrun
from lightkit.checkpoints import load_checkpoint
from lightkit.errors import ConfigError, LightkitError
from lightkit.runtime.supervisor import Supervisor

pytestmark = pytest.mark.slow

TWO = ["trainer.accelerator=cpu", "trainer.devices=2"]
QUICK = ["+experiment=cnn", "+debug=quick"]


def torchrun(*arguments, cwd):
    """Runs a command in two processes of torchrun."""
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "lightkit.train"]
    return run_python(*two, *arguments, cwd=cwd, status=0)


def metrics_of(directory):
    return json.loads((directory / "metrics.json").read_text())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("jobs")


SGD = ["+experiment=cnn", "optim=sgd", "trainer.max_epochs=1", "test=true"]


@pytest.fixture(scope="module")
def parallel(place):
    """Returns the directory and the output of a job of two processes with batches of 50 each."""
    arguments = [*SGD, *TWO, "strategy=ddp", "data.batch_size=50", "hydra.run.dir=two"]
    result = run("train", *arguments, cwd=place, status=0)
    return place / "two", result.stdout + result.stderr


def test_one_of_everything(parallel):
    """Two processes leave one directory, log, report and set of checkpoints, and print no more than one process."""
    directory, said = parallel
    assert sorted(p.name for p in directory.iterdir() if p.suffix != ".png") == [
        ".hydra",
        "checkpoints",
        "config.yaml",
        "environment.json",
        "metrics.csv",
        "metrics.json",
        "report.html",
        "tensorboard",
        "train.log",
    ]
    assert sorted(os.listdir(directory / "checkpoints")) == ["best.ckpt", "last.ckpt"]
    metrics = metrics_of(directory)
    # Each process has 1,800 of the 3,600 digits: 36 batches of 50.
    assert metrics["steps"] == 36
    assert metrics["communication/bytes_per_step"] == 4 * 93322
    page = (directory / "report.html").read_text()
    supports = re.findall(r"<td>(\d+)</td></tr>", page.partition("<th>samples</th>")[2].partition("</table>")[0])
    assert sum(map(int, supports)) == 1000
    assert said.count("epoch 1/1") == 1 and said.count("test/accuracy") == 1
    assert "Warning" not in said and "warn" not in said and "distributed" not in said.lower()


def test_evaluate_gives_the_same_numbers(parallel, tmp_path):
    """One process computes the same test metrics from the checkpoint as the two processes did."""
    directory, _ = parallel
    best = f"ckpt_path={directory}/checkpoints/best.ckpt"
    run("evaluate", best, "output=figures.json", cwd=tmp_path, status=0)
    figures, trained = json.loads((tmp_path / "figures.json").read_text()), metrics_of(directory)
    assert figures["test/accuracy"] == pytest.approx(trained["test/accuracy"])
    assert figures["test/loss"] == pytest.approx(trained["test/loss"], rel=1e-5)


def test_same_as_one_process(place):
    """Two processes with batches of 50 and one with batches of 100 give the same weights.

    The jobs compute in float64: in float32 a tie between two pixels of a pool, which rounding decides, would move the
    weights as far apart as a mistake.
    """
    exact = [*SGD, "trainer.precision=64-true", "test=false"]
    run("train", *exact, *TWO, "strategy=ddp", "data.batch_size=50", "hydra.run.dir=exact_two", cwd=place, status=0)
    run("train", *exact, "data.batch_size=100", "hydra.run.dir=exact_one", cwd=place, status=0)
    paths = (place / name / "checkpoints" / "last.ckpt" for name in ("exact_one", "exact_two"))
    one, two = (load_checkpoint(path)["state_dict"] for path in paths)
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=0, atol=1e-10)


def test_resume_with_another_number_of_processes(parallel, place):
    """One process, and local SGD, resume from the checkpoint of two processes."""
    last = f"ckpt_path={place}/two/checkpoints/last.ckpt"
    base = [*SGD, "trainer.max_epochs=2", "trainer.limit_train_batches=20", "test=false", last]
    run("train", *base, "hydra.run.dir=on_one", cwd=place, status=0)
    diloco = [*TWO, "strategy=diloco", "data.batch_size=50", "hydra.run.dir=on_diloco"]
    run("train", *base, *diloco, cwd=place, status=0)
    assert "lightkit_outer_optimizer" in load_checkpoint(place / "on_diloco" / "checkpoints" / "last.ckpt")


def test_sweep(tmp_path):
    """Each job of a sweep runs once, in two processes with the configuration of that job."""
    arguments = [*QUICK, *TWO, "strategy=local_sgd", "-m", "seed=0,1"]
    result = run("train", *arguments, cwd=tmp_path, status=0)
    (sweep,) = (tmp_path / "runs" / "cnn").iterdir()
    assert sorted(p.name for p in sweep.iterdir() if p.is_dir()) == ["0", "1"]
    seeds = [yaml.safe_load((sweep / name / "config.yaml").read_text())["seed"] for name in ("0", "1")]
    assert seeds == [0, 1]
    assert result.stdout.count("test/accuracy") == 2
    losses = [metrics_of(sweep / name)["train/loss"] for name in ("0", "1")]
    assert losses[0] != losses[1]


def test_torchrun(tmp_path):
    """torchrun's processes train together, and only the first one composes and sweeps."""
    result = torchrun(*QUICK, "trainer.accelerator=cpu", "strategy=ddp", "-m", "seed=0,1", cwd=tmp_path)
    (sweep,) = (tmp_path / "runs" / "cnn").iterdir()
    configs = [yaml.safe_load((sweep / name / "config.yaml").read_text()) for name in ("0", "1")]
    assert [config["seed"] for config in configs] == [0, 1]
    assert configs[0]["trainer"]["devices"] == 2 and configs[0]["trainer"]["num_nodes"] == 1
    assert result.stdout.count("test/accuracy") == 2


def test_help_under_torchrun(tmp_path):
    """After --help the other processes end with the first one."""
    assert "+experiment=cnn" in torchrun("--help", cwd=tmp_path).stdout


def test_more_processes_than_cores(tmp_path):
    """Three processes train together; one of them has a smaller part of the test set."""
    arguments = [*QUICK, "trainer.accelerator=cpu", "trainer.devices=3", "strategy=diloco", "hydra.run.dir=out"]
    result = run("train", *arguments, cwd=tmp_path, status=0)
    assert metrics_of(tmp_path / "out")["steps"] == 1
    # Lightning does not list the devices either.
    assert "GPU available" not in result.stdout + result.stderr


def faulty(what, directory):
    """Returns the arguments and the environment of a long job with a fault."""
    arguments = ["+experiment=cnn", *TWO, "strategy=ddp", "trainer.max_epochs=1000", "hydra.run.dir=out"]
    callback = ["+callbacks.faulty._target_=faulty.Faulty", f"+callbacks.faulty.what={what}"]
    return [*arguments, *callback, f"+callbacks.faulty.directory={directory}"], with_modules("faulty")


def assert_no_orphans(directory, seconds=0.0):
    """Asserts that no process of the job is left."""
    pids = [int(file.read_text()) for file in directory.glob("rank*.pid")]
    assert len(pids) == 2
    end = time.monotonic() + seconds
    while any(map(is_alive, pids)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(map(is_alive, pids))


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("data", "error: sample 7 is damaged"),
        ("fault", "error: process 1 of 2: RuntimeError: a fault of the program"),
        ("kill", "error: process 1 of 2 was ended by SIGKILL"),
        ("terminate", "error: process 1 of 2 was ended by SIGTERM"),
    ],
)
def test_a_process_fails(tmp_path, what, expected):
    """If one process fails, the whole job ends with one error, that of the first failure."""
    arguments, environment = faulty(what, tmp_path)
    started = time.monotonic()
    result = run("train", *arguments, cwd=tmp_path, environment=environment, status=1)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0].startswith(expected), result.stderr
    # Only a fault of the program has a traceback.
    assert result.stderr.count("Traceback") == (what == "fault")
    assert_no_orphans(tmp_path)
    assert time.monotonic() - started < 60


def test_ended_by_sigterm(tmp_path):
    """SIGTERM, as from a cluster's scheduler, ends the job with a nonzero status and a hint how to resume."""
    arguments, environment = faulty("terminate", tmp_path)
    one = [*arguments, "trainer.devices=1", "strategy=auto", "+callbacks.faulty.rank=0"]
    result = run("train", *one, cwd=tmp_path, environment=environment, status=143)
    assert result.stderr.splitlines()[-1] == "ended by SIGTERM: ckpt_path=last goes on from the last checkpoint"
    assert "Traceback" not in result.stderr


def test_no_result():
    """The supervisor raises an error if the processes end with status 0 and without a result."""
    with pytest.raises(LightkitError, match="process 0 ended without a result"):
        Supervisor([sys.executable, "-c", "pass"], 2).run({})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_leader_is_ended(tmp_path, number):
    """However the leading process ends, the others end with it, and the checkpoints are complete."""
    arguments, environment = faulty("wait", tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-m", "lightkit.train", *arguments, "trainer.limit_train_batches=4"],
        cwd=tmp_path,
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A background job of a script ignores SIGINT, and its children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    checkpoint = tmp_path / "out" / "checkpoints" / "last.ckpt"
    wait_for(checkpoint.exists, process)
    process.send_signal(number)
    try:
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert errors.count("interrupted: ckpt_path=last goes on") == 1 and "Traceback" not in errors
    if number == signal.SIGTERM:
        assert process.returncode == 143
        assert errors.splitlines()[-1] == "ended by SIGTERM: ckpt_path=last goes on from the last checkpoint"
        assert "Traceback" not in errors
    assert_no_orphans(tmp_path, seconds=10)
    assert torch.load(checkpoint, weights_only=True)["state_dict"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["strategy=ddp", "strategy.compression=fp8"], "compression must be one of none, fp16, bf16, powersgd"),
        (["strategy=diloco", "+strategy.outer.lr=1"], "takes no argument 'outer'"),
        (["strategy=diloco", "optim=sgd", "+optim.master_weights=true"], "with master_weights the optimizer would"),
    ],
)
def test_bad_input(tmp_path, arguments, expected):
    """Wrong input gives one error line, whichever process finds it."""
    assert expected in the_error(run("train", *QUICK, *TWO, *arguments, cwd=tmp_path))


def test_several_machines_need_torchrun():
    """``trainer.num_nodes=2`` without torchrun is an error."""
    config = OmegaConf.create({"trainer": {"devices": 1, "num_nodes": 2}})
    with pytest.raises(ConfigError, match=r"trainer\.num_nodes=2: start the processes .* with torchrun"):
        count_processes(config)


@pytest.mark.parametrize(
    ("world", "local", "devices", "expected"),
    [
        (4, 2, 1, (2, 2)),
        (4, 2, "auto", (2, 2)),
        (3, 3, 3, (3, 1)),
        (3, 2, 1, "is no multiple of the 2 on this node"),
        (4, 2, 4, "devices=4"),
    ],
)
def test_devices_and_nodes_are_torchruns(monkeypatch, world, local, devices, expected):
    """The number of nodes comes from torchrun's variables; devices that contradict them are an error."""
    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    config = OmegaConf.create({"trainer": {"devices": devices}})
    if isinstance(expected, str):
        with pytest.raises(ConfigError, match=expected):
            with_processes_of_torchrun(config)
    else:
        trainer = with_processes_of_torchrun(config).trainer
        assert (trainer.devices, trainer.num_nodes) == expected
