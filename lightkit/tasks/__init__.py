"""LightningModules that bind a model, a loss, an optimizer and metrics to a kind of task."""

from lightkit.tasks.classification import ClassificationTask

__all__ = ["ClassificationTask"]
