"""Building at first use, in processes of their own: once, whoever dies, and with a reason where it cannot be."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lightkit import build as build_command
from lightkit import native
from lightkit.native import builder, cache, toolchain

# Uses an op twice and the optimizer once, and prints what was warned of and whether the numbers are right.
_USE = """
import json, warnings
import torch
import torch.nn.functional as F
from lightkit import native
from lightkit.ops import cross_entropy

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    logits, target = torch.randn(8, 5), torch.arange(8) % 5
    right = all(torch.allclose(cross_entropy(logits, target), F.cross_entropy(logits, target)) for _ in range(2))
    native.available("cpu")
print(json.dumps({
    "native": native.load() is not None,
    "right": right,
    "warnings": [str(w.message) for w in caught if "lightkit" in str(w.message)],
}))
"""

_LOAD = "from lightkit import native; print(native.load().__file__)"

# Loads the library of another source tree, which is the first argument.
_LOAD_FROM = """
import sys
from pathlib import Path
from lightkit.native import toolchain
toolchain.SOURCE_DIR = Path(sys.argv[1])
""" + _LOAD.replace("; ", "\n")

# Says that it is ready and waits for a line, so that all ask for the library at the same moment.
_RACE = _LOAD_FROM.replace("print(native", 'print("ready", flush=True)\nsys.stdin.readline()\nprint(native')

_NO_COMPILER = [
    pytest.param({"PATH": "", "CXX": None}, "a C++ compiler (g++, c++ or clang++) was not found", id="empty-path"),
    pytest.param({"CXX": "/nonexistent"}, "the compiler named by CXX ('/nonexistent') was not found", id="bad-CXX"),
]


@pytest.fixture
def held_compiler(compiler: str, tmp_path: Path) -> Iterator[Path]:
    """A compiler that, where HELD is set, makes the file `compiling` and does not come back while it is there."""
    script, compiling = tmp_path / "held-compiler", tmp_path / "compiling"
    hold = f'touch "{compiling}"; while [ -e "{compiling}" ]; do sleep 0.1; done; exit 1'
    script.write_text(
        f'#!/bin/sh\nif [ -n "$HELD" ]; then case " $* " in *" -c "*) {hold};; esac; fi\nexec "{compiler}" "$@"\n'
    )
    script.chmod(0o755)
    yield script
    # Ninja gives every compiler a process group of its own, which outlives the builder's.
    compiling.unlink(missing_ok=True)


@pytest.fixture
def start(environment, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts a process that loads the library of a source tree; ends it and its ninja after the test."""
    started = []

    def begin(sources: Path, code: str = _LOAD_FROM, **changes: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(sources)],
            env=environment(tmp_path / "cache", LIGHTKIT_NATIVE="require", **changes),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.communicate()


def test_processes_at_once_compile_once(
    tiny_sources: Path, start: Callable[..., subprocess.Popen], tmp_path: Path
) -> None:
    """Four processes that start with an empty cache compile one library between them, and all load it."""
    processes = [start(tiny_sources, code=_RACE) for _ in range(4)]
    for process in processes:
        assert process.stdout.readline() == "ready\n", process.communicate()[1]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, said
    stderr = "".join(error for _, error in said)
    assert stderr.count("lightkit: compiling") == 1, stderr
    assert stderr.count("lightkit: compiled in") == 1, stderr
    (library,) = {output.strip() for output, _ in said}
    (directory,) = (path for path in (tmp_path / "cache" / "native").iterdir() if path.is_dir())
    assert Path(library).parent == directory
    assert {path.name for path in directory.iterdir()} == {Path(library).name, cache.MANIFEST}


def test_killed_builder_blocks_nobody(
    tiny_sources: Path, held_compiler: Path, start: Callable[..., subprocess.Popen], tmp_path: Path
) -> None:
    """A builder killed while it compiles leaves the lock to the process that waits, which sweeps up after it."""
    compiling = tmp_path / "compiling"
    builder = start(tiny_sources, CXX=str(held_compiler), HELD="1")
    while not compiling.exists():
        assert builder.poll() is None, builder.communicate()
        time.sleep(0.05)
    (leftover,) = cache.native_root().glob("tmp-*")

    waiting = start(tiny_sources, CXX=str(held_compiler))
    assert "waiting for another process" in waiting.stderr.readline()
    builder.kill()
    builder.wait()
    stdout, stderr = waiting.communicate()

    assert waiting.returncode == 0, stderr
    assert stderr.count("lightkit: compiling") == 1
    assert Path(stdout.strip()).is_relative_to(cache.native_root())
    assert not leftover.exists()
    assert not list(cache.native_root().glob("tmp-*"))


