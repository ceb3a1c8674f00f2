"""``lightkit.fit`` trains on every kind of samples, and its result evaluates, predicts, saves and comes back."""

from __future__ import annotations

import os
import signal
import sys
import threading
from functools import partial
from importlib import import_module

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.commands import run_python
from torch import nn
from torch.utils.data import Dataset, TensorDataset

import lightkit
from lightkit.callbacks import LeanLoop
from lightkit.errors import CheckpointError, ConfigError, DataError, LightkitError
from lightkit.models import RNN


def net(channels=1, size=8, outputs=3):
    """Returns a small convolutional classifier; its input is ``(N, channels, size, size)``."""
    side = size - 2
    # Some initial weights leave no ReLU alive.
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * side * side, outputs))


def blobs(count=120, shape=(8, 8), classes=3, dtype=np.uint8):
    """Returns images that are as bright as the number of their class, and the classes."""
    random = np.random.default_rng(0)
    labels = np.arange(count) % classes
    images = random.integers(0, 40, (count, *shape)) + 80 * labels.reshape(-1, *[1] * len(shape))
    return (images / 255).astype(dtype) if np.dtype(dtype).kind == "f" else images.astype(dtype), labels


def fit(*arguments, **options):
    fast = partial(torch.optim.Adam, lr=0.03)
    return lightkit.fit(*arguments, **{"epochs": 4, "verbose": False, "optimizer": fast, **options})


@pytest.mark.parametrize(
    ("shape", "channels"), [((8, 8), 1), ((8, 8, 1), 1), ((8, 8, 3), 3), ((3, 8, 8), 3), ((1, 8, 8), 1)]
)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_images(shape, channels, dtype):
    """Every layout and dtype of images trains, and predicts probabilities of the classes."""
    x, y = blobs(shape=shape, dtype=dtype)
    result = fit(net(channels), x, y, epochs=12)
    assert (
        list(result.history) == ["loss", "accuracy", "val_loss", "val_accuracy"] and len(result.history["loss"]) == 12
    )
    probabilities = result.predict(x)
    assert probabilities.shape == (120, 3) and np.allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    assert result.evaluate(x, y)["accuracy"] == pytest.approx((probabilities.argmax(axis=1) == y).mean())
    assert result.evaluate(x, y)["accuracy"] > 0.9


def test_uint8_is_scaled_once():
    """The model sees uint8 / 255 in training and prediction, and floating point as it is."""
    seen = []
    model = net()
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].max().item()))
    x, y = blobs()
    result = fit(model, x, y, epochs=1)
    result.predict(x)
    assert max(seen) == pytest.approx(x.max() / 255)
    with pytest.raises(DataError, match=r"^x must be uint8 as in the training, got float: uint8 counts"):
        result.predict(x.astype("float32"))


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (lambda y: y, ("0", "1", "2")),
        (lambda y: y.astype("uint8").reshape(-1, 1), ("0", "1", "2")),
        (lambda y: torch.from_numpy(y), ("0", "1", "2")),
        (lambda y: np.array(["b", "a", "c"])[y], ("a", "b", "c")),
        (lambda y: [["b", "a", "c"][label] for label in y], ("a", "b", "c")),
        (lambda y: np.array([5, -1, 70])[y], ("-1", "5", "70")),
        (lambda y: np.eye(3)[y], ("0", "1", "2")),
        (lambda y: np.eye(3, dtype=int)[y], ("0", "1", "2")),
    ],
)
def test_labels(labels, classes, tmp_path):
    """Labels are numbers, texts or one-hot rows; evaluate takes the same, and the classes come back with the file."""
    x, y = blobs()
    result = fit(net(), x, labels(y), epochs=12)
    assert result.classes == classes
    assert result.evaluate(x, labels(y))["accuracy"] > 0.9
    result.save(tmp_path / "model.ckpt")
    loaded = lightkit.load(tmp_path / "model.ckpt")
    assert loaded.classes == classes and loaded.evaluate(x, labels(y)) == result.evaluate(x, labels(y))


def test_classes_that_the_samples_lack():
    """A model of more classes than the labels show is trained as it is."""
    x, y = blobs()
    assert fit(net(outputs=5), x, y).predict(x).shape == (120, 5)


