"""The kernels under AddressSanitizer and UndefinedBehaviorSanitizer: no access outside of memory, no undefined step.

The library is built with both, in a cache entry of its own. Tests of the ops and of the optimizers that are marked
``sanitized`` run on it in a process of their own, which the first report ends. They walk the edges of vectors, tiles
and blocks one axis at a time, and hand over wrong arguments. What they leave out goes through the same kernels by
another way in Python.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import lightkit
from lightkit.native import builder, cache, toolchain

pytestmark = pytest.mark.slow

_SANITIZE = {"LIGHTKIT_NATIVE_SANITIZE": "address,undefined", "LIGHTKIT_NATIVE": "require"}

_ROOT = Path(lightkit.__file__).resolve().parents[1]

# Reads memory or a vector at an index of choice, and doubles a number, as wrongly as it is told to.
_FAULTY_SOURCE = """
#include <Python.h>

#include <cstdint>
#include <vector>

static PyObject* read(PyObject*, PyObject* arguments) {
  unsigned long long address;
  Py_ssize_t index;
  if (!PyArg_ParseTuple(arguments, "Kn", &address, &index)) return nullptr;
  return PyFloat_FromDouble(reinterpret_cast<const volatile float*>(address)[index]);
}

static PyObject* twice(PyObject*, PyObject* arguments) {
  int value;
  if (!PyArg_ParseTuple(arguments, "i", &value)) return nullptr;
  volatile int result = value;
  result = result * 2;
  return PyLong_FromLong(result);
}

static PyObject* element(PyObject*, PyObject* arguments) {
  Py_ssize_t index;
  if (!PyArg_ParseTuple(arguments, "n", &index)) return nullptr;
  std::vector<int> values(4, 1);
  values.reserve(64);
  return PyLong_FromLong(values[index]);
}

static PyMethodDef methods[] = {
    {"read", read, METH_VARARGS, nullptr},
    {"twice", twice, METH_VARARGS, nullptr},
    {"element", element, METH_VARARGS, nullptr},
    {nullptr, nullptr, 0, nullptr}};

static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_lightkit_native", nullptr, -1, methods};

PyMODINIT_FUNC PyInit__lightkit_native() {
  return PyModule_Create(&definition);
}
"""

_FAULTY_TESTS = """
import os
from pathlib import Path

import pytest
import torch

from lightkit import native

module = native._import(Path(os.environ["FAULTY_LIBRARY"]))
# torch asks for 400 bytes and no more.
tensor = torch.ones(100)


def test_right():
    assert module.read(tensor.data_ptr(), 0) == module.read(tensor.data_ptr(), 99) == 1
    assert module.twice(2**30 - 1) == 2**31 - 2
    assert module.element(3) == 1


def test_past_the_end():
    module.read(tensor.data_ptr(), 100)


def test_before_the_start():
    module.read(tensor.data_ptr(), -1)


def test_freed():
    address = torch.ones(100).data_ptr()
    module.read(address, 0)


def test_overflow():
    module.twice(2**30)


def test_element():
    module.element(4)
"""


def _run_time(name: str, compiler: str) -> Path:
    """A shared library of g++ that must be loaded first; skips where there is none."""
    said = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    path = Path(said)
    # A compiler that does not know it repeats the name; some systems have a linker's script in its place.
    if not path.is_absolute() or path.read_bytes()[:4] != b"\x7fELF":
        pytest.skip(f"{compiler} has no {name} that can be loaded")
    return path.resolve()


@pytest.fixture
def sanitized_pytest(compiler: str) -> Callable[..., subprocess.CompletedProcess]:
    """Runs pytest on lightkit with the sanitizers' run-time loaded; keywords are environment variables."""
    preload = ":".join(str(_run_time(name, compiler)) for name in ("libasan.so", "libubsan.so"))

    def run(*arguments: str, **changes: str) -> subprocess.CompletedProcess:
        # What Python and torch keep until the end are not our leaks.
        # An allocation that cannot be is torch's to report.
        allocations = "allocator_may_return_null=1:max_allocation_size_mb=8192"
        reports = {"ASAN_OPTIONS": f"detect_leaks=0:{allocations}", "UBSAN_OPTIONS": "print_stacktrace=1"}
        # Captured by pytest, a report would end with the process.
        command = [sys.executable, "-m", "pytest", "--capture=sys", "-q", "-p", "no:cacheprovider", *arguments]
        return subprocess.run(
            command,
            cwd=_ROOT,
            env={**os.environ, **_SANITIZE, **reports, "LD_PRELOAD": preload, "PYTHONPATH": str(_ROOT), **changes},
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )

    return run


