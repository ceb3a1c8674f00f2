"""Tests of side effects and of the handling of CUDA graphs on a CPU; tests/gpu has those of real graphs.

A stand-in replaces a graph. Like a graph it runs the passes on memory of its own.
"""

from __future__ import annotations

import random
import warnings

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lean_runs import HOOKS, MemoryLogger, assert_equal, loader
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from lightkit.callbacks import LeanLoop
from lightkit.loops import PassGraphs, cuda_graphs
from lightkit.loops.side_effects import LogRecorder


class Module(pl.LightningModule):
    """A module with a batch norm, several ways to log, and a step that the test gives."""

    def __init__(self, step=lambda module, batch_idx, logits: None):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 3))
        self.accuracy = MulticlassAccuracy(3)
        self.register_buffer("seen", torch.zeros(()))
        self.calls, self.kept, self.history = 0, None, []
        self.step = step

    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        logits = self.net(inputs)
        loss = F.cross_entropy(logits, labels)
        self.seen.add_(1)
        self.log("loss", loss, prog_bar=True, on_step=True, on_epoch=True)
        self.log("largest", logits.max(), reduce_fx="max", on_epoch=True, on_step=False)
        self.log_dict({"a": loss * 2, "constant": 3.0}, batch_size=5)
        self.step(self, batch_idx, logits)
        return {"loss": loss, "logits": logits}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Calls(pl.Callback):
    """Counts the calls of every hook except the one that excludes graphs."""

    def __init__(self):
        self.made = []


for _hook in set(HOOKS) - {"on_before_zero_grad"}:
    setattr(Calls, _hook, lambda self, trainer, pl_module, *_, _hook=_hook: self.made.append(_hook))


class StandIn:
    """Runs the passes on its own inputs, with the Python numbers and the log calls of the first step."""

    replays = 0

    def __init__(self, module, batch, forward, pool):
        leaves, self._spec = pytree.tree_flatten(batch)
        self._module, self._forward = module, forward
        self._inputs = [t.clone() for t in leaves]
        self.log_calls = []
        self._numbers = [
            (part, name, value.clone() if isinstance(value, torch.Tensor) else value)
            for part in module.modules()
            for name, value in vars(part).items()
            if isinstance(value, (bool, int, float, torch.Tensor))
        ]
        # The capture runs nothing yet.
        state = {name: value.clone() for name, value in module.state_dict().items()}
        self._run()
        module.load_state_dict(state)

    def _run(self):
        log, recorder = self._module.log, LogRecorder()
        vars(self._module)["log"] = recorder
        for parameter in self._module.parameters():
            parameter.grad = None
        loss, outputs = self._forward(pytree.tree_unflatten(self._inputs, self._spec), 0)
        loss.backward()
        vars(self._module)["log"] = log
        # A graph logs the tensors that it was captured with.
        if not self.log_calls:
            self.log_calls = recorder.calls
        for held, call in zip(self.log_calls, recorder.calls, strict=True):
            if isinstance(held.value, torch.Tensor):
                held.value.copy_(call.value)
        return outputs

    def __call__(self, batch):
        StandIn.replays += 1
        for held, given in zip(self._inputs, pytree.tree_leaves(batch), strict=True):
            held.copy_(given)
        now = [vars(part)[name] for part, name, _ in self._numbers]
        for part, name, value in self._numbers:
            vars(part)[name] = value
        outputs = self._run()
        for (part, name, _), value in zip(self._numbers, now, strict=True):
            vars(part)[name] = value
        return outputs


class Graphed(LeanLoop):
    """A LeanLoop with graphs on a machine without a GPU."""

    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)
        self._graphs = self._runs[id(trainer)].graphs = PassGraphs(pl_module)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "CapturedPasses", StandIn)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(StandIn, "replays", 0)


def fit(module, *callbacks, train=None, **options):
    """Returns everything that the tests compare."""
    torch.manual_seed(0)
    logger, calls = MemoryLogger(), Calls()
    trainer = pl.Trainer(
        **{
            **{"accelerator": "cpu", "max_epochs": 2, "log_every_n_steps": 3, "logger": logger},
            **dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
            **options,
            "callbacks": [calls, *callbacks],
        }
    )
    trainer.fit(module, loader() if train is None else train)
    return {
        "weights": module.state_dict(),
        "rows": logger.rows,
        "metrics": dict(trainer.callback_metrics),
        "loops": str(trainer.fit_loop.state_dict()),
        "calls": sorted(calls.made),
    }


