"""Trains the documented CNN with one contender; cnn_job.py starts a process for each and gives them turns.

    python benchmarks/cnn_contenders.py NAME --batch 32 --epochs 5

Every contender trains the same CNN on the same 60,000 images with Adam and cross-entropy. It waits for its turn before
each epoch, prints the seconds of each epoch, and prints the test accuracy at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

SEED = 0
DEVICE = os.environ.get("CNN_JOB_DEVICE", "cpu")


class Turns:
    """Waits for the turn of each epoch, and prints its seconds: from its start until the next one could start."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        # Progress bars and tables must not mix with the words for cnn_job.py.
        sys.stdout.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        self._started: float | None = None

    def begin(self) -> None:
        """Ends the previous epoch, if there was one, and waits for the next turn."""
        self.end()
        self._say({"ready": True})
        sys.stdin.readline()
        self._started = time.perf_counter()

    def end(self) -> None:
        """Ends the epoch, and prints its seconds."""
        if self._started is not None:
            self._say({"seconds": time.perf_counter() - self._started})
            self._started = None

    def finish(self, accuracy: float) -> None:
        """Ends the last epoch, and prints the test accuracy."""
        self.end()
        self._say({"accuracy": accuracy})

    def _say(self, words: dict) -> None:
        print(json.dumps(words), file=self._out, flush=True)


