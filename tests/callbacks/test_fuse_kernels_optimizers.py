"""Optimizers under FuseKernels: resumed, scheduled, scaled, wrapped, and after the fit."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fused import each, weights
from lightning.fabric.utilities.types import Optimizable
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins import MixedPrecision
from plain import Plain, batches, make, trainer
from support.commands import run_python
from torch import nn

from lightkit.callbacks import FuseKernels
from lightkit.optim.convert import is_converted

pytestmark = pytest.mark.filterwarnings("ignore:.*(does not have many workers|lower value for log_every|GPU available)")


def test_an_optimizer_that_outlives_the_fit():
    """An optimizer of the module is torch's between fits, keeps its momentum, and can be pickled without lightkit."""

    class Keeping(Plain):
        def configure_optimizers(self):
            if not hasattr(self, "kept"):
                self.kept = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, foreach=True)
            return self.kept

    plain, fused = make(Keeping), make(Keeping)
    for module, callbacks in ((plain, []), (fused, [FuseKernels()])):
        for _ in range(2):
            trainer(*callbacks).fit(module, batches())
            assert vars(module.kept).keys() == vars(plain.kept).keys()
            file = io.BytesIO()
            torch.save(module.kept, file)
            assert b"lightkit" not in file.getvalue()
    torch.testing.assert_close(weights(fused), weights(plain))
    for own, other in zip(fused.kept.state.values(), plain.kept.state.values(), strict=True):
        torch.testing.assert_close(own["momentum_buffer"], other["momentum_buffer"])
    assert fused.kept.state_dict()["param_groups"] == plain.kept.state_dict()["param_groups"]


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": False}], ids=str)
def test_resume_is_exact(tmp_path, options):
    """A resumed run ends as an uninterrupted one, in every combination with and without the callback."""
    ends = {}
    for first in (False, True):
        for second in (False, True):
            path = tmp_path / f"{first}{second}.ckpt"
            module = make(**options)
            runner = trainer(*[FuseKernels()] * first)
            runner.fit(module, batches())
            runner.save_checkpoint(path)
            (saved,) = torch.load(path, weights_only=False)["optimizer_states"]
            assert saved["param_groups"] == runner.optimizers[0].state_dict()["param_groups"]
            assert saved["param_groups"][0].items() >= options.items()
            module = make(**options)
            runner = trainer(*[FuseKernels()] * second, max_epochs=4)
            runner.fit(module, batches(), ckpt_path=path, weights_only=False)
            ends[first, second] = weights(module)
            assert runner.optimizers[0].param_groups[0]["lr"] == 0.1 * 0.5**6
    for fused in (False, True):
        whole = make(**options)
        trainer(*[FuseKernels()] * fused, max_epochs=4).fit(whole, batches())
        assert torch.equal(weights(whole), ends[fused, fused])
    for end in ends.values():
        torch.testing.assert_close(end, ends[False, False])


_WITHOUT_LIGHTKIT = """
import importlib.abc, sys, torch

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "lightkit":
            raise ImportError("lightkit is not installed")

sys.meta_path.insert(0, Blocker())
from plain import Plain, batches, make, trainer

for path in sys.argv[1:]:
    checkpoint = torch.load(path, weights_only=False)
    optimizer = torch.optim.SGD(Plain().parameters(), lr=1.0)
    optimizer.load_state_dict(checkpoint["optimizer_states"][0])
    optimizer.step()
    Plain.load_from_checkpoint(path, weights_only=False)
    module = make()
    trainer(max_epochs=4).fit(module, batches(), ckpt_path=path, weights_only=False)
    torch.save(module.state_dict(), path + ".end")
assert not any(name.startswith("lightkit") for name in sys.modules)
"""


@pytest.mark.slow
def test_checkpoints_need_no_lightkit(tmp_path):
    """A checkpoint from within a fit, with its hyperparameters, resumes without lightkit."""

    class Save(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(pl_module.path)

    ends = {}
    # These are pickled by name, unlike the lambdas.
    for loss in (F.cross_entropy, nn.CrossEntropyLoss()):
        module = make(loss=loss)
        module.path = str(tmp_path / f"{len(ends)}.ckpt")
        trainer(FuseKernels(), Save(), max_epochs=4).fit(module, batches())
        assert b"lightkit" not in Path(module.path).read_bytes()
        ends[module.path] = module.state_dict()
    run_python("-c", _WITHOUT_LIGHTKIT, *ends, cwd=Path(__file__).parent, status=0)
    for path, end in ends.items():
        torch.testing.assert_close(torch.load(path + ".end"), end)


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_clip_val": 0.1},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        {"accumulate_grad_batches": 2},
        {"precision": "bf16-mixed"},
        {"precision": "64-true"},
    ],
    ids=str,
)
def test_trainer_options(options, calls):
    """Clipping, accumulation and precisions have the same effect as without the callback."""
    plain, fused = make(), make()
    trainer(**options).fit(plain, batches())
    trainer(FuseKernels(), **options).fit(fused, batches())
    assert len(calls) == 10
    tolerance = {"rtol": 0.02, "atol": 0.01} if options.get("precision") == "bf16-mixed" else {}
    torch.testing.assert_close(weights(fused), weights(plain), **tolerance)


