"""Reports of data with names from an untrusted source."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from types import SimpleNamespace

import matplotlib
import pytest
import torch
from matplotlib import font_manager
from matplotlib.text import Text

from lightkit.app import report
from lightkit.app.report import classification, figures, fonts, forecast, language_model, page
from lightkit.app.report.section import Section
from lightkit.data import Series
from lightkit.tasks import ClassificationTask, ForecastTask

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
    # The page has scripts of its own.
    assert "<script>alert" not in html and "\x1b" not in html and "\u202e" not in html
    assert html.count("&lt;script&gt;alert") >= 6


# What people call classes and columns, and what matplotlib takes for a formula, or for a line without a legend.
NAMES = [
    *(
        "Price $",
        "US$ and $",
        "$\\bad$",
        "a_b^c",
        "\\alpha",
        "100%",
        "{}",
        "_x",
        "\\$ $ \\$",
        "$",
        "$$",
        "#",
        "~",
        EVIL,
    ),
    *("Цена", "سعر", "气温", "👩‍👧 😀", "\udcff", "", " ", "a\nb", "n" * 100, "\u1d81", EVIL),
]


def are_drawn(sections):
    return [section.html is None for section in sections]


@pytest.mark.filterwarnings("error")
def test_figures_draw_names_of_classes_as_they_are(tmp_path):
    """Figures draw each name literally, without a warning about fonts and without a formula."""
    count = len(NAMES)
    data = SimpleNamespace(classes=NAMES, test=SimpleNamespace(images=torch.zeros(count, 4, 4, dtype=torch.uint8)))
    recorded = {"logits": torch.eye(count), "labels": torch.arange(count).roll(1)}
    assert are_drawn(classification.sections(tmp_path, data, recorded)) == [True, True, False]


@pytest.mark.parametrize("name", ["US$ and $", "$\\bad$", "_x", "气温", "\udcff"])
@pytest.mark.filterwarnings("error")
def test_figures_draw_names_of_columns_as_they_are(tmp_path, name):
    """The figures of a forecast have the name of the column as a text."""
    (tmp_path / "values.csv").write_text("x\n" + "\n".join(str(i % 7) for i in range(60)) + "\n")
    data = Series(path=str(tmp_path / "values.csv"), history=4, horizon=2)
    data.setup()
    data.series = dataclasses.replace(data.series, name=name)
    recorded = {key: data.test.target for key in ("forecast", "target", "lower", "upper")}
    task = ForecastTask(torch.nn.Linear(1, 1), horizon=2)
    assert are_drawn(forecast.sections(tmp_path, task, data, recorded)) == [True, True, False]


def test_texts_are_shown_without_what_a_page_obeys():
    """The page escapes markup, control characters and bidirectional controls in a model's training text."""
    text = "<b>\x1b[2J\u202e&amp;\x07".encode() * 20
    windows = torch.frombuffer(bytearray(text), dtype=torch.uint8).unfold(0, 9, 8)
    html = language_model.passage(windows, torch.ones(len(windows), 8))
    shown = html[html.index("<pre") :]
    assert "<b>" not in shown and "\x1b" not in shown and "\u202e" not in shown and "\x07" not in shown
    assert "&lt;" in shown


@pytest.fixture
def matplotlibs_own_fonts(monkeypatch):
    """Leaves the fonts of matplotlib alone, as on a machine without others."""
    own = [font for font in font_manager.fontManager.ttflist if font.fname.startswith(matplotlib.get_data_path())]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
    monkeypatch.setattr(fonts, "_families", {})


@pytest.mark.usefixtures("matplotlibs_own_fonts")
def test_fonts(tmp_path):
    """A character that another installed font has is drawn in that font, and one that none has is escaped."""
    shown = figures.escape_names(["Цена", "\u1d81", "气温 x", "🦄"])
    assert shown == ["Цена", "\u1d81", r"\u6c14\u6e29 x", r"\U0001f984"]
    assert fonts.families_for("abc Цена") == ["sans-serif"]
    assert fonts.families_for("\u1d81") == ["sans-serif", "STIXGeneral"]


def test_a_users_style_does_not_change_a_report(tmp_path):
    """A matplotlibrc that asks for LaTeX or formulas has no effect on the texts of a figure."""
    with matplotlib.rc_context({"text.usetex": True, "axes.formatter.use_mathtext": True, "text.parse_math": True}):
        matrix = classification.confusion_matrix(torch.eye(2), torch.tensor([0, 1]), ("a_b", "$x^2$"))
        figures.save(matrix, tmp_path / "matrix.png")
    texts = [text for text in matrix.findobj(Text) if text.get_text()]
    assert {"a_b", "$x^2$"} <= {text.get_text() for text in texts}
    assert not any(text.get_parse_math() or text.get_usetex() for text in texts)


def run_directory(tmp_path):
    (tmp_path / "environment.json").write_text("{}")
    (tmp_path / "config.yaml").write_text("name: x\n")
    (tmp_path / "metrics.csv").write_text("step,train/loss_step\n0,nan\n1,inf\n2,1e300\n")
    return tmp_path


def test_a_section_that_fails(monkeypatch, tmp_path):
    """A figure that cannot be drawn says so in its section and in one warning; the rest of the report is there."""
    monkeypatch.setattr(classification, "confusion_matrix", lambda *arguments: 1 / 0)
    data = SimpleNamespace(classes=("a", "b"), test=None)
    recorded = {"logits": torch.eye(2), "labels": torch.tensor([1, 0])}
    task = ClassificationTask(torch.nn.Linear(1, 1))
    with pytest.warns(UserWarning, match="'Confusion matrix' could not be made: ZeroDivisionError") as warned:
        target = report.write(run_directory(tmp_path), {"test/loss": float("nan")}, task, data, recorded)
    html = target.read_text(encoding="utf-8")
    assert "This section could not be made: ZeroDivisionError: division by zero" in html
    assert "Class by class" in html and "Learning curves" in html and len(warned) == 1


@pytest.mark.parametrize("broken", [{}, {"logits": torch.eye(2)}, {"logits": "x", "labels": 3}])
def test_a_report_never_raises(monkeypatch, tmp_path, broken):
    """Whatever the test has recorded, the page or a warning comes of it, and the training keeps its metrics."""
    data = SimpleNamespace(classes=("a", "b"), test=None)
    task = ClassificationTask(torch.nn.Linear(1, 1))
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        assert report.write(run_directory(tmp_path), {}, task, data, broken).exists()
        (tmp_path / "environment.json").unlink()
        assert report.write(tmp_path, {}, task, data, broken) is None


def test_numbers_of_a_page(tmp_path):
    """Cards show small and large numbers, and NaN, as they are."""
    metrics = {"test/loss": 1e-5, "test/accuracy": 1e-5, "test/mae": 1e12, "test/rmse": float("nan"), "epochs": 3}
    html = page.render(run_directory(tmp_path), metrics, [])
    for shown in ("1e-05", "0.001%", "1e+12", "nan", "3"):
        assert f"<b>{shown}</b>" in html


@pytest.mark.filterwarnings("error")
def test_a_model_that_diverged(tmp_path):
    """The bits of a model that are NaN or infinite have no bar, and the others are drawn."""
    for bits in (math.nan, math.inf):
        bars = language_model.bits_per_byte({"test/bits_per_byte": bits, "baseline/unigram_bits_per_byte": 5.0})
        assert figures.save(bars, tmp_path / "bars.png").exists()
