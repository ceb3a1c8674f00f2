"""FuseKernels in real Trainers: modules without lightkit train as before, on its kernels."""

from __future__ import annotations

import _thread
import copy
import io
import os
import signal
import threading
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.types import Optimizable
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins import MixedPrecision
from plain import LOSSES, Plain, batches, make, trainer
from support.commands import run_python
from torch import nn
from torch.utils.checkpoint import checkpoint

import lightkit
from lightkit import native
from lightkit.callbacks import FuseKernels
from lightkit.capture import is_captured
from lightkit.nn import CrossEntropyLoss
from lightkit.ops import patch
from lightkit.optim import SGD
from lightkit.optim.convert import is_converted

pytestmark = pytest.mark.filterwarnings("ignore:.*(does not have many workers|lower value for log_every|GPU available)")

CODE = F.cross_entropy.__code__


@pytest.fixture(autouse=True)
def nothing_stays():
    """Checks that every test leaves torch as it was."""
    yield
    assert F.cross_entropy.__code__ is CODE and not patch.PATCH.threads


@pytest.fixture
def calls(monkeypatch):
    """Counts the calls that reach lightkit's cross-entropy through torch's name."""
    seen = []

    def counted(*arguments):
        seen.append(threading.get_ident())
        return lightkit.ops.cross_entropy(*arguments)

    monkeypatch.setattr(patch, "cross_entropy", counted)
    return seen


def each(callback, name):
    return next(found for found in callback.report if found.name == name)


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


class Watch(Callback):
    """Records during batches whether the optimizers are on lightkit's kernels; their class is torch's."""

    def __init__(self):
        self.converted = set()

    def on_train_batch_end(self, trainer, *_):
        assert all(type(optimizer) is torch.optim.SGD for optimizer in trainer.optimizers)
        self.converted |= {is_converted(optimizer) for optimizer in trainer.optimizers}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_same_training_on_the_kernels(loss, calls):
    """Losses and weights are torch's for any way to call cross-entropy, and lightkit computed them."""
    plain, fused, watch = make(loss=loss), make(loss=loss), Watch()
    trainer().fit(plain, batches())
    assert calls == []
    runner = trainer(FuseKernels(), watch)
    runner.fit(fused, batches())
    assert len(calls) == 10 and watch.converted == {True}
    torch.testing.assert_close(torch.tensor(fused.losses), torch.tensor(plain.losses))
    torch.testing.assert_close(weights(fused), weights(plain))
    assert fused.losses[-1] < fused.losses[0]
    assert not is_converted(runner.optimizers[0]) and "step" in vars(runner.optimizers[0])


def test_every_stage(calls):
    """Validation, test and prediction run on the kernels with the same results, the sanity check too."""
    results = []
    for callbacks in ([], [FuseKernels()]):
        module, runner = make(), trainer(*callbacks, max_epochs=1)
        runner.fit(module, batches(), batches())
        results.append(
            [*runner.validate(module, batches(), verbose=False), *runner.test(module, batches(), verbose=False)]
        )
        results[-1].append({"predicted": torch.cat(runner.predict(module, batches())).sum().item()})
    # The fit has 5 calls, the sanity check 2, its validation 5, and each other stage 5.
    assert len(calls) == 27
    for plain, fused in zip(*results, strict=True):
        assert plain == pytest.approx(fused, rel=1e-5)


class Many(Plain):
    """A module with several optimizers and losses."""

    class Mine(torch.optim.SGD):
        pass

    class MyLoss(nn.CrossEntropyLoss):
        pass

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.criteria = nn.ModuleDict(
            {
                "torch": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5])),
                "derived": Many.MyLoss(),
                "other": nn.NLLLoss(),
                "lightkit": CrossEntropyLoss(),
            }
        )

    def configure_optimizers(self):
        parameters = list(self.parameters())
        patched = torch.optim.SGD([parameters[3]], lr=0.1)
        patched.step = lambda *_, **__: None
        return [
            torch.optim.SGD(parameters[:1], lr=0.1, momentum=0.9),
            torch.optim.RMSprop(parameters[1:2], lr=0.01),
            Many.Mine(parameters[2:3], lr=0.1),
            patched,
            torch.optim.SGD([parameters[3]], lr=0.0, differentiable=True),
            SGD([parameters[3]], lr=0.0),
        ]

    def training_step(self, batch, batch_idx):
        logits = self(batch[0])
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = sum(self.criteria[name](logits, batch[1]) for name in ("torch", "derived", "lightkit"))
        self.manual_backward(loss + self.criteria["other"](logits.log_softmax(1), batch[1]))
        self.clip_gradients(optimizers[0], gradient_clip_val=0.5, gradient_clip_algorithm="norm")
        for optimizer in (*optimizers[:4], optimizers[5]):
            # A differentiable optimizer steps on parameters that are no leaves.
            optimizer.step()
        self.losses.append(loss.item())