def module(step=lambda module, batch_idx, logits: None):
    torch.manual_seed(1)
    return Module(step)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_clip_val": 0.05},
        {"limit_train_batches": 5},
        {"max_steps": 15, "max_epochs": -1},
        {"precision": "bf16-mixed"},
        {"accumulate_grad_batches": 2},
        {"log_every_n_steps": 1},
    ],
    ids=str,
)
def test_a_run_with_graphs_is_lightnings_to_the_bit(options):
    """Weights, running values, logged rows, counters and calls of hooks are the same."""
    own = fit(module(), **options)
    lean = Graphed()
    assert_equal(fit(module(), lean, **options), own)
    assert lean.graph_unsupported_reason is None
    assert (StandIn.replays == 0) == ("accumulate_grad_batches" in options)


def test_a_batch_of_another_shape_has_a_graph_of_its_own():
    """Each of the first eight shapes has a graph; Python runs batches of other shapes."""

    def batches():
        generator = torch.Generator().manual_seed(0)
        for size in [*[3, 4] * 6, *range(2, 14)] * 2:
            yield torch.randn(size, 4, generator=generator), torch.randint(3, (size,), generator=generator)

    own = fit(module(), train=DataLoader(list(batches()), batch_size=None))
    assert_equal(fit(module(), Graphed(), train=DataLoader(list(batches()), batch_size=None)), own)
    # Two epochs of twelve batches of each size: eight sizes are replayed, except the recorded batch.
    assert 40 < StandIn.replays < 90


def _keep(module, batch_idx, logits):
    module.kept = logits.detach()


def _append(module, batch_idx, logits):
    module.history.append(0)


def _count(module, batch_idx, logits):
    module.calls += 1


def _warn(module, batch_idx, logits):
    warnings.warn("called a synchronizing CUDA operation", stacklevel=1)


def _append_deeper(module, batch_idx, logits):
    module.kept["outputs"].append(logits.detach())


def _meter(module, batch_idx, logits):
    module.meter.count += 1


def _log_rate(module, batch_idx, logits):
    module.log("lr", module.optimizers().param_groups[0]["lr"])


CAUSES = {
    "a list in a dict": (_append_deeper, "changes self.kept"),
    "an object's attribute": (_meter, "changes self.meter"),
    "a generator of one's own": (lambda m, i, z: m.rng.random(), "changes self.rng"),
    "an iterator": (lambda m, i, z: next(m.numbers), "changes self.numbers"),
    "the learning rate": (_log_rate, "reads trainer.strategy"),
    "a counter": (_count, "changes self.calls"),
    "a tensor kept": (_keep, "changes self.kept"),
    "a list that grows": (_append, "changes self.history"),
    "batch_idx": (lambda m, i, z: m.log("x", float(i % 2)), "uses batch_idx"),
    "batch_idx logged": (lambda m, i, z: m.log("x", i), "uses batch_idx"),
    "the step": (lambda m, i, z: m.log("x", z.mean() * m.global_step), "reads trainer.global_step"),
    "the epoch": (lambda m, i, z: m.current_epoch, "reads trainer.current_epoch"),
    "a metric": (lambda m, i, z: m.log("x", m.accuracy), "logs 'x', which is a MulticlassAccuracy and no tensor"),
    "a metric fed": (lambda m, i, z: m.accuracy.update(z, z.argmax(1)), "changes self.accuracy."),
    "Python's random": (lambda m, i, z: random.random(), "draws random numbers on the CPU"),
    "NumPy's random": (lambda m, i, z: np.random.rand(), "draws random numbers on the CPU"),
    "torch's random": (lambda m, i, z: torch.rand(1), "draws random numbers on the CPU"),
    "waiting": (_warn, "waits for the GPU"),
}


class Meter:
    count = 0


def equipped(step):
    """Returns a module with attributes of several kinds."""
    made = module(step)
    if step in (_append_deeper, CAUSES["a list in a dict"][0]):
        made.kept = {"outputs": []}
    made.meter, made.rng = Meter(), np.random.default_rng(0)
    made.meter.count = 0
    if step is CAUSES["an iterator"][0]:
        made.numbers = iter(range(1000))
    return made


@pytest.mark.parametrize(("step", "cause"), CAUSES.values(), ids=CAUSES)
def test_what_a_graph_would_leave_out_is_noticed(step, cause):
    """A side effect disables the graphs with a reason, and the run is Lightning's to the bit."""
    own = fit(equipped(step))
    lean = Graphed()
    assert_equal(fit(equipped(step), lean), own)
    assert cause in lean.graph_unsupported_reason
    assert StandIn.replays == 0


