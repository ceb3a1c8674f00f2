"""Searches for a learning rate and a batch size, which train copies and leave everything else as it is."""

from lightkit.tuning.batch_size import BatchSizeSearch, find_batch_size
from lightkit.tuning.learning_rate import LearningRateSearch, find_learning_rate

__all__ = ["BatchSizeSearch", "LearningRateSearch", "find_batch_size", "find_learning_rate"]
