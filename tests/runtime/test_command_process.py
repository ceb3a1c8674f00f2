"""How the process of a command begins and ends: faster than Python's own, and with nothing lost."""

from __future__ import annotations

import gc
import os
import subprocess
import sys

import pytest

from lightkit.runtime.command_process import begin_to_collect


def run(program: str, cwd, **options) -> subprocess.CompletedProcess:
    """Runs a program whose `main` is the entry point of a command."""
    code = f"from lightkit.runtime.command_process import run_as_process\n{program}\nrun_as_process(main)"
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, **options)


@pytest.mark.parametrize(
    ("end", "status", "said"),
    [
        ("return 0", 0, ""),
        ("return None", 0, ""),
        ("return 3", 3, ""),
        ("raise SystemExit", 0, ""),
        ("raise SystemExit(2)", 2, ""),
        ("raise SystemExit('what went wrong')", 1, "what went wrong\n"),
        ("raise ValueError('a fault')", 1, "ValueError: a fault\n"),
    ],
)
def test_status(tmp_path, end, status, said):
    """Is what Python's own end makes of it."""
    result = run(f"def main():\n    {end}", tmp_path)
    assert result.returncode == status and result.stderr.endswith(said)


def test_nothing_is_lost(tmp_path):
    """What is open is written, threads are waited for, and what was registered for the end is done."""
    program = """
import atexit, threading, time
kept = open("kept.txt", "w")
def late():
    time.sleep(0.2)
    kept.write("thread\\n")
atexit.register(lambda: kept.write("registered\\n"))
def main():
    kept.write("main\\n")
    threading.Thread(target=late).start()
    open("dropped.bin", "wb").write(b"1")
    print("said")
"""
    result = run(program, tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "said\n", "")
    assert (tmp_path / "kept.txt").read_text() == "main\nthread\nregistered\n"
    assert (tmp_path / "dropped.bin").read_bytes() == b"1"


def test_output_that_nobody_reads(tmp_path):
    """Is told by the status, as Python tells it."""
    with open("/dev/full", "w") as full:
        code = "from lightkit.runtime.command_process import run_as_process\nrun_as_process(lambda: print('x' * 10))"
        buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        result = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, env=buffered)
    assert result.returncode == 120


def test_collects_after_the_imports(tmp_path):
    """The collector rests while modules are imported and works from then on, and what there was is out of its way."""
    program = """
import gc
import os
from lightkit.runtime.command_process import begin_to_collect
def main():
    was = gc.isenabled()
    begin_to_collect()
    print(was, gc.isenabled(), gc.get_freeze_count() > 0)
    gc.disable()
    begin_to_collect()
    print(gc.isenabled())
"""
    assert run(program, tmp_path).stdout == "False True True\nFalse\n"


def test_other_programs_collect_as_they_did():
    """Only a process that is there for a command has its collector set."""
    frozen, enabled = gc.get_freeze_count(), gc.isenabled()
    begin_to_collect()
    assert (gc.get_freeze_count(), gc.isenabled()) == (frozen, enabled)
