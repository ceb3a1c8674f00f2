"""Trains the documented CNN on a folder of images with lightkit.fit, and prints the test accuracy."""

from torch import nn

import lightkit

model = nn.Sequential(
    *(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.MaxPool2d(2)),
    *(nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2)),
    *(nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Flatten()),
    *(nn.Linear(576, 64), nn.ReLU(), nn.Linear(64, 10)),
)
result = lightkit.fit(model, "digits", epochs=5)
print(result.evaluate("more_digits")["accuracy"])
