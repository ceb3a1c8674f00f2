"""FuseKernels in real Trainers: modules without lightkit train as before, on its kernels."""

from __future__ import annotations

import signal
import warnings

import pytest
import torch
import torch.nn.functional as F
from fused import CODE, Watch, weights
from plain import LOSSES, Plain, batches, make, trainer
from torch import nn

from lightkit import native
from lightkit.callbacks import FuseKernels
from lightkit.nn import CrossEntropyLoss
from lightkit.optim import SGD
from lightkit.optim.convert import is_converted

pytestmark = pytest.mark.filterwarnings("ignore:.*(does not have many workers|lower value for log_every|GPU available)")


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
