"""The sizes of a model that follow from its data, such as the number of classes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from lightkit.config import SIZE_KEYS, find_class, to_plain
from lightkit.errors import ConfigError


def sizes_of(data: Any) -> dict[str, Any]:
    """Returns the sizes that a data module gives to a model, by the name of the model's argument.

    A data module may define them in a method ``model_sizes``, as `lightkit.data.ImageDataModule` does. Any other data
    module gives ``num_classes`` and ``num_outputs`` if it has an attribute ``num_classes`` or ``classes``.

    Args:
        data: the data module, before or after its ``setup``.

    Returns:
        The sizes; an empty dict if nothing is known.
    """
    if hasattr(data, "model_sizes"):
        return dict(data.model_sizes())
    count = getattr(data, "num_classes", None)
    if count is None and getattr(data, "classes", None) is not None:
        count = len(data.classes)
    return {} if count is None else {"num_classes": int(count), "num_outputs": int(count)}


def sizes_for(model: type, data: Any) -> dict[str, Any]:
    """Returns those of `sizes_of` that the class of a model takes: ``CNN(**sizes_for(CNN, data))``.

    Args:
        model: the class.
        data: the data module.
    """
    parameters = inspect.signature(model).parameters
    return {name: size for name, size in sizes_of(data).items() if name in parameters}


def with_sizes(model: Mapping[str, Any], data: Any) -> dict[str, Any]:
    """Returns the configuration of a model in which the data have set the sizes that are null.

    The sizes are the keys `lightkit.config.SIZE_KEYS`. A size that the data do not say is the default of the class, or
    left out if the class has no such argument.

    Args:
        model: the configuration, with ``_target_``; a container of OmegaConf or a mapping.
        data: the data module.

    Raises:
        ConfigError: the class needs a size that neither the configuration nor the data say.
        DataError: the data module cannot find its files.
    """
    filled = dict(to_plain(model))
    missing = [key for key in SIZE_KEYS if key in filled and filled[key] is None]
    known = sizes_of(data) if missing else {}
    for key in missing:
        if key in known:
            filled[key] = known[key]
        elif (default := _default(str(filled.get("_target_")), key, data)) is not None:
            filled[key] = default
        else:
            del filled[key]
    return filled


def _default(target: str, key: str, data: Any) -> Any:
    """Returns the default of an argument of a class; None if it has none, or the class has no such argument."""
    try:
        parameters = inspect.signature(find_class(target)).parameters
    except (TypeError, ValueError):
        return None
    if key not in parameters:
        return None
    if parameters[key].default is inspect.Parameter.empty:
        raise ConfigError(f"model.{key} is null, and {type(data).__name__} does not say it: set model.{key}")
    return parameters[key].default
