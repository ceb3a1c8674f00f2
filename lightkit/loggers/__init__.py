"""Loggers of Lightning whose files are whole, lie in the directory of the run, and end with it."""

from lightkit.loggers.csv_logger import CSVLogger, read_rows
from lightkit.loggers.mlflow_logger import MLFlowLogger
from lightkit.loggers.wandb_logger import WandbLogger

__all__ = ["CSVLogger", "MLFlowLogger", "WandbLogger", "read_rows"]
