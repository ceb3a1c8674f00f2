"""Measures the sequence experiments beside the same models in a plain PyTorch loop.

    python benchmarks/sequence_jobs.py [--jobs rnn language_model char_rnn] [--seeds 0]

Both sides see the same data, start from the same seed, and take as many steps of the same size with the same rates. The
whole test set measures lightkit's checkpoint of the lowest validation loss, and the loop after its last step. The loop
uses torch's parts alone: cross-entropy of logits, torch's optimizer, its clipping.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_module
from omegaconf import DictConfig
from rows import append
from torch import Tensor, nn

from lightkit.app.factory import build_data
from lightkit.config import build
from lightkit.data import with_sizes

# For each job, the names of its metric and of its rate.
JOBS = {
    "rnn": ("test/accuracy", "train/images_per_second"),
    "language_model": ("test/bits_per_byte", "train/tokens_per_second"),
    "char_rnn": ("test/bits_per_byte", "train/tokens_per_second"),
}


def lightkit_job(job: str, seed: int) -> tuple[float, float]:
    """Returns the metric and the rate of the command line."""
    with tempfile.TemporaryDirectory() as directory:
        arguments = [f"+experiment={job}", f"seed={seed}", "hydra.run.dir=out"]
        subprocess.run([sys.executable, "-m", "lightkit.train", *arguments], cwd=directory, check=True)
        metrics = json.loads((Path(directory) / "out" / "metrics.json").read_text())
    metric, rate = JOBS[job]
    return metrics[metric], metrics[rate]


def plain_loop(job: str, seed: int) -> tuple[float, float]:
    """Returns the metric and the rate of a plain loop with the settings of the experiment."""
    with initialize_config_module("lightkit.conf", version_base="1.3"):
        config = compose("train", [f"+experiment={job}", f"seed={seed}", "run_dir=."])
    data = build_data(config)
    data.setup()
    torch.manual_seed(seed)
    model = build(with_sizes(config.model, data))
    optimizer = _optimizer(config, model)
    scheduler = build(config.scheduler)(optimizer)
    clip = config.optim.get("max_grad_norm")
    counted, seconds = 0, 0.0
    for _ in range(config.trainer.max_epochs):
        started = time.perf_counter()
        for index, batch in enumerate(data.train_dataloader()):
            if index == config.trainer.limit_train_batches:
                break
            inputs, targets = data.on_after_batch_transfer(batch, 0)
            optimizer.zero_grad()
            F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten()).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            counted += targets.numel()
        scheduler.step()
        seconds += time.perf_counter() - started
    return _test(job, model.eval(), data), counted / seconds


def _optimizer(config: DictConfig, model: nn.Module) -> torch.optim.Optimizer:
    kind = getattr(torch.optim, config.optim._target_.rpartition(".")[2])
    options = {name: config.optim[name] for name in ("lr", "betas", "eps", "weight_decay")}
    return kind(model.parameters(), **options)


@torch.inference_mode()
def _test(job: str, model: nn.Module, data) -> float:
    losses: list[Tensor] = []
    hits: list[Tensor] = []
    for batch in data.test_dataloader():
        inputs, targets = data.on_after_batch_transfer(batch, 0)
        logits = model(inputs).flatten(0, -2)
        losses.append(F.cross_entropy(logits, targets.flatten(), reduction="none"))
        hits.append(logits.argmax(1) == targets.flatten())
    if JOBS[job][0] == "test/accuracy":
        return float(torch.cat(hits).float().mean())
    return float(torch.cat(losses).mean()) / math.log(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    options = parser.parse_args()
    for job in options.jobs:
        metric, rate = JOBS[job]
        for seed in options.seeds:
            rows = []
            for name, run in (("lightkit", lightkit_job), ("plain loop", plain_loop)):
                reached, speed = run(job, seed)
                rows.append(
                    {"job": job, "what": name, "seed": seed, "metric": metric.removeprefix("test/"), "test": reached}
                    | {"unit": rate.removeprefix("train/"), "rate": speed}
                )
                print(rows[-1], flush=True)
            append("sequence_jobs", rows)


if __name__ == "__main__":
    main()
