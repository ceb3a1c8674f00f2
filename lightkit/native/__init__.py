"""The native library: found in the cache or compiled at first use, and loaded once a process.

`load` waits for a library that must be compiled; `start` lets the compilers run while the process does other things.

``LIGHTKIT_NATIVE`` decides what happens where that fails:

- ``auto`` (the default): one warning that says why, and the pure-PyTorch references do the work;
- ``require``: `NativeUnavailableError`;
- ``off``: the references do the work, and nothing is compiled.
"""

from __future__ import annotations

import os
import threading
import warnings
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from lightkit.errors import ConfigError, LightkitError

if TYPE_CHECKING:
    from .background import BackgroundWork

_POLICIES = ("auto", "require", "off")

_OFF = "LIGHTKIT_NATIVE=off"

_lock = threading.Lock()
_loaded: tuple[ModuleType | None, str] | None = None
_warned = False
_build: BackgroundWork | None = None


class NativeUnavailableError(LightkitError, RuntimeError):
    """The native library is required and cannot be had."""


def policy() -> str:
    """Returns the value of ``LIGHTKIT_NATIVE``.

    Raises:
        ConfigError: it is none that there is.
    """
    value = os.environ.get("LIGHTKIT_NATIVE", "auto")
    if value not in _POLICIES:
        raise ConfigError(f"LIGHTKIT_NATIVE must be one of {', '.join(_POLICIES)}, got {value!r}")
    return value


def start() -> None:
    """Begins to compile the library in the background if it must be compiled; `load` waits for it.

    Nothing runs on torch's own operations meanwhile: what needs the library calls `load`. If this process ends before
    the compilers, they end, too, and leave nothing behind.
    """
    global _build
    with _lock:
        if _loaded is not None or _build is not None or policy() == "off":
            return
        from . import cache, toolchain

        try:
            if cache.find() is None:
                from . import compile

                _build = compile.start()
        except (toolchain.ToolchainError, cache.CacheError):
            # `load` comes to the same error, and tells it.
            return


def load() -> ModuleType | None:
    """Returns the native module, compiled first if need be; None where the references are to be used."""
    global _warned
    module, cause = _load_once()
    if module is None and cause != _OFF and not _warned:
        _warned = True
        warnings.warn(
            f"lightkit works without its native kernels, more slowly: {cause}\n"
            "(LIGHTKIT_NATIVE=off silences this, LIGHTKIT_NATIVE=require makes it an error)",
            RuntimeWarning,
            stacklevel=1,
        )
    return module


def _load_once() -> tuple[ModuleType | None, str]:
    global _loaded
    if _loaded is None:
        with _lock:
            if _loaded is None:
                _loaded = _load()
    return _loaded


def _load() -> tuple[ModuleType | None, str]:
    """The module, or None and the cause."""
    chosen = policy()
    if chosen == "off":
        return None, _OFF
    from . import cache, toolchain

    try:
        library = _build.result() if _build is not None else cache.find()
        if library is None:
            from . import compile

            library = compile.build()
        cache.check_processor(cache.read_manifest(library.parent))
        return _import(library), ""
    except (toolchain.ToolchainError, cache.CacheError, ImportError) as error:
        if chosen == "require":
            raise NativeUnavailableError(f"LIGHTKIT_NATIVE=require, but there is no native library: {error}") from error
        return None, str(error)


def _import(library: Path) -> ModuleType:
    from .toolchain import MODULE_NAME

    spec = spec_from_file_location(MODULE_NAME, library, loader=ExtensionFileLoader(MODULE_NAME, str(library)))
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    # The ops are there from now on.
    from lightkit.ops.batching import register

    register()
    return module


def available(device_type: str = "cpu") -> bool:
    """Returns whether there are native kernels for tensors on such a device."""
    module = load()
    return module is not None and device_type in module.devices


def missing(device_type: str = "cpu") -> str | None:
    """Returns why there are no native kernels for tensors on such a device, or None where there are.

    For callers that tell the user themselves: unlike `load`, it does not warn.
    """
    module, cause = _load_once()
    if module is None:
        return cause
    if device_type not in module.devices:
        return f"the native library has kernels for {' and '.join(module.devices)}, not for {device_type}"
    return None