@pytest.mark.parametrize(("changes", "cause"), _NO_COMPILER)
def test_without_a_compiler_the_references_work(run_code, changes: dict[str, str | None], cause: str) -> None:
    """Training goes on without a compiler, after exactly one warning that says why and what can be set."""
    result = run_code(_USE, **changes)
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    assert said["right"] and not said["native"]
    (warning,) = said["warnings"]
    assert cause in warning
    assert "LIGHTKIT_NATIVE=off" in warning and "LIGHTKIT_NATIVE=require" in warning


@pytest.mark.parametrize(("changes", "cause"), _NO_COMPILER)
def test_required_library_without_a_compiler_is_an_error(run_code, changes: dict[str, str | None], cause: str) -> None:
    """LIGHTKIT_NATIVE=require does not run slowly in silence."""
    result = run_code(_LOAD, LIGHTKIT_NATIVE="require", **changes)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("lightkit.native.NativeUnavailableError: ") and cause in last


def test_off_neither_compiles_nor_warns(run_python, tmp_path: Path) -> None:
    """LIGHTKIT_NATIVE=off touches no compiler and no cache."""
    result = run_python("-c", _USE, LIGHTKIT_NATIVE="off")
    assert json.loads(result.stdout) == {"native": False, "right": True, "warnings": []}
    assert "lightkit" not in result.stderr
    assert not (tmp_path / "cache").exists()


def test_unknown_policy_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A typing error in LIGHTKIT_NATIVE is told, not taken for the default."""
    monkeypatch.setenv("LIGHTKIT_NATIVE", "bogus")
    monkeypatch.setattr(native, "_loaded", None)
    with pytest.raises(ValueError, match="LIGHTKIT_NATIVE must be one of auto, require, off, got 'bogus'"):
        native.load()


def test_missing_says_why(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    """Whoever tells the user himself gets the cause, for the library as for a device, and no warning besides."""
    assert native.missing("cpu") is None
    assert native.missing("xla").endswith("not for xla")
    monkeypatch.setattr(native, "_loaded", (None, "there is no compiler"))
    assert native.missing("cpu") == "there is no compiler"
    assert not recwarn.list


@pytest.mark.parametrize(("changes", "cause"), _NO_COMPILER)
def test_prebuilt_library_needs_no_compiler(
    run_code, built_cache: Path, changes: dict[str, str | None], cause: str
) -> None:
    """An image that was built with a compiler and ships without one runs the kernels."""
    result = run_code(_USE, cache_dir=built_cache, LIGHTKIT_NATIVE="require", **changes)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == {"native": True, "right": True, "warnings": []}
    assert "compil" not in result.stderr


@pytest.mark.parametrize("problem", ["read-only", "unreachable"])
def test_unusable_cache_is_a_warning(run_code, compiler: str, problem: str) -> None:
    """A cache that this user cannot write or enter, such as root's in an image, stops no training."""
    # Not pytest's directory: that is closed to the user that root becomes.
    with tempfile.TemporaryDirectory() as base:
        os.chmod(base, 0o755)
        cache_dir = Path(base) / "cache"
        (cache_dir / "native").mkdir(parents=True)
        closed, mode = (cache_dir / "native", 0o555) if problem == "read-only" else (cache_dir, 0o000)
        closed.chmod(mode)
        become_somebody = (
            "import os\nfrom lightkit.native import cache, builder, toolchain\nimport lightkit.ops\n"
            "if os.geteuid() == 0: os.setuid(12345)\n"
        )
        try:
            result = run_code(become_somebody + _USE, cache_dir=cache_dir)
        finally:
            closed.chmod(0o755)
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    assert said["right"] and not said["native"]
    assert len(said["warnings"]) == 1


