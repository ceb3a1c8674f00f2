"""Messages for errors in the input of a command."""

from __future__ import annotations

import re
import sys

from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from omegaconf.errors import OmegaConfBaseException

from lightkit._util.installation import how_to_install
from lightkit._util.printable import printable
from lightkit.app.schema import config_loader, override_names
from lightkit.errors import CarriedError, LightkitError
from lightkit.targets import nearest

# Control characters that a message may contain.
_LAYOUT = "\n\t"

# The largest number of characters of a message; an error may list millions of columns of a file.
_LONGEST_MESSAGE = 4000


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
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return _explain_choice(group, name, list(error.options))
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


def explain_null() -> str | None:
    """Returns the message for ``GROUP=null`` on the command line, for which Hydra raises a bare ValueError.

    Returns:
        The message; None if no override sets a group to null.
    """
    with config_loader() as loader:
        for word in sys.argv[1:]:
            name, _, value = word.lstrip("+").partition("=")
            group = name.partition("@")[0]
            if group in loader.list_groups("") and "null" in value.lower().split(","):
                return _explain_choice(group, "null", loader.get_group_options(group))
    return None


def _explain_choice(group: str, name: str, choices: list[str]) -> str:
    """Returns the message that ``group`` has no choice ``name``, with the ``choices`` of the group."""
    if (group, name) == ("hydra/sweeper", "optuna"):
        return f"hydra/sweeper=optuna needs a package that is not installed: {how_to_install('sweep')}"
    hint = nearest(name, choices) or ("; did you mean none?" if name == "null" and "none" in choices else ".")
    return f"there is no {group}={name}{hint} Choices: {', '.join(choices)}"
