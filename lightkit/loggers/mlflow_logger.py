"""A logger of MLflow with a database of its own, which may lie in the directory of the run."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch import loggers
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightkit.loggers.packages import check_packages

# The address of a store that is never used.
_UNUSED = "http://localhost"


class MLFlowLogger(loggers.MLFlowLogger):
    """Lightning's ``MLFlowLogger``, except that its default store is a database in ``save_dir``.

    MLflow no longer supports the store of plain files that Lightning takes by default. ``mlflow ui
    --backend-store-uri sqlite:///SAVE_DIR/mlflow.db`` shows the runs.

    Args:
        experiment_name: the name of the experiment.
        save_dir: the directory of the database ``mlflow.db`` and of ``mlartifacts``.
        tracking_uri: the address of a server or of another store; None takes the environment variable
            ``MLFLOW_TRACKING_URI``, and without it the database in ``save_dir``.
        tags: the tags of the run: a mapping of names to values, or a list, which becomes one tag ``tags`` with commas.
        **options: the other keyword arguments of Lightning's ``MLFlowLogger``.

    Raises:
        ConfigError: the package ``mlflow`` is not installed.
    """

    def __init__(
        self,
        experiment_name: str = "lightning_logs",
        save_dir: str | os.PathLike = ".",
        tracking_uri: str | None = None,
        tags: Mapping[str, Any] | Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        check_packages([MLFlowLogger.__name__])
        # MLflow logs each migration of a new database, and sets the levels of its loggers when it is imported.
        importlib.import_module("mlflow")
        for package in ("mlflow", "alembic"):
            logging.getLogger(package).setLevel(logging.WARNING)
        self._directory = Path(save_dir).absolute()
        tracking_uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        if rank_zero_only.rank != 0:
            # Process 0 alone logs. The client would make the database here, too, and never asks a server by itself.
            tracking_uri = _UNUSED
        if not tracking_uri:
            self._directory.mkdir(parents=True, exist_ok=True)
            tracking_uri = f"sqlite:///{self._directory / 'mlflow.db'}"
            options.setdefault("artifact_location", (self._directory / "mlartifacts").as_uri())
        named = dict(tags) if isinstance(tags, Mapping) else {"tags": ",".join(tags)} if tags else None
        super().__init__(experiment_name=experiment_name, tracking_uri=tracking_uri, tags=named, **options)

    @property
    def save_dir(self) -> str:
        """The directory of the database, if the logger has one of its own."""
        return str(self._directory)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The client of MLflow; the first access makes the experiment and the run."""
        client = self._mlflow_client
        if not self._initialized and self._run_id is None and self._experiment_id is None:
            # Lightning warns before it makes an experiment.
            found = client.get_experiment_by_name(self._experiment_name)
            if found is None:
                location = self._artifact_location
                self._experiment_id = client.create_experiment(self._experiment_name, artifact_location=location)
        return super().experiment
