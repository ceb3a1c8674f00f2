"""Weights & Biases and MLflow log in the run directory; a missing package is one line that names it."""

from __future__ import annotations

import sqlite3

import pytest
from omegaconf import OmegaConf

from lightkit.app import hyperparameters
from lightkit.errors import ConfigError
from lightkit.loggers import CSVLogger, MLFlowLogger, WandbLogger, packages

CONFIG = OmegaConf.create(
    {
        "optim": {"_target_": "lightkit.optim.Adam", "_partial_": True, "lr": 0.1, "betas": [0.9, 0.99]},
        "scheduler": {"_target_": None},
        "objective": "val/loss",
        "tags": ["a", "b"],
        "run_dir": "elsewhere",
    }
)


class FakeTrainer:
    """A trainer of process 0 with loggers, or of another process."""

    def __init__(self, *loggers, is_global_zero=True):
        self.loggers, self.is_global_zero = list(loggers), is_global_zero


def test_flatten():
    """The names are those of the command line; null and lists are texts, and instructions for building are left out."""
    assert hyperparameters.flatten(OmegaConf.to_container(CONFIG)) == {
        "optim._target_": "lightkit.optim.Adam",
        "optim.lr": 0.1,
        "optim.betas": "[0.9, 0.99]",
        "scheduler._target_": "null",
        "objective": "val/loss",
        "tags": "['a', 'b']",
        "run_dir": "elsewhere",
    }


def test_csv(tmp_path):
    """A log elsewhere has the hyperparameters beside it; in the run directory config.yaml has them."""
    logger = CSVLogger(tmp_path, name="", version="")
    hyperparameters.log(FakeTrainer(logger), OmegaConf.merge(CONFIG, {"run_dir": str(tmp_path)}))
    logger.log_metrics({"a": 1.0}, 0)
    logger.save()
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.csv"}
    hyperparameters.log(FakeTrainer(logger, is_global_zero=False), CONFIG)
    logger.save()
    assert not (tmp_path / "hparams.yaml").exists()
    hyperparameters.log(FakeTrainer(logger), CONFIG)
    logger.save()
    assert OmegaConf.load(tmp_path / "hparams.yaml")["optim.lr"] == 0.1


def test_tensorboard(tmp_path):
    """TensorBoard's table of hyperparameters has the run and the objective; no metric is invented."""
    loggers = pytest.importorskip("lightning.pytorch.loggers")
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = loggers.TensorBoardLogger(tmp_path, name="", version="", default_hp_metric=False)
    hyperparameters.log(FakeTrainer(logger), CONFIG)
    logger.log_metrics({"val/loss": 2.0}, 1)
    logger.finalize("success")
    found = events.EventAccumulator(str(tmp_path)).Reload()
    assert found.Tags()["scalars"] == ["val/loss"]
    content = found.PluginTagToContent("hparams")
    start = content["_hparams_/session_start_info"]
    assert b"optim.lr" in start and b"lightkit.optim.Adam" in start
    assert b"val/loss" in content["_hparams_/experiment"]


def test_missing_packages(monkeypatch):
    """The error has the command that installs exactly the missing packages; classes of other packages need none."""
    monkeypatch.setattr(packages, "_is_installed", lambda name: name == "tensorboardX")
    for known in ("lightning.pytorch.loggers.TensorBoardLogger", "lightkit.loggers.CSVLogger", "mine.Logger"):
        packages.check_packages([known])
    one = r"^WandbLogger needs a package that is not installed: pip install wandb$"
    with pytest.raises(ConfigError, match=one):
        packages.check_packages(["lightkit.loggers.WandbLogger", "lightning.pytorch.loggers.WandbLogger"])
    with pytest.raises(ConfigError, match=one):
        WandbLogger()
    with pytest.raises(ConfigError, match=r"pip install mlflow$"):
        MLFlowLogger()
    with pytest.raises(ConfigError, match=r"^MLFlowLogger and WandbLogger need .* pip install mlflow wandb$"):
        packages.check_packages(["MLFlowLogger", "WandbLogger"])


