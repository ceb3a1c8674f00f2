"""A build goes on beside the job, and ends with it."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lightkit import native
from lightkit.native import background, builder, cache
from lightkit.native.progress import Progress, ProgressLine

# Starts the build of another source tree, which is the first argument, and waits for a line.
_START = """
import sys
from pathlib import Path
from lightkit import native
from lightkit.native import toolchain
toolchain.SOURCE_DIR = Path(sys.argv[1])
native.start()
print("started", flush=True)
sys.stdin.readline()
"""

_WAIT = _START.replace("sys.stdin.readline()", "print(native.load().__file__)")


@pytest.fixture
def held_sources(tiny_sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: str) -> Iterator[Path]:
    """Small sources whose compiler writes its number into `compiling` and does not come back on its own."""
    script, compiling = tmp_path / "held-compiler", tmp_path / "compiling"
    hold = f'echo $$ > "{compiling}.new"; mv "{compiling}.new" "{compiling}"; exec sleep 600'
    script.write_text(f'#!/bin/sh\ncase " $* " in *" -c "*) {hold};; esac\nexec "{compiler}" "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    yield tiny_sources
    if compiling.exists():
        try:
            os.kill(int(compiling.read_text()), signal.SIGKILL)
        except ProcessLookupError:
            pass


@pytest.fixture
def job(environment, tmp_path: Path, held_sources: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts a process with a build in its background, and returns when the compiler runs."""
    processes = []

    def begin(code: str = _START) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(held_sources)],
            env=environment(tmp_path / "cache", LIGHTKIT_NATIVE="require", CXX=os.environ["CXX"]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A shell has what it starts in the background ignore Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        processes.append(process)
        assert process.stdout.readline() == "started\n", process.communicate()[1]
        wait_until(lambda: (tmp_path / "compiling").exists() or process.poll() is not None)
        assert process.poll() is None, process.communicate()[1]
        return process

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


def wait_until(condition: Callable[[], bool]) -> None:
    """Waits for a condition that must come true; a minute is the sign that it does not."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def is_free(directory: Path) -> bool:
    """Whether nobody holds the lock of builders."""
    with open(directory / "build.lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL, None])
@pytest.mark.parametrize("code", [_START, _WAIT], ids=["working", "waiting"])
def test_end_of_the_job_ends_the_compilers(
    job: Callable[..., subprocess.Popen], tmp_path: Path, end: signal.Signals | None, code: str
) -> None:
    """However a job ends, its compilers end, the scraps of the build are removed and the lock is free."""
    if end is None and code == _WAIT:
        pytest.skip("a job that waits does not end by itself")
    process = job(code)
    compiler = int((tmp_path / "compiling").read_text())
    if end is None:
        process.stdin.write("\n")
        process.stdin.flush()
    else:
        process.send_signal(end)
    process.wait(60)
    wait_until(lambda: not is_running(compiler))
    wait_until(lambda: not list(cache.native_root().glob("tmp-*")))
    wait_until(lambda: is_free(cache.native_root()))


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has not asked for the library yet."""
    monkeypatch.setattr(native, "_loaded", None)
    monkeypatch.setattr(native, "_build", None)


def test_load_waits_for_what_start_began(fresh, tiny_sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library that is loaded is that of the build in the background: it is compiled once."""
    loaded = []
    monkeypatch.setattr(native, "_import", lambda library: loaded.append(library) or native)
    begun = []
    begin = builder.start
    monkeypatch.setattr(builder, "start", lambda: begun.append(1) or begin())
    native.start()
    native.start()
    assert native.load() is native
    assert begun == [1]
    assert loaded == [cache.find()]


@pytest.mark.parametrize("reason", ["off", "there"])
def test_start_starts_nothing_without_need(
    fresh, tiny_sources: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    """With LIGHTKIT_NATIVE=off, or with a library in the cache, no thread and no process is started."""
    if reason == "there":
        builder.build()
    else:
        monkeypatch.setenv("LIGHTKIT_NATIVE", "off")
    monkeypatch.setattr(builder, "start", lambda: pytest.fail("a build was started"))
    native.start()


def test_error_of_the_background_is_that_of_load(fresh, tiny_sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build that fails is told where the library is asked for, as without `start`."""
    (tiny_sources / "broken.cpp").write_text("int wrong = no_such_name;\n")
    native.start()
    with pytest.raises(native.NativeUnavailableError, match="no_such_name"):
        native.load()


def test_work_of_a_parent_is_done_anew_in_a_fork() -> None:
    """A forked process, which has no thread of its parent's, does the work itself instead of waiting for ever."""
    release = threading.Event()
    work = background.BackgroundWork(lambda control: release.wait() and "done", "working")
    pid = os.fork()
    if pid == 0:
        release.set()
        os._exit(0 if work.result() == "done" else 1)
    release.set()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert work.result() == "done"


@pytest.mark.parametrize(
    ("done", "shown"),
    [(0, "[........................] 0/4"), (1, "[######..................] 1/4, about 3"), (4, "4/4")],
)
def test_progress_says_how_far_and_how_long(monkeypatch: pytest.MonkeyPatch, done: int, shown: str) -> None:
    """The line has the units and, once it can be told, the seconds left."""
    progress = Progress(done=done, total=4, started=100.0)
    monkeypatch.setattr(time, "monotonic", lambda: 110.0)
    assert shown in str(progress)


def test_without_a_terminal_one_line_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """A log file gets a line, not a bar drawn again and again."""
    line = ProgressLine("compiling")
    line.draw(Progress(done=1, total=2))
    line.close()
    assert capsys.readouterr().err == "compiling\n"
