"""The sizes of the model and of the metrics follow the data where the user has not set them."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import DictConfig
from support.idx_files import write_idx_set

from lightkit.app.factory import build, build_data
from lightkit.app.model_sizes import fill
from lightkit.app.run_records import Run
from lightkit.app.run_search import config_differences
from lightkit.config import to_plain
from lightkit.data import ImageDataModule, ImageSet, MNIST5k, sizes_for, sizes_of, with_sizes
from lightkit.errors import ConfigError
from lightkit.models import CNN, RNN


class Coloured(ImageDataModule):
    """A user's data module of images in colour, which are not square."""

    classes = ("red", "green", "blue")
    image_size = (20, 26)
    channels = 3

    def read(self):
        """Returns six images, each of one colour."""
        labels = torch.arange(6) % 3
        images = torch.zeros(6, 3, 20, 26, dtype=torch.uint8)
        images[torch.arange(6), labels] = 255
        return ImageSet(images, labels), ImageSet(images, labels)


class Named(pl.LightningDataModule):
    """A user's data module that has the names of its classes alone."""

    classes = ("a", "b", "c")


def composed(*words):
    with initialize_config_module("lightkit.conf", version_base="1.3"):
        return compose("train", [*words, "run_dir=."])


@pytest.mark.parametrize(
    ("experiment", "size", "expected"),
    [
        ("cnn", (20, 20), {"in_channels": 1, "image_size": 20, "num_classes": 10}),
        ("cnn", (20, 33), {"in_channels": 1, "image_size": [20, 33], "num_classes": 10}),
        ("rnn", (30, 18), {"input_size": 18, "num_outputs": 10}),
    ],
)
def test_the_model_follows_the_files(tmp_path, experiment, size, expected):
    """Neither a size nor a number of classes need be given, and the record has all of them."""
    write_idx_set(tmp_path, train_size=size)
    config = composed(f"+experiment={experiment}", "data=mnist", f"data.data_dir={tmp_path}")
    filled = fill(config, build_data(config))
    assert {key: to_plain(filled.model)[key] for key in expected} == expected
    assert filled.task.metrics.accuracy.num_classes == 10
    # The caller's configuration stays as it is.
    assert config.model.get("image_size") is None
    assert fill(filled, build_data(filled)) == filled


def test_values_of_the_user_win():
    """A size that is set stays, whatever the data say."""
    config = composed("+experiment=cnn", "model.image_size=32", "model.in_channels=2", "model.num_classes=10")
    model = to_plain(fill(config, MNIST5k()).model)
    assert (model["image_size"], model["in_channels"], model["num_classes"]) == (32, 2, 10)


def test_the_configuration_of_another_process():
    """A process that gets the resolved configuration fills the metrics too, whose interpolations are gone."""
    resolved = DictConfig(to_plain(composed("+experiment=cnn")))
    assert fill(resolved, MNIST5k()).task.metrics.accuracy.num_classes == 10


def test_the_record_has_the_sizes(tmp_path):
    """The job has the filled configuration, which its checkpoints and config.yaml keep."""
    config = composed("+experiment=cnn", "trainer=cpu")
    config.run_dir = str(tmp_path)
    job = build(config)
    assert to_plain(job.config.model) == {
        **{"_target_": "lightkit.models.CNN", "in_channels": 1, "num_classes": 10, "image_size": 28, "blocks": "fused"}
    }


@pytest.mark.parametrize("layout", ["image", "rows"])
def test_images_in_colour(layout):
    """Three channels, not square: the model is made for what the data serve, before and after the setup."""
    data = Coloured(batch_size=2, layout=layout)
    before = sizes_of(data)
    data.setup()
    assert sizes_of(data) == before
    model = CNN(**sizes_for(CNN, data)) if layout == "image" else RNN(hidden_size=4, **sizes_for(RNN, data))
    inputs, labels = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    assert model(inputs).shape == (2, 3) and inputs.max() == 1
    if layout == "rows":
        # A row has all values of the first channel, then those of the second.
        assert inputs.shape == (2, 20, 78)
        assert inputs[0, 0].reshape(3, 26)[labels[0]].min() == 1
    else:
        assert (inputs.sum(dim=(2, 3)).argmax(dim=1) == labels).all()


def test_a_data_module_with_names_alone():
    """Classes are counted; a size that the data do not say is the default of the class, or one line."""
    assert with_sizes({"_target_": "lightkit.models.CNN", "in_channels": None, "num_classes": None}, Named()) == {
        "_target_": "lightkit.models.CNN",
        "in_channels": 1,
        "num_classes": 3,
    }
    with pytest.raises(ConfigError, match=r"^model\.input_size is null, and Named does not say it: set model"):
        with_sizes({"_target_": "lightkit.models.RNN", "input_size": None, "num_outputs": None}, Named())
    assert sizes_of(pl.LightningDataModule()) == {}


def test_a_run_of_an_earlier_version_is_resumed(tmp_path):
    """A size that an earlier run has in its record and this one leaves to the data is no difference; others are."""
    explicit = {"data": {}, "model": {"in_channels": 1, "image_size": 28, "blocks": "fused"}, "seed": 0}
    null = {"data": {}, "model": {"in_channels": None, "image_size": None, "blocks": "fused"}, "seed": 0}
    other = {"data": {}, "model": {"in_channels": 3, "image_size": None, "blocks": "torch"}, "seed": 0}
    runs = [Run(tmp_path, 0.0, config) for config in (explicit, null, other)]
    assert config_differences(runs[1], runs[0]) == config_differences(runs[0], runs[1]) == []
    names = [name for name, *_ in config_differences(runs[0], runs[2])]
    assert names == ["model.in_channels", "model.blocks"]
