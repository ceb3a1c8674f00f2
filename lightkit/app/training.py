"""A training job from its configuration to its report, for `lightkit.train`."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from lightkit import native
from lightkit._util.strategy_traits import TrafficCounter, traits_of
from lightkit.app import checks, factory, report, run_files
from lightkit.app.checks import lightning_errors_as_config_errors
from lightkit.app.console import print_table
from lightkit.app.factory import TrainingJob
from lightkit.callbacks import Throughput
from lightkit.callbacks.throughput import rate_name


def train(config: DictConfig) -> dict[str, Any]:
    """Trains, tests and writes the report of a job.

    Args:
        config: the composed configuration, with the keys of ``conf/train.yaml``.

    Returns:
        The metrics by name, which the function also writes to ``metrics.json``.

    Raises:
        LightkitError: the configuration, the data or the checkpoint cannot be used.
    """
    checks.check(config)
    # The compilers, if needed, run while this process builds the data and the model.
    native.start()
    started = time.perf_counter()
    job = factory.build(config)
    # The job waits for the compilers here, so that neither the first step nor any timing includes the wait.
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
    """Trains and returns the metrics of the training by name."""
    trainer, resume = job.trainer, job.resume
    if resume is not None:
        resume.continue_logs(trainer.loggers, job.run_dir)
    with lightning_errors_as_config_errors():
        trainer.fit(job.task, datamodule=job.data, ckpt_path=resume.path if resume is not None else None)
    metrics = _logged_metrics(job) | {"epochs": trainer.current_epoch, "steps": trainer.global_step}
    # Lightning sets Trainer.callbacks in a connector, where a type checker does not see it.
    callbacks = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    for throughput in (callback for callback in callbacks if isinstance(callback, Throughput)):
        metrics |= _throughput_metrics(throughput, rate_name(job.data))
    if isinstance(trainer.strategy, TrafficCounter):
        metrics |= trainer.strategy.communication
    if resume is not None and not trainer.callback_metrics:
        # No epoch was left to train, as after a kill during the test: the resumed run has logged the metrics.
        metrics |= resume.metrics()
    return metrics


def _throughput_metrics(throughput: Throughput, rate: str) -> dict[str, Any]:
    """Returns the metrics that a `Throughput` callback measured.

    Args:
        throughput: the callback after a training.
        rate: the name of the metric that has the samples per second.
    """
    metrics: dict[str, Any] = {}
    if throughput.total is not None:
        metrics[rate] = throughput.total
    if throughput.flops_per_second is not None:
        metrics["train/gigaflops_per_second"] = throughput.flops_per_second / 1e9
    if throughput.fraction_of_matmul_rate is not None:
        metrics["train/fraction_of_matmul_rate"] = throughput.fraction_of_matmul_rate
    if throughput.step is not None:
        metrics |= {f"step/{part} (ms)": value for part, value in throughput.step.items()}
    return metrics


def _test(job: TrainingJob) -> dict[str, Any]:
    """Tests the best checkpoint of this run, or the current weights if the run has none.

    Returns:
        The metrics of the test and the metrics of the data module's baselines, by name.
    """
    # A Checkpoint of another package need not have a best one.
    best = getattr(job.trainer.checkpoint_callback, "best_model_path", None) or None
    with lightning_errors_as_config_errors():
        job.trainer.test(job.task, datamodule=job.data, ckpt_path=best, verbose=False)
    # A data module may know simple rules to compare with on the same test set.
    baselines = getattr(job.data, "baselines", dict)()
    return _logged_metrics(job) | {f"baseline/{name}": value for name, value in baselines.items()}


def _logged_metrics(job: TrainingJob) -> dict[str, Any]:
    """Returns the last value that the task logged under each name."""
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
