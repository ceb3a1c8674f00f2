"""Messages for errors in the input of a command."""

from __future__ import annotations

import re
import shlex
import sys

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from lightkit._util.installation import how_to_install
from lightkit._util.printable import printable
from lightkit.app.schema import config_loader, override_names
from lightkit.app.texts import quote_word
from lightkit.errors import CarriedError, LightkitError
from lightkit.targets import nearest

# Control characters that a message may contain.
_LAYOUT = "\n\t"

# The largest number of characters of a message; an error may list millions of columns of a file.
_LONGEST_MESSAGE = 4000

# The keys that take a list on the command line.
_LIST_KEYS = ("callbacks", "logger", "tags")


def lightning_exceptions(name: str) -> tuple[type[BaseException], ...]:
    """Returns Lightning's exception class ``name`` in a tuple; an empty tuple if Lightning has not been imported."""
    module = sys.modules.get("lightning.pytorch.utilities.exceptions")
    return () if module is None else (getattr(module, name),)


def user_error_types() -> tuple[type[BaseException], ...]:
    """Returns the types of errors in the input; any other type is a fault of the program and keeps its traceback."""
    misconfiguration = lightning_exceptions("MisconfigurationException")
    return (LightkitError, HydraException, OmegaConfBaseException, OSError, *misconfiguration)


def print_error(message: str) -> None:
    """Prints ``message`` on standard error; escapes control characters, which names in the message may contain."""
    if len(message) > _LONGEST_MESSAGE:
        message = f"{message[:_LONGEST_MESSAGE]} ... ({len(message):,} characters)"
    print(f"error: {printable(message, keep=_LAYOUT)}", file=sys.stderr)


def explain(error: BaseException, config_name: str) -> str:
    """Returns the message for an error in the input, with the nearest known names for a misspelt one.

    Args:
        error: an instance of one of `user_error_types`, or a `CarriedError`.
        config_name: the name of the command's configuration.
    """
    if isinstance(error, CarriedError):
        return explain(error.args[0], config_name)
    message = str(error).strip()
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        # For one choice of a list Hydra leaves the options out.
        if options := list(error.options or _choices(group)):
            return _explain_choice(group, name, options)
    if isinstance(error, OverrideParseException):
        return _explain_word(error)
    if several := re.match(r"Ambiguous value for argument '(.*)'\n1", message, re.DOTALL):
        return f"{several[1]}: the key has one value; -m runs a job for each of several{_list_hint(several[1])}"
    if added := re.match(r"Multiple values for (\w+)\. To override a value use 'override \w+: (.+)'", message):
        group, choice = added.groups()
        several = f"; with the default choice, {group}=[default,{choice}]" if group in _LIST_KEYS else ""
        return f"+{group}={choice}: the group has a choice already, which {group}={choice} replaces{several}"
    if isinstance(error, ConfigCompositionException):
        cause = str(error.__cause__).partition("\n")[0] if error.__cause__ else ""
        key = re.search(r"Could not (?:override|append|delete) '([^'@]+)", message)
        hint = nearest(key[1], [name for name in override_names(config_name) if name != key[1]]) if key else ""
        return ". ".join(part for part in (message.replace("\n", " "), cause) if part) + hint
    if isinstance(error, OSError) and not isinstance(error, LightkitError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, (OmegaConfBaseException, HydraException)):
        return message.replace("\n", " ")
    return message or type(error).__name__


def _explain_word(error: OverrideParseException) -> str:
    """Returns the message for a word of the command line that Hydra's parser rejects."""
    word = error.override
    key, separator, _ = word.partition("=")
    if not separator:
        return (
            f"{word!r} on the command line is not KEY=VALUE; if it belongs to the word before it, put both into one "
            "pair of the shell's quotes: 'KEY=some value'"
        )
    try:
        OverridesParser.create().parse_override(f"{key}=")
    except HydraException:
        return f"{word!r} on the command line is not KEY=VALUE: {key!r} cannot be the name of a key"
    # For a function such as range(...) the parser says what is wrong with its arguments.
    cause = re.search(r"(\w*Error while evaluating .*)", error.args[0]) if error.args else None
    if cause is not None:
        return f"{word!r} on the command line: {cause[1]}"
    return (
        f"{word!r} on the command line: the value cannot be read; a bracket or quote may be missing, and a text with "
        f"special characters needs quotes within the shell's quotes: {shlex.quote(quote_word(word))}"
    )


def explain_null() -> str | None:
    """Returns the message for ``GROUP=null`` on the command line, for which Hydra raises a bare ValueError.

    The function also explains ``GROUP=[default,null]`` and ``GROUP=[default,1]``, for which Hydra raises a TypeError.

    Returns:
        The message; None if no override sets a group to a value that is no name.
    """
    with config_loader() as loader:
        for word in sys.argv[1:]:
            name, _, value = word.lstrip("+").partition("=")
            group = name.partition("@")[0]
            if group not in loader.list_groups(""):
                continue
            elements = value.strip("[] ").split(",")
            for element in map(str.strip, elements if value.startswith("[") or "null" in value.lower() else []):
                if element.lower() == "null" or (value.startswith("[") and not _is_name(element)):
                    return _explain_choice(group, element.lower(), loader.get_group_options(group))
    return None


def _choices(group: str) -> list[str]:
    with config_loader() as loader:
        return loader.get_group_options(group)


def _is_name(element: str) -> bool:
    """Returns True if Hydra reads an element of a list as a text."""
    try:
        return isinstance(OverridesParser.create().parse_override(f"key={element}").value(), str)
    except HydraException:
        return True


def _list_hint(word: str) -> str:
    """Returns a clause that proposes a list, for ``GROUP=a,b`` and ``tags=a,b``; else an empty string."""
    key, _, value = word.partition("=")
    return f"; a list of several is {key}=[{value}]" if key in _LIST_KEYS else ""


def _explain_choice(group: str, name: str, choices: list[str]) -> str:
    """Returns the message that ``group`` has no choice ``name``, with the ``choices`` of the group."""
    if (group, name) == ("hydra/sweeper", "optuna"):
        return f"hydra/sweeper=optuna needs a package that is not installed: {how_to_install('sweep')}"
    hint = nearest(name, choices) or ("; did you mean none?" if name == "null" and "none" in choices else ".")
    return f"there is no {group}={name}{hint} Choices: {', '.join(choices)}"