def test_report(calls, monkeypatch):
    """One log message names every component and its outcome, and the module trains as before."""
    plain, fused = make(Many), make(Many)
    trainer().fit(plain, batches())
    keys = list(plain.state_dict())
    callback = FuseKernels()
    # Not caplog: whether Lightning's loggers propagate depends on what other tests of this process have run.
    messages: list[str] = []
    monkeypatch.setattr("lightkit.callbacks.fuse_kernels.rank_zero_info", messages.append)
    trainer(callback).fit(fused, batches())
    (message,) = messages
    name = f"{Many.__module__}.Many"
    assert message.splitlines() == [
        "FuseKernels:",
        "  optimizers[0] (torch.optim.SGD): replaced by lightkit.optim.SGD",
        "  optimizers[1] (torch.optim.RMSprop): kept: lightkit has no kernel for it",
        f"  optimizers[2] ({name}.Mine): kept: it is a subclass of torch.optim.SGD, which may do something else",
        "  optimizers[3] (torch.optim.SGD): kept: its method step has been replaced",
        "  optimizers[4] (torch.optim.SGD): kept: differentiable=True, and autograd does not see the native step",
        "  optimizers[5] (lightkit.optim.SGD): kept: it is lightkit's already",
        "  criteria.torch (torch.nn.CrossEntropyLoss): replaced by lightkit.ops.cross_entropy",
        f"  criteria.derived ({name}.MyLoss): kept: it is a subclass of torch.nn.CrossEntropyLoss; "
        "what it calls of torch.nn.functional.cross_entropy is replaced",
        "  criteria.other (torch.nn.NLLLoss): kept: what it calls of torch.nn.functional.nll_loss is replaced behind a "
        "log-softmax",
        "  criteria.lightkit (lightkit.nn.CrossEntropyLoss): kept: it is lightkit's already",
        "  torch.nn.functional.cross_entropy: replaced by lightkit.ops.cross_entropy",
        "  torch.nn.functional.nll_loss of a log-softmax: replaced by lightkit.ops.cross_entropy",
    ]
    assert [f"  {found}" for found in callback.report] == message.splitlines()[1:]
    assert len(calls) == 20
    torch.testing.assert_close(weights(fused), weights(plain))
    assert list(fused.state_dict()) == keys and type(fused.criteria["torch"]) is nn.CrossEntropyLoss


def test_nothing_without_native_kernels(monkeypatch, calls):
    """One warning says why; nothing is replaced and training is torch's, bit for bit."""
    monkeypatch.setenv("LIGHTKIT_NATIVE", "off")
    monkeypatch.setattr(native, "_loaded", None)
    plain, fused, watch, callback = make(), make(), Watch(), FuseKernels()
    trainer().fit(plain, batches())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(callback, watch).fit(fused, batches())
    (message,) = [str(w.message) for w in caught if "kernels" in str(w.message)]
    assert message == "FuseKernels replaces nothing: there are no native kernels: LIGHTKIT_NATIVE=off"
    assert calls == [] and watch.converted == {False}
    assert all(found.replacement is None and "LIGHTKIT_NATIVE=off" in found.reason for found in callback.report)
    assert torch.equal(weights(plain), weights(fused))


