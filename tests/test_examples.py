"""The programs in examples/ run as they are, and reach what they are for."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

_EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def _main(name: str) -> Callable:
    return runpy.run_path(str(_EXAMPLES / f"{name}.py"))["main"]


def test_every_example_has_a_test():
    """A program that nobody runs breaks unseen."""
    tested = {"arrays", "ops_alone", "search_and_schedule", "strategy", "trainer_with_callbacks"}
    assert {path.stem for path in _EXAMPLES.glob("*.py")} == tested
    assert {path.parent.name for path in _EXAMPLES.glob("*/*.py")} == {"own_model"}


def test_a_trainer_with_the_callbacks(capsys):
    """A stranger's module trains on the kernels."""
    assert _main("trainer_with_callbacks")() < 0.3
    assert "replaced by lightkit.optim.Adam" in capsys.readouterr().out


def test_arrays():
    """The documented CNN learns digits in one call."""
    assert _main("arrays")(epochs=1) > 0.8


def test_search_and_schedule(capsys):
    """The numbers that the searches find train the model, whose layers are printed once."""
    assert _main("search_and_schedule")() < 0.5
    out = capsys.readouterr().out
    assert "batch size 64 (an epoch of 2,048 samples" in out and out.count("(model)  Sequential") == 1


def test_ops_alone():
    """A plain loop learns with the ops and an optimizer alone."""
    first, last = _main("ops_alone")()
    assert last < 0.8 * first


def test_a_strategy():
    """One process takes the same way as two."""
    assert _main("strategy")(processes=1) < 0.05


@pytest.mark.slow
def test_a_model_of_ones_own(call, monkeypatch, tmp_path):
    """The command trains and evaluates a model that only a folder outside of lightkit has."""
    folder = _EXAMPLES / "own_model"
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("LIGHTKIT_TARGETS", "bars")
    words = ["--config-dir", str(folder / "conf"), "+experiment=bars", "trainer=cpu", "hydra.run.dir=run"]
    assert call("train", *words, cwd=tmp_path).returncode == 0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["test/accuracy"] > 0.9
    result = call("evaluate", "ckpt_path=run/checkpoints/best.ckpt", "accelerator=cpu", cwd=tmp_path)
    assert "test/accuracy" in result.stdout
