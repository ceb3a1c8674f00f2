"""A training job from its configuration to its report, for `lightkit.train`."""

from __future__ import annotations

import os
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, WeightAveraging
from omegaconf import DictConfig

from lightkit import native
from lightkit._util.numbers import format_number, format_rate
from lightkit._util.strategy_traits import TrafficCounter, traits_of
from lightkit.app import auto_values, checks, factory, hyperparameters, profiling, report, run_files
from lightkit.app.checks import lightning_errors_as_config_errors
from lightkit.app.compression import find_request
from lightkit.app.compression_outcome import (
    CompressionOutcome,
    compression_outcome,
    outcome_facts,
    outcome_metrics,
)
from lightkit.app.compression_request import CompressionRequest
from lightkit.app.console import print_table
from lightkit.app.factory import TrainingJob
from lightkit.app.report.section import describe_error
from lightkit.callbacks import Throughput
from lightkit.callbacks.throughput import rate_name
from lightkit.checkpoints import load_checkpoint, load_weights
from lightkit.compress.magnitudes import is_sharded
from lightkit.data.advice import settings_named
from lightkit.loops.hooks import is_overridden


@settings_named("data.")
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
    search = find_request(config)
    # The compilers, if needed, run while this process builds the data and the model.
    native.start()
    auto_values.resolve(config)
    started = time.perf_counter()
    job = factory.build(config)
    if search is not None:
        # It imports the exports and their runtimes, for which other jobs need not wait.
        from lightkit.app.compression_after_training import check_job

        check_job(job)
    # The job waits for the compilers here, so that neither the first step nor any timing includes the wait.
    waiting = time.perf_counter()
    native.load()
    started += time.perf_counter() - waiting
    if job.trainer.is_global_zero:
        job.run_dir.mkdir(parents=True, exist_ok=True)
        run_files.write_config(job.run_dir, job.config)
        run_files.write_json(job.run_dir / run_files.ENVIRONMENT, run_files.environment())

    with hyperparameters.finishing(job.trainer.loggers):
        metrics = _fit(job)
        if job.trainer.is_global_zero:
            run_files.write_json(job.run_dir / run_files.METRICS, metrics)
        takes_part = job.trainer.is_global_zero or not traits_of(job.trainer.strategy).replicates_evaluation
        if job.tests and takes_part and _can_test(job):
            metrics |= _test(job)
    outcome = _compression_outcome(job, search) if job.trainer.is_global_zero else None
    metrics |= {} if outcome is None else outcome_metrics(outcome)
    metrics["wall_seconds"] = time.perf_counter() - started
    if job.trainer.is_global_zero:
        run_files.write_json(job.run_dir / run_files.METRICS, metrics)
        page = report.write(job.run_dir, metrics, job.task, job.data, job.recorder.result(), outcome)
        _print_summary(job, metrics, page, outcome)
    return metrics


def _fit(job: TrainingJob) -> dict[str, Any]:
    """Trains and returns the metrics of the training by name."""
    trainer, resume = job.trainer, job.resume
    if resume is not None:
        resume.continue_logs(trainer.loggers, job.run_dir)
    hyperparameters.log(trainer, job.config)
    with lightning_errors_as_config_errors():
        trainer.fit(job.task, datamodule=job.data, ckpt_path=resume.path if resume is not None else None)
    profiling.print_profile(trainer, job.run_dir)
    metrics = _logged_metrics(job) | {"epochs": trainer.current_epoch, "steps": trainer.global_step}
    for throughput in (callback for callback in _callbacks(job) if isinstance(callback, Throughput)):
        metrics |= _throughput_metrics(throughput, rate_name(job.data))
    if isinstance(trainer.strategy, TrafficCounter):
        metrics |= trainer.strategy.communication
    if resume is not None and not trainer.callback_metrics:
        # No epoch was left to train, as after a kill during the test: the resumed run has logged the metrics.
        metrics |= resume.metrics()
    return metrics


def _callbacks(job: TrainingJob) -> list[Callback]:
    # Lightning sets Trainer.callbacks in a connector, where a type checker does not see it.
    return job.trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]


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


