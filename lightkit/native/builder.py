"""The build of the native library from the sources in csrc/, with ninja."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from . import cache, target, toolchain
from .background import BackgroundWork, Control

_ANNOUNCEMENT = "lightkit: compiling the native kernels, once for this torch and this kind of processor"


def start() -> BackgroundWork[Path]:
    """Starts, in a background thread, to find the library in the cache or to compile it for this torch and machine.

    The ``result()`` of the returned work waits for the path of the library, and raises the errors of `build`.
    """
    return BackgroundWork(_find_or_build, _ANNOUNCEMENT)


def build() -> Path:
    """Returns the path of the library for this torch and machine; compiles it unless an intact one is in the cache.

    Raises:
        ToolchainError: a compiler, a header or ninja is missing, or the sources do not compile.
        CacheError: the cache cannot be used.
    """
    return start().result()


@contextmanager
def _locked_cache(control: Control) -> Iterator[tuple[Path, int]]:
    """Holds the builder's lock within the context; yields the directory of the builds and the lock's descriptor.

    Raises:
        CacheError: the cache cannot be used.
        Stopped: a thread has called ``control.stop()`` before the lock was free.
    """
    directory = cache.make_root()
    try:
        with cache.builder_lock(directory, control.check) as lock:
            yield directory, lock
    except OSError as error:
        raise cache.CacheError(f"the cache cannot be written: {error}; set LIGHTKIT_CACHE_DIR") from error


def _find_or_build(control: Control) -> Path:
    with _locked_cache(control) as (directory, lock):
        found = cache.find()
        return found if found is not None else _build(directory, lock, control)


def _build(directory: Path, lock: int, control: Control) -> Path:
    compiler = toolchain.require_compiler()
    built_for = target.resolve(compiler, directory)
    cuda, reason = toolchain.find_cuda()
    with cache.work_directory(directory) as work:
        library = work / f"{toolchain.MODULE_NAME}.so"
        units = toolchain.units(toolchain.sources(cuda is not None))
        run_ninja(work, lock, ninja_file(compiler, built_for, cuda, units, library.name), len(units) + 1, control)
        architectures = ", ".join(f"sm_{a}" for a in cuda.architectures) if cuda else ""
        manifest = {
            "base_key": target.base_key(),
            "torch": torch.__version__,
            "python": target.python_abi(),
            "compiler": toolchain.compiler_version(compiler),
            "flags": [*toolchain.common_flags(cuda is not None), *built_for.flags],
            "march": built_for.march,
            "instructions": list(built_for.instructions),
            "simd": built_for.simd,
            "cuda": f"nvcc {cuda.version} for {architectures}" if cuda else f"none: {reason}",
            "seconds": round(control.progress.seconds or 0.0, 1),
        }
        return cache.publish(work, library, manifest, cache.build_directory(compiler))


def check_cuda(architectures: tuple[str, ...] = toolchain.DEFAULT_CUDA_ARCHITECTURES) -> list[str]:
    """Compiles every CUDA source without a link step, which needs nvcc and no GPU.

    Args:
        architectures: the compute capabilities to compile for, such as ``"80"`` for sm_80.

    Returns:
        The paths of the sources relative to csrc/.

    Raises:
        ToolchainError: there is no nvcc, or a source does not compile.
    """
    cuda, reason = toolchain.find_nvcc()
    if cuda is None:
        raise toolchain.ToolchainError(reason)
    cuda = replace(cuda, architectures=architectures)
    cuda_sources = [path for path in toolchain.sources(cuda=True) if toolchain.is_cuda_source(path)]
    compiler = toolchain.require_compiler()

    def work(control: Control) -> None:
        with _locked_cache(control) as (directory, lock), cache.work_directory(directory) as place:
            # A CPU build of torch has all CUDA headers except one, which torch's own build generates.
            extra = () if torch.version.cuda else ("-DC10_USING_CUSTOM_GENERATED_MACROS",)
            units = toolchain.units(cuda_sources)
            rules = ninja_file(compiler, target.resolve(compiler, directory), cuda, units, None, extra)
            run_ninja(place, lock, rules, len(units), control)

    names = ", ".join("sm_" + a for a in architectures)
    BackgroundWork(work, f"lightkit: compiling the CUDA kernels for {names}").result()
    return [str(path.relative_to(toolchain.SOURCE_DIR)) for path in cuda_sources]


def _escape(text: str | os.PathLike) -> str:
    """Returns a path or flag with the characters escaped that ninja interprets."""
    return re.sub(r"([$ :])", r"$\1", os.fspath(text))


def _shell(*words: str) -> str:
    """Returns the words of a command as one text, quoted for the shell and escaped for ninja."""
    return " ".join(
        "'" + word.replace("'", "'\\''") + "'" if re.search(r"[^\w@%+=:,./-]", word) else word for word in words
    ).replace("$", "$$")


def ninja_file(
    compiler: tuple[str, ...],
    built_for: target.Target,
    cuda: toolchain.CudaToolchain | None,
    units: list[toolchain.Unit],
    library: str | None,
    extra_flags: tuple[str, ...] = (),
) -> str:
    """Returns the content of ``build.ninja``: a rule for the object of each unit, and one that links the objects.

    Args:
        compiler: the words of the C++ compiler's command.
        built_for: the target of the build.
        cuda: the CUDA toolchain; None for a build without CUDA.
        units: the units to compile.
        library: the file name of the library; None for a build that does not link.
        extra_flags: further flags of the C++ compiler.
    """
    includes = toolchain.include_flags(cuda)
    flags = [*toolchain.common_flags(cuda is not None), *built_for.flags, *extra_flags]
    cxx = _shell(*compiler, *flags, *includes)
    lines = [
        "rule cxx",
        f"  command = {cxx} $options -c $in -o $out",
        "rule link",
        f"  command = {_shell(*compiler)} $in -o $out {_shell(*toolchain.link_flags(cuda))}",
    ]
    if cuda is not None:
        lines += ["rule nvcc", f"  command = {_shell(cuda.nvcc, *toolchain.cuda_compile_flags(cuda))} -c $in -o $out"]
    objects = []
    for unit in units:
        *others, last = unit.files
        rule = "nvcc" if last.suffix == ".cu" else "cxx"
        name = unit.name.replace("/", "-") + ".o"
        lines.append(f"build {_escape(name)}: {rule} {_escape(last)}")
        options = toolchain.glue_flags() if unit.is_glue else []
        options += [word for path in others for word in ("-include", os.fspath(path))]
        if rule == "cxx" and options:
            lines.append(f"  options = {_shell(*options)}")
        objects.append(_escape(name))
    if library is not None:
        lines += [f"build {_escape(library)}: link {' '.join(objects)}", f"default {_escape(library)}"]
    return "\n".join(lines) + "\n"


def _ninja() -> str:
    try:
        import ninja
    except ImportError:
        found = shutil.which("ninja")
        if found is None:
            raise toolchain.ToolchainError("ninja was not found: pip install ninja") from None
        return found
    return str(Path(ninja.BIN_DIR) / "ninja")


def run_ninja(work: Path, lock: int, rules: str, steps: int, control: Control) -> None:
    """Runs ninja, and updates ``control.progress``.

    Args:
        work: the directory of the build.
        lock: the descriptor of the builder's lock, which ninja inherits.
        rules: the content of ``build.ninja``.
        steps: the number of build steps, for the progress.
        control: the control of the background work.

    Raises:
        ToolchainError: ninja is missing, or a source does not compile; the message has the errors.
        Stopped: a thread has called ``control.stop()``.
    """
    (work / "build.ninja").write_text(rules)
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    progress = control.progress
    progress.started = time.monotonic()
    progress.total = steps
    command = [_ninja(), "-C", os.fspath(work), *jobs]
    output: list[str] = []
    with control.run(command, work, lock, {**os.environ, "NINJA_STATUS": "[%f/%t] "}) as process:
        assert process.stdout is not None
        for line in process.stdout:
            output.append(line)
            if done := re.match(r"\[(\d+)/\d+\]", line):
                progress.done = int(done[1])
    control.check()
    if process.returncode != 0:
        raise toolchain.ToolchainError("the native kernels do not compile:\n" + _errors("".join(output)))
    progress.seconds = time.monotonic() - progress.started


def _errors(output: str, limit: int = 20) -> str:
    """Returns the lines with errors in a compiler's output, or the first lines if none has; ``limit`` lines at most."""
    lines = output.splitlines()
    errors = [line for line in lines if re.search(r"\berror\b|undefined reference|No space left|Killed", line)]
    return "\n".join((errors or lines)[:limit])
