"""Predictions for folders of images as people have them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from lightkit.app.prediction import PredictionRequest, images
from lightkit.data import MNIST5k
from lightkit.errors import DataError
from lightkit.models import CNN, RNN
from lightkit.tasks import ClassificationTask


def request(path, **values):
    return PredictionRequest(input=str(path), **values)


def noise(seed, shape=(28, 28)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


def test_one_bad_image_costs_no_other(tmp_path):
    """The predictions of a folder with a damaged file are those of the folder without it."""
    task = ClassificationTask(CNN()).eval()
    for index in range(5):
        noise(index).save(tmp_path / f"{index}.png")
    expected = images.predict(task, MNIST5k(), request(tmp_path)).images
    (tmp_path / "1a.png").write_bytes((tmp_path / "1.png").read_bytes()[:200])
    with pytest.warns(UserWarning, match=r"^skipped 1 of 6 images: .*1a\.png is a damaged image"):
        found = images.predict(task, MNIST5k(), request(tmp_path, batch_size=2)).images
    assert [image.path for image in found] == [image.path for image in expected]
    assert [image.label for image in found] == [image.label for image in expected]
    with pytest.raises(DataError, match=r"^\S*1a\.png is a damaged image"):
        images.predict(task, MNIST5k(), request(tmp_path / "1a.png"))


@pytest.mark.parametrize(
    ("model", "data", "state", "shape"),
    [
        (CNN(image_size=20), MNIST5k(), None, (1, 20, 20)),
        (CNN(image_size=20), MNIST5k(), {"image_shape": [20, 20]}, (1, 20, 20)),
        (RNN(18, 4, 10), MNIST5k(layout="rows"), {"image_shape": [30, 18]}, (30, 18)),
    ],
)
def test_pictures_have_the_size_of_the_model(tmp_path, model, data, state, shape):
    """A model that was trained on another size than 28 gets pictures of its own size."""
    noise(0, (50, 70)).save(tmp_path / "a.png")
    seen = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape[1:])))
    images.predict(ClassificationTask(model).eval(), data, request(tmp_path / "a.png"), state)
    assert seen == [shape]


def test_deep_scans_are_told_apart(tmp_path):
    """Scans of 16 bits give the predictions of the same scans with 8 bits."""
    task = ClassificationTask(CNN()).eval()
    (tmp_path / "8").mkdir()
    (tmp_path / "16").mkdir()
    for index in range(4):
        pixels = np.asarray(noise(index))
        Image.fromarray(pixels).save(tmp_path / "8" / f"{index}.png")
        Image.fromarray(pixels.astype(np.uint16) * 257).save(tmp_path / "16" / f"{index}.png")
    shallow, deep = (images.predict(task, MNIST5k(), request(tmp_path / bits)).images for bits in ("8", "16"))
    assert [image.probability for image in shallow] == [image.probability for image in deep]
    assert len({image.probability for image in deep}) == 4
    assert torch.is_grad_enabled()
