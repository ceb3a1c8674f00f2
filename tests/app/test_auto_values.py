"""`auto` becomes a number that the records have, and a job with this number is the same job."""

from __future__ import annotations

import json

import pytest
import torch
from omegaconf import OmegaConf
from support.commands import run, the_error

from lightkit.app.auto_values import resolve
from lightkit.checkpoints import CONFIG_KEY, load_checkpoint
from lightkit.errors import CheckpointError

JOB = ["+experiment=cnn", "trainer.limit_train_batches=3", "trainer.limit_val_batches=1", "test=false"]
JOB += ["trainer.accelerator=cpu", "trainer.max_epochs=1", "trainer.deterministic=true"]


def read(directory):
    """Returns the configuration of a run, that in its checkpoint, and the weights."""
    checkpoint = load_checkpoint(directory / "checkpoints" / "last.ckpt")
    return OmegaConf.load(directory / "config.yaml"), checkpoint[CONFIG_KEY], checkpoint["state_dict"]


@pytest.mark.slow
def test_job(tmp_path):
    """The numbers are in every record; the job has the weights of one that was given them, and a resumed one searches
    no more."""
    auto = ["optim.lr=auto", "data.batch_size=auto"]
    found = run("train", *JOB, *auto, "run_dir=one", cwd=tmp_path, status=0)
    config, saved, weights = read(tmp_path / "one")
    rate, size = config.optim.lr, config.data.batch_size
    assert f"data.batch_size={size}: " in found.stdout and f"optim.lr={rate}: a tenth" in found.stdout
    assert (saved["optim"]["lr"], saved["data"]["batch_size"]) == (rate, size)
    given = [f"optim.lr={rate}", f"data.batch_size={size}", "run_dir=two"]
    run("train", *JOB, *given, cwd=tmp_path, status=0)
    assert all(torch.equal(value, weights[name]) for name, value in read(tmp_path / "two")[2].items())
    assert {path.name for path in (tmp_path / "one").iterdir()} == {path.name for path in (tmp_path / "two").iterdir()}
    more = ["trainer.max_epochs=2", "ckpt_path=one/checkpoints/last.ckpt", "run_dir=three"]
    resumed = run("train", *JOB, *auto, *more, cwd=tmp_path, status=0)
    assert f"from the checkpoint: optim.lr={rate}" in resumed.stdout and "a tenth" not in resumed.stdout
    assert read(tmp_path / "three")[0].data.batch_size == size
    assert json.loads((tmp_path / "three" / "metrics.json").read_text())["epochs"] == 2
    processes = ["strategy=ddp", "trainer.devices=2"]
    error = the_error(run("train", *JOB, *auto, *processes, cwd=tmp_path))
    assert "data.batch_size=auto searches in one process, and the job has 2" in error


def test_number_of_a_checkpoint(tmp_path, capsys):
    """A checkpoint's number replaces `auto`; a checkpoint without a number is an error that names the key."""
    path = tmp_path / "a.ckpt"
    for rate in (0.25, "auto", None, -1.0, True):
        torch.save({"state_dict": {}, CONFIG_KEY: {"optim": {"lr": rate}, "data": {"batch_size": 8}}}, path)
        nodes = {"optim": {"lr": "auto"}, "data": {"batch_size": 4}, "ckpt_path": str(path)}
        config = OmegaConf.create(nodes, flags={"struct": True})
        if rate == 0.25:
            resolve(config)
            assert (config.optim.lr, config.data.batch_size) == (0.25, 4)
            assert capsys.readouterr().out == "from the checkpoint: optim.lr=0.25\n"
            continue
        with pytest.raises(CheckpointError, match=r"has no number for optim\.lr=auto: set optim\.lr to a number"):
            resolve(config)


def test_nothing_to_do():
    """A configuration without `auto`, and one without the keys, stay as they are."""
    for nodes in ({"optim": {"lr": 0.1}, "data": {"batch_size": 4}}, {"optim": {}, "data": {}}):
        config = OmegaConf.create({**nodes, "ckpt_path": None})
        before = config.copy()
        resolve(config)
        assert config == before