@pytest.fixture
def faulty_library(tiny_sources: Path, forget_keys: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library with the flags of the sanitizers, whose functions do wrong where they are told to."""
    for name, value in _SANITIZE.items():
        monkeypatch.setenv(name, value)
    (tiny_sources / "module.cpp").write_text(_FAULTY_SOURCE)
    forget_keys()
    return builder.build()


def test_faults_are_reported(sanitized_pytest, faulty_library: Path, tmp_path: Path) -> None:
    """The run can fail: reads beside a tensor of torch or after its end, an overflow and a wrong element end it."""
    tests = tmp_path / "test_faulty.py"
    tests.write_text(_FAULTY_TESTS)
    expected = {
        "right": None,
        "past_the_end": "AddressSanitizer: heap-buffer-overflow",
        "before_the_start": "AddressSanitizer: heap-buffer-overflow",
        "freed": "AddressSanitizer: heap-use-after-free",
        "overflow": "runtime error: signed integer overflow",
        "element": "Assertion '__n < this->size()' failed",
    }
    for name, report in expected.items():
        result = sanitized_pytest(f"{tests}::test_{name}", FAULTY_LIBRARY=str(faulty_library))
        if report is None:
            assert result.returncode == 0 and "1 passed" in result.stdout, result.stdout + result.stderr
        else:
            assert result.returncode != 0 and report in result.stderr, (name, result.stdout + result.stderr)


def test_kernels_under_the_sanitizers(sanitized_pytest, compiler: str) -> None:
    """The marked tests and the fuzz's first calls pass without a report, on a library that was built for it."""
    # Without the sanitizers in the compilers; the library stays in the cache for the next time.
    built = subprocess.run(
        [sys.executable, "-m", "lightkit.build"],
        env={**os.environ, **_SANITIZE, "PYTHONPATH": str(_ROOT)},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert built.returncode == 0, built.stderr
    assert "-fsanitize=address,undefined" in built.stdout
    result = sanitized_pytest("tests/ops", "tests/optim", "tests/fuzz", "-m", "sanitized")
    ran = re.search(r"(\d+) passed", result.stdout)
    # Not all of it: the report is at the end.
    said = result.stdout[-5000:] + result.stderr[-10000:]
    assert not re.search(r"Sanitizer|runtime error", result.stderr), said
    assert result.returncode == 0, said
    # A marker that went astray would leave nothing to look at.
    assert ran and int(ran[1]) > 500, said


def test_unknown_sanitizer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A typing error in LIGHTKIT_NATIVE_SANITIZE does not give an ordinary build."""
    monkeypatch.setenv("LIGHTKIT_NATIVE_SANITIZE", "address,adress")
    with pytest.raises(toolchain.ToolchainError, match="knows address, undefined, got 'adress'"):
        toolchain.common_flags(cuda=False)


def test_sanitized_build_is_not_taken_for_an_ordinary_one(
    tiny_sources: Path, forget_keys: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two have cache entries of their own: a training never loads what was built for a test."""
    builder.build()
    ordinary = cache.find()
    monkeypatch.setenv("LIGHTKIT_NATIVE_SANITIZE", "address,undefined")
    forget_keys()
    assert ordinary is not None
    assert cache.find() is None
