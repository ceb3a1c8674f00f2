"""The settings of a resumed training: those on the command line, else those of the checkpoint.

The states in a checkpoint hold the settings of the optimizer and of the schedule. A command line that resumes a
training need not repeat them, and one that gives them changes them; the configuration of the run says what holds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from lightkit._util.printable import printable
from lightkit.app import untrusted
from lightkit.checkpoints import CONFIG_KEY, load_checkpoint
from lightkit.errors import CheckpointError, ConfigError
from lightkit.targets import find_class, is_in_user_package

# The groups whose settings the states hold, and single keys of other groups.
_SECTIONS = ("optim", "scheduler")
_KEYS = {
    "strategy": ("outer_lr", "outer_momentum"),
    "callbacks": ("patience", "min_delta", "start"),
    "compress": (
        *("keep_macs", "zeros", "start", "end", "rounds", "weight", "temperature"),
        *("bits", "edge_bits", "activations", "group_size", "batches"),
    ),
}

# The groups whose choice a command line must repeat, by which it gives no values.
_REPEATED = ("callbacks", "compress")

# Keys of another group that a choice sets.
_SET_BY_CHOICES = {("callbacks", "ema"): "optim.ema_decay"}

# Keys at the top: how the training began, and what it trains in which epoch.
_FINE_TUNING = ("init_from", "init_skip", "freeze", "unfreeze")

_TARGET = "_target_"

# The classes of optimizers and schedulers that the configuration in a checkpoint may name.
_ALLOWED = re.compile(r"(torch\.optim|torch\.optim\.lr_scheduler|lightkit\.optim)\.\w+")

# The schedule of the first edition ended with the epochs of its training.
_LENGTH = "T_max"


def saved_config(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the configuration in a checkpoint, checked to be plain; an empty dict if there is none.

    Raises:
        CheckpointError: the configuration holds something else than plain values, or too many.
    """
    config = checkpoint.get(CONFIG_KEY)
    if type(config) is not dict:
        return {}
    sections = {key: config.get(key) for key in (*_SECTIONS, *_KEYS, "trainer")}
    others = {key: config[key] for key in _FINE_TUNING if key in config}
    untrusted.check_plain({**sections, **others})
    return {**{key: value if type(value) is dict else {} for key, value in sections.items()}, **others}


def take_settings(configs: Sequence[DictConfig], path: str | Path, overrides: Iterable[str]) -> bool:
    """Sets the settings that the command line does not give to those of a checkpoint, and prints the differences.

    Args:
        configs: the configuration of the job as the command line composes it, resolved or not. The function reads the
            first one, and changes all of them.
        path: the checkpoint from which the job resumes.
        overrides: the overrides on the command line, such as ``optim.lr=0.1``.

    Returns:
        True if the function has changed a setting.

    Raises:
        CheckpointError: the checkpoint cannot be read, or it names a class that it may not name.
    """
    # The tensors, which may take long to read, are left out.
    saved = saved_config(load_checkpoint(path, map_location="meta", untrusted=True))
    given = _given_keys(overrides)
    raw, mine = (_to_dict(OmegaConf.to_container(configs[0], resolve=resolve)) for resolve in (False, True))
    taken: dict[str, Any] = {}
    for section in _SECTIONS if saved else ():
        own, own_raw = _to_dict(mine.get(section)), _to_dict(raw.get(section))
        taken |= _section_settings(section, own, own_raw, saved[section], given, saved["trainer"].get("max_epochs"))
    for section, names in _KEYS.items() if saved else ():
        taken |= _key_settings(section, _to_dict(mine.get(section)), saved[section], names, given)
    for key in _FINE_TUNING:
        if key in saved and key in mine and key not in given and _by_text(saved[key]) != _by_text(mine[key]):
            taken[key] = saved[key]
    if not taken:
        return False
    for config in configs:
        with read_write(config), open_dict(config):
            for key, value in taken.items():
                OmegaConf.update(config, key, value, merge=False, force_add=True)
    shown = {key: value[_TARGET] if _TARGET in _to_dict(value) else value for key, value in taken.items()}
    print(f"from the checkpoint: {printable(', '.join(f'{k}={v}' for k, v in shown.items()))}", flush=True)
    return True


