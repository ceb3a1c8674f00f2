"""The callback Quantize: what is validated has few bits, what is optimized has not, and both resume to the bit."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from pruned_trainings import Module, Same, fit, loader, seeded
from support.trainers import bare_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightkit.callbacks import AveragedWeights, FuseKernels, LeanLoop
from lightkit.checkpoints import load_checkpoint
from lightkit.compress import QUANTIZATION_KEY, Distil, Prune, Quantize, Sparsify, apply_quantization, apply_widths
from lightkit.errors import CheckpointError, ConfigError
from lightkit.models import RNN, RNNLanguageModel, Transformer
from lightkit.nn import FusedSequential
from lightkit.nn.input_quantizer import quantizer_of
from lightkit.optim import SGD, Adam
from lightkit.tasks import ClassificationTask, LanguageModelTask


def levels_of_rows(weight):
    """The largest number of different magnitudes in a row of a weight, which bits limit."""
    return max(len(row.abs().unique()) for row in weight.detach().flatten(1))


class Watch(pl.Callback):
    """Counts the magnitudes of a row of the second layer in each pass and before each optimizer step."""

    def __init__(self):
        self.passes, self.steps, self.validations = [], [], []

    def _count(self, module):
        return levels_of_rows(module.net[4].weight)

    def on_before_backward(self, trainer, pl_module, loss):
        self.passes.append(self._count(pl_module))

    def on_validation_batch_end(self, trainer, pl_module, *arguments):
        self.validations.append(self._count(pl_module))

    def on_train_batch_end(self, trainer, pl_module, *arguments):
        self.steps.append(self._count(pl_module))


@pytest.mark.parametrize(
    ("make", "options", "callbacks"),
    [
        (None, {}, [LeanLoop()]),
        (lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3), {}, [LeanLoop()]),
        (lambda p: Adam(p, lr=0.01, ema_decay=0.9), {}, [AveragedWeights()]),
        (lambda p: Adam(p, lr=0.01, master_weights=True), {"precision": "bf16-true"}, []),
        (lambda p: torch.optim.Adam(p, lr=0.01), {"precision": "bf16-mixed"}, [FuseKernels()]),
        (lambda p: torch.optim.Adam(p, lr=0.01), {"precision": "64-true"}, []),
        (lambda p: torch.optim.RMSprop(p, lr=0.001), {"accumulate_grad_batches": 2}, []),
        (lambda p: torch.optim.Adam(p, lr=0.01), {"gradient_clip_val": 0.1}, [LeanLoop()]),
    ],
    ids=["Adam", "SGD", "averages", "master weights", "FuseKernels", "float64", "accumulated", "clipped"],
)
def test_passes_have_few_levels(make, options, callbacks):
    """From the first round on, passes and validations see 4 bits, and the optimizer steps weights in float."""
    module, watch = seeded(make), Watch()
    trainer = fit(module, *callbacks, watch, Quantize(4, start=0.3, end=0.6, batches=4, edge_bits=4), **options)
    begin = next(i for i, count in enumerate(watch.passes) if count <= 8)
    assert begin > 0 and max(watch.passes[begin:]) <= 8 and min(watch.passes[:begin]) > 8
    assert min(watch.steps) > 8, "the step of the optimizer is lost"
    assert max(watch.validations[-8:]) <= 8
    # After the training the module has the weights that were validated.
    assert levels_of_rows(module.net[4].weight) <= 8
    assert trainer.callback_metrics["val/loss"] < 0.65


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_learns(bits):
    """A model of any number of bits learns; at 2 bits rounding at the end alone would lose it."""
    module = seeded()
    trainer = fit(module, Quantize(bits, start=0.2, end=0.6, batches=4), epochs=8)
    assert trainer.callback_metrics["val/loss"] < 0.4
    assert levels_of_rows(module.net[4].weight) <= {8: 128, 4: 8, 3: 4, 2: 2}[bits]


@pytest.mark.parametrize("sequential", [nn.Sequential, FusedSequential])
def test_deployed_is_validated(tmp_path, sequential):
    """A model that is built anew from a checkpoint has the loss of the validation, to the bit."""
    module, best = seeded(sequential=sequential), ModelCheckpoint(tmp_path, monitor="val/loss")
    trainer = fit(module, Quantize(8, batches=4), best, epochs=4, enable_checkpointing=True)
    checkpoint = torch.load(best.best_model_path, weights_only=True)
    assert checkpoint[QUANTIZATION_KEY]["weights"].keys() == {f"net.{i}.weight" for i in (0, 4, 6)}
    deployed = Module(sequential=sequential)
    deployed.load_state_dict(checkpoint["state_dict"])
    assert apply_quantization(deployed, checkpoint)
    (found,) = trainer.validate(module, loader(), verbose=False, ckpt_path=best.best_model_path)
    plain = bare_trainer()
    (again,) = plain.validate(deployed, loader(), verbose=False)
    assert found == again and found["val/loss"] == pytest.approx(float(best.best_model_score), abs=1e-6)
    # The checkpoint itself has weights in float, from which a training goes on.
    assert levels_of_rows(checkpoint["state_dict"]["net.4.weight"]) > 128


def test_test_of_a_checkpoint(tmp_path):
    """A Trainer with a new callback tests a checkpoint with its bits and ranges."""
    module = seeded()
    trainer = fit(module, Quantize(2, batches=4), epochs=4)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    (expected,) = trainer.test(module, loader(), verbose=False)
    (found,) = bare_trainer(Quantize(2)).test(seeded(), loader(), ckpt_path=tmp_path / "x.ckpt", verbose=False)
    (dense,) = bare_trainer().test(seeded(), loader(), ckpt_path=tmp_path / "x.ckpt", verbose=False)
    assert found["val/loss"] == pytest.approx(expected["val/loss"], abs=1e-6)
    assert dense["val/loss"] != pytest.approx(expected["val/loss"], abs=1e-6)


def test_best_has_ranges(tmp_path):
    """A validation between the first round and the end of its observation is that of another model than the last."""

    class Epochs(Module):
        def validation_step(self, batch, batch_idx):
            self.log("val/loss", float(self.current_epoch))

    best = ModelCheckpoint(tmp_path, monitor="val/loss")
    # The first round comes after the last step of the first epoch, and the validation right behind it.
    fit(Epochs(), Quantize(8, batches=4, start=0.25), best, enable_checkpointing=True)
    assert len(torch.load(best.best_model_path, weights_only=True)[QUANTIZATION_KEY]["inputs"]) == 3


def test_checkpoint_of_before(tmp_path):
    """After a training, a checkpoint of before its first round is validated in float."""

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, *arguments):
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "x.ckpt")

    module = seeded()
    trainer = fit(module, Quantize(2, batches=4), Save())
    (found,) = trainer.validate(module, loader(), ckpt_path=tmp_path / "x.ckpt", verbose=False)
    (dense,) = bare_trainer().validate(seeded(), loader(), ckpt_path=tmp_path / "x.ckpt", verbose=False)
    assert found == dense


@pytest.mark.parametrize("step", [5, 12, 14, 22, 30])
@pytest.mark.parametrize("with_prune", [False, True])
def test_resumed(tmp_path, step, with_prune):
    """A training that resumes before, within and after the observations is the uninterrupted one to the bit."""

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, *arguments):
            if trainer.global_step == step:
                trainer.save_checkpoint(tmp_path / "x.ckpt")

    def train(*more, ckpt_path=None):
        module = seeded(sequential=FusedSequential)
        quantize = Quantize(4, start=0.35, end=0.65, batches=4)
        both = [Prune(0.4, rounds=2, end=0.5), quantize] if with_prune else [quantize]
        trainer = bare_trainer(*both, *more, LeanLoop(), max_epochs=4, num_sanity_val_steps=0)
        trainer.fit(module, Same(), loader(), ckpt_path=ckpt_path)
        return module

    whole = train(Save())
    torch.load(tmp_path / "x.ckpt", weights_only=True)
    module = train(ckpt_path=tmp_path / "x.ckpt")
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in module.state_dict().items())
    for index in (0, 4, 6):
        mine, theirs = quantizer_of(module.net[index]), quantizer_of(whole.net[index])
        assert (mine.scale, mine.zero_point) == (theirs.scale, theirs.zero_point)


def test_with_prune_and_zeros(tmp_path):
    """Pruned and sparse weights are rounded in their new shapes; zeros stay zeros."""
    module = seeded()
    fit(module, Prune(0.4), Sparsify(0.7), Quantize(4, start=0.2, batches=4), epochs=8).save_checkpoint(tmp_path / "x")
    assert module.net[0].weight.shape[0] < 16
    weights = torch.cat([p.flatten() for p in module.parameters() if p.dim() > 1])
    assert float((weights == 0).float().mean()) > 0.69
    checkpoint = load_checkpoint(tmp_path / "x")
    again = Module()
    assert apply_widths(again, checkpoint)
    again.load_state_dict(checkpoint["state_dict"])
    apply_quantization(again, checkpoint)
    assert torch.equal(again.net[4].weight, module.net[4].weight)


def test_with_distil():
    """The model in float, as it is before the first round, teaches the rounded one."""
    trainer = fit(seeded(), Distil(), Quantize(2, start=0.4, batches=4), epochs=8)
    assert trainer.callback_metrics["train/distillation"] > 0


def test_failed_training_keeps_weights():
    """An error within a step leaves the weights as the optimizer has made them."""

    class Fails(pl.Callback):
        def on_after_backward(self, trainer, pl_module):
            if trainer.global_step == 20:
                raise RuntimeError("stop")

    module = seeded()
    with pytest.raises(RuntimeError, match="stop"):
        fit(module, Quantize(2, start=0.3, batches=2), Fails())
    assert levels_of_rows(module.net[4].weight) > 8


@pytest.mark.parametrize("cell", ["lstm", "gru", "elman"])
def test_recurrent(cell):
    """The weights of recurrent layers have few bits, whose inputs stay in float."""
    torch.manual_seed(0)
    model = RNN(3, 16, 2, num_layers=2, cell=cell)
    x = torch.randn(64, 7, 3)
    data = DataLoader(TensorDataset(x, (x.sum((1, 2)) > 0).long()), batch_size=8)
    bare_trainer(Quantize(4, edge_bits=4), max_epochs=4).fit(ClassificationTask(model), data)
    assert all(levels_of_rows(p) <= 8 for name, p in model.named_parameters() if "weight" in name)
    assert quantizer_of(model.core) is None


@pytest.mark.parametrize("model", [lambda: Transformer(20, 32, 2, 4, 8), lambda: RNNLanguageModel(20, 32)])
def test_language_models(model):
    """Linear layers of language models share a scale among 32 values; their inputs stay in float."""
    torch.manual_seed(0)
    task = LanguageModelTask(model())
    tokens = torch.randint(20, (64, 9))
    data = DataLoader(TensorDataset(tokens[:, :-1], tokens[:, 1:]), batch_size=8)
    bare_trainer(Quantize(4), max_epochs=4).fit(task, data)
    assert not any(quantizer_of(layer) for layer in task.modules())
    linear = [m for m in task.model.body.modules() if isinstance(m, nn.Linear)]
    assert all(levels_of_rows(layer.weight.view(-1, 32)) <= 8 for layer in linear)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 5}, "bits must be one of 2, 3, 4, 8, got 5"),
        ({"bits": True}, "bits must be one of 2, 3, 4, 8, got True"),
        ({"edge_bits": 16}, "edge_bits must be one of"),
        ({"activations": "int4"}, "activations must be one of auto, int8, float, got 'int4'"),
        ({"group_size": -1}, "group_size must be null or a whole number"),
        ({"start": 0.9}, "end must be at least start"),
        ({"rounds": 0}, "rounds must be a whole number, at least 1, got 0"),
        ({"batches": 1.5}, "batches must be a whole number, at least 1, got 1.5"),
    ],
)
def test_wrong_arguments(arguments, message):
    """A mistake is one line when the callback is made."""
    with pytest.raises(ConfigError, match=message):
        Quantize(**arguments)


@pytest.mark.parametrize(
    ("callbacks", "make", "message"),
    [
        ([Sparsify(0.5)], None, "weights of 2 bits have no zero"),
        ([WeightAveraging()], None, "WeightAveraging would average the weights"),
        ([], torch.optim.LBFGS, "LBFGS evaluates the model within a step"),
    ],
)
def test_refused(callbacks, make, message):
    """What cannot go with it is said before the first step."""
    with pytest.raises(ConfigError, match=message):
        fit(seeded(make), Quantize(2), *callbacks)


def test_ended_early():
    """A training that ends within a round takes the range of the batches so far, and warns."""

    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *arguments):
            trainer.should_stop = trainer.global_step == 19

    module = seeded()
    with pytest.warns(UserWarning, match="ended before round 1 of 2 was complete"):
        fit(module, Quantize(8, start=0.5, end=0.95, batches=16), Stop(), min_steps=1)
    assert quantizer_of(module.net[4]).scale is not None


def test_short_training():
    """A round that has few batches before the next one observes half of them, so that its ranges are used."""
    module = seeded()
    fit(module, Quantize(8, batches=1000), epochs=1)
    assert all(quantizer_of(module.net[i]).scale is not None for i in (0, 4, 6))


@pytest.mark.parametrize(
    "state",
    [{}, {"rounds": -1, "left": 0, "ranges": {}}, {"rounds": 1, "left": 0, "ranges": {"net.0": [1.0]}}],
)
def test_damaged_state(state):
    """A stranger's state is refused before it is used."""
    with pytest.raises(CheckpointError, match="state of Quantize"):
        Quantize().load_state_dict(state)


@pytest.mark.parametrize(
    "spec",
    [
        [],
        {"weights": {}},
        {"weights": {"net.9.weight": [8, 0]}, "inputs": {}},
        {"weights": {"net.0.weight": [7, 0]}, "inputs": {}},
        {"weights": {"net.4.weight": [8, 7]}, "inputs": {}},
        {"weights": {"net.4.weight": [8, -1]}, "inputs": {}},
        {"weights": {"net.4.weight": [8, True]}, "inputs": {}},
        {"weights": {}, "inputs": {"net.1": [0.1, 0]}},
        {"weights": {}, "inputs": {"net.0": [float("nan"), 0]}},
        {"weights": {}, "inputs": {"net.0": [0.0, 0]}},
        {"weights": {}, "inputs": {"net.0": [0.1, 256]}},
        {"weights": {}, "inputs": {"net.0": ["0.1", 0]}},
    ],
)
def test_damaged_checkpoint(spec):
    """A stranger's entry that does not fit is one error, and changes nothing."""
    module = seeded()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(CheckpointError, match="quantization of the checkpoint"):
        apply_quantization(module, {QUANTIZATION_KEY: spec})
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
