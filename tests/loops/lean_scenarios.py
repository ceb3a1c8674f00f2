"""Fits in two processes with Lightning's loop and with the lean one; run as ``python FILE DIRECTORY``.

Each rank writes the outcome of both, which the tests compare.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from support.two_processes import Module, fit, loader, uneven

from lightkit.callbacks import LeanLoop
from lightkit.loops.step import LeanStep
from lightkit.strategies import DiLoCo, LocalSGD, ParameterServer


class Logging(Module):
    """Logs values that all processes share, in steps and over epochs."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.log("own", loss.detach() + self.global_rank, on_step=True)
        return loss


class Skipping(Module):
    """Returns None for a batch, which Lightning rejects with several processes."""

    def training_step(self, batch, batch_idx):
        return None if batch_idx == 3 else super().training_step(batch, batch_idx)


SCENARIOS = {
    "ddp": {"strategy": "ddp"},
    "ddp, all of it": {
        "strategy": "ddp",
        "module": Logging,
        "train": loader,
        "validate": True,
        "val_check_interval": 3,
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 0.1,
        "precision": "bf16-mixed",
    },
    "data_parallel": {"strategy": "data_parallel", "module": Logging, "validate": True},
    "data_parallel, accumulated": {"strategy": "data_parallel_fp16", "accumulate_grad_batches": 3},
    "local_sgd": {"strategy": lambda: LocalSGD(period=3), "module": Logging, "validate": True},
    "local_sgd, uneven": {"strategy": lambda: LocalSGD(period=2), "train": uneven},
    "diloco": {"strategy": lambda: DiLoCo(period=3), "accumulate_grad_batches": 2},
    "parameter_server": {"strategy": "parameter_server", "gradient_clip_val": 0.1},
    "parameter_server, two": {"strategy": lambda: ParameterServer(servers=2), "validate": True},
    "skipping": {"strategy": "data_parallel", "module": Skipping},
}


def compare(strategy, module=Module, **options):
    """Returns both outcomes and the number of lean steps."""
    outcomes = []
    for callbacks in ([], [LeanLoop()]):
        steps = []
        real = LeanStep.__call__

        def count(step, fetcher, steps=steps, real=real):
            steps.append(1)
            return real(step, fetcher)

        with patch.object(LeanStep, "__call__", count):
            made = strategy() if callable(strategy) else strategy
            outcome = fit(made, module=module(), callbacks=callbacks, **options)
        outcomes.append({**outcome, "lean": len(steps)})
    return outcomes


def main(directory: Path) -> None:
    results = {name: compare(**options) for name, options in SCENARIOS.items()}
    torch.save(results, directory / f"rank{os.environ.get('LOCAL_RANK', 0)}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
