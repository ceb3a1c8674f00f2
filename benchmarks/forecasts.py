"""Measures the errors of the forecast experiment on the test part of each series, next to the simplest rules.

    python benchmarks/forecasts.py [--data co2 sunspots] [--seeds 0 1 2]

The rules are those of `lightkit.data.SeriesDataModule.baselines`: the last value stays, or the last season comes again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from rows import append

METRICS = ("mae", "rmse")


def job(data: str, seed: int) -> dict[str, Any]:
    """Trains the experiment by the command line and returns its row."""
    arguments = ["+experiment=forecast", f"data={data}", f"seed={seed}", "hydra.run.dir=out"]
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run([sys.executable, "-m", "lightkit.train", *arguments], cwd=directory, check=True)
        out = Path(directory) / "out"
        metrics = json.loads((out / "metrics.json").read_text())
        config = yaml.safe_load((out / "config.yaml").read_text())
    row: dict[str, Any] = {"data": data, "seed": seed, "horizon": config["data"]["horizon"]}
    for name in METRICS:
        row[name] = metrics[f"test/{name}"]
        row[f"{name}_last"] = metrics[f"baseline/naive_{name}"]
        row[f"{name}_season"] = metrics[f"baseline/seasonal_naive_{name}"]
    return row | {"coverage": metrics["test/coverage"]}


def main() -> None:
    """Trains each series with each seed, and appends a row after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["co2", "sunspots"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    for data in options.data:
        for seed in options.seeds:
            append("forecasts", [job(data, seed)])


if __name__ == "__main__":
    main()
