"""The log of what a program prints: every line once, as text, whatever a terminal shows meanwhile."""

from __future__ import annotations

import io
import logging
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.live import Live
from rich.text import Text

from lightkit._util.output_log import OutputLog, log_only


@pytest.fixture
def streams(monkeypatch):
    """Returns a function that puts streams in the place of those of the process, and returns them."""

    def replace():
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, io.StringIO())
        return sys.stdout, sys.stderr

    return replace


def test_both_streams(streams, tmp_path):
    """Both streams get what is printed, and the file too, in its order and without escape codes."""
    out, err = streams()
    path = tmp_path / "new" / "x.log"
    with OutputLog() as log:
        print("early")
        log.open(path)
        print("\x1b[1;31mred\x1b[0m \x07bell \x1b]0;title\x07", file=sys.stderr)
        print("a\r\nb", end="")
        assert path.read_text().endswith("a\n")
        sys.stdout.writelines(["c\n", "d \udcff\n"])
        log_only("quiet")
        assert path.read_text().endswith("quiet\n")
    print("late")
    log_only("nobody")
    assert path.read_text() == "early\nred bell \na\nbc\nd \\udcff\nquiet\n"
    assert out.getvalue().startswith("early\na\r\nbc\n") and "red" in err.getvalue()
    assert sys.stdout is out and sys.stderr is err


def test_continues(streams, tmp_path):
    """A second log of the same file goes on after the first one."""
    streams()
    for word in ("one", "two"):
        with OutputLog() as log:
            log.open(tmp_path / "x.log")
            print(word)
    assert (tmp_path / "x.log").read_text() == "one\ntwo\n"


def test_errors(streams, tmp_path):
    """The file gets the traceback of an error, and one line of an interruption; both go on to the caller."""
    streams()
    for error in (ZeroDivisionError("no"), KeyboardInterrupt()):
        with pytest.raises(type(error)), OutputLog() as log:
            log.open(tmp_path / "x.log")
            raise error
    lines = (tmp_path / "x.log").read_text().splitlines()
    assert lines[0].startswith("Traceback") and lines[-2:] == ["ZeroDivisionError: no", "ended by KeyboardInterrupt"]


def test_nothing_without_a_file(streams, tmp_path):
    """A run that was rejected writes nothing; a file that cannot be made or written to ends nothing."""
    out, _ = streams()
    with OutputLog():
        print("x")
    with OutputLog() as log:
        log.open(tmp_path)
        print("y")
    with OutputLog() as log:
        log.open(Path("/dev/full"))
        print("z")
    assert out.getvalue() == "x\ny\nz\n" and not list(tmp_path.iterdir())


def test_a_bar_on_a_terminal(streams, tmp_path):
    """Of a bar that rewrites itself the last state stays; what is printed beside it stays too, once."""
    streams()
    with OutputLog() as log:
        log.open(tmp_path / "x.log")
        console = Console(force_terminal=True, width=60)
        with Live(Text("bar 0"), console=console, auto_refresh=False, redirect_stdout=False) as live:
            for number in range(1, 6):
                live.update(Text(f"bar {number}\nsecond line"), refresh=True)
                if number == 3:
                    live.console.print("beside the bar")
        print("after")
    lines = (tmp_path / "x.log").read_text().splitlines()
    assert lines.count("beside the bar") == 1 and lines[-1] == "after"
    assert [line for line in lines if line.startswith("bar")] == ["bar 5"] and lines.count("second line") == 1


def test_a_bar_of_one_line(streams, tmp_path):
    """Of a line that returns to its beginning the last state stays."""
    streams()
    with OutputLog() as log:
        log.open(tmp_path / "x.log")
        for number in range(5):
            print(f"\r{number}/4", end="", file=sys.stderr)
        print(file=sys.stderr)
        print("\r1\r2\r3\ndone\r")
    assert (tmp_path / "x.log").read_text() == "4/4\n3\ndone\n"


def test_a_handler_outlives_the_log(streams, tmp_path):
    """A logging handler that was made within the context goes on to print after it."""
    _, err = streams()
    with OutputLog() as log:
        log.open(tmp_path / "x.log")
        handler = logging.StreamHandler()
    handler.emit(logging.makeLogRecord({"msg": "later"}))
    assert err.getvalue() == "later\n" and (tmp_path / "x.log").read_text() == ""
