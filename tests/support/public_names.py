"""Lists the public names of lightkit with their signatures; as a program, rewrites the committed list.

A name is public if a module of `MODULES` exports it: by ``__all__``, or by defining it without an underscore.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

LIST = Path(__file__).parents[1] / "public_names.txt"

# What the documentation names. Everything else may change without an alias.
MODULES = (
    "lightkit.callbacks",
    "lightkit.checkpoints",
    "lightkit.compress",
    "lightkit.config",
    "lightkit.data",
    "lightkit.errors",
    "lightkit.export",
    "lightkit.finetune",
    "lightkit.flops",
    "lightkit.loggers",
    "lightkit.memory",
    "lightkit.models",
    "lightkit.native",
    "lightkit.nn",
    "lightkit.ops",
    "lightkit.optim",
    "lightkit.parameter_server",
    "lightkit.runs",
    "lightkit.serve",
    "lightkit.strategies",
    "lightkit.tasks",
)


def public_names() -> list[str]:
    """Returns one line a name: ``lightkit.ops.cross_entropy(input, target, *, ...)``."""
    lines = []
    for name in MODULES:
        module = importlib.import_module(name)
        for attribute in _exports(module):
            lines += _describe(f"{name}.{attribute}", getattr(module, attribute))
    return lines


def _exports(module: ModuleType) -> list[str]:
    if (exported := getattr(module, "__all__", None)) is not None:
        return sorted(exported)
    own = (n for n, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__)
    return sorted(name for name in own if not name.startswith("_"))


def _describe(path: str, value: object) -> Iterator[str]:
    if not callable(value):
        yield path
        return
    if not value.__module__.startswith("lightkit."):
        # The signature and the methods of a class of torch's are torch's, and differ between its releases.
        yield path
        return
    yield f"{path}{_signature(value)}"
    if inspect.isclass(value):
        foreign = [base for base in value.__mro__ if not base.__module__.startswith("lightkit.")]
        for name, member in sorted(vars(value).items()):
            # A hook of Lightning's that is overridden is no name of ours.
            if not name.startswith("_") and not any(hasattr(base, name) for base in foreign):
                function = getattr(member, "__func__", member)
                yield f"{path}.{name}{_signature(function) if inspect.isfunction(function) else ''}"


def _signature(function: object) -> str:
    """Returns the names and defaults of the parameters; annotations and memory addresses are left out."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return "(...)"
    empty = inspect.Parameter.empty
    plain = (str, int, float, bool, type(None), tuple)
    parameters = [
        p.replace(annotation=empty, default=p.default if p.default is empty or type(p.default) in plain else ...)
        for p in signature.parameters.values()
    ]
    return str(signature.replace(parameters=parameters, return_annotation=empty))


if __name__ == "__main__":
    LIST.write_text("\n".join(public_names()) + "\n")
