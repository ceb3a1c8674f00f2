"""The versions of lightkit and its libraries, and the state of the kernels, without an import of torch."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import lightkit
from lightkit._util.printable import printable
from lightkit.errors import ConfigError
from lightkit.native import cache, installed_torch, policy, target, toolchain

_PACKAGES = ("lightning", "hydra-core")


def version_lines() -> str:
    """Returns the versions of lightkit, torch, Lightning and Hydra, and the state of the kernels, a line each."""
    rows = {"lightkit": lightkit.__version__, "torch": _torch_version()}
    for package in _PACKAGES:
        try:
            rows[package] = version(package)
        except PackageNotFoundError:
            rows[package] = "not installed"
    rows["kernels"] = kernel_state()
    return "\n".join(printable(f"{name} {value}") for name, value in rows.items())


def kernel_state() -> str:
    """Returns whether the cache has the kernels for this torch, Python and processor; compiles and loads nothing."""
    try:
        if policy() == "off":
            return "off: LIGHTKIT_NATIVE=off"
        manifest = _find_manifest()
    except (ConfigError, ImportError, OSError, cache.CacheError, toolchain.ToolchainError) as error:
        return f"not built: {error}"
    if manifest is None:
        return "not built for this machine: the first use compiles them, as python -m lightkit.build does"
    with_cuda = "" if manifest.cuda.startswith("none") else f", {manifest.cuda}"
    return f"built for this machine ({manifest.march}, {manifest.simd}{with_cuda})"


def add_version_option(parser: argparse.ArgumentParser) -> None:
    """Adds ``--version``, which prints `version_lines` and ends the program."""
    parser.add_argument("--version", action=_PrintVersions, nargs=0, help="print versions and the state of the kernels")


class _PrintVersions(argparse.Action):
    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: str | Sequence[Any] | None, option: Any = None
    ) -> None:
        print(version_lines())
        parser.exit()


def _torch_version() -> str:
    try:
        return installed_torch.version()
    except (ImportError, OSError):
        return "not installed"


def _find_manifest() -> cache.Manifest | None:
    if installed_torch.cuda_version() is None or os.environ.get("TORCH_CUDA_ARCH_LIST"):
        library = cache.find()
        return None if library is None else cache.read_manifest(library.parent)
    # torch alone knows the GPUs of this machine, for which a build with CUDA is made.
    root = cache.native_root()
    if not root.is_dir():
        return None
    cache.check_private(root)
    for build in sorted(root.iterdir()):
        manifest = cache.read_manifest(build)
        if (
            manifest is not None
            and manifest.torch == installed_torch.version()
            and manifest.python == target.python_abi()
            and not target.missing_instructions(manifest.instructions)
            and cache.intact_library(build) is not None
        ):
            return manifest
    return None
