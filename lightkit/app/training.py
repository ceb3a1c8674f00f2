"""Runs a job from its configuration to its report: what `lightkit.train` does."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from lightkit import native
from lightkit._util.strategy_traits import TrafficCounter, traits_of
from lightkit.app import checks, factory, report, run_files
from lightkit.app.checks import errors_of_lightning
from lightkit.app.console import print_table
from lightkit.app.factory import TrainingJob
from lightkit.callbacks import Throughput
from lightkit.callbacks.throughput import rate_name


def train(config: DictConfig) -> dict[str, Any]:
    """Runs a job and returns the figures that it wrote to ``metrics.json``.

    Args:
        config: the keys of ``conf/train.yaml``.

    Raises:
        LightkitError: something in the configuration, the data or the checkpoint cannot be used.
    """
    checks.check(config)
    # If kernels must be compiled, that goes on while data and model are made.
    native.start()
    started = time.perf_counter()
    job = factory.build(config)
    # Waited for here, not in the middle of the first step or of any timing.
    waiting = time.perf_counter()
    native.load()
    started += time.perf_counter() - waiting
    if job.trainer.is_global_zero:
        job.run_dir.mkdir(parents=True, exist_ok=True)
        run_files.write_config(job.run_dir, config)
        run_files.write_json(job.run_dir / run_files.ENVIRONMENT, run_files.environment())

    metrics = _fit(job)
    if job.trainer.is_global_zero:
        run_files.write_json(job.run_dir / run_files.METRICS, metrics)
    if job.tests and (job.trainer.is_global_zero or not traits_of(job.trainer.strategy).replicates_evaluation):
        metrics |= _test(job)
    metrics["wall_seconds"] = time.perf_counter() - started
    if job.trainer.is_global_zero:
        run_files.write_json(job.run_dir / run_files.METRICS, metrics)
        page = report.write(job.run_dir, metrics, job.task, job.data, job.recorder.result())
        _print_summary(job, metrics, page)
    return metrics


def _fit(job: TrainingJob) -> dict[str, Any]:
    """Trains, and returns the figures of the training."""
    trainer, resume = job.trainer, job.resume
    if resume is not None:
        resume.continue_logs(trainer.loggers, job.run_dir)
    with errors_of_lightning():
        trainer.fit(job.task, datamodule=job.data, ckpt_path=resume.path if resume is not None else None)
    metrics = _logged(job) | {"epochs": trainer.current_epoch, "steps": trainer.global_step}
    for throughput in (c for c in trainer.callbacks if isinstance(c, Throughput)):
        metrics |= _speed(throughput, rate_name(job.data))
    if isinstance(trainer.strategy, TrafficCounter):
        metrics |= trainer.strategy.communication
    if resume is not None and not trainer.callback_metrics:
        # No epoch was left, as after a kill in the test: the figures are those of the process that trained.
        metrics |= resume.figures()
    return metrics


def _speed(throughput: Throughput, rate: str) -> dict[str, Any]:
    """Returns the figures of a `Throughput`.

    Args:
        throughput: has measured a training.
        rate: the name of the samples per second.
    """
    figures: dict[str, Any] = {}
    if throughput.total is not None:
        figures[rate] = throughput.total
    if throughput.flops_per_second is not None:
        figures["train/gigaflops_per_second"] = throughput.flops_per_second / 1e9
    if throughput.fraction_of_matmul_rate is not None:
        figures["train/fraction_of_matmul_rate"] = throughput.fraction_of_matmul_rate
    if throughput.step is not None:
        figures |= {f"step/{part} (ms)": value for part, value in throughput.step.items()}
    return figures


def _test(job: TrainingJob) -> dict[str, Any]:
    """Tests the best checkpoint of this run, else the weights as they are; returns the figures, with the baselines'."""
    callback = job.trainer.checkpoint_callback
    best = (callback.best_model_path or None) if callback is not None else None
    with errors_of_lightning():
        job.trainer.test(job.task, datamodule=job.data, ckpt_path=best, verbose=False)
    # The simplest rules on the same test set, where the data module knows some.
    baselines = getattr(job.data, "baselines", dict)()
    return _logged(job) | {f"baseline/{name}": value for name, value in baselines.items()}


def _logged(job: TrainingJob) -> dict[str, Any]:
    """Returns the last value that was logged under each name."""
    return {name: value.item() for name, value in sorted(job.trainer.callback_metrics.items())}


def _print_summary(job: TrainingJob, metrics: dict[str, Any], page: Path | None) -> None:
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
    rows["run"] = os.path.relpath(job.run_dir)
    if page is not None:
        rows["report"] = os.path.relpath(page)
    print_table(job.name, rows)
