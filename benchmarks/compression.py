"""Measures compressed models beside the dense one of the documented job, which is trained equally long.

    python benchmarks/compression.py [--seeds 0 1 2] [--epochs 5] [--data mnist_5k] [--variants quarter ...]

For each seed the documented job trains the dense model, and `python -m lightkit.compress` goes on from its checkpoint.
The test set of mnist_5k has 1,000 digits, that of fashion_mnist 10,000 images. Latencies are medians of calls in turn,
in one process with both models.
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
    "8 bits, not trained": ["keep_macs=null", "bits=8", "epochs=0"],
    "8 bits": ["keep_macs=null", "bits=8"],
    "2 bits": ["keep_macs=null", "bits=2"],
    "quarter, 8 bits": ["keep_macs=0.25", "bits=8"],
    "quarter, 4 bits": ["keep_macs=0.25", "bits=4"],
    "quarter, 2 bits": ["keep_macs=0.25", "bits=2"],
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
    parser.add_argument("--data", default="mnist_5k")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    options = parser.parse_args()
    rows = []
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as directory:
            words = ["+experiment=cnn", f"data={options.data}", f"seed={seed}", "test=false", "hydra.run.dir=dense"]
            run("train", *words, directory=directory)
            for index, variant in enumerate(options.variants):
                # The dense model of a seed is trained on once.
                more = [f"seed={seed}", f"output=out_{index}", f"compare={str(index == 0).lower()}"]
                run(
                    *("compress", "ckpt_path=dense", f"epochs={options.epochs}", *VARIANTS[variant], *more),
                    directory=directory,
                )
                content = json.loads((Path(directory) / f"out_{index}" / "compression.json").read_text())
                for model, values in content["models"].items():
                    measured = {column: values.get(name) for column, name in _COLUMNS.items()}
                    rows.append(
                        {
                            "data": options.data,
                            "variant": variant,
                            "model": model,
                            "seed": seed,
                            "epochs": options.epochs,
                            **measured,
                        }
                    )
    append("compression", rows)


if __name__ == "__main__":
    main()
