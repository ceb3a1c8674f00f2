"""LightningModules that bind a model, a loss, an optimizer and metrics to a kind of task."""

from lightkit.tasks.classification import ClassificationTask
from lightkit.tasks.ensemble import ensemble
from lightkit.tasks.forecast import ForecastTask
from lightkit.tasks.language_model import LanguageModelTask
from lightkit.tasks.regression import RegressionTask
from lightkit.tasks.schedule import Schedule
from lightkit.tasks.task import Task

__all__ = ["ClassificationTask", "ForecastTask", "LanguageModelTask", "RegressionTask", "Schedule", "Task", "ensemble"]
