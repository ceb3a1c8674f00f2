"""Compares what a program sees of the lean loop with Lightning's: after errors, in copies, with patched functions."""

from __future__ import annotations

import copy
import functools
import pickle
import signal
from contextlib import nullcontext

import lightning.pytorch as pl
import pytest
import torch
from lean_runs import MemoryLogger, Module, assert_equal, bare_trainer, loader
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection, _ResultMetric

from lightkit.callbacks import LeanLoop
from lightkit.loops.lazy_metrics import LazyMetric
from lightkit.loops.step import LeanStep

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(does not have many workers|lower value for log_every|val_dataloader)"
)

STEP = 6

PLACES = {
    "fetching": None,
    "on_train_batch_start": Callback,
    "training_step before": None,
    "training_step after": None,
    "on_before_zero_grad": Callback,
    "on_before_backward": Callback,
    "backward": None,
    "on_after_backward": Callback,
    "on_before_optimizer_step": Callback,
    "optimizer": None,
    "lr_scheduler_step": None,
    "on_train_batch_end": Callback,
    "on_train_batch_end of the module": None,
    "log_metrics": None,
}


class Failing(Module):
    """Fails once, at a chosen place of a step."""

    def __init__(self, place, error):
        super().__init__()
        self.place, self.error = place, error

    def fail(self, place):
        if self.place == place and self.trainer.fit_loop.epoch_loop.batch_progress.current.ready == STEP:
            raise self.error("in the middle")

    def training_step(self, batch, batch_idx):
        self.fail("training_step before")
        loss = super().training_step(batch, batch_idx)
        if batch_idx == STEP - 1:
            self.log("new", loss * 3, on_step=True, prog_bar=True)
        self.fail("training_step after")
        loss.register_hook(lambda _: self.fail("backward"))
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        super().on_train_batch_end(outputs, batch, batch_idx)
        self.fail("on_train_batch_end of the module")

    def lr_scheduler_step(self, scheduler, metric):
        self.fail("lr_scheduler_step")
        super().lr_scheduler_step(scheduler, metric)

    def configure_optimizers(self):
        found = super().configure_optimizers()
        found["optimizer"].register_step_post_hook(lambda *_: self.fail("optimizer"))
        return found


class Raising(Callback):
    """Fails in a hook of a callback."""


class FailingLogger(MemoryLogger):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def log_metrics(self, metrics, step):
        super().log_metrics(metrics, step)
        self.module.fail("log_metrics")


class FailingLoader:
    def __init__(self, module):
        self.module, self.loader = module, loader()

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        for index, batch in enumerate(self.loader):
            if self.module.place == "fetching" and index == STEP:
                raise self.module.error("in the middle")
            yield batch


class Reading(Callback):
    """Reads the metrics of a trainer at a chosen time."""

    def __init__(self, when):
        self.when, self.seen = when, []

    def look(self, trainer):
        for metrics in (trainer.callback_metrics, trainer.progress_bar_metrics, trainer.logged_metrics):
            self.seen.append({name: float(value) for name, value in metrics.items()})

    def on_before_optimizer_step(self, trainer, *_):
        if self.when == "in the step":
            self.look(trainer)

    def on_train_batch_end(self, trainer, *_):
        if self.when == "now and then" and trainer.global_step % 4 == 0:
            self.look(trainer)

    def on_exception(self, trainer, *_):
        if self.when == "at the error":
            self.look(trainer)


for _name in (name for name, owner in PLACES.items() if owner is Callback):
    setattr(Raising, _name, lambda self, trainer, module, *_, name=_name: module.fail(name))