def test_what_stays_the_same_may_be_read():
    """A step may read constants of the trainer, set an attribute to its own value, and warn."""

    def step(module, batch_idx, logits):
        module.calls = module.trainer.world_size - 1
        warnings.warn("mine", stacklevel=1)

    lean = Graphed()
    with pytest.warns(UserWarning, match="mine"):
        fit(module(step), lean)
    assert lean.graph_unsupported_reason is None and StandIn.replays > 0


def test_a_batch_that_a_graph_cannot_hold():
    """A replay has no numbers and strings of a batch: they disable the graphs."""
    batches = [(torch.randn(4, 4), torch.randint(3, (4,)))] * 6

    class Named(Module):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["data"], batch_idx)

    lean = Graphed()
    fit(Named(), lean, train=DataLoader([{"data": b, "name": "one"} for b in batches], batch_size=None))
    assert lean.graph_unsupported_reason == "the batch has a str in it"


def test_a_history_that_is_kept_is_noticed():
    """A live autograd history would break the capture on a GPU: it disables the graphs."""

    class Keeps(pl.Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.seen.append(outputs["logits"])

    own = fit(module(), Keeps())
    lean = Graphed()
    assert_equal(fit(module(), Keeps(), lean), own)
    assert "must be detached" in lean.graph_unsupported_reason


class Anneals(pl.Callback):
    """Sets a number, by which the module multiplies its loss, every few batches."""

    def __init__(self, every):
        self.every = every

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.global_step + 1) % self.every == 0:
            pl_module.factor = pl_module.factor * 0.5


class Annealed(Module):
    def __init__(self):
        super().__init__()
        self.factor, self.host = 1.0, torch.ones(())

    def training_step(self, batch, batch_idx):
        outputs = super().training_step(batch, batch_idx)
        return {"loss": outputs["loss"] * self.factor * float(self.host)}


@pytest.mark.parametrize("every", [4, 5, 11])
def test_an_attribute_that_a_callback_sets_now_and_then(every):
    """The passes are captured again."""
    torch.manual_seed(1)
    own = fit(Annealed(), Anneals(every), max_epochs=1)
    torch.manual_seed(1)
    lean = Graphed()
    assert_equal(fit(Annealed(), Anneals(every), lean, max_epochs=1), own)
    assert lean.graph_unsupported_reason is None
    assert StandIn.replays > 0


def test_an_attribute_that_a_callback_sets_all_the_time():
    """The graphs are disabled with a reason after a few changes."""
    torch.manual_seed(1)
    own = fit(Annealed(), Anneals(1))
    torch.manual_seed(1)
    lean = Graphed()
    assert_equal(fit(Annealed(), Anneals(1), lean), own)
    assert lean.graph_unsupported_reason == "something changes Annealed.factor between the steps, again and again"


def test_an_attribute_that_a_callback_sets_in_a_long_run():
    """Any number of changes with many replays between them keeps the graphs."""
    torch.manual_seed(1)
    own = fit(Annealed(), Anneals(20), train=loader(600), max_epochs=1)
    torch.manual_seed(1)
    lean = Graphed()
    assert_equal(fit(Annealed(), Anneals(20), lean, train=loader(600), max_epochs=1), own)
    assert lean.graph_unsupported_reason is None
    assert StandIn.replays > 100


class Temperature(nn.Module):
    """A submodule with a number and a buffer."""

    def __init__(self):
        super().__init__()
        self.value = 1.0
        self.register_buffer("queue", torch.ones(3))

    def forward(self, x):
        return x * self.value * self.queue


def _number_of_a_part(part, step):
    part.value = 1 / (step + 1)


def _number_that_comes_and_goes(part, step):
    part.value = None
    part.value = 1 / (step + 3)


def _another_buffer(part, step):
    part.queue = torch.full((3,), 1 / (step + 1))


def _a_hook(part, step):
    part.register_forward_hook(lambda module, inputs, output: output * 0.5)


def _a_hook_before_backward(part, step):
    part.register_full_backward_pre_hook(lambda module, gradients: tuple(g * 0.5 for g in gradients))


def _another_mode(part, step):
    part.train(not part.training)


def _another_parameter(part, step):
    part.value = nn.Parameter(torch.tensor(1 / (step + 1)))


