"""Reports of data with names from an untrusted source."""

from __future__ import annotations

import json

import torch

from lightkit.app.report import classification, figures, forecast, language_model, page
from lightkit.app.report.section import Section
from lightkit.data import Series
from lightkit.tasks import ForecastTask

EVIL = "<script>alert(1)</script>\x1b[2J\u202e & $\\frac{1}$ \"'"


def test_the_page_shows_names_and_runs_none(tmp_path):
    """The page escapes markup and control characters of a name everywhere."""
    run_dir = tmp_path / EVIL.replace("/", "")
    run_dir.mkdir()
    (run_dir / "environment.json").write_text(json.dumps({EVIL: EVIL}))
    (run_dir / "config.yaml").write_text(f"name: {EVIL}\n{EVIL}\n")
    classes = (EVIL, "other")
    table = classification.class_table(torch.eye(2), torch.tensor([0, 1]), classes)
    html = page.render(run_dir, {EVIL: 1.0, "test/loss": 0.5}, [Section(EVIL, html=table)])
    assert "<script" not in html and "\x1b" not in html and "\u202e" not in html
    assert html.count("&lt;script&gt;") >= 6


def test_figures_draw_names_as_they_are(tmp_path):
    """Figures draw a name between dollar signs literally; as a formula matplotlib would reject it."""
    classes = (EVIL, "$\\bad$")
    matrix = classification.confusion_matrix(torch.eye(2), torch.tensor([0, 1]), classes)
    figures.save(matrix, tmp_path / "matrix.png")
    images = torch.zeros(2, 4, 4, dtype=torch.uint8)
    figures.save(
        classification.worst_mistakes(images, torch.eye(2), torch.tensor([1, 0]), classes), tmp_path / "worst.png"
    )
    (tmp_path / "values.csv").write_text("$\\bad$\n" + "\n".join(str(i % 7) for i in range(60)) + "\n")
    data = Series(path=str(tmp_path / "values.csv"), history=4, horizon=2)
    data.setup()
    target = data.test.target
    recorded = {name: target for name in ("forecast", "target", "lower", "upper")}
    task = ForecastTask(torch.nn.Linear(1, 1), horizon=2)
    (tmp_path / "run").mkdir()
    assert len(forecast.sections(tmp_path / "run", task, data, recorded)) == 3


def test_texts_are_shown_without_what_a_page_obeys():
    """The page escapes markup, control characters and bidirectional controls in a model's training text."""
    text = "<b>\x1b[2J\u202e&amp;\x07".encode() * 20
    windows = torch.frombuffer(bytearray(text), dtype=torch.uint8).unfold(0, 9, 8)
    html = language_model.passage(windows, torch.ones(len(windows), 8))
    shown = html[html.index("<pre") :]
    assert "<b>" not in shown and "\x1b" not in shown and "\u202e" not in shown and "\x07" not in shown
    assert "&lt;" in shown