def test_regression():
    """Numbers are targets in their own units, whatever their size; predictions are values."""
    random = np.random.default_rng(0)
    x = random.normal(size=(300, 4)).astype("float32")
    y = 1e6 + 3000 * x[:, 0]
    for targets, shape in ((y, (300, 1)), (y.reshape(-1, 1), (300, 1)), (np.stack([y, -y], axis=1), (300, 2))):
        result = fit(nn.Linear(4, shape[1]), x, targets, epochs=30)
        assert result.predict(x).shape == shape
        assert list(result.history) == ["loss", "val_loss", "val_mae", "val_rmse"]
        assert np.abs(result.predict(x)[:, 0] - y).mean() < 300


def test_sequences_tokens_and_texts():
    """Sequences, tokens and texts with labels reach the model as they are."""
    x, y = blobs(shape=(6, 2), dtype=np.float32)
    assert fit(RNN(2, 8, 3), x, y, epochs=6).predict(x).shape == (120, 3)
    bag = nn.Sequential(nn.Embedding(256, 8), nn.AdaptiveAvgPool2d((1, 8)), nn.Flatten(), nn.Linear(8, 2))
    texts = [("good " if index % 2 else "bad ") * 3 for index in range(60)]
    names = ["pos" if index % 2 else "neg" for index in range(60)]
    result = fit(bag, texts, names, epochs=20)
    assert result.evaluate(texts, names)["accuracy"] == 1


def test_a_series():
    """A series is forecast: the result takes histories and returns the next values in their units."""
    x = 1000 + 10 * np.sin(np.arange(400) / 5)
    result = fit(nn.Sequential(nn.Flatten(), nn.Linear(20, 3)), x, history=20, epochs=30)
    forecast = result.predict(x[None, :20])
    assert forecast.shape == (1, 3) and np.abs(forecast[0] - x[20:23]).max() < 3


class Pairs(Dataset):
    """A dataset of a user's own."""

    def __init__(self):
        x, self.y = blobs(dtype=np.float32)
        self.x = torch.from_numpy(x).unsqueeze(1)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], int(self.y[index])


def test_datasets():
    """A Dataset trains through a DataLoader, one of tensors without."""
    pairs = Pairs()
    for data in (pairs, TensorDataset(pairs.x, torch.from_numpy(pairs.y))):
        result = fit(net(), data, epochs=12)
        assert result.predict(data if isinstance(data, Pairs) else pairs.x).shape == (120, 3)
        assert result.evaluate()["accuracy"] > 0.9


@pytest.mark.parametrize("name", ["cnn", "mlp", "rnn"])
def test_models_by_name(name, tmp_path):
    """A model by name has the channels, the size and the classes of the samples, and comes back from its file."""
    x, y = blobs(shape=(20, 20))
    result = fit(name, x, y, epochs=2)
    result.save(tmp_path / "model.ckpt")
    assert np.array_equal(lightkit.load(tmp_path / "model.ckpt").predict(x), result.predict(x))


class Module(pl.LightningModule):
    """A LightningModule of a user's own."""

    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


def test_a_lightning_module(tmp_path):
    """A LightningModule trains with its own loss and optimizer, and predicts by its forward."""
    x, y = blobs()
    result = fit(Module(), x, y)
    assert list(result.history) == ["train_loss"] and result.predict(x).shape == (120, 3)
    result.save(tmp_path / "model.ckpt")
    again = lightkit.load(tmp_path / "model.ckpt", Module())
    assert np.array_equal(again.predict(x), result.predict(x))
    with pytest.raises(ConfigError, match="loss: a LightningModule has its own"):
        fit(Module(), x, y, loss="mse")


class Own(nn.Module):
    """A module of a user's own."""

    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x):
        return self.net(x)


def test_a_file_has_no_code(tmp_path):
    """The file of a model of one's own loads into an instance; without one the error names the class."""
    x, y = blobs()
    result = fit(Own(), x, y)
    result.save(tmp_path / "model.ckpt")
    assert np.array_equal(lightkit.load(tmp_path / "model.ckpt", Own()).predict(x), result.predict(x))
    with pytest.raises(CheckpointError, match=r"Own' is not among the classes"):
        lightkit.load(tmp_path / "model.ckpt")