@pytest.mark.parametrize("every", [1, 12])
@pytest.mark.parametrize(
    "change",
    [
        *(_number_of_a_part, _number_that_comes_and_goes, _another_buffer, _a_hook, _another_mode),
        *(_another_parameter, _a_hook_before_backward),
    ],
)
def test_a_part_that_a_callback_changes_within_an_epoch(change, every):
    """A change of any attribute of a submodule leads to a new capture or disables the graphs."""

    class Changes(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if (trainer.global_step + 1) % every == 0:
                if change is _another_parameter:
                    del pl_module.net[4].value
                change(pl_module.net[4], trainer.global_step)

    def make():
        made = module()
        made.net.append(Temperature())
        return made

    own = fit(make(), Changes())
    lean = Graphed()
    assert_equal(fit(make(), Changes(), lean), own)
    assert (lean.graph_unsupported_reason is None) == (every == 12)


def test_a_tensor_that_changes_after_it_was_logged():
    """The value at the time of the call is logged."""

    def step(module, batch_idx, logits):
        loss = logits.square().mean()
        module.log("before", loss, on_step=True)
        loss += 10

    own = fit(module(step), log_every_n_steps=1)
    lean = Graphed()
    assert_equal(fit(module(step), lean, log_every_n_steps=1), own)
    assert lean.graph_unsupported_reason is None


class Hidden(Module):
    """Has a parameter that its submodules do not register."""

    def __init__(self):
        super().__init__()
        self.hidden = [nn.Parameter(torch.ones(3))]

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]) * self.hidden[0], batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD([*self.parameters(), *self.hidden], lr=0.1)


class ReturnsIndex(Module):
    def training_step(self, batch, batch_idx):
        return {**super().training_step(batch, batch_idx), "index": batch_idx}


class WritesIntoBatch(Module):
    def training_step(self, batch, batch_idx):
        batch[0].mul_(2)
        return super().training_step(batch, batch_idx)


class TakesFromBatch(Module):
    def training_step(self, batch, batch_idx):
        return super().training_step((batch[0], batch.pop()), batch_idx)


class BeforeZeroGrad(Module):
    def on_before_zero_grad(self, optimizer):
        self.seen.mul_(2)


@pytest.mark.parametrize(
    ("cls", "cause"),
    [
        (Hidden, "the optimizer has parameters that are not the module's"),
        (ReturnsIndex, "returns 'index', which is not all tensors"),
        (WritesIntoBatch, "changes the batch"),
        (TakesFromBatch, "changes the batch"),
        (BeforeZeroGrad, "on_before_zero_grad"),
    ],
)
def test_modules_that_no_graph_goes_with(cls, cause):
    """They train as with Lightning to the bit, and the callback has a reason."""
    runs = []
    for lean in ([], [Graphed()]):
        torch.manual_seed(1)
        runs.append(fit(cls(), *lean))
    assert_equal(*runs)
    assert cause in lean[0].graph_unsupported_reason


def test_sparse_batches():
    """Sparse tensors have no strides: they disable the graphs."""

    class Sparse(Module):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch[0].to_dense(), batch[1]), batch_idx)

    batches = [(torch.randn(4, 4).to_sparse_csr(), torch.randint(3, (4,))) for _ in range(6)]
    lean = Graphed()
    fit(Sparse(), lean, train=DataLoader(batches, batch_size=None))
    assert "sparse" in lean.graph_unsupported_reason


class AtEpochs(pl.Callback):
    """Changes submodules at the start of an epoch."""

    def on_train_epoch_start(self, trainer, pl_module):
        pl_module.net[1].inplace = trainer.current_epoch % 2 == 1
        pl_module.net[2].momentum = 0.1 / (1 + trainer.current_epoch)
        pl_module.host.mul_(0.5)


def test_parts_that_change_between_epochs():
    """Numbers of layers and CPU tensors that are written to take effect."""
    torch.manual_seed(1)
    own = fit(Annealed(), AtEpochs(), max_epochs=3)
    torch.manual_seed(1)
    lean = Graphed()
    assert_equal(fit(Annealed(), AtEpochs(), lean, max_epochs=3), own)
    assert lean.graph_unsupported_reason is None and StandIn.replays > 0


def test_a_capture_that_fails(monkeypatch):
    """Python runs this step and all later ones."""

    def fail(*arguments):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(cuda_graphs, "CapturedPasses", fail)
    own = fit(module())
    lean = Graphed()
    assert_equal(fit(module(), lean), own)
    assert lean.graph_unsupported_reason.endswith(
        "cannot be captured: operation not permitted when stream is capturing"
    )


def test_an_error_in_a_watched_step_leaves_nothing_behind():
    """The module has its own log and trainer again."""

    def fail(module, batch_idx, logits):
        if module.seen == 2:
            raise ValueError("mine")

    failing = module(fail)
    with pytest.raises(ValueError, match="mine"):
        fit(failing, Graphed())
    assert type(failing._trainer) is pl.Trainer
    assert "log" not in vars(failing)
    assert failing.trainer.fit_loop.epoch_loop.__class__.__name__ == "_TrainingEpochLoop"