def images() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns Fashion-MNIST: images ``(N, 28, 28)``, float32 in [0, 1], and labels, of training and test."""
    from lightkit.data import FashionMNIST

    train, test = FashionMNIST().read()
    return (
        train.images.numpy().astype(np.float32) / 255,
        train.labels.numpy(),
        test.images.numpy().astype(np.float32) / 255,
        test.labels.numpy(),
    )


def keras(turns: Turns, batch: int, epochs: int) -> float:
    """Trains the documented listing."""
    data = np.load(os.environ["CNN_JOB_DATA"])
    import keras

    keras.utils.set_random_seed(SEED)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(32, (3, 3), activation="relu"),
            layers.MaxPooling2D((2, 2)),
            layers.Conv2D(64, (3, 3), activation="relu"),
            layers.MaxPooling2D((2, 2)),
            layers.Conv2D(64, (3, 3), activation="relu"),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile(optimizer="adam", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    for _ in range(epochs):
        turns.begin()
        model.fit(data["x"][..., None], data["y"], batch_size=batch, epochs=1, verbose=0)
    turns.end()
    return float(model.evaluate(data["test_x"][..., None], data["test_y"], batch_size=500, verbose=0)[1])


def torch_cnn():
    """Returns the CNN in torch's own layers."""
    from torch import nn

    return nn.Sequential(
        nn.Conv2d(1, 32, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(576, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def _tensors():
    import torch

    x, y, test_x, test_y = (torch.from_numpy(a) for a in images())
    return x.unsqueeze(1), y, test_x.unsqueeze(1).to(DEVICE), test_y.to(DEVICE)


def _accuracy(model, test_x, test_y) -> float:
    import torch

    model.eval()
    with torch.inference_mode():
        pairs = zip(test_x.split(500), test_y.split(500), strict=True)
        return sum(int((model(x).argmax(1) == y).sum()) for x, y in pairs) / len(test_y)


def loop(turns: Turns, batch: int, epochs: int, tuned: bool = False, compiled: bool = False) -> float:
    """Trains a plain PyTorch loop; ``tuned`` adds channels-last and the fused Adam, ``compiled`` CUDA graphs."""
    import torch
    import torch.nn.functional as F

    x, y, test_x, test_y = _tensors()
    torch.manual_seed(SEED)
    x, y, model = x.to(DEVICE), y.to(DEVICE), torch_cnn().to(DEVICE)
    if tuned:
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), fused=tuned)

    def loss_of(inputs, labels):
        return F.cross_entropy(model(inputs), labels)

    if compiled:
        loss_of = torch.compile(loss_of, mode="reduce-overhead", dynamic=False)
    for _ in range(epochs):
        turns.begin()
        for chosen in torch.randperm(len(y), device=DEVICE).split(batch):
            optimizer.zero_grad()
            loss_of(x[chosen], y[chosen]).backward()
            optimizer.step()
        _wait()
    turns.end()
    return _accuracy(model, test_x, test_y)


def _wait() -> None:
    """Waits for the kernels of a GPU: the epoch ends with them."""
    import torch

    if DEVICE == "cuda":
        torch.cuda.synchronize()


def compiled_loop(turns: Turns, batch: int, epochs: int) -> float:
    """Trains the tuned loop, with model and loss compiled into CUDA graphs."""
    return loop(turns, batch, epochs, tuned=True, compiled=True)


def tuned_loop(turns: Turns, batch: int, epochs: int) -> float:
    """Trains the plain loop with channels-last and the fused Adam."""
    return loop(turns, batch, epochs, tuned=True)


def _pause(turns: Turns):
    """Returns a callback that waits for its turn before each epoch; the clock includes the end of the epoch."""
    from lightning.pytorch.callbacks import Callback

    class Pause(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            _wait()
            turns.begin()

        def on_train_end(self, trainer, pl_module):
            _wait()
            turns.end()

    return Pause()


def lightning(turns: Turns, batch: int, epochs: int, callbacks: Callable[[], list] = list) -> float:
    """Trains with stock Lightning: DataLoader, a logged accuracy, its logger, progress bar and checkpoints."""
    import lightning.pytorch as pl
    import torch
    import torch.nn.functional as F
    from torch.utils.data import DataLoader, TensorDataset
    from torchmetrics.classification import MulticlassAccuracy

    class Classifier(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = torch_cnn()
            self.accuracy = MulticlassAccuracy(10, average="micro")

        def training_step(self, batch, batch_idx):
            inputs, labels = batch
            logits = self.model(inputs)
            loss = F.cross_entropy(logits, labels)
            self.accuracy(logits, labels)
            self.log("train_loss", loss, prog_bar=True)
            self.log("train_accuracy", self.accuracy, on_step=False, on_epoch=True, prog_bar=True)
            return loss

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters())

    x, y, test_x, test_y = _tensors()
    pl.seed_everything(SEED, verbose=False)
    module = Classifier()
    loader = DataLoader(TensorDataset(x, y), batch_size=batch, shuffle=True)
    with tempfile.TemporaryDirectory() as directory:
        trainer = pl.Trainer(
            accelerator=DEVICE, max_epochs=epochs, default_root_dir=directory, callbacks=[_pause(turns), *callbacks()]
        )
        trainer.fit(module, loader)
    return _accuracy(module.model.to(DEVICE), test_x, test_y)


def lightning_one_line(turns: Turns, batch: int, epochs: int) -> float:
    """Trains the module of `lightning` with lightkit's callbacks."""
    from lightkit.callbacks import FuseKernels, LeanLoop

    return lightning(turns, batch, epochs, lambda: [LeanLoop(), FuseKernels()])


def lightkit(turns: Turns, batch: int, epochs: int, *overrides: str) -> float:
    """Trains ``python -m lightkit.train +experiment=cnn data=fashion_mnist`` as it comes."""
    from hydra import compose, initialize_config_module

    from lightkit.app.training import train
    from lightkit.config import allow_targets

    # The application builds its callbacks from the configuration: ours among them.
    module = sys.modules[__name__]
    module.Paused = type(_pause(turns))
    module.Paused.__module__ = __name__
    allow_targets(__name__)
    with tempfile.TemporaryDirectory() as directory, initialize_config_module("lightkit.conf", version_base="1.3"):
        config = compose(
            "train",
            [
                "+experiment=cnn",
                "data=fashion_mnist",
                "data.validation_size=0",
                "callbacks.checkpoint.monitor=null",
                f"data.batch_size={batch}",
                f"trainer.max_epochs={epochs}",
                f"seed={SEED}",
                f"run_dir={directory}",
                f"+callbacks.pause._target_={__name__}.Paused",
                *overrides,
            ],
        )
        return train(config)["test/accuracy"]


def lightkit_bfloat16(turns: Turns, batch: int, epochs: int) -> float:
    """Trains `lightkit` in bfloat16."""
    return lightkit(turns, batch, epochs, "trainer.precision=bf16-mixed")


def lightkit_without_graphs(turns: Turns, batch: int, epochs: int) -> float:
    """Trains `lightkit` with every kernel launched by Python."""
    return lightkit(turns, batch, epochs, "callbacks.lean_loop.cuda_graphs=false")


def lightkit_stock_loop(turns: Turns, batch: int, epochs: int) -> float:
    """Trains `lightkit` with Lightning's own loop."""
    return lightkit(turns, batch, epochs, "~callbacks.lean_loop")


CONTENDERS: dict[str, Callable[[Turns, int, int], float]] = {
    "keras": keras,
    "lightning": lightning,
    "loop": loop,
    "tuned_loop": tuned_loop,
    "compiled_loop": compiled_loop,
    "lightning_one_line": lightning_one_line,
    "lightkit": lightkit,
    "lightkit_stock_loop": lightkit_stock_loop,
    "lightkit_without_graphs": lightkit_without_graphs,
    "lightkit_bfloat16": lightkit_bfloat16,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=CONTENDERS)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args()
    turns = Turns()
    turns.finish(CONTENDERS[options.name](turns, options.batch, options.epochs))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