def test_report_names_what_was_built(run_python, built_cache: Path) -> None:
    """`python -m lightkit.build` says which library, compiler, flags, SIMD level and CUDA it has, and why no CUDA."""
    result = run_python("-m", "lightkit.build", cache_dir=built_cache)
    assert result.returncode == 0, result.stderr
    rows = dict(re.findall(r"^ *(\w[\w ]*): (.+)$", result.stdout, re.MULTILINE))
    assert Path(rows["library"]).is_relative_to(built_cache)
    assert rows["compiler"] == toolchain.compiler_version(toolchain.find_compiler())
    assert {"-O3", "-std=c++20", "-fopenmp"} <= set(rows["flags"].split())
    assert rows["SIMD"] in ("AVX512", "AVX2", "DEFAULT")
    assert re.fullmatch(r"none: \S.*|nvcc [\d.]+ for sm_\d+.*", rows["CUDA"])


@pytest.mark.parametrize(("changes", "cause"), _NO_COMPILER)
def test_build_command_without_a_compiler_fails_in_one_line(
    run_python, changes: dict[str, str | None], cause: str
) -> None:
    """An image that cannot build says so by its exit status and one line, not by a traceback."""
    result = run_python("-m", "lightkit.build", **changes)
    assert result.returncode == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("lightkit.build: ") and cause in line


def test_check_cuda_without_nvcc_fails_in_one_line(run_python) -> None:
    """`--check-cuda` does not pass where nothing was checked."""
    result = run_python("-m", "lightkit.build", "--check-cuda", PATH="", CUDA_HOME="/nonexistent")
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line == "lightkit.build: nvcc was not found on the path or under CUDA_HOME"


@pytest.mark.slow
def test_cuda_kernels_compile(run_python, compiler: str) -> None:
    """Every CUDA kernel compiles for sm_80 and sm_90 on a machine without a GPU."""
    cuda, reason = toolchain.find_nvcc()
    if cuda is None:
        pytest.skip(reason)
    result = run_python("-m", "lightkit.build", "--check-cuda")
    assert result.returncode == 0, result.stderr
    compiled = {Path(line.partition("compiles: ")[2]).name for line in result.stdout.splitlines()}
    assert {"cross_entropy.cu", "sgd.cu"} <= compiled


@pytest.fixture
def broken_sources(tiny_sources: Path) -> Path:
    """A source tree with an error in line 2 of one of two files."""
    (tiny_sources / "broken.cpp").write_text("int right = 1;\nint wrong = no_such_name;\n")
    return tiny_sources


def test_compile_error_is_shown_and_leaves_nothing(
    broken_sources: Path, capfd: pytest.CaptureFixture[str], forget_keys: Callable[[], None]
) -> None:
    """The command shows the compiler's own error line, and neither a build nor its scraps stay in the cache."""
    forget_keys()
    assert build_command.main([]) == 1
    error = capfd.readouterr().err
    assert re.search(r"broken\.cpp:2:\d+: error: .*no_such_name", error)
    assert "Traceback" not in error
    assert not [path.name for path in cache.native_root().iterdir() if path.is_dir()]


def test_compile_error_in_training_is_a_warning(broken_sources: Path, run_code, tmp_path: Path) -> None:
    """Sources that do not compile, with some other compiler perhaps, do not stop training either."""
    use_from = _LOAD_FROM.partition("from lightkit import native")[0] + _USE
    result = run_code(use_from, str(broken_sources))
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    assert said["right"] and not said["native"]
    (warning,) = said["warnings"]
    assert re.search(r"broken\.cpp:2:\d+: error: .*no_such_name", warning)
    assert not [path.name for path in (tmp_path / "cache" / "native").iterdir() if path.is_dir()]


def test_missing_sources_are_named(tiny_sources: Path, forget_keys: Callable[[], None]) -> None:
    """An incomplete installation says which directory it misses."""
    shutil.rmtree(tiny_sources)
    forget_keys()
    with pytest.raises(toolchain.ToolchainError, match=f"{re.escape(str(tiny_sources))} does not exist"):
        builder.build()


def test_missing_symbol_fails_when_it_is_loaded(tiny_sources: Path, run_code) -> None:
    """A library that lacks a function is refused at once and does not crash in the first call."""
    source = tiny_sources / "module.cpp"
    text = source.read_text().replace("  return module;", "  return absent(module);")
    source.write_text(text.replace("static", "PyObject* absent(PyObject*);\nstatic", 1))
    result = run_code(_LOAD_FROM, str(tiny_sources), LIGHTKIT_NATIVE="require")
    assert result.returncode == 1
    assert "NativeUnavailableError" in result.stderr and "absent" in result.stderr
