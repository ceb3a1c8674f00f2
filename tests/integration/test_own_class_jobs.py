"""Jobs with modules, models and data of a user's own train, resume, are evaluated and used for predictions."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import yaml
from PIL import Image
from support.commands import run, the_error, with_modules

import lightkit.app.training
from lightkit.checkpoints import CONFIG_KEY, load_checkpoint

pytestmark = pytest.mark.slow

QUICK = ["+experiment=cnn", "+debug=quick", "trainer=cpu", "logger=csv"]


@pytest.fixture
def job(call, monkeypatch, tmp_path):
    """Returns a function that runs a command in this process with the classes of `strangers`, without a report."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setenv("LIGHTKIT_TARGETS", "strangers")
    monkeypatch.setattr(lightkit.app.training.report, "write", lambda *arguments: None)

    def start(name, *words):
        return call(name, *words, cwd=tmp_path)

    return start


def newest(directory, name="best"):
    return sorted(directory.glob(f"runs/*/*/checkpoints/{name}.ckpt"))[-1]


def test_a_model(job, tmp_path):
    """A plain module that returns logits trains, is restored and classifies; the metric has the classes of the data."""
    result = job("train", *QUICK, "model._target_=strangers.Net", "+model.width=4")
    assert result.returncode == 0, result.stderr
    path = newest(tmp_path)
    config = yaml.safe_load((path.parents[1] / "config.yaml").read_text())
    assert config["model"] == {"_target_": "strangers.Net", "width": 4}
    assert config["task"]["metrics"]["accuracy"]["num_classes"] == 10
    assert yaml.safe_load((path.parents[1] / ".hydra" / "config.yaml").read_text())["model"] == config["model"]
    assert "test/accuracy" in job("evaluate", f"ckpt_path={path}", "accelerator=cpu").stdout
    Image.fromarray(numpy.zeros((28, 28), numpy.uint8)).save(tmp_path / "a.png")
    assert "a.png" in job("predict", f"ckpt_path={path}", "input=a.png").stdout


def test_a_module_of_ones_own(job, tmp_path):
    """A program in one module trains without lightkit's parts; its validation loss decides which checkpoint is best."""
    with pytest.warns(UserWarning, match="monitor=val/loss of the checkpoints is not logged: val_loss is taken for it"):
        result = job("train", *QUICK, "task._target_=strangers.Whole", "+task.lr=0.01")
    assert result.returncode == 0, result.stderr
    assert "val_loss" in result.stdout and "test_loss" in result.stdout
    path = newest(tmp_path)
    config = load_checkpoint(path)[CONFIG_KEY]
    assert config["model"] is config["optim"] is config["scheduler"] is None
    assert "test_loss" in job("evaluate", f"ckpt_path={path}", "accelerator=cpu").stdout

    words = ["task._target_=strangers.Whole", "+task.lr=0.01", "ckpt_path=last", "trainer.max_epochs=2"]
    result = job("train", *QUICK, *words)
    assert result.returncode == 0, result.stderr
    assert load_checkpoint(newest(tmp_path, "last"))["epoch"] == 1
    # The state of the callback has been found, although another metric took the place of its monitor.
    (state,) = (s for key, s in load_checkpoint(newest(tmp_path))["callbacks"].items() if key.startswith("Checkpoint"))
    assert state["monitor"] == "val_loss" and state["best_model_score"] is not None

    Image.fromarray(numpy.zeros((28, 28), numpy.uint8)).save(tmp_path / "a.png")
    error = the_error(job("predict", f"ckpt_path={path}", "input=a.png"))
    assert "predict_step of Whole that returns the probabilities" in error and "a tensor (1, 10)" in error


def test_a_prediction_with_a_module_of_ones_own(job, tmp_path):
    """A `predict_step` that returns probabilities is all that a prediction of images needs."""
    assert job("train", *QUICK, "task._target_=strangers.Predicting", "test=false").returncode == 0
    Image.fromarray(numpy.zeros((28, 28), numpy.uint8)).save(tmp_path / "a.png")
    assert "a.png" in job("predict", f"ckpt_path={newest(tmp_path)}", "input=a.png").stdout


