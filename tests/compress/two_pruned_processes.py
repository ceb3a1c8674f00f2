"""Prunes and quantizes in two processes: ``python two_pruned_processes.py DIRECTORY`` runs small trainings."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from support.two_processes import Module, fit

from lightkit.callbacks import LeanLoop
from lightkit.compress import Prune, Quantize
from lightkit.nn.input_quantizer import quantizer_of
from lightkit.strategies import DataParallel


def prune() -> Prune:
    return Prune(0.4, rounds=2)


def quantized() -> dict:
    """Quantizes in two processes, and returns the ranges of this one's inputs beside what `fit` returns."""
    module = Module()
    outcome = fit("ddp", module=module, callbacks=[Quantize(8, "int8", start=0.3, batches=3)], validate=True)
    quantizers = [quantizer_of(layer) for layer in module.modules()]
    return {**outcome, "ranges": [(q.scale, q.zero_point) for q in quantizers if q is not None]}


def main(directory: Path) -> None:
    results = {
        "ddp": fit("ddp", callbacks=[prune()], validate=True),
        "data_parallel": fit("data_parallel", callbacks=[prune(), LeanLoop()], validate=True),
        "powersgd": fit(DataParallel("powersgd"), callbacks=[prune()], validate=True, max_epochs=6),
        "whole": fit("data_parallel", directory / "whole", callbacks=[prune()], every=9),
        "resumed": fit(
            "data_parallel", directory / "again", callbacks=[prune()], ckpt_path=directory / "whole" / "step=9.ckpt"
        ),
        "quantized": quantized(),
    }
    torch.save(results, directory / f"rank{os.environ.get('LOCAL_RANK', 0)}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
