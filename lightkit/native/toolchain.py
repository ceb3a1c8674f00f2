"""The compilers of this machine, and the flags that fit the installed torch."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from . import installed_torch

SOURCE_DIR = Path(__file__).resolve().parent.parent / "csrc"
MODULE_NAME = "_lightkit_native"

# The compute capabilities of the CUDA kernels on a machine without a GPU: Ampere (sm_80) and Hopper (sm_90).
DEFAULT_CUDA_ARCHITECTURES = ("80", "90")

# The flags of every .cu file, without the architectures.
CUDA_FLAGS = ("-std=c++17", "-O3", "-lineinfo", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC")

# The units that take longest to compile, the slowest first, so that two cores finish at about the same time.
_SLOWEST_UNITS = (
    *("ops/common", "kernels/cpu/layer_chain", "bindings.cpp", "kernels/cpu/conv2d"),
    *("kernels/cpu/linear_cross_entropy", "ops/cross_entropy", "ops/linear_cross_entropy", "ops/layer_chain"),
    *("ops/conv2d", "ops/optim"),
)

# The values of LIGHTKIT_NATIVE_SANITIZE: the sanitizers that work in a library that Python loads.
_SANITIZERS = ("address", "undefined")


class ToolchainError(RuntimeError):
    """The native library cannot be built; the message says what is missing."""


@dataclass(frozen=True)
class CudaToolchain:
    """The compiler nvcc and its directories.

    Args:
        nvcc: the path of nvcc.
        version: the CUDA version of nvcc, such as ``12.6``.
        architectures: the compute capabilities to compile for, such as ``90``.
        include_dirs: the directories of CUDA's headers.
        library_dirs: the directories of CUDA's libraries.
    """

    nvcc: str
    version: str
    architectures: tuple[str, ...]
    include_dirs: tuple[str, ...]
    library_dirs: tuple[str, ...]


def find_compiler() -> tuple[str, ...] | None:
    """Returns the command of the C++ compiler in words: ``$CXX``, else the first of g++, c++, clang++ on the path.

    The function does not run the compiler.

    Returns:
        The command; None if there is none on the path.
    """
    wanted = os.environ.get("CXX")
    candidates = [shlex.split(wanted)] if wanted else [["g++"], ["c++"], ["clang++"]]
    # A wrapper makes a command of several words, such as CXX="ccache g++".
    return next(((found, *rest) for name, *rest in candidates if (found := shutil.which(name))), None)


def require_compiler() -> tuple[str, ...]:
    """Returns the command that `find_compiler` finds, after a check that torch works with the compiler.

    Raises:
        ToolchainError: there is no compiler, or it is clang on Linux; the message says how to get one.
    """
    compiler = find_compiler()
    if compiler is None:
        wanted = os.environ.get("CXX")
        what = f"the compiler named by CXX ({wanted!r})" if wanted else "a C++ compiler (g++, c++ or clang++)"
        raise ToolchainError(f"{what} was not found on the path; on Debian and Ubuntu: apt-get install g++")
    if platform.system() == "Linux" and "clang" in compiler_version(compiler):
        # clang's OpenMP is libomp; torch has loaded g++'s, and the two compete for the cores.
        raise ToolchainError(
            f"{' '.join(compiler)} is clang, whose OpenMP does not work with torch's on Linux; set CXX to a g++"
        )
    return compiler


def output(*command: str) -> str:
    """Returns the standard output of a command, whose words are ``command``.

    Raises:
        ToolchainError: the command fails or prints nothing.
    """
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if result.returncode != 0 or not result.stdout:
        said = result.stderr.strip() or result.stdout.strip() or "it said nothing"
        raise ToolchainError(f"{' '.join(command)} failed: {said}")
    return result.stdout


@cache
def compiler_version(compiler: tuple[str, ...]) -> str:
    """Returns the first line that ``compiler --version`` prints.

    Raises:
        ToolchainError: the compiler fails.
    """
    return output(*compiler, "--version").splitlines()[0]


def sanitizers() -> tuple[str, ...]:
    """Returns the sanitizers in the comma-separated list ``LIGHTKIT_NATIVE_SANITIZE``; an empty tuple by default.

    The sanitizers serve tests of the kernels: an error in such a build ends the process with a report. The library
    loads only if ``LD_PRELOAD`` has loaded the run-time of the sanitizers.

    Raises:
        ToolchainError: the list has another name than ``address`` and ``undefined``.
    """
    named = tuple(name for name in os.environ.get("LIGHTKIT_NATIVE_SANITIZE", "").split(",") if name)
    if unknown := [name for name in named if name not in _SANITIZERS]:
        raise ToolchainError(f"LIGHTKIT_NATIVE_SANITIZE knows {', '.join(_SANITIZERS)}, got {unknown[0]!r}")
    return named


def sanitize_flags() -> list[str]:
    """Returns the flags of the sanitizers for every C++ file and for the link; an empty list without sanitizers."""
    names = sanitizers()
    if not names:
        return []
    # Without vptr: that check needs the run-time types of torch's classes, which torch does not export.
    flags = [f"-fsanitize={','.join(names)}", "-fno-sanitize-recover=all", "-fno-sanitize=vptr"]
    # -O1 compiles faster; -g1 and frame pointers give lines and whole stacks in a report.
    return [*flags, "-O1", "-g1", "-fno-omit-frame-pointer", "-D_GLIBCXX_ASSERTIONS"]


def glue_flags() -> list[str]:
    """Returns ``["-O2"]``, which replaces the -O3 of `common_flags` for units that only call kernels.

    Such a unit would compile longer with -O3 and not run faster. The list is empty with sanitizers, which use -O1.
    """
    return [] if sanitizers() else ["-O2"]


def common_flags(cuda: bool) -> list[str]:
    """Returns the flags of every C++ file, without those of the target's instructions.

    Args:
        cuda: define LIGHTKIT_CUDA, for a build with CUDA.
    """
    return [
        *("-std=c++20", "-O3", "-DNDEBUG", "-fPIC", "-fopenmp", "-fvisibility=hidden"),
        *sanitize_flags(),
        *(["-DLIGHTKIT_CUDA"] if cuda else []),
        f"-DLIGHTKIT_MODULE={MODULE_NAME}",
        # Each op has a header of its own; without this flag torch's headers include all two thousand.
        "-DAT_PER_OPERATOR_HEADERS",
        # Every torch that lightkit works with is built so.
        "-D_GLIBCXX_USE_CXX11_ABI=1",
    ]


def include_flags(cuda: CudaToolchain | None) -> list[str]:
    """Returns the flags of the header directories of torch and Python, and of CUDA unless ``cuda`` is None.

    Raises:
        ToolchainError: Python's headers are missing.
    """
    python = sysconfig.get_paths()["include"]
    if not (Path(python) / "Python.h").is_file():
        raise ToolchainError(f"Python's headers are not in {python}; on Debian and Ubuntu: apt-get install python3-dev")
    # The import is local, since it takes longer than to load the library.
    from torch.utils import cpp_extension

    paths = [*cpp_extension.include_paths("cpu"), python]
    paths += cuda.include_dirs if cuda else ()
    return [flag for path in paths for flag in ("-isystem", path)]


def linked(cuda: CudaToolchain | None) -> list[str]:
    """Returns the linker's flags and the libraries of the shared object, without the libraries' directories.

    OpenMP's run-time library is not linked: its symbols come from the one that torch has loaded. A second run-time
    library would have a second pool of threads, which competes with the first for the cores. ``-z now`` makes an
    undefined symbol an error at load time instead of a crash in the first call. libstdc++ comes first: a compiler that
    links it statically would add a second libstdc++, whose streams crash functions of torch, such as those that print a
    shape into an error. CUDA's run-time library is linked statically; it shares the CUDA context with that of torch.

    Args:
        cuda: the CUDA toolchain; None for a build without CUDA.
    """
    libraries = ["c10", "torch_cpu", "torch", "torch_python"]
    if platform.system() == "Linux":
        libraries.insert(0, "stdc++")
    if cuda is not None:
        libraries += ["c10_cuda", "torch_cuda", "cudart_static", "rt", "dl", "pthread"]
    undefined = ["-undefined", "dynamic_lookup"] if platform.system() == "Darwin" else ["-Wl,-z,now"]
    return ["-shared", *undefined, *sanitize_flags(), *(f"-l{name}" for name in libraries)]


def link_flags(cuda: CudaToolchain | None) -> list[str]:
    """Returns the flags of `linked` after those of the directories of torch's and, unless None, CUDA's libraries."""
    from torch.utils import cpp_extension

    paths = [*cpp_extension.library_paths("cpu"), *(cuda.library_dirs if cuda else ())]
    return [*(f"-L{path}" for path in paths), *linked(cuda)]


def find_cuda() -> tuple[CudaToolchain | None, str]:
    """Returns the CUDA toolchain with which the library is compiled for the installed torch.

    Returns:
        The toolchain and an empty string; or None and the reason why there is none, such as a CPU build of torch.
    """
    if installed_torch.cuda_version() is None:
        return None, "the installed torch is a CPU build"
    return find_nvcc()


def find_nvcc() -> tuple[CudaToolchain | None, str]:
    """Returns the CUDA toolchain of nvcc, also for a CPU build of torch.

    Returns:
        The toolchain and an empty string; or None and the reason: nvcc is missing, or has another major version of CUDA
        than torch.
    """
    nvcc = nvcc_path()
    if nvcc is None:
        return None, "nvcc was not found on the path or under CUDA_HOME"
    version = next((line for line in output(nvcc, "--version").splitlines() if "release" in line), "unknown")
    number = version.partition("release ")[2].partition(",")[0]
    wanted = installed_torch.cuda_version()
    if wanted and number.partition(".")[0] != wanted.partition(".")[0]:
        return None, f"nvcc is of CUDA {number} but torch was built for CUDA {wanted}"
    # nvcc prints its directories: it may be a wrapper, or belong to a package without the layout of a toolkit.
    dry_run = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    include_dirs = re.findall(r'(?:-I|"-isystem" ")([^"\s]+)"', dry_run)
    library_dirs = re.findall(r'"-L([^"\s]+)"', dry_run)
    unique = tuple(dict.fromkeys(include_dirs)), tuple(dict.fromkeys(library_dirs))
    return CudaToolchain(nvcc, number, cuda_architectures(), *unique), ""


def nvcc_path() -> str | None:
    """Returns the path of nvcc: in ``CUDA_HOME`` or ``CUDA_PATH``, on the path, or in /usr/local/cuda; else None."""
    inside = [Path(home) / "bin" / "nvcc" for name in ("CUDA_HOME", "CUDA_PATH") if (home := os.environ.get(name))]
    named = next((str(path) for path in inside if path.exists()), None)
    usual = Path("/usr/local/cuda/bin/nvcc")
    return named or shutil.which("nvcc") or (str(usual) if usual.exists() and not inside else None)


def cuda_architectures() -> tuple[str, ...]:
    """Returns the compute capabilities to compile CUDA kernels for, such as ``90``.

    They are those of ``TORCH_CUDA_ARCH_LIST``, else of this machine's GPUs, else `DEFAULT_CUDA_ARCHITECTURES`.
    """
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if listed:
        return tuple(dict.fromkeys(a.replace(".", "").removesuffix("+PTX") for a in listed.replace(";", " ").split()))
    # The import is local: with a CPU build of torch nothing else here needs torch itself.
    import torch

    if torch.cuda.is_available():
        capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        return tuple(f"{major}{minor}" for major, minor in sorted(capabilities))
    return DEFAULT_CUDA_ARCHITECTURES


def cuda_compile_flags(toolchain: CudaToolchain) -> list[str]:
    """Returns the flags of every .cu file, with the architectures of ``toolchain``."""
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in toolchain.architectures]
    return [*CUDA_FLAGS, *targets]


def sources(cuda: bool) -> list[Path]:
    """Returns the paths of the files to compile, sorted.

    Args:
        cuda: include the files that only a build with CUDA compiles, ``*.cu`` and ``*_cuda.cpp``.

    Raises:
        ToolchainError: the directory csrc/ does not exist.
    """
    if not SOURCE_DIR.is_dir():
        raise ToolchainError(f"the kernel sources are not where they belong: {SOURCE_DIR} does not exist")
    found = sorted(path for path in SOURCE_DIR.rglob("*") if path.suffix in (".cpp", ".cu"))
    return [path for path in found if cuda or not is_cuda_source(path)]


@dataclass(frozen=True)
class Unit:
    """The source files that one run of a compiler compiles into one object.

    Args:
        name: the folder or file relative to csrc/, such as ``ops/optim``.
        files: the source files.
    """

    name: str
    files: tuple[Path, ...]

    @property
    def is_glue(self) -> bool:
        """True if the files of the unit only call kernels, outside of the folder kernels/, and do no arithmetic."""
        return not self.name.startswith("kernels/")


def units(files: list[Path]) -> list[Unit]:
    """Groups source files into units, the slowest to compile first.

    The C++ files in the folder of a family of ops, such as ops/optim, are one unit; any other file is a unit of its
    own. The files are short and torch's headers are long: one more file in a unit takes some tenths of a second to
    compile, one more unit takes two seconds.
    """
    grouped: dict[str, list[Path]] = {}
    for path in files:
        place = path.relative_to(SOURCE_DIR)
        is_cuda = is_cuda_source(path)
        # Families have the folders ops/FAMILY and kernels/cpu/FAMILY.
        if place.parts[0] == "ops" or (not is_cuda and len(place.parts) == 4):
            place = place.parent / "cuda" if is_cuda else place.parent
        grouped.setdefault(place.as_posix(), []).append(path)
    ranks = {name: rank for rank, name in enumerate(_SLOWEST_UNITS)}
    ordered = sorted(grouped, key=lambda name: ranks.get(name, len(ranks)))
    return [Unit(name, tuple(grouped[name])) for name in ordered]


def is_cuda_source(path: Path) -> bool:
    """Returns True if only a build with CUDA compiles the source ``path``."""
    return path.suffix == ".cu" or path.stem.endswith("_cuda")
