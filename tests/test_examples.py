"""The programs in examples/ run as they are, and reach what they are for."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

_EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def _main(name: str) -> Callable:
    return runpy.run_path(str(_EXAMPLES / f"{name}.py"))["main"]


def test_every_example_has_a_test():
    """A program that nobody runs breaks unseen."""
    tested = {"ops_alone", "strategy", "trainer_with_callbacks"}
    assert {path.stem for path in _EXAMPLES.glob("*.py")} == tested


def test_a_trainer_with_the_callbacks(capsys):
    """A stranger's module trains on the kernels."""
    assert _main("trainer_with_callbacks")() < 0.3
    assert "replaced by lightkit.optim.Adam" in capsys.readouterr().out


def test_ops_alone():
    """A plain loop learns with the ops and an optimizer alone."""
    first, last = _main("ops_alone")()
    assert last < 0.8 * first


@pytest.mark.usefixtures("leaves_no_process_group")
def test_a_strategy():
    """One process takes the same way as two."""
    assert _main("strategy")(processes=1) < 0.05
