"""Compiles the CUDA kernels for the emulated GPU of machine.h with a C++ compiler, and runs them.

A kernel is written in CUDA's dialect of C++. Most of it is macros, types and functions, for which ``include/``
stands in; the three forms that are not C++ at all are rewritten here, line by line, before compilation.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parents[2] / "csrc" / "kernels"

# Pointers to scalars are read as packs of them, which CUDA's compiler allows.
_FLAGS = ["-std=c++20", "-O1", "-g1", "-fno-strict-aliasing", "-Wall", "-Wno-unknown-pragmas", "-Wno-psabi"]
# A misaligned or wild access ends the process; so does one beyond the end of any buffer.
_SANITIZERS = [
    "-fsanitize=address,alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero",
    *("-fno-sanitize-recover=all", "-fno-omit-frame-pointer"),
]

_ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:abort_on_error=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


class EmulationError(Exception):
    """The emulation ended itself: what it said."""


def translate(source: str) -> str:
    """CUDA's own syntax as C++, with every line where it was."""
    # __launch_bounds__(N) name(...) { -> name(...) { check(N);
    source = re.sub(
        r"__launch_bounds__\(([^()]*)\)(\s+\w+\([^{;]*\)\s*\{)",
        r"\2 emulation::check_launch_bounds(\1);",
        source,
    )
    # extern __shared__ T name[]; and __shared__ T name[N]; or __shared__ T name;
    source = re.sub(
        r"extern __shared__ (?:__align__\(\d+\) )?([\w:<> ]+?) (\w+)\[\];",
        r"auto* \2 = static_cast<\1*>(emulation::dynamic_shared());",
        source,
    )
    source = re.sub(
        r"__shared__ (?:__align__\(\d+\) )?([\w:<> ]+?) (\w+)((?:\[[^;]*\])?);",
        r"auto& \2 = emulation::shared_variable<\1\3>([] {});",
        source,
    )
    # kernel<T, N><<<grid, block>>>(arguments)
    return re.sub(r"(\w+(?:<[^<>;]*>)?)<<<(.*?)>>>\(", r"emulated_kernel(\1, \2)(", source, flags=re.DOTALL)


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise EmulationError(f"{' '.join(command)}:\n{result.stdout}{result.stderr}")


def build(compiler: str, directory: Path) -> Path:
    """The driver with every kernel of csrc/kernels/cuda, compiled in ``directory``."""
    tree = directory / "csrc" / "kernels"
    here = directory / "tests" / "native" / HERE.name
    for root, target in ((KERNELS, tree), (HERE, here)):
        for path in root.rglob("*"):
            if path.suffix in (".cu", ".cuh", ".h", ".cpp") and "cpu" not in path.relative_to(root).parts:
                copy = target / path.relative_to(root)
                copy.parent.mkdir(parents=True, exist_ok=True)
                text = path.read_text()
                is_kernel = path.suffix in (".cu", ".cuh")
                copy.write_text(f'#line 1 "{path}"\n{translate(text)}' if is_kernel else text)
    sources = [*(tree / "cuda").rglob("*.cu"), *here.glob("*.cu"), *here.glob("*.cpp")]

    def compile_one(source: Path) -> Path:
        made = source.with_suffix(".o")
        language = ["-x", "c++", "-include", "cuda_runtime.h"] if source.suffix == ".cu" else []
        command = [compiler, *_FLAGS, *_SANITIZERS, f"-I{here / 'include'}", *language, "-c", str(source)]
        _run([*command, "-o", str(made)])
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    program = directory / "driver"
    _run([compiler, *_SANITIZERS, *map(str, objects), "-o", str(program)])
    return program


class Emulator:
    """A process that runs kernels, started anew after each that ended it."""

    def __init__(self, program: Path) -> None:
        self._program = program
        self._process = None
        self._said = tempfile.TemporaryFile()

    def _start(self) -> None:
        self._said.seek(0)
        self._said.truncate()
        self._process = subprocess.Popen(
            [self._program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env={**os.environ, **_ENVIRONMENT},
        )

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.stdin.close()
            self._process.stdout.close()
            self._process.wait()
            self._process = None

    def said(self) -> str:
        """What kernels and sanitizers printed since the process was started."""
        self._said.seek(0)
        return self._said.read().decode(errors="replace")

    def call(
        self,
        function: str,
        buffers: dict[str, Tensor],
        settings: dict[str, object],
        *,
        offsets: dict[str, int] | None = None,
    ) -> tuple[int, int]:
        """Runs ``function`` on ``buffers``, which it changes in place, each OFFSET bytes off a multiple of 16.

        Returns the CUDA error and the number of kernels launched. Raises `EmulationError` with what was said if
        a kernel did what no kernel may.
        """
        if self._process is None:
            self._start()
        try:
            requests = [b"clear\n"]
            for name, tensor in buffers.items():
                data = _bytes(tensor)
                offset = (offsets or {}).get(name, 0)
                requests += [f"buffer {name} {len(data)} {offset}\n".encode(), data]
            requests += [f"set {name} {value}\n".encode() for name, value in settings.items()]
            self._process.stdin.write(b"".join([*requests, f"call {function}\n".encode()]))
            self._process.stdin.flush()
            answer = self._process.stdout.readline().split()
            if not answer:
                raise BrokenPipeError
            for name, tensor in buffers.items():
                self._process.stdin.write(f"fetch {name}\n".encode())
                self._process.stdin.flush()
                data = bytearray(self._process.stdout.read(tensor.numel() * tensor.element_size()))
                if data:
                    tensor.copy_(torch.frombuffer(data, dtype=tensor.dtype).view(tensor.shape))
        except BrokenPipeError:
            self._process.wait()
            self._process.stdout.close()
            self._process = None
            raise EmulationError(self.said()) from None
        return int(answer[1]), int(answer[2])


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
