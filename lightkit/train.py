"""``python -m lightkit.train +experiment=cnn``: compose, train, test, report."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from omegaconf import DictConfig

from lightkit import report, results
from lightkit.callbacks import TestRecorder, Throughput
from lightkit.checkpoints import AtomicCheckpointIO, check_weights, find_last, load_checkpoint
from lightkit.cli import entry_point
from lightkit.config import build
from lightkit.errors import CheckpointError
from lightkit.job import SaveConfig, build_data, build_task


@entry_point("train")
def main(config: DictConfig) -> None:
    """Trains what the configuration describes."""
    train(config)


def train(config: DictConfig) -> dict[str, Any]:
    """Runs a job from configuration to report; returns what it wrote to ``metrics.json``."""
    started = time.perf_counter()
    run_dir = Path(config.run_dir)
    pl.seed_everything(config.seed, workers=True, verbose=False)
    data = build_data(config)
    task = build_task(config)
    resume = _checkpoint_to_resume(config, task)

    run_dir.mkdir(parents=True, exist_ok=True)
    results.write_config(run_dir, config)
    results.write_json(run_dir / "environment.json", results.environment())
    recorder = TestRecorder()
    trainer = build(
        config.trainer,
        callbacks=[*build(config.callbacks).values(), SaveConfig(config), recorder],
        logger=list(build(config.logger).values()),
        plugins=[AtomicCheckpointIO()],
        enable_model_summary=False,
    )
    trainer.fit(task, datamodule=data, ckpt_path=resume)
    if config.test and not trainer.interrupted:
        trainer.test(task, datamodule=data, ckpt_path=_best(trainer), verbose=False)

    metrics = _final_metrics(trainer, time.perf_counter() - started)
    if trainer.is_global_zero:
        results.write_json(run_dir / "metrics.json", metrics)
        page = report.write(run_dir, metrics, data, recorder.result())
        _summarize(config, metrics, page)
    return metrics


def _checkpoint_to_resume(config: DictConfig, task: pl.LightningModule) -> Path | None:
    """The checkpoint to go on from, checked to fit this task and to leave something to do."""
    if config.ckpt_path is None:
        return None
    if config.ckpt_path == "last":
        path = find_last(Path("runs") / config.name)
        print(f"continuing {path}")
    else:
        path = Path(config.ckpt_path)
    checkpoint = load_checkpoint(path)
    check_weights(task, checkpoint, path)
    done = checkpoint["epoch"] + 1
    at_its_end = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"]
    if at_its_end and 0 < config.trainer.max_epochs <= done:
        raise CheckpointError(
            f"{path} has {done} epochs behind it and trainer.max_epochs is {config.trainer.max_epochs}: "
            f"nothing is left to train; pass trainer.max_epochs={done + 1} or more"
        )
    return path


def _best(trainer: pl.Trainer) -> str | None:
    """The checkpoint to test: the best of this run, else the weights as they are."""
    callback = trainer.checkpoint_callback
    return (callback.best_model_path or None) if callback is not None else None


def _final_metrics(trainer: pl.Trainer, wall_seconds: float) -> dict[str, Any]:
    metrics: dict[str, Any] = {name: value.item() for name, value in sorted(trainer.logged_metrics.items())}
    metrics.update({name: value.item() for name, value in sorted(trainer.callback_metrics.items())})
    throughput = next((c.total for c in trainer.callbacks if isinstance(c, Throughput)), None)
    if throughput is not None:
        metrics["train/images_per_second"] = throughput
    metrics["epochs"] = trainer.current_epoch
    metrics["steps"] = trainer.global_step
    metrics["wall_seconds"] = wall_seconds
    return metrics


def _summarize(config: DictConfig, metrics: dict[str, Any], page: Path | None) -> None:
    formats = {
        "test/accuracy": "{:.4f}",
        "test/loss": "{:.4f}",
        "train/images_per_second": "{:,.0f} images/s",
        "wall_seconds": "{:.1f} s",
        "epochs": "{}",
    }
    rows = {name: form.format(metrics[name]) for name, form in formats.items() if name in metrics}
    rows["run"] = str(config.run_dir)
    if page is not None:
        rows["report"] = str(page)
    results.print_table(config.name, rows)


if __name__ == "__main__":
    sys.exit(main())
