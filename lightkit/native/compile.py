"""Compiles csrc/ with ninja."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from . import cache, toolchain

_HOW_LONG = "this happens once for this torch and this machine and takes one to two minutes"


def build() -> Path:
    """The library for this torch and this machine, compiled now unless an intact one is in the cache.

    Raises `ToolchainError` or `CacheError` where it cannot be built.
    """
    with _locked_cache() as directory:
        found = cache.find()
        return found if found is not None else _build(directory)


@contextmanager
def _locked_cache() -> Iterator[Path]:
    """The cache directory, while this process is the one that builds."""
    directory = cache.make_root()
    try:
        with cache.builder_lock(directory):
            yield directory
    except OSError as error:
        raise cache.CacheError(f"the cache cannot be written: {error}; set LIGHTKIT_CACHE_DIR") from error


def _build(directory: Path) -> Path:
    compiler = toolchain.require_compiler()
    cuda, reason = toolchain.find_cuda()
    started = time.monotonic()
    with cache.work_directory(directory) as work:
        library = work / f"{toolchain.MODULE_NAME}.so"
        rules = ninja_file(compiler, cuda, toolchain.sources(cuda is not None), library.name)
        run_ninja(work, rules, f"lightkit: compiling the native kernels; {_HOW_LONG}")
        architectures = ", ".join(f"sm_{a}" for a in cuda.architectures) if cuda else ""
        manifest = {
            "torch": torch.__version__,
            "compiler": toolchain.compiler_version(compiler),
            "flags": toolchain.compile_flags(compiler, cuda is not None),
            "simd": toolchain.simd_level(compiler),
            "cuda": f"nvcc {cuda.version} for {architectures}" if cuda else f"none: {reason}",
            "seconds": round(time.monotonic() - started, 1),
        }
        return cache.publish(work, library, manifest)


def check_cuda(architectures: tuple[str, ...] = toolchain.DEFAULT_CUDA_ARCHITECTURES) -> list[str]:
    """Compiles every CUDA kernel and its glue, without linking, on a machine that need not have a GPU.

    Returns the names of the compiled sources. Raises `ToolchainError` without nvcc or if one fails.
    """
    cuda, reason = toolchain.find_nvcc()
    if cuda is None:
        raise toolchain.ToolchainError(reason)
    cuda = replace(cuda, architectures=architectures)
    cuda_sources = [path for path in toolchain.sources(cuda=True) if toolchain.is_cuda_source(path)]
    with _locked_cache() as directory, cache.work_directory(directory) as work:
        # A CPU build of torch has the CUDA headers but for one that its own build would have generated.
        extra = () if torch.version.cuda else ("-DC10_USING_CUSTOM_GENERATED_MACROS",)
        rules = ninja_file(toolchain.require_compiler(), cuda, cuda_sources, None, extra)
        run_ninja(
            work, rules, f"lightkit: compiling the CUDA kernels for {', '.join('sm_' + a for a in architectures)}"
        )
    return [str(path.relative_to(toolchain.SOURCE_DIR)) for path in cuda_sources]


def _escape(text: str | os.PathLike) -> str:
    """A path or flag as ninja reads it."""
    return re.sub(r"([$ :])", r"$\1", os.fspath(text))


def _shell(*words: str) -> str:
    """Words of a command as ninja hands them to the shell."""
    return " ".join(
        "'" + word.replace("'", "'\\''") + "'" if re.search(r"[^\w@%+=:,./-]", word) else word for word in words
    ).replace("$", "$$")


def ninja_file(
    compiler: tuple[str, ...],
    cuda: toolchain.CudaToolchain | None,
    sources: list[Path],
    library: str | None,
    extra_flags: tuple[str, ...] = (),
) -> str:
    """The build: one object a unit, and ``library`` of them all if it is named."""
    includes = toolchain.include_flags(cuda)
    cxx = _shell(*compiler, *toolchain.compile_flags(compiler, cuda is not None), *extra_flags, *includes)
    lines = [
        "rule cxx",
        f"  command = {cxx} $options -c $in -o $out",
        "rule link",
        f"  command = {_shell(*compiler)} $in -o $out {_shell(*toolchain.link_flags(cuda))}",
    ]
    if cuda is not None:
        lines += ["rule nvcc", f"  command = {_shell(cuda.nvcc, *toolchain.cuda_compile_flags(cuda))} -c $in -o $out"]
    objects = []
    for unit in toolchain.units(sources):
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


def run_ninja(work: Path, rules: str, announcement: str) -> None:
    """Runs a build in ``work``, telling on standard error how far it is."""
    (work / "build.ninja").write_text(rules)
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    on_terminal = sys.stderr.isatty()
    print(announcement, file=sys.stderr, end="" if on_terminal else "\n", flush=True)
    process = subprocess.Popen(
        [_ninja(), "-C", str(work), *jobs],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "NINJA_STATUS": "[%f/%t] "},
    )
    said = []
    started = time.monotonic()
    try:
        for line in process.stdout:
            said.append(line)
            if on_terminal and (progress := re.match(r"\[\d+/\d+\]", line)):
                print(f"\r{announcement} {progress[0]}", file=sys.stderr, end="", flush=True)
        failed = process.wait() != 0
    except BaseException:
        # Terminated, not killed: ninja then ends its compilers, too.
        process.terminate()
        process.wait()
        raise
    finally:
        if on_terminal:
            print(file=sys.stderr)
    if failed:
        raise toolchain.ToolchainError("the native kernels do not compile:\n" + _errors("".join(said)))
    print(f"lightkit: compiled in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)


def _errors(output: str, limit: int = 20) -> str:
    """The lines of a compiler's output that tell why it failed."""
    lines = output.splitlines()
    errors = [line for line in lines if re.search(r"\berror\b|undefined reference|No space left|Killed", line)]
    return "\n".join((errors or lines)[:limit])
