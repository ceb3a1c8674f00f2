"""A configuration in which the data have set the values that the user left to them."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl
from omegaconf import DictConfig, open_dict, read_write

from lightkit.app.task_choice import choose_task
from lightkit.app.texts import escape_interpolations
from lightkit.config import SIZE_KEYS, to_plain
from lightkit.data.sizes import sizes_of, with_sizes


def fill(config: DictConfig, data: pl.LightningDataModule) -> DictConfig:
    """Returns a copy of a configuration in which the data have set the sizes that are null.

    Of the model these are the keys `lightkit.config.SIZE_KEYS`: see `lightkit.data.with_sizes`. Of the metrics it is
    ``num_classes``. A data module with a method ``found_arguments`` sets its own arguments that are null, such as the
    names of its classes. A task of several kinds becomes the kind of the data: see `lightkit.app.task_choice`.

    Args:
        config: the configuration of the job. The record of the run and its checkpoints have the copy, so that
            evaluation and prediction build the same model without the data.
        data: the data module that the configuration describes.

    Raises:
        ConfigError: the model needs a size that neither the configuration nor the data say.
        DataError: the data module cannot find its files.
    """
    config = copy.deepcopy(config)
    with read_write(config), open_dict(config):
        choose_task(config, data)
        found = getattr(data, "found_arguments", dict)()
        _set(config.data, {name: value for name, value in found.items() if config.data.get(name) is None})
        model = config.get("model") or {}
        missing = [key for key in SIZE_KEYS if key in model and model.get(key) is None]
        sizes = with_sizes({key: config.model.get(key) for key in ("_target_", *missing)}, data) if missing else {}
        _set(config.model, {key: sizes[key] for key in missing if key in sizes})
        for key in missing:
            if key not in sizes:
                del config.model[key]
        for metric in (config.task.get("metrics") or {}).values():
            # A process that another one has started gets the metrics without interpolations.
            if isinstance(metric, DictConfig) and "num_classes" in metric and metric.get("num_classes") is None:
                model = config.get("model") or {}
                outputs = model.get("num_classes") or model.get("num_outputs")
                classes = sizes_of(data).get("num_classes", outputs)
                _set(metric, {} if classes is None else {"num_classes": classes})
    return config


def _set(node: DictConfig, values: dict[str, Any]) -> None:
    for key, value in escape_interpolations(to_plain(values)).items():
        node[key] = value
