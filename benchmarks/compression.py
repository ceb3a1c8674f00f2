"""Measures compressed models beside the dense one of the documented job, which is trained equally long.

    python benchmarks/compression.py [--seeds 0 1 2] [--epochs 5]

For each seed the documented job trains the dense model, and `python -m lightkit.compress` goes on from its checkpoint.
The test set has 1,000 digits. Latencies are medians of calls in turn, in one process with both models.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from rows import append

VARIANTS = {
    "quarter": ["keep_macs=0.25"],
    "quarter, distilled": ["keep_macs=0.25", "distil=0.5"],
    "quarter, 90 % zeros": ["keep_macs=0.25", "zeros=0.9"],
    "90 % zeros": ["keep_macs=null", "zeros=0.9"],
}

_COLUMNS = {
    "accuracy": "test/accuracy",
    "multiply_adds": "multiply-adds",
    "bytes_raw": "bytes raw",
    "bytes_zipped": "bytes zipped",
    "ms_1": "ms at batch 1",
    "ms_32": "ms at batch 32",
}


def run(command: str, *words: str, directory: str) -> None:
    """Runs a command of lightkit in a directory."""
    subprocess.run([sys.executable, "-m", f"lightkit.{command}", *words], cwd=directory, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args()
    rows = []
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as directory:
            run("train", "+experiment=cnn", f"seed={seed}", "test=false", "hydra.run.dir=dense", directory=directory)
            for variant, words in VARIANTS.items():
                more = [f"epochs={options.epochs}", f"seed={seed}", f"output=out_{len(rows)}"]
                run("compress", "ckpt_path=dense", *words, *more, directory=directory)
                content = json.loads((Path(directory) / more[-1].partition("=")[2] / "compression.json").read_text())
                for model, values in content["models"].items():
                    measured = {column: values.get(name) for column, name in _COLUMNS.items()}
                    rows.append(
                        {"variant": variant, "model": model, "seed": seed, "epochs": options.epochs, **measured}
                    )
    append("compression", rows)


if __name__ == "__main__":
    main()
