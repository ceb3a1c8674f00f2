"""Measures the accuracy of the documented job beside that of the same model in a plain PyTorch loop.

    python benchmarks/cnn_accuracy.py [--data mnist_5k fashion_mnist] [--seeds 0 1 2]

Both train on the same split with the same seeds, 5 epochs of batches of 32 with Adam. The test set measures lightkit's
checkpoint of the lowest validation loss, and the loop after its last epoch.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from rows import append

from lightkit.data import FashionMNIST, MNIST5k
from lightkit.data.images import to_input
from lightkit.models import CNN

SETS = {
    "mnist_5k": lambda: MNIST5k(validation_size=400),
    "fashion_mnist": lambda: FashionMNIST(validation_size=5000),
}


def lightkit_job(data: str, seed: int) -> tuple[float, float]:
    """Returns accuracy and images a second of the command line."""
    with tempfile.TemporaryDirectory() as directory:
        arguments = ["+experiment=cnn", f"data={data}", f"seed={seed}", "hydra.run.dir=out"]
        subprocess.run([sys.executable, "-m", "lightkit.train", *arguments], cwd=directory, check=True)
        metrics = json.loads((Path(directory) / "out" / "metrics.json").read_text())
    return metrics["test/accuracy"], metrics["train/images_per_second"]


def plain_loop(data: str, seed: int) -> tuple[float, float]:
    """Returns accuracy and images a second of a loop with torch's layers, on images that are floats already."""
    sets = SETS[data]()
    sets.setup()
    inputs, labels = to_input(sets.train.images), sets.train.labels
    torch.manual_seed(seed)
    model = CNN(blocks="torch")
    optimizer = torch.optim.Adam(model.parameters())
    started = time.perf_counter()
    for _ in range(5):
        for batch in torch.randperm(len(labels)).split(32):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[batch]), labels[batch]).backward()
            optimizer.step()
    seconds = time.perf_counter() - started
    with torch.inference_mode():
        hits = sum(
            int((model(to_input(x)).argmax(1) == y).sum())
            for x, y in zip(sets.test.images.split(500), sets.test.labels.split(500), strict=True)
        )
    return hits / len(sets.test), 5 * len(labels) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    for data in options.data:
        rows = []
        for seed in options.seeds:
            for name, job in (("lightkit", lightkit_job), ("plain loop", plain_loop)):
                accuracy, rate = job(data, seed)
                rows.append({"data": data, "what": name, "seed": seed, "accuracy": accuracy, "images_per_second": rate})
                print(rows[-1], flush=True)
        for name in ("lightkit", "plain loop"):
            values = [row["accuracy"] for row in rows if row["what"] == name]
            print(f"{data}, {name}: mean accuracy {sum(values) / len(values):.4f} over {len(values)} seeds")
        append("cnn_accuracy", rows)


if __name__ == "__main__":
    main()
