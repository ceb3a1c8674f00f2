"""Compression by the command line: smaller checkpoints that every command takes, resumption, and mistakes."""

from __future__ import annotations

import json
import re

import pytest
import torch

import lightkit.app.training
from lightkit.checkpoints import load_checkpoint
from lightkit.compress import QUANTIZATION_KEY, WIDTHS_KEY
from lightkit.errors import ConfigError

pytestmark = pytest.mark.slow

QUICK = ["+experiment=cnn", "trainer=cpu", "logger=csv", "test=false", "trainer.limit_train_batches=12"]
PRUNE = ["compress=[prune,sparse,distil]", "compress.prune.keep_macs=0.3", "compress.prune.rounds=2"]


@pytest.fixture
def job(call, monkeypatch, tmp_path):
    """Returns a function that runs a command in this process, without a report."""
    monkeypatch.setattr(lightkit.app.training.report, "write", lambda *arguments: None)
    return lambda *words, command="train": call(command, *words, cwd=tmp_path)


def test_pruned_job(job, tmp_path):
    """A pruned checkpoint is evaluated without further keys, and resumes with and without the group."""
    result = job(*QUICK, *PRUNE, "trainer.max_epochs=2", "hydra.run.dir=runs/cnn/a")
    assert result.returncode == 0, result.stderr
    assert "pruned to 3" in result.stdout or "pruned to 2" in result.stdout
    best = load_checkpoint(tmp_path / "runs/cnn/a/checkpoints/best.ckpt")
    widths = best[WIDTHS_KEY]
    assert widths["model.features.3.weight"][0] < 64
    weights = [w for w in best["state_dict"].values() if w.dim() > 1]
    assert max(float((w == 0).float().mean()) for w in weights) > 0.9
    metrics = json.loads((tmp_path / "runs/cnn/a/metrics.json").read_text())
    zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    assert metrics["compression/zeros"] == pytest.approx(zeros) and 0.1 < metrics["compression/macs_left"] <= 0.3
    assert "zeros" in result.stdout and "multiply-adds a sample" in result.stdout
    result = job("ckpt_path=runs/cnn/a", "output=x.json", command="evaluate")
    assert result.returncode == 0 and "test/accuracy" in result.stdout, result.stderr

    # The settings of the group come from the checkpoint, whose choice the command line repeats.
    result = job(*QUICK, PRUNE[0], "ckpt_path=last", "trainer.max_epochs=3", "hydra.run.dir=runs/cnn/b")
    assert result.returncode == 0, result.stderr
    assert "compress.prune.keep_macs=0.3" in result.stdout and "pruned to" not in result.stdout
    resumed = load_checkpoint(tmp_path / "runs/cnn/b/checkpoints/last.ckpt")
    assert resumed[WIDTHS_KEY] == widths

    result = job(
        *QUICK, "ckpt_path=runs/cnn/b/checkpoints/last.ckpt", "trainer.max_epochs=4", "hydra.run.dir=runs/cnn/c"
    )
    assert result.returncode == 0, result.stderr
    assert load_checkpoint(tmp_path / "runs/cnn/c/checkpoints/last.ckpt")[WIDTHS_KEY] == widths


def test_quantized_job(job, tmp_path):
    """A quantized checkpoint is evaluated with its bits, exported with int8 weights, and resumes with its group."""
    words = ["compress=[prune,int4]", "compress.prune.rounds=2", "compress.quantize.batches=4"]
    result = job(*QUICK, *words, "trainer.max_epochs=2", "hydra.run.dir=runs/cnn/q", "test=true")
    assert result.returncode == 0, result.stderr
    pattern = r"quantized [\d,]+ weights: [\d,]+ to 4 bits, [\d,]+ to 8 bits; the inputs of 5 layers have 8 bits"
    assert re.search(pattern, result.stdout)
    best = load_checkpoint(tmp_path / "runs/cnn/q/checkpoints/best.ckpt")
    assert best[QUANTIZATION_KEY]["weights"]["model.features.3.weight"] == [4, 0]
    assert len(best[QUANTIZATION_KEY]["inputs"]) == 5
    tested = json.loads((tmp_path / "runs/cnn/q/metrics.json").read_text())
    assert tested["compression/bits"] == 4 and "4, 8" in result.stdout
    result = job("ckpt_path=runs/cnn/q", "output=x.json", command="evaluate")
    evaluated = json.loads((tmp_path / "x.json").read_text())
    assert evaluated["test/accuracy"] == tested["test/accuracy"]
    assert evaluated["test/loss"] == pytest.approx(tested["test/loss"], rel=1e-6)

    result = job(*QUICK, words[0], "ckpt_path=last", "trainer.max_epochs=3", "hydra.run.dir=runs/cnn/r")
    assert result.returncode == 0, result.stderr
    assert "compress.quantize.batches=4" in result.stdout
    resumed = load_checkpoint(tmp_path / "runs/cnn/r/checkpoints/last.ckpt")
    assert resumed[QUANTIZATION_KEY]["weights"] == best[QUANTIZATION_KEY]["weights"]


