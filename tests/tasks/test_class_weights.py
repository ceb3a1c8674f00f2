"""Class weights of the loss: given as a list, or balanced by the labels of the training set."""

from __future__ import annotations

import copy
import pickle

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from support.trainers import bare_trainer
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightkit.callbacks import Checkpoint, FuseKernels, LeanLoop
from lightkit.checkpoints import AtomicCheckpointIO, check_weights, load_checkpoint, load_weights
from lightkit.data import TensorBatches
from lightkit.errors import CheckpointError, ConfigError, DataError
from lightkit.nn import CrossEntropyLoss
from lightkit.tasks import ClassificationTask

LABELS = torch.tensor([0] * 12 + [1] * 6 + [2] * 2)
# scikit-learn's compute_class_weight("balanced", ...): N / (C n).
BALANCED = torch.tensor([20 / 36, 20 / 18, 20 / 6])
INPUTS = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))


def balanced(**options):
    torch.manual_seed(0)
    return ClassificationTask(nn.Linear(4, 3), loss=CrossEntropyLoss(weight="balanced", **options))


class Pairs(Dataset):
    """Samples that are read one by one."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return INPUTS[index], int(LABELS[index])


class Data(pl.LightningDataModule):
    """A data module with any attributes, that serves batches."""

    def __init__(self, batches=None, **attributes):
        super().__init__()
        self._batches = batches or TensorBatches([INPUTS, LABELS], 7, shuffle=True)
        vars(self).update(attributes)

    def train_dataloader(self):
        return self._batches


SOURCES = {
    "batches in memory": lambda: TensorBatches([INPUTS, LABELS], 7, shuffle=True),
    "a share of them": lambda: TensorBatches([INPUTS, LABELS], 7, shuffle=True, rank=1, world_size=3),
    "dataset of tensors": lambda: DataLoader(TensorDataset(INPUTS, LABELS), 7, shuffle=True, drop_last=True),
    "dataset": lambda: DataLoader(Pairs(), 7, shuffle=True),
    "several inputs": lambda: TensorBatches([INPUTS, LABELS], 20),
    "data module": lambda: Data(),
    "data module of a dataset": lambda: Data(DataLoader(Pairs(), 7)),
    "data module with labels": lambda: Data(DataLoader(Pairs(), 7), training_labels=lambda: LABELS),
    "data module with classes": lambda: Data(num_classes=3, classes=("a", "b", "c")),
}


@pytest.mark.parametrize("source", SOURCES)
def test_balanced_is_the_inverse_of_the_share(source):
    """The weights are those of all training samples, of any data and shard, and weigh 1 on average."""
    task = balanced()
    bare_trainer().fit(task, SOURCES[source]())
    torch.testing.assert_close(task.loss.weight, BALANCED)
    assert task.loss.weight[LABELS].mean().item() == pytest.approx(1)
    expected = nn.functional.cross_entropy(task(INPUTS), LABELS, BALANCED)
    torch.testing.assert_close(task.loss(task(INPUTS), LABELS), expected)


def test_counting_changes_no_order():
    """A pass over the data to count labels leaves the random numbers of the training as they were."""
    weights = []
    for loss in (CrossEntropyLoss(weight="balanced"), CrossEntropyLoss(weight=BALANCED)):
        torch.manual_seed(0)
        task = ClassificationTask(nn.Linear(4, 3), loss=loss)
        bare_trainer(max_epochs=2).fit(task, DataLoader(Pairs(), 7, shuffle=True))
        weights.append(task.model.weight)
    assert torch.equal(*weights)


@pytest.mark.parametrize("callback", [LeanLoop, FuseKernels])
def test_with_lightkits_callbacks(callback):
    """The lean loop and the fused kernels train with the weights, to the same parameters as Lightning's loop."""
    trained = []
    for callbacks in ([], [callback()]):
        task = balanced(label_smoothing=0.1)
        bare_trainer(*callbacks, max_epochs=2).fit(task, TensorBatches([INPUTS, LABELS], 7))
        trained.append(task.model.weight.detach())
    torch.testing.assert_close(*trained)


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed", "bf16-true"])
def test_precisions(precision):
    """The weights follow the precision of the training."""
    task = balanced()
    inputs = INPUTS.double() if precision == "64-true" else INPUTS
    bare_trainer(precision=precision).fit(task, TensorBatches([inputs, LABELS], 7))
    assert task.loss.weight.sum().item() == pytest.approx(BALANCED.sum().item(), rel=1e-2)


