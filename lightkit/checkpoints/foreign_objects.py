"""Finds the object in a checkpoint that is no plain data, and its key, without a run of the file's code.

Hyperparameters of a stranger's LightningModule may hold a path, a configuration or a number of NumPy. Such an object is
a call of a function in the pickle, which ``weights_only=True`` refuses. This module interprets the operations of the
pickle with stand-ins for all objects; it imports, calls, hashes and compares nothing of the file.
"""

from __future__ import annotations

import pickletools
import zipfile
from _compat_pickle import NAME_MAPPING
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

from lightkit._util.printable import printable
from lightkit.checkpoints.archives import is_plain_global

# The limits in bytes of the pickle, in objects of the search, in keys of a path, and in characters of a key.
_MAX_PICKLE, _MAX_OBJECTS, _MAX_DEPTH, _MAX_KEY = 64 << 20, 500_000, 12, 60

# Types by the ends of the names of the functions that make their objects. NumPy's modules differ between releases.
_MAKERS = {
    "multiarray.scalar": "a NumPy scalar",
    "multiarray._reconstruct": "a NumPy array",
    "numeric._frombuffer": "a NumPy array",
    "_codecs.encode": "bytes",
}

# Modules of the functions that make tensors of all kinds. torch loads those without the file's code.
_TENSORS = ("torch._utils.", "torch._tensor.")


@dataclass(eq=False)
class _Node:
    """A stand-in for an object.

    Attributes:
        name: the dotted name of the global that makes the object, or that it is; "" for a container.
        parts: the parts of the object with their keys; None is the key of an argument or a state.
        is_global: True for a class or function itself.
    """

    name: str = ""
    parts: list[tuple[Any, Any]] = field(default_factory=list)
    is_global: bool = False


_MARK = _Node("mark")


def find_foreign_object(file: BinaryIO, refused: str | None = None) -> str | None:
    """Returns the first object of a checkpoint that is no plain data, such as "hyper_parameters.root is of type ...".

    Args:
        file: the checkpoint, open for reading; the search moves its position.
        refused: the dotted name of the global to search; None searches for any that is not plain.

    Returns:
        The key and the type of the object; None if the file is no checkpoint with a ``state_dict``, or has none.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            (part,) = (part for part in archive.infolist() if part.filename.endswith("/data.pkl"))
            with archive.open(part) as stream:
                pickle = stream.read(_MAX_PICKLE + 1)
        root = _interpret(pickle) if len(pickle) <= _MAX_PICKLE else None
    except (zipfile.BadZipFile, ValueError, IndexError, KeyError, NotImplementedError, EOFError, RuntimeError):
        return None
    if not isinstance(root, _Node) or "state_dict" not in [key for key, _ in root.parts if isinstance(key, str)]:
        return None
    return next(_foreign(root, refused), None)


def _foreign(root: _Node, refused: str | None) -> Iterator[str]:
    """Yields the descriptions of foreign objects, the least nested first."""
    pending: deque[tuple[_Node, tuple[str, ...]]] = deque([(root, ())])
    seen = {id(root)}
    while pending and len(seen) < _MAX_OBJECTS:
        node, path = pending.popleft()
        if _is_foreign(node.name) if refused is None else _public(node.name) == refused:
            yield f"{''.join(path).removeprefix('.') or 'its content'} is {_describe(node)}"
        elif len(path) < _MAX_DEPTH and not node.name.startswith(_TENSORS):
            for key, part in node.parts:
                if isinstance(part, _Node) and id(part) not in seen:
                    seen.add(id(part))
                    pending.append((part, (*path, _segment(key))))


def _is_foreign(name: str) -> bool:
    return name != "" and not is_plain_global(name) and not name.startswith(_TENSORS)


def _segment(key: Any) -> str:
    if key is None:
        return ""
    text = printable(str(key)) if isinstance(key, (str, int, float)) else "?"
    text = text if len(text) <= _MAX_KEY else f"{text[:_MAX_KEY]}..."
    return f".{text}" if isinstance(key, str) else f"[{text}]"


def _describe(node: _Node) -> str:
    # Python 3.13 pickles the paths by the private module that defines them; other versions do not have it.
    name = printable(_public(node.name).replace("pathlib._local.", "pathlib.", 1))
    known = next((words for end, words in _MAKERS.items() if node.name.endswith(end)), f"of type {name}")
    return f"the class or function {name}" if node.is_global else known


def _public(name: str) -> str:
    """Returns the name of a global in Python 3, without the module of the built-in ones, as torch's errors have it."""
    module, _, attribute = name.rpartition(".")
    module, attribute = NAME_MAPPING.get((module, attribute), (module, attribute))
    return attribute if module in ("builtins", "__builtin__", "") else f"{module}.{attribute}"


