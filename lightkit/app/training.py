"""A job from its configuration to its report: what `lightkit.train` runs."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from omegaconf import DictConfig

from lightkit import native
from lightkit._util.strategy_traits import TrafficCounter, traits_of
from lightkit.app import report, run_files, run_records
from lightkit.app.factory import (
    SaveConfig,
    build_data,
    build_task,
    build_trainer,
    check_accelerator,
    check_scheduler,
    refusals_of_lightning,
)
from lightkit.callbacks import TestRecorder, Throughput
from lightkit.callbacks.save_figures import EPOCH_KEY, FIGURES_KEY, SaveFigures
from lightkit.callbacks.throughput import rate_name
from lightkit.checkpoints import AtomicCheckpointIO, check_weights, load_checkpoint
from lightkit.checkpoints.training_state import CheckTrainingState, check_training_state, checked_weights
from lightkit.config import build
from lightkit.errors import CheckpointError, ConfigError
from lightkit.loggers import CSVLogger

_METRICS = "metrics.json"
_LOG = "metrics.csv"

# Seeds that Python, NumPy and torch all take.
_SEEDS = 2**32


def train(config: DictConfig) -> dict[str, Any]:
    """Runs a job from configuration to report; returns what it wrote to ``metrics.json``.

    Raises:
        LightkitError: something in the configuration, the data or the checkpoint cannot be used.
    """
    if not 0 <= config.seed < _SEEDS:
        raise ConfigError(f"seed must be from 0 to {_SEEDS - 1}, got {config.seed}")
    check_accelerator(config)
    check_scheduler(config)
    # If they must be compiled, that goes on while data and model are made.
    native.start()
    started = time.perf_counter()
    run_dir = Path(config.run_dir)
    pl.seed_everything(config.seed, workers=True, verbose=False)
    data = build_data(config)
    task = build_task(config)
    if config.compile:
        # In place, and the model alone: parameters keep their names, and what a LightningModule logs stays outside.
        task.model.compile()
    resume = _checkpoint_to_resume(config, task)

    recorder = TestRecorder()
    loggers = list(build(config.get("logger") or {}).values())
    trainer = build_trainer(
        config,
        callbacks=[
            *build(config.get("callbacks") or {}).values(),
            *(SaveConfig(config), SaveFigures(), recorder),
            *([CheckTrainingState(resume.path)] if resume is not None else []),
        ],
        logger=loggers,
        plugins=[AtomicCheckpointIO()],
        enable_model_summary=False,
    )
    # Waited for here, not in the middle of the first step or of any timing.
    waiting = time.perf_counter()
    native.load()
    started += time.perf_counter() - waiting
    if trainer.is_global_zero:
        run_dir.mkdir(parents=True, exist_ok=True)
        run_files.write_config(run_dir, config)
        run_files.write_json(run_dir / "environment.json", run_files.environment())
    if resume is not None:
        _continue_logs(loggers, run_dir, resume)
    with refusals_of_lightning():
        trainer.fit(task, datamodule=data, ckpt_path=resume.path if resume is not None else None)
    metrics = _scalars(trainer) | {"epochs": trainer.current_epoch, "steps": trainer.global_step}
    for throughput in (c for c in trainer.callbacks if isinstance(c, Throughput)):
        if throughput.total is not None:
            metrics[rate_name(data)] = throughput.total
        if throughput.flops_per_second is not None:
            metrics["train/gigaflops_per_second"] = throughput.flops_per_second / 1e9
        if throughput.fraction_of_matmul_rate is not None:
            metrics["train/fraction_of_matmul_rate"] = throughput.fraction_of_matmul_rate
        if throughput.step is not None:
            metrics |= {f"step/{part} (ms)": value for part, value in throughput.step.items()}
    if isinstance(trainer.strategy, TrafficCounter):
        metrics |= trainer.strategy.communication
    if resume is not None and not trainer.callback_metrics:
        # No epoch was left, as after a kill in the test: the figures are those of the process that trained.
        metrics |= resume.figures()
    if trainer.is_global_zero:
        run_files.write_json(run_dir / _METRICS, metrics)
    if config.test and (trainer.is_global_zero or not traits_of(trainer.strategy).replicates_evaluation):
        with refusals_of_lightning():
            trainer.test(task, datamodule=data, ckpt_path=_best(trainer), verbose=False)
        metrics |= _scalars(trainer)
        # What the simplest rules reach on the same test set, where the data knows some.
        metrics |= {f"baseline/{name}": value for name, value in getattr(data, "baselines", dict)().items()}
    metrics["wall_seconds"] = time.perf_counter() - started

    if trainer.is_global_zero:
        run_files.write_json(run_dir / _METRICS, metrics)
        page = report.write(run_dir, metrics, task, data, recorder.result())
        _summarize(config, metrics, page)
    return metrics


@dataclass(frozen=True)
class _Resumed:
    """A checkpoint that a training goes on from: where it lies, what is in it, and the run that it is of, if any."""

    path: Path
    checkpoint: dict[str, Any]
    run: run_records.Run | None

    def steps(self) -> int:
        """Returns how many steps were logged before it: several optimizers take one each."""
        return math.ceil(self.checkpoint["global_step"] / max(1, len(self.checkpoint.get("optimizer_states", []))))

    def figures(self) -> dict[str, Any]:
        """Returns what was logged last under each name before the test."""
        logged = self.checkpoint.get(FIGURES_KEY)
        numbers = (int, float)
        logged = {k: v for k, v in logged.items() if type(v) in numbers} if isinstance(logged, dict) else {}
        return (
            logged if self.run is None else logged | run_files.read_if_newer(self.run.directory / _METRICS, self.path)
        )


def _checkpoint_to_resume(config: DictConfig, task: pl.LightningModule) -> _Resumed | None:
    """The checkpoint to go on from, checked to fit this task and to leave something to do."""
    if config.ckpt_path is None:
        return None
    if config.ckpt_path == "last":
        # The process that leads has chosen already; here are programs that train by themselves.
        path = run_records.find_last(run_records.describe(config), config.name)
        print(f"continuing {path}")
    else:
        path = Path(config.ckpt_path)
    checkpoint = load_checkpoint(path, is_strangers=True)
    check_weights(task, {"state_dict": checked_weights(checkpoint, path)}, path)
    try:
        done = checkpoint["epoch"] + 1
        at_its_end = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} cannot be resumed: it has the weights but not the state of a training"
        ) from error
    check_training_state(checkpoint, path)
    run = run_records.find_run(path)
    # What is left of a run that has no report is the test and the report.
    has_report = run is None or run.is_finished
    is_own = path.absolute().is_relative_to(Path(config.run_dir).absolute())
    wanted = config.trainer.max_epochs or 0
    if at_its_end and not is_own and 0 < wanted <= done and (has_report or wanted < done):
        raise CheckpointError(
            f"{path} has {done} epochs behind it and trainer.max_epochs is {config.trainer.max_epochs}: "
            f"nothing is left to train; pass trainer.max_epochs={done + 1} or more"
        )
    return _Resumed(path, checkpoint, run)


def _continue_logs(loggers: list[Any], run_dir: Path, resume: _Resumed) -> None:
    """Lets each ``metrics.csv`` begin with the rows of the run that goes on."""
    source = resume.path.absolute().parent.parent if resume.run is None else resume.run.directory
    for logger in loggers:
        if isinstance(logger, CSVLogger):
            own = Path(logger.log_dir).absolute()
            # Its place in both runs is the same; outside of them they have one log.
            place = source / own.relative_to(run_dir.absolute()) if own.is_relative_to(run_dir.absolute()) else own
            epoch = resume.checkpoint.get(EPOCH_KEY, {})
            logger.continue_from(place / _LOG, resume.steps(), epoch and {"epoch": resume.checkpoint["epoch"], **epoch})


def _best(trainer: pl.Trainer) -> str | None:
    """The checkpoint to test: the best of this run, else the weights as they are."""
    callback = trainer.checkpoint_callback
    return (callback.best_model_path or None) if callback is not None else None


def _scalars(trainer: pl.Trainer) -> dict[str, Any]:
    """What was logged last under each name."""
    return {name: value.item() for name, value in sorted(trainer.callback_metrics.items())}


def _summarize(config: DictConfig, metrics: dict[str, Any], page: Path | None) -> None:
    rows = {name: f"{value:.4f}" for name, value in metrics.items() if name.startswith(("test/", "baseline/"))}
    rows |= {name: f"{value:,.0f}" for name, value in metrics.items() if name.endswith("_per_second")}
    if (fraction := metrics.get("train/fraction_of_matmul_rate")) is not None:
        rate = metrics["train/gigaflops_per_second"]
        rows["train/gigaflops_per_second"] = f"{rate:,.1f}, {fraction:.2f} times a matrix product's"
    rows |= {"wall_seconds": f"{metrics['wall_seconds']:.1f} s", "epochs": str(metrics["epochs"])}
    parts = {name[len("step/") : -len(" (ms)")]: value for name, value in metrics.items() if name.startswith("step/")}
    if total := sum(parts.values()):
        shares = ", ".join(f"{part} {value / total:.0%}" for part, value in parts.items())
        rows["step"] = f"{total:.2f} ms: {shares}"
    rows["run"] = os.path.relpath(config.run_dir)
    if page is not None:
        rows["report"] = os.path.relpath(page)
    run_files.print_table(config.name, rows)