def fail(lean, place, error, when):
    pl.seed_everything(3, verbose=False)
    module, reading = Failing(place, error), Reading(when)
    trainer = bare_trainer(
        lean, reading, Raising(), logger=FailingLogger(module), log_every_n_steps=2, enable_checkpointing=False
    )
    before = signal.getsignal(signal.SIGINT)
    try:
        # StopIteration ends an epoch.
        expected = {KeyboardInterrupt: pytest.raises(SystemExit), StopIteration: nullcontext()}
        with expected.get(error, pytest.raises(error)):
            trainer.fit(module, FailingLoader(module))
    finally:
        signal.signal(signal.SIGINT, before)
    connector = trainer._logger_connector
    results = trainer.fit_loop.epoch_loop._results
    return {
        "callback": dict(trainer.callback_metrics),
        "logged": dict(trainer.logged_metrics),
        "bar": dict(trainer.progress_bar_metrics),
        "seen": reading.seen,
        "running": {key: (type(metric), repr(metric), metric._forward_cache) for key, metric in results.items()},
        "batch": results.batch is None,
        "hook": (module._current_fx_name, connector._current_fx, connector._first_loop_iter),
        "counters": str(trainer.fit_loop.state_dict()),
        "rows": trainer.logger.rows,
        "weights": {name: value.clone() for name, value in module.state_dict().items()},
    }


CASES = [
    *((place, RuntimeError, "never") for place in PLACES),
    *(("training_step after", RuntimeError, when) for when in ("in the step", "now and then", "at the error")),
    ("on_train_batch_end", RuntimeError, "in the step"),
    ("on_before_optimizer_step", RuntimeError, "at the error"),
    ("training_step after", KeyboardInterrupt, "never"),
    ("on_train_batch_end", KeyboardInterrupt, "at the error"),
    ("on_train_batch_start", StopIteration, "never"),
    ("training_step after", StopIteration, "never"),
]


@pytest.mark.parametrize(("place", "error", "when"), CASES)
def test_after_an_error(place, error, when):
    """Metrics, running values, counters and rows are those that Lightning leaves, wherever a step fails."""
    assert_equal(fail(True, place, error, when), fail(False, place, error, when))


class Looking(Callback):
    """Calls a function within a lean step."""

    def __init__(self, look):
        self.look, self.found = look, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.look is not None and batch_idx == STEP and trainer.current_epoch == 0:
            self.found.append(self.look(trainer))

    def __getstate__(self):
        return {"look": None, "found": []}


# The state that a program sees within an epoch, in addition to the table in LeanLoop's docstring.
DIFFERENCES = {
    "attributes of the training loop": {"run", "__getstate__"},
    "attributes of the module": {"log", "__getstate__"},
    "attributes of the loader": {"_get_iterator", "__getstate__"},
    "classes of running values": {LazyMetric},
}


def what_is_seen(trainer):
    module, loop = trainer.lightning_module, trainer.fit_loop.epoch_loop
    assert type(loop) is _TrainingEpochLoop and type(module) is Module
    assert all(isinstance(metric, _ResultMetric) for metric in loop._results.values())
    return {
        "attributes of the training loop": set(vars(loop)),
        "attributes of the module": set(vars(module)),
        "attributes of the loader": set(vars(trainer.train_dataloader)),
        "classes of running values": {type(metric) for metric in loop._results.values()},
    }