def test_no_native_library_warns_once(monkeypatch):
    """A failed build is reported once, and not by both the library and the callback."""
    monkeypatch.setattr(native, "_loaded", (None, "there is no C++ compiler"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(FuseKernels()).fit(make(), batches())
    (message,) = [str(w.message) for w in caught if "compiler" in str(w.message)]
    assert message.startswith("FuseKernels replaces nothing")


@pytest.mark.parametrize("where", ["training_step", "validation_step", "setup", "on_train_epoch_end"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_undone_after_an_exception(where, error):
    """Optimizer and function are torch's again, whatever ends the run and wherever."""
    module, made = make(), []

    def fail(*_, **__):
        assert F.cross_entropy.__code__ is not CODE
        made.extend(module.trainer.optimizers)
        raise error("stop")

    setattr(module, where, fail)
    before = signal.getsignal(signal.SIGINT)
    try:
        # Lightning ends the process after Ctrl-C, and ignores further ones.
        with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
            trainer(FuseKernels()).fit(module, batches(), batches())
    finally:
        signal.signal(signal.SIGINT, before)
    assert F.cross_entropy.__code__ is CODE
    assert not any(is_converted(optimizer) for optimizer in made)
    assert bool(made) == (where != "setup")


def test_fits_in_a_row(calls):
    """Each fit of one trainer and callback runs on the kernels, also after a failure."""
    callback, watch = FuseKernels(), Watch()
    plain, fused = make(), make()
    for module, callbacks in ((plain, []), (fused, [callback, watch])):
        runner = trainer(*callbacks)
        runner.fit(module, batches())
        runner.fit_loop.max_epochs = 4
        runner.fit(module, batches())
    assert watch.converted == {True} and len(calls) == 20
    torch.testing.assert_close(weights(fused), weights(plain))

    class Failing(Plain):
        def training_step(self, batch, batch_idx):
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        trainer(callback).fit(make(Failing), batches())
    again = make()
    trainer(callback).fit(again, batches())
    assert len(calls) == 30 and again.losses[0] == pytest.approx(fused.losses[0])


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


def test_deepcopy_and_pickle_during_the_fit(calls):
    """Copies of the module from within a fit are complete, torch's, and run after it."""
    copies = []

    class Copy(Callback):
        def on_train_epoch_end(self, trainer, module):
            copies.append(copy.deepcopy(module))
            file = io.BytesIO()
            torch.save(module.loss, file)
            assert b"lightkit" not in file.getvalue()

    module = make(loss=nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0])))
    trainer(FuseKernels(), Copy()).fit(module, batches())
    count = len(calls)
    trainer().fit(copies[0], batches())
    assert len(calls) == count and type(copies[0].loss) is nn.CrossEntropyLoss
    torch.testing.assert_close(copies[1].loss.weight, module.loss.weight)


def test_copies_of_a_captured_module_are_torchs():
    """Copies, pickles, hyperparameters of a checkpoint and traces are torch's."""

    seen = []

    class Copy(Callback):
        def on_train_epoch_end(self, trainer, module):
            assert is_captured(module.features) and type(module.features) is nn.Sequential
            file = io.BytesIO()
            torch.save(module.features, file)
            traced = torch.jit.trace(module.features, torch.zeros(1, 1, 8, 8))
            seen.append((type(copy.deepcopy(module.features)), b"lightkit" in file.getvalue(), str(traced.graph)))

    class Convolutional(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2))

        def training_step(self, batch, index):
            return self.features(batch[0]).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(4, 1, 8, 8)), batch_size=2)
    trainer(FuseKernels(), Copy(), max_epochs=1).fit(Convolutional(), data)
    ((kind, names_lightkit, graph),) = seen
    assert kind is nn.Sequential and not names_lightkit and "lightkit::" not in graph


def test_compiled_submodules_stay_torchs(calls):
    """A loss in a compiled submodule is torch's in the graph and in the report; a loss outside is not."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)
            self.criterion = nn.CrossEntropyLoss()

        def forward(self, inputs, labels):
            logits = self.layer(inputs)
            return self.criterion(logits, labels) + F.cross_entropy(logits, labels), logits

    class Compiled(Plain):
        def __init__(self):
            super().__init__()
            self.network = torch.compile(Network(), backend="aot_eager", fullgraph=True)

        def training_step(self, batch, batch_idx):
            loss, logits = self.network(*batch)
            return loss + self.loss(logits, batch[1])

    callback, plain, fused = FuseKernels(), make(Compiled), make(Compiled)
    trainer().fit(plain, batches())
    trainer(callback).fit(fused, batches())
    assert len(calls) == 10
    for name in ("network", "network._orig_mod.criterion"):
        assert each(callback, name).reason == "it is under torch.compile, whose graphs stay torch's"
    torch.testing.assert_close(weights(fused), weights(plain))


def test_compiled_lightning_module(calls):
    """A LightningModule under torch.compile trains as before; its losses stay torch's."""
    callback, plain, fused = FuseKernels(), make(loss=nn.CrossEntropyLoss()), make(loss=nn.CrossEntropyLoss())
    trainer().fit(plain, batches())
    trainer(callback).fit(torch.compile(fused, backend="aot_eager"), batches())
    assert each(callback, "loss").reason == "it is under torch.compile, whose graphs stay torch's"
    torch.testing.assert_close(weights(fused), weights(plain))


