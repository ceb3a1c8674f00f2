"""Processes that train together agree on the class weights and on the best checkpoints, also after a resumption."""

from __future__ import annotations

import json

import pytest
from support.commands import run

from lightkit.checkpoints import load_checkpoint

pytestmark = pytest.mark.slow

JOB = [
    "+experiment=cnn",
    "+debug=quick",
    "logger=csv",
    "task.loss.weight=balanced",
    "callbacks.checkpoint.save_top_k=2",
]


def test_resuming_elsewhere(tmp_path):
    """The second training has the best checkpoints of both, with class weights, and `evaluate` measures with them.

    The workers of a parameter server are the strictest: they exchange JSON values alone.
    """
    processes = ["strategy=parameter_server", "trainer.devices=2", "trainer.accelerator=cpu"]
    run("train", *JOB, *processes, "hydra.run.dir=a", "trainer.max_epochs=2", cwd=tmp_path, status=0)
    more = ["hydra.run.dir=b", "trainer.max_epochs=3", "ckpt_path=a/checkpoints/last.ckpt"]
    run("train", *JOB, *processes, *more, cwd=tmp_path, status=0)
    files = sorted((tmp_path / "b" / "checkpoints").glob("*.ckpt"))
    assert len(files) == 4 and {"best.ckpt", "last.ckpt"} < {path.name for path in files}
    (best,) = (load_checkpoint(path) for path in files if path.name == "best.ckpt")
    (state,) = (state for key, state in best["callbacks"].items() if key.startswith("Checkpoint"))
    assert best["state_dict"]["loss.weight"].tolist() == pytest.approx([1.0] * 10)
    metrics = json.loads((tmp_path / "b" / "metrics.json").read_text())
    evaluate = ["ckpt_path=b/checkpoints/best.ckpt", "output=figures.json"]
    run("evaluate", *evaluate, cwd=tmp_path, status=0)
    # The run and this command test with the same checkpoint; the run of +debug=quick on one batch.
    assert json.loads((tmp_path / "figures.json").read_text()).keys() <= metrics.keys()
    assert float(state["best_model_score"]) == float(state["current_score"])