def test_the_table_of_differences():
    """Classes are Lightning's. The docstring's table has every difference, and none remains after the run."""
    seen = []
    for lean in (False, True):
        looking = Looking(what_is_seen)
        trainer = bare_trainer(lean, looking, max_epochs=2)
        trainer.fit(Module(), loader())
        seen += [looking.found[0], what_is_seen(trainer)]
    stock, stock_after, lean, lean_after = seen
    assert {name: lean[name] - stock[name] for name in lean} == DIFFERENCES
    assert lean_after == stock_after
    for name in ("run", "log", "_get_iterator", "LazyMetric"):
        assert f"``{name}``" in LeanLoop.__doc__


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda trainer: pickle.loads(pickle.dumps(trainer))])
def test_copies_of_a_trainer_in_the_middle_of_a_step(duplicate):
    """A copied or pickled trainer has nothing of the run and trains by itself; the run continues."""
    steps = []
    looking = Looking(duplicate)
    pl.seed_everything(3, verbose=False)
    trainer, module = bare_trainer(True, looking, max_epochs=2), Module()
    original = LeanStep.__call__

    def counting(self, fetcher):
        steps.append(self._trainer)
        return original(self, fetcher)

    LeanStep.__call__ = counting
    try:
        trainer.fit(module, loader())
        taken = len(steps)
        (copied,) = looking.found
        loop = copied.fit_loop.epoch_loop
        assert "run" not in vars(loop) and "__getstate__" not in vars(loop)
        assert {type(metric) for metric in loop._results.values()} == {_ResultMetric}
        assert "log" not in vars(copied.strategy.model or Module())
        copied.fit_loop.max_epochs = 3
        copied.fit(Module(), loader())
    finally:
        LeanStep.__call__ = original
    assert taken == 18 and steps[taken:] and all(each is copied for each in steps[taken:])
    pl.seed_everything(3, verbose=False)
    plain = Module()
    bare_trainer(False, max_epochs=2).fit(plain, loader())
    assert_equal(module.state_dict(), plain.state_dict())


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (pl.LightningModule, "log"),
        (pl.LightningModule, "backward"),
        (pl.LightningModule, "on_after_backward"),
        (Callback, "on_train_batch_end"),
        (pl.strategies.Strategy, "optimizer_step"),
        (_TrainingEpochLoop, "advance"),
        (_ResultCollection, "log"),
        (torch.optim.Optimizer, "zero_grad"),
    ],
)
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_patched_functions_are_called(monkeypatch, owner, name, when):
    """A patched function of a step is called, whether it was patched before the run or within an epoch."""
    counts = []
    for lean in (False, True):
        calls, original = [], getattr(owner, name)

        @functools.wraps(original)
        def patched(*args, original=original, calls=calls, **kwargs):
            if not isinstance(args[0], LeanLoop):
                calls.append(name)
            return original(*args, **kwargs)

        with monkeypatch.context() as patch:
            looking = Looking(lambda trainer, patch=patch, patched=patched: patch.setattr(owner, name, patched))
            if when == "before":
                patch.setattr(owner, name, patched)
            bare_trainer(lean, Callback(), *([looking] if when == "meanwhile" else [])).fit(Module(), loader())
        counts.append(len(calls))
    assert counts[0] == counts[1] > 0


def test_what_is_exchanged_in_the_middle_of_an_epoch():
    """New hooks, a new training_step and new callbacks take part from the next step on."""
    seen = []
    for lean in (False, True):
        calls = []

        class Late(Callback):
            def on_before_backward(self, trainer, *_, calls=calls):
                calls.append(("callback", trainer.global_step))

        def exchange(trainer, calls=calls, late=Late):
            module = trainer.lightning_module
            step = module.training_step
            module.on_after_backward = lambda: calls.append(("hook", trainer.global_step))
            module.training_step = lambda batch, batch_idx: calls.append(("step", batch_idx)) or step(batch, batch_idx)
            trainer.callbacks.append(late())

        bare_trainer(lean, Looking(exchange)).fit(Module(), loader())
        seen.append(calls)
    assert seen[0] == seen[1] and len(seen[0]) == 12


def test_a_profiler_sees_the_gradients_reset():
    """torch's profiler has a range of ``zero_grad`` in every step."""

    class Profiled(Looking):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == STEP:
                self.profile = torch.profiler.profile().__enter__()

        def on_train_batch_end(self, *arguments):
            if arguments[-1] == STEP:
                self.profile.__exit__(None, None, None)

    for lean in (False, True):
        profiled = Profiled(None)
        bare_trainer(lean, profiled).fit(Module(), loader())
        names = {event.key for event in profiled.profile.key_averages()}
        assert {"Optimizer.zero_grad#SGD.zero_grad", "Optimizer.step#SGD.step"} <= names
