"""Patterns of the names of parameters and modules, such as ``features.*`` and ``*.bias``."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from lightkit.errors import ConfigError
from lightkit.targets import nearest

# The number of names that a message lists.
_MAX_SHOWN = 6


def to_patterns(value: Any, argument: str) -> list[str]:
    """Returns a pattern or a sequence of patterns as a list.

    Args:
        value: the value that a user has given.
        argument: the name of the argument, for the message.

    Raises:
        ConfigError: ``value`` is something else, or a pattern is empty.
    """
    patterns = [value] if isinstance(value, str) else value
    is_list = isinstance(patterns, Sequence) and not isinstance(patterns, (str, bytes))
    if not is_list or not all(isinstance(pattern, str) and pattern.strip() for pattern in patterns):
        raise ConfigError(f"{argument} must be a list of patterns of names, such as [features.*], got {value!r}")
    return list(patterns)


def match(patterns: Iterable[str], names: Collection[str], argument: str, prefix: str = "") -> set[str]:
    """Returns the names that a pattern matches: the name itself, or that of a module around it.

    A pattern matches as in the shell: ``*`` any text, dots included, ``?`` one character, ``[ab]`` one of them.

    Args:
        patterns: the patterns.
        names: the dotted names of tensors.
        argument: the name of the argument, for the message.
        prefix: the beginning that the names have in common and that a pattern may leave out, such as ``model.``.

    Raises:
        ConfigError: a pattern matches no name; the message has the nearest names.
    """
    forms = {name: _forms(name, prefix) for name in names}
    found: set[str] = set()
    for pattern in patterns:
        matched = {name for name, known in forms.items() if any(fnmatchcase(form, pattern) for form in known)}
        if not matched:
            # The shorter forms are those that people write.
            known = sorted(
                {form for forms_of_one in forms.values() for form in forms_of_one}, key=lambda n: (len(n), n)
            )
            hint = nearest(pattern.rstrip(".*"), known) or f"; there are {_listed(_tops(names, prefix))}"
            raise ConfigError(f"{argument}: {pattern!r} matches no parameter or module{hint}")
        found |= matched
    return found


def common_prefix(names: Iterable[str]) -> str:
    """Returns the first part of dotted names with its dot, if all of them begin with the same; else an empty text."""
    tops = {name.partition(".")[0] if "." in name else "" for name in names}
    return f"{tops.pop()}." if len(tops) == 1 and "" not in tops else ""


def _forms(name: str, prefix: str) -> list[str]:
    parts = name.split(".")
    forms = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    return forms + [form.removeprefix(prefix) for form in forms if prefix and form.startswith(prefix)]


def _tops(names: Iterable[str], prefix: str) -> list[str]:
    return list(dict.fromkeys(name.removeprefix(prefix).partition(".")[0] for name in names))


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else ""
    return ", ".join(names[:_MAX_SHOWN]) + more
