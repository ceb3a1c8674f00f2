"""Models by HTTP: ``python -m lightkit.serve ckpt_path=...``, and `serve` and `Server` in a program.

See `lightkit.app.serving` for its parts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightkit.app.serving import Server, ServerSettings, serve

__all__ = ["Server", "ServerSettings", "serve"]


def __getattr__(name: str) -> Any:
    # --help need not wait for the import.
    if name in __all__:
        import lightkit.app.serving

        return getattr(lightkit.app.serving, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