def test_directory_of_files_is_no_package(tmp_path, monkeypatch):
    """The directory wandb/, which wandb makes where it runs, does not count as the package."""
    (tmp_path / "lightkit_no_such_package").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not packages._is_installed("lightkit_no_such_package")
    assert packages._is_installed("json")


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """The module wandb, on a machine without a login."""
    module = pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    yield module
    module.finish()


@pytest.mark.slow
def test_wandb(wandb, tmp_path, capsys):
    """Without a login the run stays in the run directory with configuration and tags; the next job gets another run."""
    ids = []
    for number in range(2):
        directory = tmp_path / str(number)
        directory.mkdir()
        logger = WandbLogger(save_dir=directory, project="p", tags=["a", "b"])
        with hyperparameters.finishing([logger]):
            hyperparameters.log(FakeTrainer(logger), CONFIG)
            logger.log_metrics({"loss": 1.0}, 1)
            run = logger.experiment
            assert (run.config["optim.lr"], run.tags, run.project) == (0.1, ("a", "b"), "p")
            ids.append(run.id)
        assert list(directory.glob(f"wandb/offline-run-*/run-{run.id}.wandb"))
        assert wandb.run is None
    assert len(set(ids)) == 2
    assert "wandb is not logged in: the run stays in" in capsys.readouterr().out


def test_wandb_uploads_where_somebody_is_logged_in(wandb, tmp_path, monkeypatch, capsys):
    """A key in the environment or in .netrc, or WANDB_MODE, decides; a word of the user comes first."""

    def mode(**options):
        return WandbLogger(save_dir=tmp_path, **options)._wandb_init.get("mode")

    assert mode() == "offline" and mode(offline=False) == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert mode() is None and mode(offline=True) == "offline"
    monkeypatch.delenv("WANDB_MODE")
    host = wandb.Settings().base_url.partition("//")[2].strip("/")
    (tmp_path / "netrc").write_text(f"machine {host}\n  login user\n  password {'k' * 40}\n")
    assert mode() == "online"
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert mode() == "online"
    with pytest.raises(ConfigError, match="log_model uploads checkpoints"):
        WandbLogger(save_dir=tmp_path, offline=True, log_model=True)


@pytest.mark.slow
def test_mlflow(tmp_path, monkeypatch, caplog):
    """The database in the run directory has parameters, metrics, tags and the end of the run."""
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    logger = MLFlowLogger("an experiment", tmp_path / "run", tags=["a", "b"])
    hyperparameters.log(FakeTrainer(logger), CONFIG)
    logger.log_metrics({"val/loss": 1.5}, 3)
    logger.finalize("success")
    with sqlite3.connect(tmp_path / "run" / "mlflow.db") as database:
        parameters = dict(database.execute("select key, value from params"))
        assert (parameters["optim.lr"], parameters["scheduler._target_"]) == ("0.1", "null")
        assert dict(database.execute("select key, value from tags"))["tags"] == "a,b"
        assert database.execute("select key, value, step from metrics").fetchall() == [("val/loss", 1.5, 3)]
        assert database.execute("select status from runs").fetchall() == [("FINISHED",)]
        (location,) = database.execute("select artifact_location from experiments where name = 'an experiment'")
    assert location[0] == (tmp_path / "run" / "mlartifacts").as_uri()
    assert logger.save_dir == str(tmp_path / "run") and not caplog.records


def test_mlflow_in_other_processes(tmp_path, monkeypatch):
    """Process 0 alone makes the database."""
    pytest.importorskip("mlflow")
    monkeypatch.setattr("lightning.pytorch.utilities.rank_zero.rank_zero_only.rank", 1)
    logger = MLFlowLogger(save_dir=tmp_path / "run")
    logger.log_hyperparams({"a": 1})
    logger.log_metrics({"loss": 1.0}, 1)
    logger.finalize("success")
    assert not (tmp_path / "run").exists()


def test_mlflow_elsewhere(tmp_path, monkeypatch):
    """A store of the user's gets the run, and the run directory no database."""
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/environment.db")
    assert MLFlowLogger(save_dir=tmp_path / "run")._tracking_uri.endswith("environment.db")
    given = MLFlowLogger(save_dir=tmp_path / "run", tracking_uri=f"sqlite:///{tmp_path}/given.db")
    assert given._tracking_uri.endswith("given.db") and not (tmp_path / "run").exists()
