"""What a build depends on: the instructions of its target, torch, Python and the sources."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import sysconfig
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from . import installed_torch, toolchain

# The values of LIGHTKIT_MARCH: this machine's processor, or a level of x86-64.
MARCHES = ("native", "x86-64-v3", "x86-64-v4")

# The compiler's macros of the instructions that the widest paths of at::vec need.
_AVX512_MACROS = {"AVX512F", "AVX512BW", "AVX512DQ", "AVX512VL", "FMA"}
_AVX2_MACROS = {"AVX2", "FMA", "F16C"}

# Instructions that a compiler emits only if a program names them, as lightkit does not. Virtual machines hide some.
_NEVER_EMITTED = set(
    "CLDEMOTE CLFLUSHOPT CLWB CLZERO ENQCMD FSGSBASE FXSR HRESET INVPCID KL MOVDIRI MOVDIR64B MWAITX PCONFIG PKU "
    "PREFETCHWT1 PREFETCHI PTWRITE RDPID RDRND RDSEED RTM SERIALIZE SGX SHSTK TSXLDTRK UINTR WAITPKG WBNOINVD WIDEKL "
    "XSAVE XSAVEC XSAVEOPT XSAVES AES VAES SHA AMX_TILE AMX_INT8 AMX_BF16 AMX_FP16 PRFCHW ABM".split()
)

# Names in /proc/cpuinfo that differ from the macro in lower case.
_CPUINFO_NAMES = {
    **{"SSE3": "pni", "BMI": "bmi1", "LZCNT": "abm", "CRC32": "sse4_2", "LAHF_SAHF": "lahf_lm", "PCLMUL": "pclmulqdq"},
    **{"AVX512VNNI": "avx512_vnni", "AVX512BF16": "avx512_bf16", "AVX512FP16": "avx512_fp16"},
    **{"AVX512BITALG": "avx512_bitalg", "AVX512VPOPCNTDQ": "avx512_vpopcntdq", "AVX512VBMI2": "avx512_vbmi2"},
    **{"AVXVNNI": "avx_vnni", "AVXIFMA": "avx_ifma", "AVXVNNIINT8": "avx_vnni_int8"},
}


@dataclass(frozen=True)
class Target:
    """The instructions for which a compiler compiles under a value of ``LIGHTKIT_MARCH``.

    Args:
        march: the value of ``LIGHTKIT_MARCH``: ``native``, or a level of x86-64.
        instructions: the instructions that the compiler may emit, as /proc/cpuinfo names them.
        simd: the level of torch's vector class at::vec: ``AVX512``, ``AVX2`` or ``DEFAULT``.
    """

    march: str
    instructions: tuple[str, ...]
    simd: str

    @property
    def flags(self) -> list[str]:
        """The compiler's flags for this target."""
        level = [f"-DCPU_CAPABILITY_{self.simd}"] if self.simd != "DEFAULT" else []
        return [_march_flag(self.march), f"-DCPU_CAPABILITY={self.simd}", *level]


def march() -> str:
    """Returns the value of the environment variable ``LIGHTKIT_MARCH``, ``native`` by default.

    Raises:
        ToolchainError: the value is unknown, or is not for this machine.
    """
    value = os.environ.get("LIGHTKIT_MARCH", "native")
    if value not in MARCHES:
        raise toolchain.ToolchainError(f"LIGHTKIT_MARCH must be one of {', '.join(MARCHES)}, got {value!r}")
    if value != "native" and not _is_x86():
        raise toolchain.ToolchainError(
            f"LIGHTKIT_MARCH={value} is for x86-64, and this machine is {platform.machine()}"
        )
    return value


def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def _march_flag(name: str) -> str:
    # Clang on Apple's ARM takes -mcpu.
    return f"-mcpu={name}" if platform.machine() in ("arm64", "aarch64") else f"-march={name}"


@cache
def processor() -> frozenset[str]:
    """Returns the instructions of this machine's processor, as /proc/cpuinfo names them."""
    try:
        with open("/proc/cpuinfo") as file:
            # The line of the first core suffices: all are the same, and a large machine has hundreds.
            line = next((line for line in file if line.startswith(("flags", "Features"))), "")
    except OSError:
        line = f":{platform.machine()} {platform.processor()}"
    return frozenset(line.partition(":")[2].split())


def missing_instructions(wanted: list[str] | tuple[str, ...]) -> list[str]:
    """Returns, sorted, those of the instructions ``wanted`` that this machine's processor lacks."""
    return sorted(set(wanted) - processor())


