"""``python -m lightkit.build``: compile the native kernels ahead of time, and say what was built.

For images and clusters, so that no training job has to. With ``--check-cuda`` every CUDA kernel is compiled
for sm_80 and sm_90, which needs nvcc but no GPU.
"""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from lightkit.lifetime import run_as_process
from lightkit.native import cache, compile, toolchain


def report(library) -> str:
    """What is known of a build, a line a fact."""
    manifest = cache.read_manifest(library.parent)
    rows = {
        "library": library,
        "torch": manifest.torch,
        "compiler": manifest.compiler,
        "flags": " ".join(manifest.flags),
        "SIMD": manifest.simd,
        "CUDA": manifest.cuda,
        "built in": f"{manifest.seconds:.0f} s",
    }
    return "\n".join(f"{name:>9}: {value}" for name, value in rows.items())


def main(arguments: list[str] | None = None) -> int:
    """Builds, and prints the report; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m lightkit.build", description=__doc__)
    parser.add_argument(
        "--check-cuda", action="store_true", help="compile the CUDA kernels for sm_80 and sm_90 and stop"
    )
    options = parser.parse_args(arguments)
    try:
        if options.check_cuda:
            for name in compile.check_cuda():
                print(f"compiles: {name}")
        else:
            print(report(compile.build()))
    except (toolchain.ToolchainError, cache.CacheError) as error:
        print(f"lightkit.build: {error}", file=sys.stderr)
        return 1
    return 0


def command() -> NoReturn:
    """Runs `main` as a process of its own."""
    run_as_process(main)


if __name__ == "__main__":
    command()
