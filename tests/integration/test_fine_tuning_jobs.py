"""Fine-tuning by the command line: initial weights, frozen parts, resumption, two processes, and the record."""

from __future__ import annotations

import pytest
import torch
import yaml
from support.commands import run, the_error

import lightkit.app.training
from lightkit.checkpoints import load_checkpoint

pytestmark = pytest.mark.slow

QUICK = ["+experiment=cnn", "+debug=quick", "trainer=cpu", "logger=csv", "test=false"]
FREEZE = ["freeze=[features.*]", "unfreeze={1: [features.6]}"]


@pytest.fixture
def job(call, monkeypatch, tmp_path):
    """Returns a function that runs a command in this process, without a report."""
    monkeypatch.setattr(lightkit.app.training.report, "write", lambda *arguments: None)
    return lambda *words: call("train", *QUICK, *words, cwd=tmp_path)


@pytest.fixture
def start(job, tmp_path):
    """The weights of a training before, with averages, which are what such a training is judged by."""
    assert job("hydra.run.dir=first", "optim.ema_decay=0.5", "trainer.max_epochs=2").returncode == 0
    return load_checkpoint(tmp_path / "first" / "checkpoints" / "last.ckpt")["state_dict"]


def unchanged(path, start):
    weights = load_checkpoint(path)["state_dict"]
    return {name for name, value in start.items() if name.endswith("weight") and torch.equal(weights[name], value)}


def test_from_the_weights_of_another_run(job, start, tmp_path):
    """A fine-tuning begins with the averages, freezes, and resumes without reading its file or its words again."""
    words = ["init_from=first/checkpoints/last.ckpt", "name=tuned"]
    result = job(*words, *FREEZE, "hydra.run.dir=runs/tuned/a")
    assert result.returncode == 0, result.stderr
    assert "init_from=first/checkpoints/last.ckpt: 10 tensors loaded\n" in result.stdout
    assert "frozen: 55,744 of 93,322 parameters" in result.stdout
    frozen = {f"model.features.{index}.weight" for index in (0, 3, 6)}
    assert unchanged(tmp_path / "runs/tuned/a/checkpoints/last.ckpt", start) == frozen
    config = yaml.safe_load((tmp_path / "runs/tuned/a/config.yaml").read_text())
    assert config["freeze"] == ["features.*"] and config["unfreeze"] == {1: ["features.6"]}

    (tmp_path / "first" / "checkpoints" / "last.ckpt").unlink()
    result = job(*words, "ckpt_path=last", "trainer.max_epochs=2", "hydra.run.dir=runs/tuned/b")
    assert result.returncode == 0, result.stderr
    assert "from the checkpoint: freeze=['features.*'], unfreeze={1: ['features.6']}" in result.stdout
    assert "is not read again: the training resumes from" in result.stdout and "2 tensors unfrozen" in result.stdout
    assert unchanged(tmp_path / "runs/tuned/b/checkpoints/last.ckpt", start) == frozen - {"model.features.6.weight"}
    # A run that began otherwise is another run.
    error = the_error(job("name=tuned", "ckpt_path=last", "trainer.max_epochs=3"))
    assert 'init_from="first/checkpoints/last.ckpt" there and null here' in error


def test_another_number_of_classes(job, start, tmp_path):
    """The head for other classes is found, and one line names its tensors."""
    torch.save({name.removeprefix("model."): value for name, value in start.items()}, tmp_path / "plain.pt")
    weights = {**torch.load(tmp_path / "plain.pt"), "classifier.3.weight": torch.ones(3, 64)}
    torch.save({**weights, "classifier.3.bias": torch.ones(3)}, tmp_path / "three.pt")
    result = job("init_from=three.pt")
    assert result.returncode == 0, result.stderr
    assert "init_from=three.pt: 8 tensors loaded; new: classifier.3.weight, classifier.3.bias" in result.stdout


@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_two_processes(start, tmp_path, strategy):
    """Both processes train what is unfrozen with the gradients of both: the averages of weights stay the same."""
    words = ["init_from=first/checkpoints/last.ckpt", *FREEZE, "trainer.max_epochs=2", "trainer.limit_train_batches=3"]
    two = [f"strategy={strategy}", "trainer.devices=2", "data.batch_size=16", "hydra.run.dir=two"]
    run("train", *QUICK, *words, *two, cwd=tmp_path, status=0)
    run("train", *QUICK, *words, "data.batch_size=32", "hydra.run.dir=one", cwd=tmp_path, status=0)
    one, other = (load_checkpoint(tmp_path / name / "checkpoints/last.ckpt")["state_dict"] for name in ("one", "two"))
    assert unchanged(tmp_path / "two/checkpoints/last.ckpt", start) == {f"model.features.{i}.weight" for i in (0, 3)}
    assert torch.allclose(one["model.features.6.weight"], other["model.features.6.weight"], atol=1e-4)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["unfreeze={1: a}"], "freeze names no"),
        (["init_skip=[a]"], "init_skip has no effect without init_from"),
        (["freeze=[featurs.*]"], "freeze: 'featurs.*' matches no parameter or module; did you mean features"),
        (["init_from=gone.ckpt"], "there is no checkpoint gone.ckpt"),
    ],
)
def test_mistakes(job, words, expected):
    """A mistake is one line before the training."""
    assert expected in the_error(job(*words))
