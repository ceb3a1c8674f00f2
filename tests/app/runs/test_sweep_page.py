"""The page of a sweep: its best job, its parameters, and what is wrong with it."""

from __future__ import annotations

import json
import os
import warnings

import pytest
from support.browser import CHROMIUM, browser
from support.runs import make_run

from lightkit.app.runs import sweep_page
from lightkit.app.runs.sweep_page import SWEEP_PAGE, read_sweep, update_sweep_page, write_sweep_page

EVIL = "</script><img src=x onerror=alert(1)>"


@pytest.fixture
def sweep(tmp_path):
    """A sweep of ten jobs, of which one failed and one diverged."""
    for number in range(10):
        rate = 10 ** (-number / 2)
        words = ["+experiment=cnn", f"optim.lr={rate}", f"optim={('adam', 'sgd')[number % 2]}"]
        metrics = {"val/loss": None if number == 3 else abs(number - 6) + 0.5, "test/accuracy": 0.9}
        result = float("inf") if number == 3 else abs(number - 6) + 0.5
        options = {"error": f"E: {EVIL}"} if number == 7 else {"result": result}
        options |= {"overrides": words, "job": "j", "losses": (2.0, 0.5)}
        make_run(tmp_path / str(number), 1e9, None if number == 7 else metrics, **options)
    (tmp_path / "sweep.json").write_text(json.dumps({"objective": "val/loss", "direction": "minimize"}))
    return tmp_path


def test_best(sweep):
    """The best job is the finished one with the best objective in the direction of the sweeper."""
    summary = read_sweep(sweep)
    assert [run.directory.name for run in summary.jobs] == [str(number) for number in range(10)]
    assert summary.best == 6 and list(summary.parameters) == ["optim.lr", "optim"]
    # Of the job that failed the last value that it logged is shown; it is not the best, though it is no worse.
    assert summary.values()[3] is None and summary.values()[7] == 0.5
    (sweep / "sweep.json").write_text(json.dumps({"objective": "val/loss", "direction": "maximize"}))
    assert read_sweep(sweep).best == 0
    # Without a sweeper's direction the name of the objective tells it, and without a record the jobs do.
    (sweep / "sweep.json").unlink()
    assert read_sweep(sweep).best == 6 and read_sweep(sweep).objective == "val/loss"


def test_page(sweep):
    """The page marks the best job, links to the reports, and shows names as texts."""
    page = write_sweep_page(sweep).read_text()
    assert '<a href="./6/report.html">6 ★</a>' in page and page.count('class="best"') == 1
    assert 'href="./7/report.html"' not in page and "9 finished, 1 failed" in page
    assert EVIL not in page and "onerror=alert(1)&gt;" in page
    assert len(page) < 1e6


@pytest.mark.parametrize("content", ["", "[]", '{"objective": 3, "direction": []}', '{"objective": "<b>"}'])
def test_damaged_sweeps(sweep, content):
    """A page comes of a damaged record, of damaged jobs and of none at all."""
    (sweep / "sweep.json").write_text(content)
    (sweep / "2" / ".hydra" / "run.json").write_text("{")
    assert "jobs" in write_sweep_page(sweep).read_text()
    empty = sweep / "new"
    empty.mkdir()
    assert "no job yet" in write_sweep_page(empty).read_text()


def test_updates(sweep, monkeypatch):
    """A page that takes long is not written after every job, except at the end; an error is one warning."""
    written = []
    monkeypatch.setattr(sweep_page, "write_sweep_page", lambda directory: written.append(directory))
    update_sweep_page(sweep)
    (sweep / SWEEP_PAGE).touch()
    monkeypatch.setitem(sweep_page._last_seconds, sweep / SWEEP_PAGE, 10.0)
    update_sweep_page(sweep)
    assert len(written) == 1
    update_sweep_page(sweep, force=True)
    monkeypatch.setitem(sweep_page._last_seconds, sweep / SWEEP_PAGE, 0.001)
    os.utime(sweep / SWEEP_PAGE, (1, 1))
    update_sweep_page(sweep)
    assert len(written) == 3

    def fail(directory):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sweep_page, "write_sweep_page", fail)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        update_sweep_page(sweep, force=True)
    assert len(caught) == 1 and "No space left" in str(caught[0].message)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser(sweep, tmp_path_factory, width):
    """The page draws a line for each job, sorts its table, selects jobs along an axis, and asks the network nothing."""
    page = write_sweep_page(sweep)
    with browser(tmp_path_factory.mktemp("profile")) as window:
        window.open(page, width)
        assert window.errors == [] and window.requests == [page.as_uri()]
        assert window.run("document.documentElement.scrollWidth") <= width
        assert window.run("document.querySelectorAll('#parallel .job').length") == 10
        assert window.run("document.querySelectorAll('#curves .line').length") > 0
        assert window.run("document.querySelectorAll('img').length") == 0
        column = "[...document.querySelectorAll('tbody tr')].map(row => row.cells[2].textContent)"
        heading = "[...document.querySelectorAll('th button')].find(b => b.textContent === 'val/loss').click()"
        window.run(heading)
        up = window.run(column)
        assert up[0] == "0.5" and [float(v) for v in up[:8]] == sorted(float(v) for v in up[:8]) and up[9] == ""
        window.run(heading)
        assert window.run(column)[0] == "6.5" and window.run(column)[9] == ""
        box = "document.querySelector('#parallel .brush').getBoundingClientRect()"
        left, top, tall = (window.run(f"{box}.{side}") for side in ("left", "top", "height"))
        window.mouse("mousePressed", left + 10, top + 10, "left", 1)
        window.mouse("mouseMoved", left + 10, top + tall / 3, "left")
        window.mouse("mouseReleased", left + 10, top + tall / 3, "left", 1)
        shown = window.run("[...document.querySelectorAll('tbody tr')].filter(row => !row.hidden).length")
        assert 0 < shown < 10 and window.errors == []
