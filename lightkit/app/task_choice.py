"""The task that fits the data, where a configuration leaves the choice to them."""

from __future__ import annotations

import lightning.pytorch as pl
from omegaconf import DictConfig

from lightkit.data.sizes import sizes_of
from lightkit.errors import ConfigError

# The task that predicts the other kind of target than the data have, by the name of its class.
_KINDS = {"lightkit.tasks.ClassificationTask": "classification", "lightkit.tasks.RegressionTask": "regression"}


def choose_task(config: DictConfig, data: pl.LightningDataModule) -> None:
    """Replaces a task of several kinds, as in ``conf/task/table.yaml``, by the kind that the data ask for.

    A data module says its kind by a method ``task_name``; one that has classes asks for ``classification``.

    Args:
        config: the configuration of the job, which the function changes: ``task`` gets the entries of the chosen kind.
        data: the data module.

    Raises:
        ConfigError: the task has no kind for the data, or a given task is for another kind of target.
    """
    kind = getattr(data, "task_name", lambda: None)()
    target = config.task.get("_target_")
    if target is not None:
        if kind is not None and _KINDS.get(target, kind) != kind:
            raise ConfigError(
                f"task={_KINDS[target]}, and the target of {type(data).__name__} asks for a {kind}: use task=table, or "
                f"set data.kind={_KINDS[target]}"
            )
        return
    if kind is None and "num_classes" in sizes_of(data):
        kind = "classification"
    choices = [name for name, node in config.task.items() if isinstance(node, DictConfig) and "_target_" in node]
    if kind not in choices:
        raise ConfigError(f"the task is one of {', '.join(map(str, choices))}, and {type(data).__name__} has neither")
    config.task = config.task[kind]