@pytest.mark.parametrize("fused", [None, True])
def test_gradient_scaler(fused):
    """Gradients are unscaled once and overflowing steps are skipped, also if torch's fused step would unscale."""
    ends = []
    # Both are compared with torch's loop: after an overflow in the first step, torch's fused step uses a momentum
    # buffer that was never written (2.13).
    for callbacks, options in (([], {}), ([FuseKernels()], {"fused": fused})):
        module = make(**options)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=2)
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        trainer(*callbacks, plugins=[plugin], max_epochs=8).fit(module, batches())
        ends.append((weights(module), scaler.get_scale()))
    assert ends[0][1] == ends[1][1] < 2.0**40
    torch.testing.assert_close(ends[0][0], ends[1][0], rtol=0.02, atol=0.01)
    assert not torch.equal(ends[1][0], weights(make()))


def test_schedulers_and_hooks():
    """Schedulers from before and during the fit, hooks and the optimizer stay connected."""
    events = []

    class Scheduled(Plain):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
            optimizer.register_step_pre_hook(lambda *_: events.append("before"))
            optimizer.register_step_post_hook(lambda *_: events.append("after"))
            self.made = optimizer
            one = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=4)
            two = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"} for scheduler in (one, two)]

        def on_train_epoch_start(self):
            assert is_converted(self.made) is expected and self.trainer.optimizers == [self.made]
            assert self.optimizers().optimizer is self.made
            torch.optim.lr_scheduler.ConstantLR(self.made, factor=1.0)

    with warnings.catch_warnings():
        # Torch warns if a scheduler seems to be stepped before its optimizer.
        warnings.filterwarnings("error", ".*lr_scheduler.step.*")
        expected = False
        plain = make(Scheduled)
        trainer().fit(plain, batches())
        expected = True
        fused = make(Scheduled)
        trainer(FuseKernels()).fit(fused, batches())
    assert events == ["before", "after"] * 20
    assert fused.made.param_groups[0]["lr"] == plain.made.param_groups[0]["lr"]
    torch.testing.assert_close(weights(fused), weights(plain))
    # The optimizer is torch's again.
    assert not is_converted(fused.made)
    for module in (plain, fused):
        module.made.step()
    torch.testing.assert_close(weights(fused), weights(plain))


def test_a_scheduler_made_during_the_fit_outlives_it():
    """It wraps lightkit's step; after the fit the optimizer takes torch's steps."""

    class Late(Plain):
        def configure_optimizers(self):
            self.made = torch.optim.SGD(self.parameters(), lr=0.1)
            return self.made

        def on_train_start(self):
            self.late = torch.optim.lr_scheduler.StepLR(self.made, 1)

    module = make(Late)
    trainer(FuseKernels()).fit(module, batches())
    assert not is_converted(module.made)
    before = weights(module).clone()
    module(torch.ones(1, 4)).sum().backward()
    module.made.step()
    module.late.step()
    assert not torch.equal(weights(module), before)
    assert module.made.step.__wrapped__ is torch.optim.SGD.step


# Lightning takes what has the attributes of an optimizer. Those that its wrapper passes on count before Python
# 3.12, whose check of a protocol calls no __getattr__.
@pytest.mark.skipif(
    not isinstance(LightningOptimizer(torch.optim.SGD([torch.zeros(1)])), Optimizable),
    reason="Lightning rejects its own wrapper on this Python",
)
def test_an_optimizer_that_comes_wrapped():
    """configure_optimizers may return Lightning's wrapper."""

    class Wrapped(Plain):
        def configure_optimizers(self):
            return LightningOptimizer(torch.optim.SGD(self.parameters(), lr=0.1))

        def on_train_epoch_end(self):
            kinds.append(is_converted(self.optimizers().optimizer))

    kinds, callback = [], FuseKernels()
    trainer(callback).fit(make(Wrapped), batches())
    assert kinds == [True, True]
    assert each(callback, "optimizers[0]").kind == "torch.optim.SGD"
