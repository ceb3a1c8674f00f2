r"""Texts on the command line: Hydra takes the value of a text key literally, whatever characters it has.

Hydra's parser of overrides gives a meaning to brackets, quotes, commas, ``=``, ``$`` and many more, and rejects all
letters but ASCII's. Names of files and columns have such characters, so that this module quotes them for Hydra.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

from lightkit.app.schema import check_name
from lightkit.errors import ConfigError

# The keys whose values are paths, in which `~` stands for a home directory.
PATHS = frozenset(
    {
        "callbacks.checkpoint.dirpath",
        "ckpt_path",
        "compress.distil.teacher",
        "data.data_dir",
        "data.path",
        "data.test_path",
        "data_dir",
        "hydra.run.dir",
        "hydra.sweep.dir",
        "hydra.sweep.subdir",
        "init_from",
        "input",
        "logger.csv.save_dir",
        "logger.mlflow.save_dir",
        "logger.tensorboard.save_dir",
        "logger.wandb.save_dir",
        "output",
        "run_dir",
        "strategy.directory",
        "trainer.default_root_dir",
    }
)

# The keys within groups whose values are other texts. The texts among a command's own keys are those of type str.
TEXTS = frozenset(
    {
        "callbacks.checkpoint.filename",
        "callbacks.checkpoint.monitor",
        "callbacks.early_stopping.monitor",
        "data.column",
        "data.decimal",
        "data.encoding",
        "data.separator",
        "data.sheet",
        "data.target",
        "data.time_column",
        "logger.csv.name",
        "logger.csv.version",
        "logger.mlflow.experiment_name",
        "logger.mlflow.run_name",
        "logger.mlflow.tracking_uri",
        "logger.tensorboard.name",
        "logger.tensorboard.version",
        "logger.wandb.entity",
        "logger.wandb.group",
        "logger.wandb.name",
        "logger.wandb.project",
        "scheduler.monitor",
    }
)

# Hydra's own keys name directories by interpolations such as ${now:%H-%M}, and Hydra resolves their values twice.
_INTERPOLATED = "hydra."

# A text that Hydra's parser takes for one quoted string.
_QUOTED = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\"""", re.DOTALL)

# One of the values of a sweep, with the comma after it; a comma within quotes does not separate.
_ELEMENT = re.compile(rf"\s*({_QUOTED.pattern}|[^,]*?)\s*(?:,|\Z)", re.DOTALL)

_SWEEP_FUNCTION = re.compile(r"(choice|glob|interval|range|shuffle|sort|tag)\s*\(.*\)", re.DOTALL)

_MISSING = "???"


def literal_texts(words: list[str], names: Collection[str], is_sweep: bool) -> list[str]:
    """Returns the words of a command line, in which the values of text keys are quoted for Hydra where necessary.

    The value of a text key is literal, except ``null``, a value that is wholly in quotes and, in a sweep, commas
    between values and Hydra's functions such as ``choice(...)``. A path may begin with ``~`` or ``~user``.

    Args:
        words: the words of the command line.
        names: the command's own keys whose values are str; the function knows the text keys within groups.
        is_sweep: True if ``-m`` is among the words.

    Raises:
        ConfigError: a text cannot be passed to Hydra, or the value of ``name`` cannot be a directory.
    """
    known = {*names, *PATHS, *TEXTS}
    return [_literal_word(word, is_sweep) if override_key(word) in known else word for word in words]


def override_key(word: str) -> str | None:
    """Returns the key of a word ``KEY=VALUE``, ``+KEY=VALUE`` or ``++KEY=VALUE``; None for any other word."""
    key, separator, _ = word.partition("=")
    return re.sub(r"\A\+{1,2}", "", key) if separator else None


def quote_word(word: str) -> str:
    """Returns a word ``KEY=VALUE`` with quotes around its value, which Hydra then takes literally."""
    key, _, value = word.partition("=")
    return f"{key}={QuotedString(value, Quote.double).with_quotes()}"


def escape_interpolations(node: Any) -> Any:
    """Returns resolved plain containers in a form of which OmegaConf makes the same values: it would resolve ``${``.

    Args:
        node: nested dicts and lists; other objects than str stay unchanged.
    """
    if isinstance(node, str):
        # OmegaConf halves the backslashes before an interpolation.
        return re.sub(r"(\\*)\$\{", lambda match: 2 * match[1] + r"\${", node)
    if isinstance(node, dict):
        return {key: escape_interpolations(value) for key, value in node.items()}
    return [escape_interpolations(value) for value in node] if isinstance(node, list) else node


def _literal_word(word: str, is_sweep: bool) -> str:
    start, _, value = word.partition("=")
    key = override_key(word) or ""
    if not is_sweep or key.startswith(_INTERPOLATED):
        return f"{start}={_literal(key, value, is_sweep)}"
    if _is_sweep_function(value):
        return word
    elements = [match[1] for match in _ELEMENT.finditer(value)]
    # The pattern also matches the empty text at the end.
    elements = elements[:-1] if len(elements) > 1 and not value.endswith(",") else elements
    values = elements if len(elements) > 1 else [value]
    return f"{start}={','.join(_literal(key, element, is_sweep) for element in values)}"


def _literal(key: str, value: str, is_sweep: bool) -> str:
    """Returns the value of a text key as Hydra must get it.

    Args:
        key: the key.
        value: the value as the user has typed it, of several the one.
        is_sweep: True within a sweep.
    """
    if value == "null" or _QUOTED.fullmatch(value):
        return value
    if value == _MISSING:
        raise ConfigError(f"{key}={value}: this text stands for a missing value, which {key} cannot be")
    if not value and key in PATHS:
        # A shell makes this of a variable that is not set; as a path it would be the current directory.
        raise ConfigError(f"{key}= is empty, and must be a path or null")
    text = os.path.expanduser(value) if key in PATHS else value
    if key == "name":
        check_name(text)
    if "${" in text and not key.startswith(_INTERPOLATED):
        if is_sweep:
            # Hydra resolves the words of a sweep before it composes the jobs.
            raise ConfigError(f"{key}={value}: with -m a text cannot contain ${{; in quotes, it is an interpolation")
        return QuotedString(escape_interpolations(text), Quote.single).with_quotes()
    # A word that needs no quotes stays unchanged, as records of earlier runs have it.
    return text if _parses_to(text) else QuotedString(text, Quote.single).with_quotes()


def _parses_to(text: str) -> bool:
    """Returns True if Hydra's parser returns ``text`` itself for it."""
    try:
        value = OverridesParser.create().parse_override(f"key={text}").value()
    except HydraException:
        return False
    return isinstance(value, str) and value == text


def _is_sweep_function(value: str) -> bool:
    if not _SWEEP_FUNCTION.fullmatch(value):
        return False
    try:
        return OverridesParser.create().parse_override(f"key={value}").is_sweep_override()
    except HydraException:
        return False