def test_checkpoints_have_the_weights(tmp_path):
    """A training resumes, and a new task measures with the weights of the training, which it cannot compute."""
    batches, settings = TensorBatches([INPUTS, LABELS], 7), {"plugins": [AtomicCheckpointIO()]}
    trainer = bare_trainer(Checkpoint(tmp_path, save_last=True), enable_checkpointing=True, **settings)
    trainer.fit(balanced(), batches)
    checkpoint = load_checkpoint(tmp_path / "last.ckpt")
    torch.testing.assert_close(checkpoint["state_dict"]["loss.weight"], BALANCED)
    again, new = balanced(), bare_trainer(max_epochs=2, **settings)
    check_weights(again, checkpoint, "last.ckpt")
    new.fit(again, batches, ckpt_path=tmp_path / "last.ckpt")
    assert new.global_step == 6
    fresh = balanced()
    load_weights(fresh, checkpoint, "last.ckpt")
    torch.testing.assert_close(fresh.loss.weight, BALANCED)
    (found,) = bare_trainer().test(fresh, batches, verbose=False)
    assert found["test/loss"] > 0
    checkpoint["state_dict"]["loss.weight"] = torch.ones(3, 1)
    with pytest.raises(CheckpointError, match=r"another model: loss\.weight is "):
        check_weights(balanced(), checkpoint, "last.ckpt")


def test_copies():
    """A copy and a pickle keep the weights, and that they are balanced."""
    loss = CrossEntropyLoss(weight="balanced")
    for made in (loss, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert made.is_balanced and made.weight is None and "weight" not in made.state_dict()
        made.balance(torch.tensor([12, 6, 2]))
        torch.testing.assert_close(pickle.loads(pickle.dumps(made)).weight, BALANCED)


@pytest.mark.parametrize("weight", [[1, 2.5, 0], (1, 2.5, 0), np.array([1, 2.5, 0]), torch.tensor([1, 2.5, 0])])
def test_a_list_is_the_tensor(weight):
    """A list of a configuration, a tuple and an array of NumPy are as the tensor that torch takes."""
    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    expected = nn.functional.cross_entropy(logits, labels, torch.tensor([1, 2.5, 0]))
    torch.testing.assert_close(CrossEntropyLoss(weight=weight)(logits, labels), expected)


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        ("balance", "weight must be a list of numbers, 'balanced' or None, got 'balance'"),
        (3, "weight must be a list with a number for each class, got 3"),
        ([1, -1], "a number of at least 0 for each class, got -1 for class 1"),
        ([1, float("nan")], "got nan for class 1"),
        ([float("inf"), 1], "got inf for class 0"),
        ([1, "x"], "got 'x' for class 1"),
        ([0, 0], "a number above 0 for some class, got \\[0, 0\\]"),
        ([], "a number above 0 for some class"),
    ],
)
def test_wrong_weights(weight, expected):
    """The error has the value and its class."""
    with pytest.raises(ValueError, match=expected):
        CrossEntropyLoss(weight=weight)


def test_weights_for_other_classes():
    """A list for another number of classes is one error before the training."""
    task = ClassificationTask(nn.Linear(4, 3), loss=CrossEntropyLoss(weight=[1, 2]))
    with pytest.raises(ConfigError, match="weight of the loss has 2 numbers, but the data has 3 classes"):
        bare_trainer().fit(task, datamodule=Data(num_classes=3))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (Data(num_classes=5, classes=("a", "b", "c", "d\x1b", "e")), r"no sample of the class d\\x1b, e; give the"),
        (Data(num_classes=30), "of the class 3, 4, 5 and 24 more; give"),
        (Data(TensorBatches([INPUTS, LABELS * 2], 7)), "of the class 1, 3; give"),
        (Data(num_classes=2), "the training set has the label 2"),
        (Data(TensorBatches([INPUTS, LABELS - 1], 7)), "the training set has the label -1"),
        (
            Data(TensorBatches([INPUTS, LABELS.float()], 7)),
            r"needs integer labels \(N\) in the batches, got torch.float32",
        ),
        (Data([{"x": INPUTS}]), "needs integer labels .* got dict"),
    ],
)
def test_labels_that_give_no_weights(data, expected):
    """A class without samples, or wrong labels, are one error."""
    with pytest.raises(DataError, match=expected):
        bare_trainer().fit(balanced(), datamodule=data)


def test_balanced_without_a_training():
    """A test without a checkpoint names what sets the weights."""
    with pytest.raises(ConfigError, match=r"weight='balanced' of the loss has no values .*loss\.balance\(counts\)"):
        bare_trainer().test(balanced(), TensorBatches([INPUTS, LABELS], 7), verbose=False)
    with pytest.raises(ValueError, match=r"counts must be one positive number for each class, got \[1, 0\]"):
        CrossEntropyLoss(weight="balanced").balance(torch.tensor([1, 0]))