def test_nested_trainers(calls):
    """A trainer within a callback of another may have the same callback; the outer run continues unchanged."""
    shared, watch = FuseKernels(), Watch()

    class Inner(Callback):
        def on_train_epoch_end(self, *_):
            trainer(shared, max_epochs=1).fit(make(), batches())

    trainer(shared, Inner(), watch).fit(make(), batches())
    assert len(calls) == 20 and watch.converted == {True}


def test_two_callbacks_in_one_trainer(calls):
    """The second callback finds nothing to replace and changes nothing."""

    class Second(FuseKernels):
        pass

    first, second = FuseKernels(), Second()
    trainer(first, second).fit(make(), batches())
    assert len(calls) == 10
    assert each(second, "optimizers[0]").reason == "it is on lightkit's kernels already"


def test_other_threads_keep_torchs(calls):
    """Another thread computes with torch's function while a trainer runs."""
    values = []

    class Aside(Callback):
        def on_train_batch_start(self, *_):
            if not values:
                thread = threading.Thread(target=lambda: values.append(F.cross_entropy(logits, labels)))
                thread.start()
                thread.join()

    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    trainer(FuseKernels(), Aside()).fit(make(), batches())
    assert len(calls) == 10 and set(calls) == {threading.get_ident()}
    assert torch.equal(values[0], F.cross_entropy(logits, labels))


def test_threads_of_autograd(calls):
    """Autograd's threads, which recompute checkpointed losses for a GPU, have the same kernel."""

    class Aside(Callback):
        def on_train_start(self, *_):
            done = threading.Event()

            def compute():
                F.cross_entropy(torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0]))
                done.set()

            _thread.start_new_thread(compute, ())
            assert done.wait(60)

    trainer(FuseKernels(), Aside()).fit(make(), batches())
    assert len(calls) == 11 and len(set(calls)) == 2


def test_checkpointed_losses(calls):
    """The recomputed loss comes from the same kernel as in the forward pass."""

    def loss(logits, labels):
        # Backward recomputes the result of the exponential, and thereby the loss.
        return checkpoint(lambda logits: F.cross_entropy(logits, labels).exp(), logits, use_reentrant=False)

    plain, fused = make(loss=loss), make(loss=loss)
    trainer().fit(plain, batches())
    trainer(FuseKernels()).fit(fused, batches())
    assert len(calls) == 20
    torch.testing.assert_close(weights(fused), weights(plain))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn"])
def test_two_processes(tmp_path, strategy):
    """Each of two data-parallel processes replaces and restores; the weights are torch's."""
    script = tmp_path / "train.py"
    script.write_text(_TWO_PROCESSES)
    path = os.pathsep.join([str(Path(lightkit.__file__).parents[1]), str(Path(__file__).parent)])
    result = run_python(script, strategy, tmp_path, environment={"PYTHONPATH": path}, status=0)
    # The first process reports once.
    assert (result.stdout + result.stderr).count("optimizers[0] (torch.optim.SGD): replaced by") == 1
    torch.testing.assert_close(*(torch.load(tmp_path / f"{fuse}.pt") for fuse in (False, True)))


_TWO_PROCESSES = """
import sys
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from multiprocessing.util import Finalize
from plain import Plain, batches, make, trainer
from lightkit.callbacks import FuseKernels
from lightkit.optim.convert import is_converted


class Check(Callback):
    def __init__(self, fuse):
        self.fuse = fuse

    def on_train_batch_end(self, trainer, *_):
        assert is_converted(trainer.optimizers[0]) == self.fuse
        assert trainer.world_size == 2

    def on_fit_end(self, *_):
        # Lightning leaves the group to the end of the interpreter, where gloo's threads now and then abort it.
        Finalize(None, destroy, exitpriority=1)


def destroy():
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    strategy, directory = sys.argv[1:]
    code = F.cross_entropy.__code__
    for fuse in (False, True):
        runner = trainer(*[FuseKernels()] * fuse, Check(fuse), strategy=strategy, devices=2)
        module = make()
        runner.fit(module, batches())
        assert F.cross_entropy.__code__ is code
        if runner.global_rank == 0:
            torch.save(module.state_dict(), f"{directory}/{fuse}.pt")
"""