def test_a_second_fit_goes_on():
    """The second fit has the weights and the optimizer's state of the first, and another order of the samples."""
    x, y = blobs()
    model, whole = net(), net()
    fit(model, x, y, epochs=2)
    result = fit(model, x, y, epochs=1)
    fit(whole, x, y, epochs=2)
    untouched = {name: value.clone() for name, value in whole.state_dict().items()}
    import_module("lightkit.fitting.fit")._earlier.pop(whole)
    fresh = fit(whole, x, y, epochs=1, seed=2)
    assert not all(torch.equal(untouched[name], value) for name, value in result.model.state_dict().items())
    # Without the state of the optimizer the same epoch has other weights.
    assert not all(torch.equal(a, b) for a, b in zip(fresh.model.parameters(), result.model.parameters(), strict=True))
    # An optimizer that the user keeps goes on by itself.
    optimizer = torch.optim.Adam(model.parameters())
    fit(model, x, y, epochs=1, optimizer=optimizer)
    steps = optimizer.state[next(model.parameters())]["step"].item()
    fit(model, x, y, epochs=1, optimizer=optimizer)
    # An epoch has 4 batches.
    assert optimizer.state[next(model.parameters())]["step"].item() == steps + 4


class Interrupt(pl.Callback):
    """Presses Ctrl-C in the second epoch."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == 1:
            signal.raise_signal(signal.SIGINT)


@pytest.fixture
def ctrl_c_raises():
    """Ctrl-C raises a KeyboardInterrupt: a background job of a script ignores it, and its children inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_returns_what_is_trained(ctrl_c_raises):
    """Ctrl-C ends the training; the result has the finished epoch, and Ctrl-C works as before."""
    x, y = blobs()
    result = fit(net(), x, y, callbacks=[Interrupt()])
    assert len(result.history["loss"]) == 1 and result.predict(x).shape == (120, 3)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_in_a_thread():
    """A notebook or a server may call fit outside of the main thread."""
    x, y = blobs()
    results = []
    thread = threading.Thread(target=lambda: results.append(fit(net(), x, y, epochs=1)))
    thread.start()
    thread.join()
    assert len(results) == 1


def test_run_directory(tmp_path):
    """With run_dir the logs and the checkpoints are there, and without it no file appears."""
    x, y = blobs()
    here = set(os.listdir())
    fit(net(), x, y, run_dir=tmp_path / "run")
    written = {"metrics.csv", "metrics.json", "checkpoints", "model.ckpt", "report.html"}
    assert written <= set(os.listdir(tmp_path / "run"))
    assert {"best.ckpt", "last.ckpt"} <= set(os.listdir(tmp_path / "run" / "checkpoints"))
    fit(net(), x, y)
    assert set(os.listdir()) == here