def resolve(compiler: tuple[str, ...], directory: Path) -> Target:
    """Returns the target that a compiler has under ``LIGHTKIT_MARCH``.

    The function runs the compiler once, and stores the target in a file for later calls. The key of a build contains
    the target and not all instructions of the processor, so that machines with the same target share a build.

    Args:
        compiler: the words of the compiler's command.
        directory: the directory of the file; if it does not exist, nothing is stored.

    Raises:
        ToolchainError: the compiler fails, or ``LIGHTKIT_MARCH`` has a wrong value.
    """
    chosen = march()
    question = (*compiler_identity(), chosen, *(sorted(processor()) if chosen == "native" else ()))
    file = directory / f"target-{digest(*question)}.json"
    try:
        known = json.loads(file.read_text())
        return Target(known["march"], tuple(known["instructions"]), known["simd"])
    except (OSError, ValueError, TypeError, KeyError):
        found = _ask(compiler, chosen)
    if directory.is_dir():
        _remember(found, file)
    return found


def _ask(compiler: tuple[str, ...], chosen: str) -> Target:
    def macros(flag: str) -> set[str]:
        said = toolchain.output(*compiler, flag, "-dM", "-E", "-x", "c++", os.devnull)
        return set(re.findall(r"^#define __([A-Z0-9_]+?)__ 1$", said, re.MULTILINE))

    there = macros(_march_flag(chosen))
    simd = "AVX512" if there >= _AVX512_MACROS else "AVX2" if there >= _AVX2_MACROS else "DEFAULT"
    if not _is_x86():
        return Target(chosen, tuple(sorted(processor())), simd)
    used = there - macros("-march=x86-64") - _NEVER_EMITTED
    return Target(chosen, tuple(sorted({_CPUINFO_NAMES.get(name, name.lower()) for name in used})), simd)


def _remember(found: Target, file: Path) -> None:
    try:
        descriptor, name = tempfile.mkstemp(prefix="tmp-", dir=file.parent)
        with open(descriptor, "w") as new:
            json.dump(asdict(found), new)
        os.replace(name, file)
    except OSError:
        # Without the file, the next call runs the compiler again.
        pass


def digest(*parts: str | bytes) -> str:
    """Returns the first 16 hexadecimal digits of the SHA-256 of ``parts`` and their lengths."""
    hashed = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        hashed.update(len(data).to_bytes(8, "little") + data)
    return hashed.hexdigest()[:16]


def torch_build() -> str:
    """Returns the version, the commit and the CUDA version of the installed torch, separated by spaces."""
    facts = (installed_torch.version(), installed_torch.git_version(), installed_torch.cuda_version())
    return " ".join(map(str, facts))


def python_abi() -> str:
    """Returns the ABI tag of this Python's extension modules, such as ``cpython-312-x86_64-linux-gnu``."""
    return str(sysconfig.get_config_var("SOABI"))


@cache
def base_key() -> str:
    """Returns a digest of sources, flags, torch, Python and CUDA: all that a build depends on, except its target."""
    contents: list[str | bytes] = []
    sources = (path for path in toolchain.SOURCE_DIR.rglob("*") if path.is_file() and path.suffix != ".md")
    for path in sorted(sources):
        contents += [str(path.relative_to(toolchain.SOURCE_DIR)), path.read_bytes()]
    architectures = toolchain.cuda_architectures() if installed_torch.cuda_version() else ()
    flags = [*toolchain.common_flags(cuda=bool(architectures)), *toolchain.glue_flags(), *toolchain.linked(None)]
    flags += toolchain.CUDA_FLAGS if architectures else ()
    return digest(*contents, *flags, torch_build(), python_abi(), *architectures)


@cache
def compiler_identity() -> tuple[str, ...]:
    """Returns path, size and modification time of the C++ compiler and nvcc, which identify them without a run.

    The tuple is empty without a C++ compiler; nvcc is left out for a CPU build of torch.
    """
    compiler = toolchain.find_compiler()
    if compiler is None:
        return ()
    parts = []
    for word in (*compiler, toolchain.nvcc_path() if installed_torch.cuda_version() else None):
        tool = shutil.which(word) if word else None
        if tool is None:
            parts.append(str(word))
        else:
            stat = os.stat(tool)
            parts += [os.path.realpath(tool), f"{stat.st_size} {stat.st_mtime_ns}"]
    return tuple(parts)
