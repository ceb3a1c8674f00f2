"""A check that an untrusted checkpoint is a plain archive of plain data, before torch reads it.

With ``weights_only=True`` torch runs no code of a file. The file can still hang the process, end it or take any amount
of memory: by compressed records, by deeply nested tuples that take very long to hash, or by calls of functions with a
large size as argument. `torch.save` writes none of these.
"""

from __future__ import annotations

import os
import pickletools
import struct
import zipfile
from collections.abc import Iterable
from typing import Any, BinaryIO, cast

import torch

# The records at the end of a zip file: the end of central directory, and the two zip64 records before it.
_END = struct.Struct("<4s4H2LH")
_LOCATOR = struct.Struct("<4sLQL")
_LARGE_END = struct.Struct("<4sQ2H2L4Q")

# The limit in bytes of the pickle, which describes the tensors and holds everything else.
_MAX_PICKLE = 256 << 20

# The limit of the levels of nested tuples; a pickle of torch.save has three.
_MAX_NESTING = 8

# The globals in a pickle of plain data and tensors, besides storages and dtypes.
_GLOBALS = {
    "builtins.complex",
    "builtins.set",
    "__builtin__.complex",
    "__builtin__.set",
    "collections.Counter",
    "collections.OrderedDict",
    "torch.Size",
    "torch.device",
    "torch.serialization._get_layout",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_tensor_v2",
    "torch.storage.UntypedStorage",
}


def find_unsafe_content(file: BinaryIO) -> str | None:
    """Returns the first content that `torch.save` does not write, in words such as "its records are compressed".

    Args:
        file: the checkpoint, open for reading; the check moves its position.

    Returns:
        The description, a sentence; None if `torch.save` may have written the whole content for plain data.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            parts = archive.infolist()
            if problem := _find_in_archive(file, archive, parts):
                return problem
            pickles = [part for part in parts if part.filename.endswith("/data.pkl")]
            if len(pickles) != 1:
                return f"it has {len(pickles)} records data.pkl"
            if pickles[0].file_size > _MAX_PICKLE:
                return f"its data.pkl has {pickles[0].file_size:,} bytes; the limit is {_MAX_PICKLE:,}"
            return _find_in_pickle(archive.read(pickles[0]))
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, struct.error, RecursionError) as error:
        return str(error).partition("\n")[0] or type(error).__name__


def _find_in_archive(file: BinaryIO, archive: zipfile.ZipFile, parts: list[zipfile.ZipInfo]) -> str | None:
    size = os.fstat(file.fileno()).st_size
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
        return "its records are compressed"
    if sum(part.file_size for part in parts) > size or any(part.file_size != part.compress_size for part in parts):
        return "its records are larger than the file"
    # torch ignores the case of a record's name.
    if len({part.filename.lower() for part in parts}) != len(parts):
        return "two of its records have the same name"
    return None if _is_one_directory(file, size, len(archive.comment)) else "it has more than one directory"


def _is_one_directory(file: BinaryIO, size: int, comment: int) -> bool:
    """Returns True if the archive's directory ends exactly where the end records begin.

    In any other archive, two readers may find two different directories.

    Args:
        file: the archive.
        size: the size of the file in bytes.
        comment: the size of the archive's comment in bytes.
    """
    place = size - comment - _END.size
    *_, length, offset, _ = _END.unpack(_read(file, place, _END.size))
    before = _read(file, place - _LOCATOR.size, _LOCATOR.size) if place >= _LOCATOR.size else b""
    if before[:4] == b"PK\6\7":
        end = place - _LOCATOR.size - _LARGE_END.size
        if end < 0 or _LOCATOR.unpack(before)[2] != end:
            return False
        signature, *_, large_length, large_offset = _LARGE_END.unpack(_read(file, end, _LARGE_END.size))
        if signature != b"PK\6\6" or length not in (large_length, 0xFFFFFFFF):
            return False
        if offset not in (large_offset, 0xFFFFFFFF):
            return False
        place, length, offset = end, large_length, large_offset
    return offset + length == place


def _read(file: BinaryIO, place: int, size: int) -> bytes:
    file.seek(place)
    return file.read(size)


def _find_in_pickle(pickle: bytes) -> str | None:
    """Returns a description of the first operation in ``pickle`` that `torch.save` does not write, or None.

    The function interprets the opcodes with a stack that has, for each value, the number of levels of nested tuples.
    """
    stack: list[int] = []
    marks: list[int] = []
    memo: dict[int, int] = {}

    def take(count: int) -> list[int]:
        if count > len(stack) - (marks[-1] if marks else 0):
            raise ValueError("its data.pkl is damaged")
        taken = stack[len(stack) - count :]
        del stack[len(stack) - count :]
        return taken

    def take_marked() -> list[int]:
        if not marks:
            raise ValueError("its data.pkl is damaged")
        place = marks.pop()
        taken = stack[place:]
        del stack[place:]
        return taken

    # An argument is a str, an int or bytes, as its opcode says.
    operations = cast("Iterable[tuple[pickletools.OpcodeInfo, Any, int | None]]", pickletools.genops(pickle))
    for opcode, argument, _ in operations:
        name = opcode.name
        if name in ("PROTO", "FRAME", "STOP"):
            pass
        elif name == "GLOBAL":
            if not is_plain_global(argument.replace(" ", ".", 1)):
                return f"it names {argument.replace(' ', '.', 1)!r}, which is no plain data"
            stack.append(0)
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("BINPUT", "LONG_BINPUT"):
            if not stack:
                return "its data.pkl is damaged"
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            if argument not in memo:
                return "its data.pkl is damaged"
            stack.append(memo[argument])
        elif name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
            inner = take_marked() if name == "TUPLE" else take(int(name[-1]))
            depth = 1 + max(inner, default=0)
            if depth > _MAX_NESTING:
                return "it nests tuples too deep"
            stack.append(depth)
        elif name in ("SETITEMS", "APPENDS"):
            take_marked()
        elif name in ("SETITEM", "APPEND", "BUILD"):
            take(2 if name == "SETITEM" else 1)
        elif name in ("REDUCE", "BINPERSID"):
            take(2 if name == "REDUCE" else 1)
            stack.append(0)
        elif name in _VALUES:
            stack.append(0)
        else:
            return f"its data.pkl has the operation {name}"
    return None


# Opcodes that push a value without tuples.
_VALUES = frozenset(
    "BINBYTES BINFLOAT BININT BININT1 BININT2 BINUNICODE EMPTY_DICT EMPTY_LIST EMPTY_TUPLE LONG1 LONG4 NEWFALSE "
    "NEWTRUE NONE SHORT_BINBYTES".split()
)


def is_plain_global(name: str) -> bool:
    """Returns True if a pickle of plain data and tensors may name the global with the dotted ``name``."""
    module, _, attribute = name.rpartition(".")
    is_dtype = module == "torch" and isinstance(getattr(torch, attribute, None), torch.dtype)
    is_storage = module == "torch" and attribute.endswith("Storage")
    return is_dtype or is_storage or name in _GLOBALS
