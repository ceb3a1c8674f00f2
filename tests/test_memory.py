"""Freed memory stays in the process after the call, and is cleared by the system without it."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys, torch
from lightkit.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory() and keep_freed_memory()

def step():
    # 64 MiB are above every threshold that glibc adapts by itself.
    for _ in range(3):
        torch.empty(16 << 20).fill_(1)

# The first steps grow the heap.
for _ in range(6):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's settings")
def test_no_page_faults_at_the_same_step_again():
    """A tensor as large as a freed one takes its pages: the system clears none."""
    faults = {}
    for how in ("keep", "leave"):
        done = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        faults[how] = int(done.stdout)
    assert faults["keep"] < 100
    assert faults["leave"] > 10 * faults["keep"]


def test_elsewhere_it_says_no(monkeypatch):
    """On other systems the function returns False."""
    from lightkit.memory import keep_freed_memory

    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False