def _section_settings(
    section: str, mine: dict[str, Any], raw: dict[str, Any], saved: dict[str, Any], given: set[str], saved_epochs: Any
) -> dict[str, Any]:
    """Returns the values of a section that the job takes from a checkpoint, by dotted key.

    Args:
        section: the name of the section.
        mine: the section of the job.
        raw: the section of the job before interpolation.
        saved: the section of the checkpoint.
        given: the keys and groups that the command line gives.
        saved_epochs: ``trainer.max_epochs`` of the checkpoint.
    """
    if not saved or section in given:
        return {}
    literal = {key: value for key, value in saved.items() if _is_literal(value)}
    if mine.get(_TARGET) != saved.get(_TARGET):
        if f"{section}.{_TARGET}" in given:
            return {}
        _check_target(section, saved.get(_TARGET))
        return {section: {**literal, **{key: mine[key] for key in mine if f"{section}.{key}" in given}}}
    taken = {}
    for key, value in literal.items():
        name = f"{section}.{key}"
        # A value that follows from other keys goes on to do so.
        follows = key in raw and not _is_literal(raw[key])
        follows |= key == _LENGTH and raw.get(key) is None and value == saved_epochs
        if name not in given and not follows and (key not in mine or mine[key] != value):
            taken[name] = value
    return taken


def _key_settings(
    section: str, mine: dict[str, Any], saved: dict[str, Any], names: Sequence[str], given: set[str]
) -> dict[str, Any]:
    """Returns the values of single keys of a section that the job takes from a checkpoint, by dotted key.

    Args:
        section: the name of the section, which describes an object or has the descriptions of several.
        mine: the section of the job.
        saved: the section of the checkpoint.
        names: the names of the keys.
        given: the keys and groups that the command line gives.
    """
    objects = {section: (mine, saved)} if _TARGET in mine else {}
    objects |= {f"{section}.{name}": (_to_dict(part), _to_dict(saved.get(name))) for name, part in mine.items()}
    return {
        f"{place}.{name}": theirs[name]
        for place, (own, theirs) in objects.items()
        for name in names
        if (section not in given or section in _REPEATED) and f"{place}.{name}" not in given
        if own.get(_TARGET) == theirs.get(_TARGET)
        if name in own and name in theirs and _is_literal(theirs[name]) and own[name] != theirs[name]
    }


def check_optimizer(config: Mapping[str, Any], saved: Mapping[str, Any], path: str | Path) -> None:
    """Rejects an optimizer that cannot go on from the states of another algorithm.

    Args:
        config: the configuration of the job.
        saved: the configuration in the checkpoint: see `saved_config`.
        path: the path of the checkpoint, for the message.

    Raises:
        CheckpointError: the optimizers have different algorithms, such as Adam and SGD.
    """
    mine, theirs = ((node.get("optim") or {}).get(_TARGET) for node in (config, saved))
    if mine is None or theirs is None or mine == theirs:
        return
    try:
        algorithms = [_algorithm(find_class(str(target))) for target in (mine, theirs)]
    except ConfigError:
        # A class of the checkpoint that this program does not have.
        algorithms = [mine, theirs]
    if algorithms[0] != algorithms[1]:
        raise CheckpointError(
            f"optim={str(mine).rpartition('.')[2]} cannot go on with the states in {path}, which are those of "
            f"{printable(str(theirs)).rpartition('.')[2]}: leave optim out, or begin anew without ckpt_path"
        )


def _algorithm(cls: type) -> type:
    """Returns the first ancestor of an optimizer class below torch's Optimizer: Adam for AdamW."""
    below = [
        base for base in cls.__mro__ if issubclass(base, torch.optim.Optimizer) and base is not torch.optim.Optimizer
    ]
    return below[-1] if below else cls


def _check_target(section: str, target: Any) -> None:
    if target is not None and not (_ALLOWED.fullmatch(str(target)) or is_in_user_package(str(target))):
        raise CheckpointError(
            f"the checkpoint names {printable(str(target)[:100])!r} in {section}, which is no class of torch.optim or "
            f"lightkit.optim: give {section}=CHOICE, or admit your own class with LIGHTKIT_TARGETS=PACKAGE"
        )


def _given_keys(overrides: Iterable[str]) -> set[str]:
    """Returns the keys and groups that overrides set."""
    given: set[str] = set()
    for word in overrides:
        given.add(group := _key_of(word))
        choices = re.findall(r"\w+", word.partition("=")[2])
        given.update(key for (name, choice), key in _SET_BY_CHOICES.items() if name == group and choice in choices)
    return given


def _key_of(word: str) -> str:
    """Returns the dotted key or the group of an override."""
    return word.partition("=")[0].lstrip("+~").partition("@")[0].replace("/", ".")


def _is_literal(value: Any) -> bool:
    """Returns True for a value that is neither an object to build nor an interpolation."""
    if isinstance(value, dict):
        return False
    if isinstance(value, list):
        return all(map(_is_literal, value))
    return not (isinstance(value, str) and "${" in value)


def _by_text(value: Any) -> Any:
    """Returns a mapping with its keys as texts, as they are after a passage through JSON; any other value unchanged."""
    return {str(key): part for key, part in value.items()} if isinstance(value, dict) else value


def _to_dict(node: Any) -> dict[str, Any]:
    return node if isinstance(node, dict) else {}
