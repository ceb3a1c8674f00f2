"""Standard output of a command: what a terminal cannot show and a reader that has gone are no errors."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_START = "from lightkit._util import standard_output as s; import sys; s.make_tolerant(); "


def start(code, *options, environment=None, **streams):
    return subprocess.Popen(
        [sys.executable, *options, "-c", _START + code],
        env={**os.environ, **(environment or {})},
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams},
    )


@pytest.mark.parametrize("options", [[], ["-u"]], ids=["buffered", "-u"])
def test_a_reader_that_has_gone(options):
    """What follows a closed pipe, as of ``| head -1``, runs to its end, with status 0 and without a traceback."""
    process = start("[print(i, flush=True) for i in range(100000)]; sys.exit(3)", *options)
    assert process.stdout.readline() == b"0\n"
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 3


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("ascii", rb"m\xfcller \u65b0 \udcff"),
        ("latin-1", b"m\xfcller " + rb"\u65b0 \udcff"),
        ("utf-8", "müller 新 ".encode() + rb"\udcff"),
        ("ascii:replace", b"m?ller ? ?"),
    ],
)
def test_characters_that_the_terminal_does_not_have(encoding, expected):
    """They are escaped, unless the user has chosen another treatment."""
    process = start(r"print('m\xfcller \u65b0 \udcff')", environment={"PYTHONIOENCODING": encoding})
    assert process.communicate() == (expected + b"\n", b"")


def test_a_full_disk_is_still_an_error():
    """The output that a full disk has lost is told."""
    with open("/dev/full", "w") as full:
        process = start("print('x', flush=True)", stdout=full)
        assert b"No space left" in process.communicate()[1]


def test_no_output_at_all():
    """A process without standard output, as of ``>&-``, has nothing to make tolerant."""
    inner = f"subprocess.run([sys.executable, '-c', {_START!r}])"
    code = f"import os, subprocess, sys; os.close(1); sys.exit({inner}.returncode)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
