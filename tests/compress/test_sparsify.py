"""The callback Sparsify: masked weights are zero after every step, whatever steps them, and after a resumption."""

from __future__ import annotations

import io
import zipfile

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from pruned_trainings import Same, fit, loader, seeded
from support.trainers import bare_trainer
from torch import nn

from lightkit.callbacks import AveragedWeights, FuseKernels, LeanLoop
from lightkit.checkpoints import load_checkpoint
from lightkit.compress import Prune, Sparsify
from lightkit.errors import CheckpointError, ConfigError
from lightkit.optim import SGD, Adam


class Watch(pl.Callback):
    """Counts the zeros of the weights after each step and in each validation."""

    def __init__(self):
        self.shares = []

    def _count(self, module):
        weights = [p for p in module.parameters() if p.dim() > 1]
        zeros = sum(int((p == 0).sum()) for p in weights)
        self.shares.append(zeros / sum(p.numel() for p in weights))

    def on_train_batch_end(self, trainer, pl_module, *arguments):
        self._count(pl_module)

    def on_validation_batch_start(self, trainer, pl_module, *arguments):
        self._count(pl_module)


@pytest.mark.parametrize(
    ("make", "options", "callbacks"),
    [
        (None, {}, [LeanLoop()]),
        (lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3), {}, [LeanLoop()]),
        (lambda p: Adam(p, lr=0.01, ema_decay=0.9), {}, [AveragedWeights()]),
        (lambda p: Adam(p, lr=0.01, master_weights=True), {"precision": "bf16-true"}, []),
        (lambda p: torch.optim.Adam(p, lr=0.01), {"precision": "bf16-mixed"}, [FuseKernels()]),
        (lambda p: torch.optim.RMSprop(p, lr=0.001), {"accumulate_grad_batches": 2}, []),
    ],
    ids=["Adam", "SGD", "averages", "master weights", "FuseKernels", "accumulated"],
)
def test_zeros_stay(make, options, callbacks):
    """The share of zeros grows to that which was asked for, and never falls, also in validations."""
    module, sparsify, watch = seeded(make), Sparsify(0.8, rounds=3), Watch()
    fit(module, *callbacks, sparsify, watch, epochs=4, **options)
    assert all(later >= earlier for earlier, later in zip(watch.shares, watch.shares[1:], strict=False))
    assert watch.shares[0] == 0 and watch.shares[-1] == pytest.approx(0.8, abs=0.002)
    assert sparsify.sparsity == pytest.approx(0.8, abs=0.002)
    final = Watch()
    final._count(module)
    assert final.shares[0] >= watch.shares[-1]


def test_learns_and_zips():
    """A model with 80 % zeros still learns, and its weights take much less once zipped."""
    dense, module = seeded(), seeded()
    fit(dense, epochs=8)
    trainer = fit(module, Sparsify(0.8), epochs=8)
    assert trainer.callback_metrics["val/loss"] < 0.4

    def zipped(net):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, value in net.state_dict().items():
                archive.writestr(name, value.numpy().tobytes())
        return buffer.tell()

    assert zipped(module) < 0.4 * zipped(dense)


@pytest.mark.parametrize("step", [5, 18, 30])
@pytest.mark.parametrize("with_prune", [False, True])
def test_resumed(tmp_path, step, with_prune):
    """A training that resumes before, between and after the rounds is the uninterrupted one to the bit."""

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, *arguments):
            if trainer.global_step == step:
                trainer.save_checkpoint(tmp_path / "x.ckpt")

    def train(*more, ckpt_path=None):
        module = seeded()
        both = [Prune(0.4, rounds=2), Sparsify(0.7, rounds=3)] if with_prune else [Sparsify(0.7, rounds=3)]
        trainer = bare_trainer(*both, *more, LeanLoop(), max_epochs=4, num_sanity_val_steps=0)
        trainer.fit(module, Same(), loader(), ckpt_path=ckpt_path)
        return module, both[-1]

    whole, masks = train(Save())
    torch.load(tmp_path / "x.ckpt", weights_only=True)
    module, resumed = train(ckpt_path=tmp_path / "x.ckpt")
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in module.state_dict().items())
    pairs = zip(resumed.masks.values(), masks.masks.values(), strict=True)
    assert all(torch.equal(mask, other) for mask, other in pairs)