def _interpret(pickle: bytes) -> Any:
    """Returns the stand-in of the object that a pickle holds: a `_Node`, or a constant such as a str.

    Raises:
        ValueError: the pickle is damaged.
        IndexError: the pickle takes more values than it has.
        KeyError: the pickle reads a value that it has not stored.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def take_marked() -> list[Any]:
        place = len(stack) - 1
        while stack[place] is not _MARK:
            place -= 1
            if place < 0:
                raise ValueError("no mark")
        taken = stack[place + 1 :]
        del stack[place:]
        return taken

    # An argument is a str, an int or bytes, as its opcode says.
    operations = cast("Iterable[tuple[pickletools.OpcodeInfo, Any, int | None]]", pickletools.genops(pickle))
    for opcode, argument, _ in operations:
        name = opcode.name
        if name == "MARK":
            stack.append(_MARK)
        elif name == "STOP":
            return stack.pop()
        elif name in ("PROTO", "FRAME"):
            pass
        elif name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            memo[len(memo) if name == "MEMOIZE" else int(argument)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[int(argument)])
        elif name == "GLOBAL":
            stack.append(_Node(argument.replace(" ", ".", 1), is_global=True))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(_Node(f"{module}.{attribute}", is_global=True))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, function = stack.pop(), stack.pop()
            stack.append(_Node(_name_of(function), [(None, arguments)]))
        elif name == "NEWOBJ_EX":
            options, arguments, function = stack.pop(), stack.pop(), stack.pop()
            stack.append(_Node(_name_of(function), [(None, arguments), (None, options)]))
        elif name in ("OBJ", "INST"):
            parts = take_marked()
            made = _name_of(parts.pop(0)) if name == "OBJ" else argument.replace(" ", ".", 1)
            stack.append(_Node(made, [(None, part) for part in parts]))
        elif name == "BUILD":
            state = stack.pop()
            _parts_of(stack[-1]).append((None, state))
        elif name in ("SETITEM", "SETITEMS"):
            flat = take_marked() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            _parts_of(stack[-1]).extend(zip(flat[::2], flat[1::2], strict=True))
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            items = [stack.pop()] if name == "APPEND" else take_marked()
            parts = _parts_of(stack[-1])
            parts.extend(enumerate(items, len(parts)))
        elif name in ("TUPLE", "LIST", "FROZENSET"):
            stack.append(_Node(parts=list(enumerate(take_marked()))))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            items = [stack.pop() for _ in range(count)][::-1]
            stack.append(_Node(parts=list(enumerate(items))))
        elif name == "DICT":
            flat = take_marked()
            stack.append(_Node(parts=list(zip(flat[::2], flat[1::2], strict=True))))
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            take_marked()
        elif name == "BINPERSID":
            stack[-1] = _Node()
        elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "EMPTY_SET", "PERSID"):
            stack.append(_Node())
        elif name in ("EXT1", "EXT2", "EXT4"):
            stack.append(_Node("an extension of copyreg"))
        else:
            # The other operations push a constant.
            stack.append(argument)
    raise ValueError("no end")


def _name_of(function: Any) -> str:
    return function.name if isinstance(function, _Node) and function.name else "an object"


def _parts_of(node: Any) -> list[tuple[Any, Any]]:
    if not isinstance(node, _Node):
        raise ValueError("not a container")
    return node.parts
