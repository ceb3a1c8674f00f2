"""Directories of runs as a training leaves them, made without a training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightkit.app.run_records import Run


def make_run(
    directory: Path,
    started: float = 1e9,
    metrics: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    checkpoints: tuple[str, ...] = ("best.ckpt", "last.ckpt"),
    losses: tuple[float, ...] = (2.0, 1.0),
    **record: Any,
) -> Run:
    """Makes the directory of a run.

    Args:
        directory: of the run.
        started: the time of its start.
        metrics: what ``metrics.json`` has; None for a run that is not finished.
        config: keys of the configuration beside a name and an objective.
        checkpoints: the names of the files in ``checkpoints``, of a megabyte each.
        losses: the values of ``val/loss`` in ``metrics.csv``.
        record: further arguments of `Run`.
    """
    base = {"name": "x", "objective": "val/loss", "seed": 0, "optim": {"lr": 0.1}}
    run = Run(directory, started, {**base, **(config or {})}, is_finished=metrics is not None, **record)
    run.write()
    rows = "".join(f"0,{step},{loss}\n" for step, loss in enumerate(losses))
    (directory / "metrics.csv").write_text("epoch,step,val/loss\n" + rows)
    for name in checkpoints:
        (directory / "checkpoints").mkdir(exist_ok=True)
        (directory / "checkpoints" / name).write_bytes(bytes(10**6))
    if metrics is not None:
        (directory / "metrics.json").write_text(json.dumps(metrics))
        (directory / "report.html").write_text("<p>a report</p>")
    return run
