"""The native library of kernels: the cache or a compiler provides it at first use, and each process loads it once.

`load` waits for a library that must be compiled; `start` compiles in the background.

The environment variable ``LIGHTKIT_NATIVE`` decides what happens if the library cannot be loaded. A reference is the
implementation of an op in torch's operations.

- ``auto`` (the default): one warning says why, and the references run;
- ``require``: `load` raises `NativeUnavailableError`;
- ``off``: the references run, and nothing is loaded or compiled.
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
_build: BackgroundWork[Path] | None = None


class NativeUnavailableError(LightkitError, RuntimeError):
    """The native library cannot be loaded although ``LIGHTKIT_NATIVE=require``."""


def policy() -> str:
    """Returns the value of ``LIGHTKIT_NATIVE``: ``auto``, ``require`` or ``off``.

    Raises:
        ConfigError: the value is not one of auto, require, off.
    """
    value = os.environ.get("LIGHTKIT_NATIVE", "auto")
    if value not in _POLICIES:
        raise ConfigError(f"LIGHTKIT_NATIVE must be one of {', '.join(_POLICIES)}, got {value!r}")
    return value


def start() -> None:
    """Starts to compile the library in a background thread if the cache has none; a later `load` waits for it.

    The function reports no errors of the compiler: `load` does. If this process ends before the compilation, the
    compilers end, too, and leave no files.

    Raises:
        ConfigError: ``LIGHTKIT_NATIVE`` has another value than `policy` returns.
    """
    global _build
    with _lock:
        if _loaded is not None or _build is not None or policy() == "off":
            return
        from . import cache, toolchain

        try:
            if cache.find() is None:
                from . import builder

                _build = builder.start()
        except (toolchain.ToolchainError, cache.CacheError):
            # `load` raises the same error again, and reports it.
            return


def load() -> ModuleType | None:
    """Returns the native module; the first call in a process loads it, and compiles it if the cache has none.

    Returns:
        The module; None if it is switched off or cannot be loaded, after one warning in the latter case. The references
        then run instead.

    Raises:
        NativeUnavailableError: ``LIGHTKIT_NATIVE=require``, and the library cannot be loaded.
        ConfigError: ``LIGHTKIT_NATIVE`` has another value than `policy` returns.
    """
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
    """Loads the native module, and compiles it first if the cache has none.

    Returns:
        The module and an empty string; or None and the reason why there is no module.
    """
    chosen = policy()
    if chosen == "off":
        return None, _OFF
    from . import cache, toolchain

    try:
        library = _build.result() if _build is not None else cache.find()
        if library is None:
            from . import builder

            library = builder.build()
        manifest = cache.read_manifest(library.parent)
        if manifest is None:
            raise cache.CacheError(f"{library.parent} has no manifest any more")
        cache.check_processor(manifest)
        return _import(library), ""
    except (toolchain.ToolchainError, cache.CacheError, ImportError) as error:
        if chosen == "require":
            raise NativeUnavailableError(f"LIGHTKIT_NATIVE=require, but there is no native library: {error}") from error
        return None, str(error)


def _import(library: Path) -> ModuleType:
    # The library needs those of torch, which are loaded with it.
    import torch  # noqa: F401

    from .toolchain import MODULE_NAME

    loader = ExtensionFileLoader(MODULE_NAME, str(library))
    spec = spec_from_file_location(MODULE_NAME, library, loader=loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    # The import has registered the ops with torch, which `register` needs.
    from .batching import register

    register()
    return module


def available(device_type: str = "cpu") -> bool:
    """Returns True if the native library can be loaded and has kernels for tensors on ``device_type``.

    Args:
        device_type: ``type`` of a `torch.device`, such as ``"cpu"`` or ``"cuda"``.
    """
    module = load()
    return module is not None and device_type in module.devices


def missing(device_type: str = "cpu") -> str | None:
    """Returns the reason why there are no native kernels for tensors on ``device_type``.

    The function does not warn as `load` does: its callers tell the user.

    Args:
        device_type: ``type`` of a `torch.device`, such as ``"cpu"`` or ``"cuda"``.

    Returns:
        The reason; None if there are such kernels.
    """
    module, cause = _load_once()
    if module is None:
        return cause
    if device_type not in module.devices:
        return f"the native library has kernels for {' and '.join(module.devices)}, not for {device_type}"
    return None
