"""Classes of a user's own in the place of lightkit's: the keys that go with the replaced class, and unused parts.

``model._target_=my_package.Net`` replaces the class of the model. The other keys of the group `model` describe
lightkit's class, and `adapt` removes those that the user has not set.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from lightkit.app.config_layers import KeyPath, Origins, find_origins, has_users_files, leaves
from lightkit.app.log_filters import import_lightning_silently
from lightkit.app.parts import PARTS, parameter_names, taken_parts
from lightkit.errors import ConfigError
from lightkit.targets import find_class

_TARGET, _PARTIAL = "_target_", "_partial_"

# The program reads keys of the trainer itself, so that a class in its place keeps them.
_FIXED = ("trainer", "hydra")

_LIGHTKITS_TASKS = "lightkit.tasks."

_Node = dict[str, Any]


def adapt(config: DictConfig, config_name: str) -> bool:
    """Adapts the configuration of a job, in place, to the classes that a user has put in the place of lightkit's.

    - If the class of an object differs from the one that lightkit's files name, the keys of these files go, except
      ``_partial_``. A key stays if the command line or a file of the user's sets it, or if the new class takes it and
      either derives from the replaced one or the value is an interpolation, such as ``seed: ${seed}``.
    - ``model``, ``optim`` and ``scheduler`` become null where the task does not take that part: see
      `lightkit.app.parts`.

    Args:
        config: the composed configuration, before interpolation.
        config_name: the name of the configuration.

    Returns:
        True if the function has changed the configuration.

    Raises:
        ConfigError: a class is unknown, a value refers to a key that has gone, or the user has set keys of a part that
            the task does not take.
    """
    if not HydraConfig.initialized():
        return False
    # An override may hold an interpolation, which a list of OmegaConf would resolve.
    given = OmegaConf.to_container(HydraConfig.get().overrides, resolve=False)
    assert isinstance(given, dict)
    words = [*given["task"], *given["hydra"]]
    if not any(_TARGET in word for word in words) and not has_users_files():
        # The files need not be read a second time.
        return False
    origins = find_origins(config_name, words)
    plain: Any = OmegaConf.to_container(config, resolve=False)
    replaced = {path: (old, node) for path, node in objects(plain) if (old := _replaced_class(path, node, origins))}
    dropped: dict[KeyPath, str] = {}
    for path, (old, node) in replaced.items():
        import_lightning_silently()
        kept = _keys_to_keep(old, node)
        for gone in _unset_by_user(node, path, kept, origins):
            dropped[gone] = f"{'.'.join(path)}.{_TARGET}={node[_TARGET]}"
    with read_write(config), open_dict(config):
        for path in dropped:
            _remove(plain, path)
        for group in {path[0] for path in dropped}:
            config[group] = plain[group]
    unused = drop_unused_parts(config, origins)
    if dropped:
        _check_references(config, dropped)
    return bool(dropped or unused)


def drop_unused_parts(config: DictConfig, origins: Origins | None = None) -> list[str]:
    """Sets the groups of the parts that the task does not take to null, and returns their names.

    Args:
        config: the configuration of the job.
        origins: the origins of its values; None accepts all values in these groups.

    Raises:
        ConfigError: the user has set a key of such a group, which would have no effect.
    """
    target = config.task.get(_TARGET)
    if target is None or str(target).startswith(_LIGHTKITS_TASKS):
        return []
    import_lightning_silently()
    taken = taken_parts(find_class(str(target)), config.task)
    plain = OmegaConf.to_container(config, resolve=False)
    texts = [value for _, value in leaves(plain) if isinstance(value, str)]
    unused: list[str] = []
    for parameter, group in PARTS.items():
        # A value such as task.net: ${model} takes the part under another name.
        is_named = any(f"${{{group}}}" in text for text in texts)
        if parameter in taken or is_named or config.get(group) is None:
            continue
        own = _users_keys(group, origins) if origins is not None else []
        if own:
            raise ConfigError(
                f"{', '.join(own)}: {target} takes no argument {parameter!r}, so that the group {group} has no effect; "
                f"leave it out, or give {target} that argument"
            )
        with read_write(config), open_dict(config):
            config[group] = None
        unused.append(group)
    return unused


def _users_keys(group: str, origins: Origins) -> list[str]:
    """Returns the dotted keys of a group that the user has set, or the group if the user has chosen its file."""
    keys = sorted(".".join(path) for path in origins.users if path[0] == group)
    return keys + [group] if group in origins.chosen else keys


def objects(node: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, _Node]]:
    """Yields the key path and the mapping of each object that the configuration describes, the outermost first."""
    if not isinstance(node, dict) or (path and path[0] in _FIXED):
        return
    if path and node.get(_TARGET) is not None:
        yield path, node
    for key, value in node.items():
        yield from objects(value, (*path, str(key)))


def _replaced_class(path: KeyPath, node: _Node, origins: Origins) -> str | None:
    """Returns the class of lightkit's files that another one replaces; None if there is none."""
    old = origins.lightkits.get((*path, _TARGET))
    return old if old is not None and old != node[_TARGET] else None


def _keys_to_keep(old: str, node: _Node) -> set[str]:
    """Returns the keys of a replaced class that the new class of ``node`` keeps, whoever has set them."""
    new = find_class(str(node[_TARGET]))
    names = parameter_names(new)
    if issubclass(new, find_class(old)):
        return {_TARGET, _PARTIAL, *names}
    wired = {key for key, value in node.items() if isinstance(value, str) and "${" in value}
    return {_TARGET, _PARTIAL, *(wired & names)}


def _unset_by_user(node: _Node, path: KeyPath, kept: set[str], origins: Origins) -> list[KeyPath]:
    """Returns the key paths below a node that the user has not set; a nested object is one value.

    Args:
        node: the mapping.
        path: the key path of ``node``.
        kept: the keys of ``node`` to leave out of the result.
        origins: the origins of the values.
    """
    gone: list[KeyPath] = []
    for key, value in node.items():
        below = (*path, str(key))
        if key in kept:
            continue
        if not origins.has_users_value(below):
            gone.append(below)
        elif isinstance(value, dict) and _TARGET not in value:
            gone += _unset_by_user(value, below, set(), origins)
    return gone


def _remove(node: _Node, path: KeyPath) -> None:
    for key in path[:-1]:
        node = node.get(key, {})
    # A key within a mapping that has gone is gone already.
    node.pop(path[-1], None)


def _check_references(config: DictConfig, dropped: dict[KeyPath, str]) -> None:
    """Rejects values that refer to a key that has gone.

    Args:
        config: the configuration without the keys.
        dropped: the words that replace a class, by the key path that went with the class.

    Raises:
        ConfigError: a value cannot be resolved; the message has the key, the reference and both ways out.
    """
    for path, value in leaves(OmegaConf.to_container(config, resolve=False)):
        if not isinstance(value, str) or "${" not in value:
            continue
        try:
            OmegaConf.select(config, ".".join(path), throw_on_resolution_failure=True)
        except OmegaConfBaseException:
            for name in re.findall(r"[\w.]+", value):
                cause = dropped.get(tuple(name.split(".")))
                if cause is not None:
                    raise ConfigError(
                        f"{'.'.join(path)} is {value}, and {cause} takes no {name}: set {'.'.join(path)}=VALUE, or "
                        f"+{name}=VALUE"
                    ) from None