def test_with_prune():
    """Masks lose the units that are pruned later; both shares hold at the end."""
    module, prune, sparsify = seeded(), Prune(0.4, rounds=3, start=0.2, end=0.8), Sparsify(0.7, start=0.2, end=0.6)
    fit(module, sparsify, prune, epochs=8)
    assert prune.macs <= 0.4 * prune.dense_macs
    for parameter, mask in sparsify.masks.items():
        assert mask.shape == parameter.shape and bool((parameter[~mask] == 0).all())
    assert any(bool((~mask).any()) for mask in sparsify.masks.values())


def test_best_is_sparse(tmp_path):
    """The best checkpoint has all zeros: scores from before the last round do not count."""
    best = ModelCheckpoint(tmp_path, monitor="val/loss", mode="max")
    fit(seeded(), Sparsify(0.8), best, epochs=6, enable_checkpointing=True)
    weights = load_checkpoint(best.best_model_path)["state_dict"]
    counted = [value for value in weights.values() if value.dim() > 1]
    share = sum(int((w == 0).sum()) for w in counted) / sum(w.numel() for w in counted)
    assert share == pytest.approx(0.8, abs=0.002)


def test_layers_keep_weights():
    """A layer of small weights does not lose all of them."""
    module = seeded(lambda p: torch.optim.SGD(p, lr=0.0))
    with torch.no_grad():
        module.net[6].weight.mul_(1e-6)
    fit(module, Sparsify(0.9), epochs=4)
    assert int((module.net[6].weight != 0).sum()) >= 1


def test_weights_outside_of_the_optimizer():
    """Weights that no optimizer steps keep their values, and do not count among those that are masked."""
    module = seeded()
    module.make = lambda parameters: Adam(module.net[4:].parameters(), lr=0.01)
    before, sparsify = module.net[0].weight.detach().clone(), Sparsify(0.8, rounds=2)
    fit(module, sparsify)
    assert torch.equal(module.net[0].weight, before)
    assert set(sparsify.masks) == {module.net[4].weight, module.net[6].weight}
    assert sparsify.sparsity == pytest.approx(0.8, abs=0.002)


@pytest.mark.parametrize("state", [{}, {"rounds": 1, "masks": [1]}, {"rounds": -1, "masks": {}}, {"rounds": 1}])
def test_damaged_state(state):
    """A stranger's state is refused before it is used."""
    with pytest.raises(CheckpointError, match="state of Sparsify"):
        Sparsify().load_state_dict(state)


def test_mask_of_another_model():
    """A mask of another size is named."""
    sparsify = Sparsify()

    class Load(pl.Callback):
        def on_fit_start(self, *arguments):
            masks = {"net.0.weight": torch.zeros(3, dtype=torch.uint8)}
            sparsify.load_state_dict({"rounds": 1, "masks": masks})

    with pytest.raises(CheckpointError, match=r"the mask of net\.0\.weight in the checkpoint does not fit"):
        fit(seeded(), Load(), sparsify)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"zeros": 1.0}, "zeros must be at most 0.99"),
        ({"zeros": -1}, "zeros must be a number from 0 to 1, got -1"),
        ({"start": 0.9, "end": 0.1}, "end must be at least start"),
        ({"rounds": 1.5}, "rounds must be a whole number"),
    ],
)
def test_wrong_arguments(arguments, expected):
    """A wrong argument is named."""
    with pytest.raises(ConfigError, match=expected):
        Sparsify(**arguments)


def test_nothing_to_mask():
    """A module without matrices has nothing to mask."""
    module = seeded()
    module.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).requires_grad_(False)
    module.net[1].bias.requires_grad_(True)
    with pytest.raises(ConfigError, match="no weight with two or more dimensions"):
        fit(module, Sparsify())
