"""The fuzz of all ops, in part: some hundred calls in this process, and what finds a crash of one in another."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import fuzz_ops
import pytest
import torch
from fuzz_calls import arguments_of, examples_of, run, schemas, targets

CALLS = 300


@pytest.mark.sanitized
def test_some_hundred_calls() -> None:
    """Each call returns what its schema says or is refused; both happen often, and derivatives are reached."""
    outcomes = [run(seed=0, number=number) for number in range(CALLS)]
    counts = Counter("refused" if outcome.refusal else "returned" for outcome in outcomes)
    assert counts["returned"] > CALLS // 5 and counts["refused"] > CALLS // 5
    assert sum(outcome.derivatives.count("returned") for outcome in outcomes) > CALLS // 20


def test_every_op_is_fuzzed_with_right_arguments() -> None:
    """A new op is fuzzed by itself, with random arguments; for right ones fuzz_examples.py needs a call of it."""
    assert {name for name in targets() if "." not in name} == set(schemas())
    assert [op for op in schemas() if not examples_of(op)] == []
    assert len([name for name in targets() if name.startswith(("native.", "optim."))]) >= 6


def test_calls_are_made_of_seed_and_number_alone() -> None:
    """A call can be made again without those before it."""

    def made(op: str) -> str:
        torch.manual_seed(0)
        return re.sub(r"0x\w+", "", repr(arguments_of(op, random.Random("0:7"))))

    for op in schemas():
        first = made(op)
        torch.rand(3)
        assert made(op) == first


# In place of the calls: the third kills its process.
_DEADLY = """
import os, signal, sys, types

calls = types.ModuleType("fuzz_calls")
calls.Failure = AssertionError
calls.run = lambda seed, number: (
    os.kill(os.getpid(), signal.SIGSEGV) if number == 12 else types.SimpleNamespace(name="op", refusal=None)
)
sys.modules["fuzz_calls"] = calls
"""


def test_a_crash_is_told_and_passed_over(tmp_path: Path, capsys) -> None:
    """A process that dies is started again behind the call that killed it, whose number is printed."""
    (tmp_path / "sitecustomize.py").write_text(_DEADLY)
    variables = fuzz_ops.environment(sanitize=False)
    variables["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{variables['PYTHONPATH']}"
    counts = fuzz_ops.supervise(seed=5, first=10, calls=4, variables=variables, limit=60)
    assert counts["crashes"] == 1 and counts.total() == 4
    # The sanitizers catch the signal, report and exit with 1.
    assert re.search(r"seed 5, call 12 crashed \((-11|1)\)", capsys.readouterr().out)


def test_command_line() -> None:
    """One call can be run alone."""
    command = [sys.executable, str(Path(fuzz_ops.__file__)), "--seed=0", "--replay=3"]
    result = subprocess.run(command, capture_output=True, text=True, env=fuzz_ops.environment(sanitize=False))
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(result.stdout.splitlines()) == 1
