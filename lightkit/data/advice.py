"""Names a setting of a data module in a message as the command at hand names it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_prefix: ContextVar[str] = ContextVar("prefix", default="")


def advise(setting: str) -> str:
    """Returns the text with which a user of the running command sets ``setting``, such as ``data.decimal=comma``.

    Args:
        setting: the name and the value of an argument of a data module, such as ``decimal=comma``.
    """
    return f"{_prefix.get()}{setting}"


@contextmanager
def settings_named(prefix: str) -> Iterator[None]:
    """Puts ``prefix`` before each setting in messages while the context lasts.

    Args:
        prefix: ``"data."`` for a command that has the settings below ``data``; without the context, as in a program,
            the settings have the names of the arguments.
    """
    token = _prefix.set(prefix)
    try:
        yield
    finally:
        _prefix.reset(token)