def test_random_numbers_and_trace():
    """A fit is the same for a seed, leaves torch's random numbers as they were, and runs on lightkit's loop."""
    x, y = blobs()
    dropout = nn.Sequential(net(), nn.Dropout(0.5), nn.Linear(3, 3))
    other = nn.Sequential(net(), nn.Dropout(0.5), nn.Linear(3, 3))
    other.load_state_dict(dropout.state_dict())
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    results = [fit(dropout, x, y), None]
    assert torch.equal(torch.rand(3), expected)
    results[1] = fit(other, x, y)
    assert results[0].history == results[1].history
    loops = [callback for callback in results[1].task.trainer.callbacks if isinstance(callback, LeanLoop)]
    assert loops and loops[0].unsupported_reason is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs must be a whole number of at least 1, got 0"),
        ({"epochs": 1.5}, "epochs must be a whole number"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"optimizer": "adm"}, r"optimizer='adm' is none of adam, adamw, sgd; did you mean adam"),
        ({"optimizer": 3}, "optimizer must be a name, a class or an optimizer of torch, got int"),
        ({"optimizer": torch.optim.SGD([nn.Parameter(torch.zeros(1))])}, "optimizer has parameters that are not the"),
        ({"loss": "crossentropy"}, r"loss='crossentropy' is none of cross_entropy"),
        ({"metrics": ["acuracy"]}, r"metrics='acuracy' is none of accuracy.*did you mean accuracy"),
        ({"validation": 1.5}, "validation must be a share from 0 to below 1"),
        ({"class_weight": [1, 2]}, r"class_weight must be 3 finite weights of at least 0, got \[1.0, 2.0\]"),
        ({"class_weight": {"4": 1}}, "class_weight has no class '4'"),
        ({"class_weight": "balance"}, "did you mean balanced"),
        ({"y": None}, "y must have the labels or targets"),
        ({"y": np.zeros(7, int)}, "x has 120 samples, and y has 7"),
        ({"y": np.full(120, np.nan)}, "y has a value that is not finite in sample 0"),
        ({"y": np.zeros((120, 2, 2))}, r"y must be labels \(N\) or numbers \(N\) or \(N, K\)"),
        ({"x": np.full((120, 8, 8), np.nan)}, "x has a value that is not finite in sample 0"),
        (
            {"x": np.zeros((120, 9, 9), "uint8")},
            r"the model does not take samples of shape \(N, 9, 9\): as \(2, 1, 9, 9\)",
        ),
        ({"x": np.array([[object()]])}, "x must be an array of numbers, got ndarray of dtype object"),
        ({"x": np.zeros((0, 8, 8), "uint8"), "y": np.zeros(0, int)}, "x has no samples"),
        ({"model": "cn"}, "model='cn' is none of cnn, mlp, rnn"),
        ({"model": net(outputs=2)}, "the model returns 2 logits, and y has 3 classes"),
        ({"model": net(outputs=1)}, r"the model must return one logit for each class, \(N, C\), got \(N, 1\)"),
        ({"model": nn.Sequential(net(), nn.Softmax(1))}, "outputs are probabilities; leave the softmax at its end out"),
    ],
)
def test_errors(change, message):
    """Each wrong argument is one error that says what was expected."""
    x, y = blobs()
    arguments = {"model": net(), "x": x, "y": y, **change}
    with pytest.raises(LightkitError, match=message):
        lightkit.fit(arguments.pop("model"), arguments.pop("x"), arguments.pop("y"), verbose=False, **arguments)


def test_class_weight():
    """Balanced weights give a rare class as much influence as a frequent one."""
    x, y = blobs(300, classes=2)
    rare = (y == 0) | (np.arange(300) % 20 == 1)
    x, y = x[rare], y[rare]
    result = fit(net(outputs=2), x, y, class_weight="balanced", epochs=1, validation=0)
    counts = np.bincount(y)
    assert result.task.loss.weight.tolist() == pytest.approx((len(y) / (2 * counts)).tolist())
    named = fit(net(outputs=2), x, y, class_weight={1: 3.0}, epochs=1)
    assert named.task.loss.weight.tolist() == [1.0, 3.0]


def test_hydra_stays_out(tmp_path):
    """``import lightkit`` imports no torch, and a fit with save and load no Hydra."""
    code = """
import sys, lightkit
assert "torch" not in sys.modules
import numpy as np, torch
r = lightkit.fit("mlp", np.zeros((20, 2, 2), "uint8"), np.arange(20) % 2, epochs=1)
r.save("m.ckpt"); lightkit.load("m.ckpt")
lightkit.fit("mlp", np.zeros((20, 2, 2), "uint8"), np.arange(20) % 2, epochs=1, run_dir="run")
assert "hydra" not in sys.modules
"""
    run_python("-c", code, cwd=tmp_path, status=0, environment={"PYTHONPATH": os.pathsep.join(sys.path)})


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=3),
    st.sampled_from(["uint8", "int64", "float32", "float64", "bool", ">f4"]),
    st.integers(1, 6),
)
def test_arrays_of_any_form(shape, dtype, count):
    """Whatever the shape and dtype, the samples train; integers are tokens, which this model does not take."""
    x = (np.arange(count * int(np.prod(shape))).reshape(count, *shape) % 2).astype(dtype)
    x = x[::-1]
    model = nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(shape)), 2))
    if dtype == "int64":
        with pytest.raises(ConfigError, match="the model does not take samples of shape"):
            lightkit.fit(model, x, np.arange(count) % 2, epochs=1, verbose=False)
        return
    result = lightkit.fit(model, x, np.arange(count) % 2, epochs=1, verbose=False)
    assert result.predict(x).shape == (count, 2)
