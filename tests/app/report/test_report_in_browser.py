"""The report in a browser: charts are drawn and follow the pointer, and the page asks the network for nothing."""

from __future__ import annotations

import json
import math

import pytest
from support.browser import CHROMIUM, browser

from lightkit.app.report import page
from lightkit.app.run_records import Run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium"),
]

EVIL = "</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report beside two other runs; the names have markup."""
    root = tmp_path_factory.mktemp("runs")
    for number, name in enumerate(("a", "<img src=x onerror=alert(2)>", "c")):
        directory = root / name
        Run(directory, 1e9 + number, {"name": "x", "lr": number}).write()
        rows = [f"{i // 50},{i},{2 * math.exp(-i / 40) + number / 10 + i % 7 / 50},,," for i in range(200)]
        for epoch in range(4):
            rows.append(f"{epoch},{epoch * 50 + 49},,{1 / (epoch + 1)},{1 - 0.5 / (epoch + 1)},{epoch}")
        head = f"epoch,step,train/loss_step,val/loss,val/accuracy,{EVIL}\n"
        (directory / "metrics.csv").write_text(head + "\n".join(rows) + "\n")
        (directory / "config.yaml").write_text(f"name: {EVIL}\n")
        (directory / "environment.json").write_text(json.dumps({EVIL: EVIL}))
    path = root / "c" / "report.html"
    path.write_text(page.render(root / "c", {"test/accuracy": 0.5}, []))
    return path


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def lines(window):
    return window.run("[...document.querySelectorAll('#curves .line')].map(line => line.getAttribute('d').length)")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_page(report, window, width, dark):
    """Both themes and both widths draw every curve, without an error, a request or a scroll bar at the bottom."""
    window.open(report, width, dark)
    assert window.errors == [] and window.requests == [report.as_uri()]
    assert len(lines(window)) == 3 and min(lines(window)) > 50
    assert window.run("document.documentElement.scrollWidth") <= width
    color = window.run("getComputedStyle(document.body).backgroundColor")
    assert (color == "rgb(11, 17, 32)") == dark
    window.run("document.getElementById('theme').click()")
    assert window.run("getComputedStyle(document.body).backgroundColor") != color
    window.run("localStorage.clear()")


def test_the_pointer(report, window):
    """The values under the pointer are shown; a drag zooms all charts, and a double click shows everything again."""
    window.open(report)
    box = "document.querySelector('#curves svg').getBoundingClientRect()"
    left, top, wide = (window.run(f"{box}.{side}") for side in ("left", "top", "width"))
    window.mouse("mouseMoved", left + wide / 2, top + 100)
    assert window.run("document.querySelector('.tip:not([hidden])').textContent").startswith("step ")
    ticks = "[...document.querySelectorAll('#curves .chart:last-child .axis text')].map(t => t.textContent).join()"
    whole = window.run(ticks)
    window.mouse("mousePressed", left + wide / 2, top + 100, "left", 1)
    window.mouse("mouseMoved", left + wide * 0.6, top + 100, "left")
    window.mouse("mouseMoved", left + wide * 0.7, top + 100, "left")
    window.mouse("mouseReleased", left + wide * 0.7, top + 100, "left", 1)
    assert window.run(ticks) != whole
    for clicks in (1, 2):
        window.mouse("mousePressed", left + wide / 2, top + 100, "left", clicks)
        window.mouse("mouseReleased", left + wide / 2, top + 100, "left", clicks)
    assert window.run(ticks) == whole and window.errors == []


def click(window, text):
    window.run(f"[...document.querySelectorAll('button')].find(b => b.textContent === {json.dumps(text)}).click()")


def test_buttons(report, window):
    """Buttons switch the axes, the smoothing, the kinds of lines and the runs; names of runs are texts."""
    window.open(report)
    linear, drawn = window.run("document.querySelector('#curves .line').getAttribute('d')"), lines(window)
    for text in ("log axis", "epochs", "smoother", "raw"):
        before = window.run("document.querySelector('#curves').innerHTML")
        click(window, text)
        assert window.run("document.querySelector('#curves').innerHTML") != before, text
    assert window.run("document.querySelector('#curves .line').getAttribute('d')") != linear
    click(window, "all runs")
    assert len(lines(window)) == 3 * len(drawn)
    click(window, "<img src=x onerror=alert(2)>")
    assert len(lines(window)) == 2 * len(drawn)
    click(window, "validation")
    assert len(lines(window)) < 2 * len(drawn)
    assert window.run("document.querySelectorAll('img').length") == 0 and window.errors == []
    window.run("document.querySelector('details').open = true")
    window.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")
    assert window.run("document.querySelectorAll('#more-curves .line').length") >= 2
