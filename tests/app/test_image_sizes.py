"""Images of a size that the model does not take are refused before the training, and pictures get the model's size."""

from __future__ import annotations

import pytest
from support.commands import the_error
from support.idx_files import write_idx_set

from lightkit.app.image_sizes import check_image_size, picture_size
from lightkit.data import MNIST, MNIST5k
from lightkit.errors import CheckpointError, ConfigError
from lightkit.models import CNN, RNN


@pytest.mark.parametrize(
    ("experiment", "size", "test_size", "arguments", "message"),
    [
        (
            *("cnn", (20, 20), None, ["model.image_size=28"]),
            "the images are 20 x 20 pixels (height x width), but model.image_size is 28: leave model.image_size out",
        ),
        ("cnn", (20, 20), (28, 28), [], "the training images are 20 x 20 pixels and the test images 28 x 28"),
        ("cnn", (28, 28), (20, 20), [], "the training images are 28 x 28 pixels and the test images 20 x 20"),
        (
            "cnn",
            (28, 20),
            None,
            ["model.image_size=[20,28]"],
            "28 x 20 pixels (height x width), but model.image_size is [",
        ),
        ("cnn", (28, 28), None, ["data.layout=rows"], "CNN takes images: set data.layout=image"),
        ("cnn", (28, 28), None, ["model.in_channels=3"], "the images have 1 channel, but model.in_channels is 3"),
        ("cnn", (28, 28), None, ["model.image_size=20"], "but model.image_size is 20: leave model.image_size out"),
        (
            "rnn",
            (28, 20),
            None,
            ["model.input_size=28"],
            "28 rows of 20 values, but model.input_size is 28: leave ",
        ),
        ("rnn", (28, 28), None, ["data.layout=image"], "RNN takes sequences of rows: set data.layout=rows"),
    ],
)
def test_other_sizes_are_refused_before_training(
    call, tmp_path, monkeypatch, experiment, size, test_size, arguments, message
):
    """One line names the sizes and the key that helps, before an image is read."""
    write_idx_set(tmp_path / "set", train_size=size, test_size=test_size)
    monkeypatch.setattr(MNIST, "read", lambda self: pytest.fail("the data were read"))
    folder = f"data.data_dir={tmp_path / 'set'}"
    result = call("train", f"+experiment={experiment}", "+debug=quick", "data=mnist", folder, *arguments, cwd=tmp_path)
    assert message in the_error(result)


@pytest.mark.parametrize(
    ("size", "layout", "model"),
    [
        ((20, 20), "image", CNN(image_size=20)),
        ((20, 33), "image", CNN(image_size=[20, 33])),
        ((28, 28), "image", CNN()),
        ((33, 20), "rows", RNN(20, 8, 10)),
        ((28, 28), "rows", RNN(28, 8, 10)),
    ],
)
def test_sizes_that_fit(tmp_path, size, layout, model):
    """A model takes the size that it was made for, and reads rows of one length in any number."""
    data = MNIST(str(write_idx_set(tmp_path / "set", train_size=size)), layout=layout)
    check_image_size(data, model)
    data.setup()
    assert data.image_shape() == size and data.state_dict() == {"image_shape": list(size)}
    check_image_size(data, model)
    assert picture_size(MNIST(layout=layout), model, data.state_dict()) == size


def test_evaluation_on_another_size(tmp_path):
    """The size of a trained model is not the user's choice: no key is named."""
    data = MNIST(str(write_idx_set(tmp_path / "set", train_size=(20, 20))))
    with pytest.raises(ConfigError, match=r"MNIST are 20 x 20 pixels, and the model of the checkpoint takes 28 x 28$"):
        check_image_size(data, CNN(), is_trained=True)


def test_a_prediction_reads_no_data(tmp_path):
    """The format of pictures is known without the files of the data module, which may be gone, or a stranger's."""
    assert MNIST(str(tmp_path / "gone")).image_format().size == (28, 28)


class Padded(MNIST5k):
    """A user's data module, which makes inputs of another size."""

    def to_input(self, images):
        return super().to_input(images).new_zeros(len(images), 1, 32, 32)


def test_a_data_module_that_converts_images_itself():
    """A user's own conversion may make any size, and pictures go through it."""
    check_image_size(Padded(), CNN(image_size=32))
    assert picture_size(Padded(), CNN(image_size=32), {"image_shape": [28, 28]}) == (28, 28)


def test_checkpoints_of_earlier_versions():
    """Without a state the size is that of the model, and rows are as many as they are long."""
    assert picture_size(MNIST5k(), CNN(image_size=20), None) == (20, 20)
    assert picture_size(MNIST5k(layout="rows"), RNN(24, 8, 10), None) == (24, 24)
    assert picture_size(Padded(), CNN(image_size=32), None) == (28, 28)


@pytest.mark.parametrize(
    "state", [[], {}, {"image_shape": [28]}, {"image_shape": [True, 28]}, {"image_shape": [28, 10**6]}]
)
def test_states_that_a_stranger_wrote(state):
    """A checkpoint cannot make the pictures large."""
    with pytest.raises(CheckpointError, match="expected two numbers from 1 to 1024"):
        picture_size(MNIST5k(layout="rows"), RNN(28, 8, 10), state)