def _can_test(job: TrainingJob) -> bool:
    """Returns True if the task and the data of a job have a test; prints a line if not, as the training is done."""
    lacking = None
    if not is_overridden("test_step", job.task, pl.LightningModule):
        lacking = f"{type(job.task).__name__} has no test_step"
    elif not is_overridden("test_dataloader", job.data, pl.LightningDataModule):
        lacking = f"{type(job.data).__name__} has no test_dataloader"
    if lacking is not None and job.trainer.is_global_zero:
        print(f"no test: {lacking}", flush=True)
    return lacking is None


def _test(job: TrainingJob) -> dict[str, Any]:
    """Tests the best checkpoint of this run, or the current weights if the run has none.

    Returns:
        The metrics of the test and the metrics of the data module's baselines, by name.
    """
    # A Checkpoint of another package need not have a best one.
    best = getattr(job.trainer.checkpoint_callback, "best_model_path", None) or None
    if best is not None and any(isinstance(callback, WeightAveraging) for callback in _callbacks(job)):
        # Lightning's callback would load the weights of the training, and not their averages, for the test.
        checkpoint = load_checkpoint(best)
        load_weights(job.task, checkpoint, best)
        job.task.on_load_checkpoint(checkpoint)
        best = None
    with lightning_errors_as_config_errors():
        job.trainer.test(job.task, datamodule=job.data, ckpt_path=best, verbose=False)
    # A data module may know simple rules to compare with on the same test set.
    baselines = getattr(job.data, "baselines", dict)()
    return _logged_metrics(job) | {f"baseline/{name}": value for name, value in baselines.items()}


def _logged_metrics(job: TrainingJob) -> dict[str, Any]:
    """Returns the last value that the task logged under each name."""
    return {name: value.item() for name, value in sorted(job.trainer.callback_metrics.items())}


def _compression_outcome(job: TrainingJob, search: CompressionRequest | None) -> CompressionOutcome | None:
    """Returns what the callbacks of compression have made of the model of the best checkpoint, or of the last one.

    With a search they are those of the smallest model that it finds.
    """
    if search is not None:
        from lightkit.app.compression_after_training import compress_trained

        return compress_trained(job, search)
    best = getattr(job.trainer.checkpoint_callback, "best_model_path", None) or None
    try:
        if best is not None:
            # A sharded checkpoint is a directory, which a process cannot read by itself.
            return compression_outcome(_callbacks(job), load_checkpoint(best)) if Path(best).is_file() else None
        state = job.task.state_dict()
        if any(map(is_sharded, state.values())):
            return None
        return compression_outcome(_callbacks(job), {"state_dict": state})
    except Exception as error:
        # The training is done, and must not end in an error.
        warnings.warn(f"no summary of the compression: {describe_error(error)}", stacklevel=2)
        return None


def _print_summary(
    job: TrainingJob, metrics: dict[str, Any], page: Path | None, outcome: CompressionOutcome | None
) -> None:
    tested = ("test/", "test_", "baseline/")
    rows = {name: format_number(value) for name, value in metrics.items() if name.startswith(tested)}
    rows |= {name: format_rate(value) for name, value in metrics.items() if name.endswith("_per_second")}
    if (fraction := metrics.get("train/fraction_of_matmul_rate")) is not None:
        rate, times = metrics["train/gigaflops_per_second"], format_number(fraction, 2)
        rows["train/gigaflops_per_second"] = f"{format_rate(rate)}, {times} times a matrix product's"
    rows |= {"wall_seconds": f"{metrics['wall_seconds']:.1f} s", "epochs": str(metrics["epochs"])}
    parts = {name[len("step/") : -len(" (ms)")]: value for name, value in metrics.items() if name.startswith("step/")}
    if total := sum(parts.values()):
        shares = ", ".join(f"{part} {value / total:.0%}" for part, value in parts.items())
        rows["step"] = f"{format_number(total)} ms: {shares}"
    rows |= {} if outcome is None else outcome_facts(outcome)
    rows["run"] = os.path.relpath(job.run_dir)
    if page is not None:
        rows["report"] = os.path.relpath(page)
    print_table(job.name, rows)