def test_a_module_that_gets_its_parts(job, tmp_path):
    """A module that saves all of its arguments, among them the model, is resumed; one that cannot test does not."""
    words = [*QUICK, "task._target_=strangers.Template", "optim._target_=torch.optim.RMSprop", "optim.lr=0.01"]
    with pytest.warns(UserWarning, match="the best checkpoint is the latest one; callbacks.checkpoint.monitor=NAME"):
        result = job("train", *words)
    assert result.returncode == 0, result.stderr
    assert "no test: Template has no test_step" in result.stdout
    result = job("train", *words, "ckpt_path=last", "trainer.max_epochs=2")
    assert result.returncode == 0, result.stderr
    last = load_checkpoint(newest(tmp_path, "last"))
    assert last["epoch"] == 1 and set(last["hyper_parameters"]) == {"scheduler"}
    # Without the optimizer on the command line it is that of the checkpoint.
    result = job("train", *QUICK, "task._target_=strangers.Template", "ckpt_path=last", "trainer.max_epochs=3")
    assert result.returncode == 0 and "optim=torch.optim.RMSprop" in result.stdout, result.stderr


def test_data_of_ones_own(job, tmp_path):
    """A data module gets the seed of the job, and trains without a test."""
    words = ["data._target_=strangers.Images", "+data.batch=30", "seed=7"]
    result = job("train", *QUICK, *words)
    assert result.returncode == 0, result.stderr
    assert "no test: Images has no test_dataloader" in result.stdout
    assert load_checkpoint(newest(tmp_path))[CONFIG_KEY]["data"] == {
        "_target_": "strangers.Images",
        "batch": 30,
        "seed": 7,
    }


def test_compile_needs_a_model(job):
    """A module without an attribute `model` has nothing that lightkit knows how to compile."""
    result = job("train", *QUICK, "task._target_=strangers.Whole", "compile=true")
    assert "compile=true compiles the attribute `model` of the task, which strangers.Whole lacks" in the_error(result)


def test_a_sweep_over_models(job, tmp_path):
    """Each job of a sweep drops the keys of its own replaced class."""
    result = job("train", *QUICK, "test=false", "-m", "model._target_=strangers.Net,lightkit.models.CNN")
    assert result.returncode == 0, result.stderr
    configs = [yaml.safe_load(path.read_text()) for path in sorted(tmp_path.glob("runs/cnn/sweep*/*/config.yaml"))]
    assert [len(config["model"]) for config in configs] == [1, 5]


def test_two_processes(tmp_path):
    """The other processes train with the adapted configuration, too."""
    words = ["task._target_=strangers.Whole", "strategy=ddp", "trainer.devices=2"]
    run("train", *QUICK, *words, cwd=tmp_path, environment=with_modules("strangers"), status=0)
    (record,) = tmp_path.glob("runs/cnn/*/config.yaml")
    config = yaml.safe_load(record.read_text())
    assert (config["model"], config["optim"], config["trainer"]["devices"]) == (None, None, 2)
    assert (record.parent / "checkpoints" / "last.ckpt").exists()


def test_files_of_ones_own(job, tmp_path):
    """`--config-dir` adds experiments and models of a folder outside of lightkit, for one job and for a sweep."""
    for name, text in {
        "model/net.yaml": "_target_: strangers.Net\nwidth: 32\n",
        "experiment/own.yaml": "# @package _global_\ndefaults:\n  - override /model: net\nname: own\n",
    }.items():
        (tmp_path / "conf" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "conf" / name).write_text(text)
    words = ["--config-dir", "conf", "+experiment=own", *QUICK[1:], "test=false"]
    result = job("train", *words)
    assert result.returncode == 0, result.stderr
    result = job("train", *words, "-m", "model.width=8,16")
    assert result.returncode == 0, result.stderr
    configs = [yaml.safe_load(path.read_text()) for path in sorted(tmp_path.glob("runs/own/**/config.yaml"))]
    assert {config["model"]["width"] for config in configs if "run_dir" in config} == {8, 16, 32}
    assert "did you mean own?" in the_error(job("train", "--config-dir", "conf", "+experiment=ow"))
