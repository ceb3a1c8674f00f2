"""What the tests of the native build share: processes of their own, the real build, and a library small enough to
compile in a second."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cuda_emulation import Emulator, build
from support import commands

import lightkit
from lightkit.native import builder, target, toolchain

TINY_SOURCE = """
#include <Python.h>

static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_lightkit_native", nullptr, -1};

PyMODINIT_FUNC PyInit__lightkit_native() {
  PyObject* module = PyModule_Create(&definition);
  PyModule_AddObject(module, "devices", Py_BuildValue("(s)", "cpu"));
  return module;
}
"""


def _environment(cache_dir: Path, **changes: str | None) -> dict[str, str]:
    """This process's environment with another cache; None takes a variable out."""
    variables = {**os.environ, "PYTHONPATH": str(Path(lightkit.__file__).resolve().parents[1])}
    variables.pop("LIGHTKIT_NATIVE", None)
    variables["LIGHTKIT_CACHE_DIR"] = str(cache_dir)
    for name, value in changes.items():
        variables.pop(name, None)
        if value is not None:
            variables[name] = value
    return variables


@pytest.fixture(scope="session")
def environment() -> Callable[..., dict[str, str]]:
    return _environment


@pytest.fixture
def run_code(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Runs a program's text in a fork of a process that has imported torch and lightkit.ops, with an empty cache.

    Keywords are environment variables.
    """

    def run(code: str, *arguments: str, cache_dir: Path | None = None, **changes: str | None):
        environment = _environment(cache_dir or tmp_path / "cache", **changes)
        return commands.run_code(code, *arguments, environment=environment)

    return run


@pytest.fixture
def run_python(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Runs the interpreter in a process of its own; otherwise as `run_code`."""

    def run(*arguments: str, cache_dir: Path | None = None, **changes: str | None):
        environment = _environment(cache_dir or tmp_path / "cache", **changes)
        command = [sys.executable, *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)

    return run


@pytest.fixture(scope="session")
def compiler() -> str:
    found = toolchain.find_compiler()
    if found is None:
        pytest.skip("there is no C++ compiler")
    return found[0]


@pytest.fixture
def built_cache(tmp_path: Path) -> Path:
    """A cache with a copy of the real build."""
    library = builder.build()
    shutil.copytree(library.parent, tmp_path / "built" / "native" / library.parent.name)
    return tmp_path / "built"


def _forget() -> None:
    target.base_key.cache_clear()
    target.compiler_identity.cache_clear()


@pytest.fixture
def tiny_sources(compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A source tree of one small module in place of lightkit's, and an empty cache, in this process."""
    directory = tmp_path / "csrc"
    directory.mkdir()
    (directory / "module.cpp").write_text(TINY_SOURCE)
    monkeypatch.setattr(toolchain, "SOURCE_DIR", directory)
    monkeypatch.setenv("LIGHTKIT_CACHE_DIR", str(tmp_path / "cache"))
    _forget()
    yield directory
    _forget()


@pytest.fixture
def forget_keys() -> Iterator[Callable[[], None]]:
    """Makes this process look at its sources and compilers again, when called and after the test."""
    yield _forget
    _forget()


@pytest.fixture(scope="session")
def emulator(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulator]:
    """The emulated GPU with every CUDA kernel."""
    emulator = Emulator(build(compiler, tmp_path_factory.mktemp("emulation")))
    yield emulator
    emulator.close()
