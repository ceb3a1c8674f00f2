"""Deferred imports: what a command's process does without, and that all of it is there when it is asked for."""

from __future__ import annotations

import importlib
import json
import subprocess
from pathlib import Path

import pytest
from support.commands import run_python

from lightkit._util import lazy_imports

PROBE = Path(__file__).with_name("lazy_probe.py")


# Of the probe: a compiled module, a hidden function, a plot, a module inside of the compiler, a setting.
WAYS = (0, 1, 3, 6, 7)


def run(*arguments: str, lazy: str = "1") -> subprocess.CompletedProcess:
    return run_python(*arguments, environment={"LIGHTKIT_LAZY": lazy, "MPLBACKEND": "agg"})


def probe(*ways: int, lazy: str = "1") -> list[dict]:
    result = run(str(PROBE), *map(str, ways), lazy=lazy)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture(scope="module")
def found() -> dict[int, dict]:
    """What came of each way, if it is taken first in a process that has imported Lightning."""
    return dict(zip(WAYS, probe(*WAYS), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("first", WAYS)
def test_what_is_deferred_works(found, first):
    """Whatever is asked for first imports what it needs, and everything else is there as well."""
    assert found[first]["imported"] == [] and found[first]["optimizer"] == []
    check_answers(found[first])


@pytest.mark.slow
def test_nothing_is_deferred_on_request():
    """LIGHTKIT_LAZY=0 leaves all imports as they are. It fails when no library imports any more what is deferred."""
    (found,) = probe(0, lazy="0")
    assert found["imported"] == ["torch._dynamo.eval_frame", "torch._inductor", "scipy.stats", "matplotlib", "sympy"]
    check_answers(found)


def check_answers(found: dict) -> None:
    assert found["trains"] is None
    assert found["compiled"] == [True, True, True]
    # The function itself runs uncompiled, the rest compiled.
    assert found["disabled"] == [12.0, 2.0]
    assert found["constant"] and found["profiler"] and found["deterministic"]
    assert found["plot"].startswith("matplotlib.")
    assert found["scipy"] == [2, 5, 3]
    assert found["submodule"] == [7, True]


@pytest.mark.parametrize("name", sorted(lazy_imports._STAND_INS))
def test_stand_ins_know_what_there_is(name):
    """Fails when a new version of a library has renamed what a stand-in answers for."""
    # Which gives SciPy a function back that has gone.
    importlib.import_module("torchmetrics")
    module = importlib.import_module(name)
    for attribute in lazy_imports._STAND_INS[name]():
        assert hasattr(module, attribute), attribute


def test_a_program_is_left_alone():
    """To import lightkit defers nothing, and neither imports the compiler nor changes a module of others."""
    program = """
import sys, torch
finders, modules = list(sys.meta_path), {name: dict(vars(m)) for name, m in sys.modules.items() if m is not None}
import lightkit, lightkit.ops, lightkit.nn, lightkit.models, lightkit.optim
optimizer = lightkit.optim.Adam(torch.nn.Linear(2, 2).parameters())
optimizer.load_state_dict(optimizer.state_dict())
optimizer.step()
optimizer.zero_grad(set_to_none=False)
assert sys.meta_path == finders
changed = [
    f"{name}.{key}" for name, values in modules.items() for key, value in values.items()
    if not key.startswith("__") and vars(sys.modules[name]).get(key, value) is not value
    and callable(value)
]
others = ("torch._dynamo", "scipy", "matplotlib", "lightning", "omegaconf", "hydra")
print([name for name in others if name in sys.modules])
print(changed)
"""
    result = run("-c", program)
    assert (result.stdout, result.stderr) == ("[]\n[]\n", "")


def test_bad_value():
    """The variable is one of two."""
    result = run("-m", "lightkit.train", "--help", lazy="yes")
    assert result.returncode == 1
    assert result.stderr == "error: LIGHTKIT_LAZY must be 0 or 1, got 'yes'\n"
