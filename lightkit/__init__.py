"""Fast, complete model training for people who use PyTorch Lightning."""

# Type checkers take a variable of this name for True. The import of typing takes longer than that of all the rest.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from lightkit.fitting import FitResult, fit, load

__version__ = "0.1.0"

__all__ = ["FitResult", "fit", "load"]


def __getattr__(name: str) -> "Any":
    # The import of torch takes seconds, which a command such as --help need not wait for.
    if name in __all__:
        import importlib

        return getattr(importlib.import_module("lightkit.fitting"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