def test_teacher(job, tmp_path):
    """A checkpoint teaches from the first step on."""
    assert job(*QUICK, "trainer.max_epochs=1", "hydra.run.dir=dense").returncode == 0
    words = ["compress=distil", "compress.distil.teacher=dense/checkpoints/best.ckpt", "compress.distil.weight=1.0"]
    result = job(*QUICK, *words, "trainer.max_epochs=1", "hydra.run.dir=student")
    assert result.returncode == 0, result.stderr
    assert "train/distillation" in (tmp_path / "student" / "metrics.csv").read_text().splitlines()[0]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["compress=prune", "compress.prune.keep_macs=2"], "keep_macs must be a number above 0 to 1, got 2"),
        (["compress=prune", "compile=true"], "compile=true compiles the model as it is at the start"),
        (["compress=distil"], "Distil has no teacher: give one, or use it with Prune, Sparsify or Quantize"),
        (["compress=distil", "compress.distil.teacher=gone.ckpt"], "there is no checkpoint gone.ckpt"),
        (["compress=pruned"], "prune"),
        (["compress=int8", "compress.quantize.bits=6"], "bits must be one of 2, 3, 4, 8, got 6"),
        (["compress=[int2,sparse]"], "weights of 2 bits have no zero for Sparsify"),
        (["compress=int8", "compile=true"], "compile=true compiles the model as it is at the start"),
        (
            ["compress=prune", "strategy=parameter_server", "trainer.devices=1"],
            "Prune does not go with ParameterServer",
        ),
        (["compress=prune", "callbacks=[default,swa]"], "would average the weights of models of several sizes"),
    ],
)
def test_mistakes(job, words, expected):
    """A mistake is one line before the training."""
    result = job(*QUICK, "trainer.max_epochs=1", *words)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 1 and len(errors) == 1 and expected in errors[0], result.stderr


def test_default_is_unchanged(job, tmp_path):
    """Without the group a checkpoint has no widths, and the model all of its parameters."""
    assert job(*QUICK, "trainer.max_epochs=1", "hydra.run.dir=dense").returncode == 0
    checkpoint = load_checkpoint(tmp_path / "dense/checkpoints/last.ckpt")
    assert WIDTHS_KEY not in checkpoint
    assert sum(value.numel() for value in checkpoint["state_dict"].values()) == 93_322
    assert isinstance(checkpoint["state_dict"]["model.features.0.weight"], torch.Tensor)


def test_smallest_model(job, monkeypatch, tmp_path):
    """`compress.max_drop` trains the whole model, and leaves the smallest one beside it."""
    words = [*QUICK, "trainer.max_epochs=1", "compress=prune", "compress.max_drop=0.9"]
    result = job(*words, "hydra.run.dir=runs/cnn/a", "test=true")
    assert result.returncode == 0, result.stderr
    assert WIDTHS_KEY not in load_checkpoint(tmp_path / "runs/cnn/a/checkpoints/best.ckpt")
    found = load_checkpoint(tmp_path / "runs/cnn/a/compressed/checkpoints/best.ckpt")
    assert found[WIDTHS_KEY]["model.features.3.weight"][0] < 64
    metrics = json.loads((tmp_path / "runs/cnn/a/metrics.json").read_text())
    assert metrics["compression/macs_left"] <= 0.18 and 0 <= metrics["compression/accuracy"] <= 1
    assert "accuracy once compressed" in result.stdout and "dense, trained on" in result.stdout
    result = job("ckpt_path=runs/cnn/a/compressed/deploy.ckpt", "output=x.json", command="evaluate")
    assert json.loads((tmp_path / "x.json").read_text())["test/accuracy"] == metrics["compression/accuracy"]

    result = job(*words, "strategy=ddp", "trainer.devices=2")
    assert result.returncode == 1 and "compress.max_drop: the job has 2 processes" in result.stderr
    result = job(*words, "~task.metrics.accuracy")
    assert result.returncode == 1 and "compress.max_drop: the task has no metric accuracy" in result.stderr

    def fail(path, request):
        raise ConfigError("each model has lost more")

    monkeypatch.setattr("lightkit.app.compression_after_training.compress_checkpoint", fail)
    with pytest.warns(UserWarning, match="no smaller model: each model has lost more"):
        result = job(*words, "hydra.run.dir=runs/cnn/b", "test=true")
    assert result.returncode == 0, result.stderr
    assert "test/accuracy" in json.loads((tmp_path / "runs/cnn/b/metrics.json").read_text())
