"""The private names of Lightning: they exist in the installed release, and one package alone touches them."""

import ast
import importlib
import inspect
import pkgutil
import re
from functools import cache
from pathlib import Path

import lightning
import pytest
from lightning.pytorch import Trainer

import lightkit
from lightkit._lightning.names import INHERITED, USED

_PACKAGE = Path(lightkit.__file__).parent
_LIGHTNING = Path(lightning.__file__).parent

# Names that Lightning defines for objects of its own, and torch for modules and tensors.
_OTHERS = {"_modules", "_version"}

_PATHS = sorted({path for names in (*USED.values(), *INHERITED.values()) for path in names})


@pytest.mark.parametrize("path", _PATHS)
def test_private_name_exists(path):
    """A release of Lightning without the name would fail in the middle of a training."""
    module, names = _split(path)
    owner = module
    for name in names[:-1]:
        owner = getattr(owner, name)
    assert hasattr(owner, names[-1]) or _is_assigned(owner, names[-1]), f"Lightning {lightning.__version__} lacks it"


def _split(path):
    """Returns the longest prefix of a dotted path that is a module, and the names after it."""
    parts = path.split(".")
    for end in range(len(parts) - 1, 0, -1):
        try:
            return importlib.import_module(".".join(parts[:end])), parts[end:]
        except ModuleNotFoundError:
            continue
    raise AssertionError(f"{path} is in no module")


def _is_assigned(owner, name):
    """Returns True if instances of a class have an attribute: `Trainer` gets some of its own from functions."""
    if owner is Trainer:
        return hasattr(_trainer(), name)
    sources = (inspect.getsource(cls) for cls in owner.__mro__ if cls.__module__ != "builtins")
    return any(re.search(rf"\bself\.{name}\s*(:|=)", source) for source in sources)


@cache
def _trainer():
    return Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")


@cache
def _private_names_of_lightning():
    """Returns every name that begins with one underscore and is defined somewhere in Lightning."""
    defined = re.compile(r"(?:\bdef |\bclass |\bself\.|^)(_[a-zA-Z]\w*)(?=\s*[(:=])", re.MULTILINE)
    files = [file for part in ("pytorch", "fabric") for file in (_LIGHTNING / part).rglob("*.py")]
    return {name for file in files for name in defined.findall(file.read_text())} - _OTHERS


def _modules():
    files = (file for file in _PACKAGE.rglob("*.py") if file.relative_to(_PACKAGE).parts[0] != "conf")
    return sorted(file for file in files if "_lightning" not in file.parts)


@pytest.mark.parametrize("file", _modules(), ids=lambda file: str(file.relative_to(_PACKAGE)))
def test_no_other_module_touches_private_names(file):
    """An import, an attribute of an object that is not ``self``, or the name as a string."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning"):
            found += [name.name for name in node.names if _is_private(f"{node.module}.{name.name}")]
        elif isinstance(node, ast.Import):
            names = [name.name for name in node.names]
            found += [name for name in names if name.startswith("lightning") and _is_private(name)]
        elif isinstance(node, ast.Attribute) and not _is_own(node.value):
            found += [ast.unparse(node)] if node.attr in _private_names_of_lightning() else []
        elif isinstance(node, ast.Constant) and node.value in _listed():
            found.append(node.value)
    assert not found, f"touch these in lightkit/_lightning/ instead: {found}"


def _is_private(path):
    return any(part.startswith("_") and not part.startswith("__") for part in path.split("."))


def _is_own(node):
    is_super = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"
    return is_super or (isinstance(node, ast.Name) and node.id in ("self", "cls"))


@cache
def _listed():
    return {path.rpartition(".")[2] for path in _PATHS}


def test_subclasses_use_listed_members_only():
    """A private member of a base class of Lightning's is an attribute of ``self``: it must be in the list, too."""
    found = set()
    for module in _lightkit_modules():
        for cls in vars(module).values():
            if inspect.isclass(cls) and cls.__module__ == module.__name__:
                bases = [base for base in cls.__mro__ if base.__module__.startswith("lightning.")]
                used = set(re.findall(r"\b(?:self|super\(\))\.(_[a-z]\w*)", inspect.getsource(cls)))
                used |= {name for name in vars(cls) if _is_private(name)} - {"_abc_impl"}
                found |= {(cls.__qualname__, name) for name in used if any(_defines(base, name) for base in bases)}
    assert {name for _, name in found} <= _listed(), sorted(found)


def _lightkit_modules():
    for package in ("callbacks", "checkpoints", "data", "loops", "strategies", "tasks"):
        root = importlib.import_module(f"lightkit.{package}")
        yield root
        for info in pkgutil.iter_modules(root.__path__, f"{root.__name__}."):
            yield importlib.import_module(info.name)
    yield importlib.import_module("lightkit.loggers")


def _defines(cls, name):
    return name in vars(cls) or re.search(rf"\bself\.{name}\s*(:|=)", inspect.getsource(cls)) is not None
