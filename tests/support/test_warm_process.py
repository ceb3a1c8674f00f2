"""The process that commands of tests fork from: what a child sees is what a process of its own would see."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.warm_process import WarmProcess

_SEEN = """
import json, os, sys
print(json.dumps([sys.argv, os.getcwd(), sys.path[0], dict(os.environ), sys.stdin.read(), os.getpid()]))
print("an error", file=sys.stderr)
sys.path.clear()
os.environ["LEFT"] = "behind"
sys.exit(7)
"""


@pytest.fixture(scope="module")
def warm() -> Iterator[WarmProcess]:
    warm = WarmProcess()
    yield warm
    warm.close()


def test_a_child_has_what_it_was_given(warm: WarmProcess, tmp_path: Path) -> None:
    """Arguments, directory, variables, output and status; nothing that the child before it has changed."""
    variables = {"PATH": os.environ["PATH"], "ONE": "1"}
    results = [warm.run("-c", _SEEN, "a", "b c", cwd=tmp_path, environment=variables, timeout=60) for _ in range(2)]
    assert [result.returncode for result in results] == [7, 7]
    assert [result.stderr for result in results] == ["an error\n"] * 2
    one, other = (json.loads(result.stdout) for result in results)
    assert one[:-1] == [["-c", "a", "b c"], str(tmp_path), str(tmp_path), variables, ""] == other[:-1]
    assert len({one[-1], other[-1], os.getpid()}) == 3


def test_an_exception_ends_a_child_as_any_process(warm: WarmProcess, tmp_path: Path) -> None:
    """A traceback, whose last line is the exception, and status 1; a signal is a negative status."""
    result = warm.run("-c", "raise KeyError('x')", cwd=tmp_path, environment={}, timeout=60)
    assert result.returncode == 1 and result.stderr.splitlines()[-1] == "KeyError: 'x'"
    result = warm.run("-c", "import os; os.kill(os.getpid(), 9)", cwd=tmp_path, environment={}, timeout=60)
    assert result.returncode == -9


def test_a_child_that_does_not_end_is_killed(warm: WarmProcess, tmp_path: Path) -> None:
    """The time is over, and the next command runs."""
    with pytest.raises(subprocess.TimeoutExpired):
        warm.run("-c", "import time; time.sleep(600)", cwd=tmp_path, environment={}, timeout=0.5)
    (tmp_path / "own.py").write_text("print(__name__, __file__)\n")
    result = warm.run("-m", "own", cwd=tmp_path, environment={}, timeout=60)
    assert (result.returncode, result.stdout) == (0, f"__main__ {tmp_path}/own.py\n")
