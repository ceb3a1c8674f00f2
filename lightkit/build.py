"""The command ``python -m lightkit.build``, which compiles the native kernels ahead of time and prints the build.

With it, container images and clusters need no compilation in a training job. LIGHTKIT_MARCH=x86-64-v3 (AVX2) or
x86-64-v4 (AVX-512) compiles for every processor of that level instead of this machine's. ``--archive`` writes the
build to one file. ``--from`` installs such a file on a machine with the same torch, Python and lightkit; that machine
needs no compiler. An archive runs code, as a wheel does: install only archives whose author you trust.
``--check-cuda`` compiles every CUDA kernel for sm_80 and sm_90; it needs nvcc and no GPU.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from lightkit.native import archive, builder, cache, toolchain
from lightkit.native.versions import add_version_option
from lightkit.runtime.command_process import run_as_process


def report(library: Path) -> str:
    """Returns the properties of a build, one on each line.

    Args:
        library: the library in the directory of the build.

    Raises:
        CacheError: the manifest beside the library is missing or damaged.
    """
    manifest = cache.read_manifest(library.parent)
    if manifest is None:
        raise cache.CacheError(f"{library.parent / cache.MANIFEST} is missing or damaged")
    rows = {
        "library": library,
        "torch": manifest.torch,
        "compiler": manifest.compiler,
        "flags": " ".join(manifest.flags),
        "SIMD": manifest.simd,
        "target": f"{manifest.march}: {' '.join(manifest.instructions)}",
        "CUDA": manifest.cuda,
        "built in": f"{manifest.seconds:.0f} s",
    }
    return "\n".join(f"{name:>9}: {value}" for name, value in rows.items())


def main(arguments: list[str] | None = None) -> int:
    """Builds the native library, installs it from an archive or compiles the CUDA kernels for a check.

    Args:
        arguments: the command-line arguments; None takes those of the process. Without an option the function
            compiles the library into the cache, unless the cache has it. ``--archive FILE`` also writes the build to
            FILE. ``--from FILE`` copies the build in such a file to the cache. ``--check-cuda`` compiles every CUDA
            kernel, and installs nothing.

    Returns:
        The exit status: 0 after success, 1 after an error, which the function prints.
    """
    parser = argparse.ArgumentParser(prog="python -m lightkit.build", description=__doc__)
    add_version_option(parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--archive", type=Path, metavar="FILE", help="build if need be, and write the build to FILE")
    what.add_argument(
        "--from",
        type=Path,
        metavar="FILE",
        dest="source",
        help="install the build in FILE; it runs code: trust its maker",
    )
    what.add_argument("--check-cuda", action="store_true", help="compile the CUDA kernels for sm_80 and sm_90 and stop")
    options = parser.parse_args(arguments)
    try:
        if options.check_cuda:
            for name in builder.check_cuda():
                print(f"compiles: {name}")
        elif options.source is not None:
            print(report(archive.install(options.source)))
        else:
            library = builder.build()
            print(report(library))
            if options.archive is not None:
                archive.write(library, options.archive)
                print(f"  archive: {options.archive}")
    except (toolchain.ToolchainError, cache.CacheError, archive.ArchiveError) as error:
        print(f"lightkit.build: {error}", file=sys.stderr)
        return 1
    return 0


def command() -> NoReturn:
    """Runs `main` and ends the process with the exit status."""
    run_as_process(main)


if __name__ == "__main__":
    command()
