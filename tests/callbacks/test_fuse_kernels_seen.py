"""What a program sees of FuseKernels during a run: classes, patched methods, copies; and the table of differences."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
import subprocess
import sys

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, ModelSummary
from plain import trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightkit.callbacks import FuseKernels
from lightkit.capture import is_captured
from lightkit.nn import fused_sequential
from lightkit.optim.convert import is_converted

pytestmark = pytest.mark.filterwarnings("ignore:.*(not have many workers|lower value for log_every|GPU available)")


class Network(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2)), nn.Flatten(), nn.Linear(72, 3)
        )
        self.loss = nn.CrossEntropyLoss()

    def training_step(self, batch, index):
        return self.loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def batches():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(8, 1, 8, 8, generator=generator)
    return DataLoader(TensorDataset(inputs, torch.arange(8) % 3), batch_size=2)


class Looking(Callback):
    """Calls a function within a run."""

    def __init__(self, look):
        self.look, self.found = look, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.look is not None and batch_idx == 1:
            self.found.append(self.look(trainer, pl_module))

    def __getstate__(self):
        return {"look": None, "found": []}


def during(look, *callbacks, module=None):
    """Returns the result of `look` within a run."""
    torch.manual_seed(0)
    looking = Looking(look)
    trainer(*callbacks, looking, max_epochs=1).fit(Network() if module is None else module, batches())
    return looking.found[0]


def kind_of(thing):
    match thing:
        case torch.optim.Adam():
            return "adam" if type(thing) is torch.optim.Adam else "like adam"
        case nn.Sequential():
            return "sequential" if type(thing) is nn.Sequential else "like a sequential"


def test_classes_are_the_users():
    """type, match, repr, the summary and Lightning's wrapper show torch's classes, and the kernels run."""

    def look(trainer, module):
        (optimizer,) = trainer.optimizers
        assert is_converted(optimizer) and is_captured(module.net) and is_captured(module.net[0])
        return (
            [kind_of(thing) for thing in (optimizer, module.net, module.net[0])],
            repr(module),
            [type(optimizer).step, type(module.net).forward, module.net.forward.__func__],
            str(ModelSummary(max_depth=-1)._summary(trainer, module)),
            type(module.optimizers()).__name__,
            str(inspect.signature(optimizer.step)),
        )

    kinds, text, functions, summary, wrapper, signature = during(look, FuseKernels())
    assert (
        kinds == ["adam", "sequential", "sequential"] and wrapper == "LightningAdam" and signature == "(closure=None)"
    )
    assert text == repr(Network()) and "Fused" not in summary and "Sequential" in summary
    assert functions == [torch.optim.Adam.step, nn.Sequential.forward, nn.Sequential.forward]


def attributes(trainer, module):
    (optimizer,) = trainer.optimizers
    return {
        "vars(optimizer)": set(vars(optimizer)),
        "load_state_dict": {
            name
            for name in ("_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks")
            if getattr(optimizer, name)
        },
        "vars(net)": set(vars(module.net)),
        "F.cross_entropy.__code__": {F.cross_entropy.__code__.co_filename.split("/")[-1]},
        "grad_fn": {module.training_step(next(iter(batches())), 0).grad_fn.name()},
        "net.forward": {module.net.forward(torch.zeros(1, 1, 8, 8)).grad_fn.name()},
    }


def test_the_table_of_differences():
    """The docstring's table has every difference of optimizer and net."""
    stock, fused = during(attributes), during(attributes, FuseKernels())
    different = {name: fused[name] - stock[name] for name in stock}
    assert different == {
        "vars(optimizer)": {"step", "__getstate__"},
        "load_state_dict": {"_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks"},
        "vars(net)": {"_compiled_call_impl"},
        "F.cross_entropy.__code__": {"patch.py"},
        "grad_fn": {"CrossEntropyBackward"},
        "net.forward": set(),
    }
    assert all(name in FuseKernels.__doc__ for name in different)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (torch.optim.Adam, "step"),
        (torch.optim.Optimizer, "zero_grad"),
        (nn.Sequential, "forward"),
        (nn.Conv2d, "forward"),
        (nn.Module, "__call__"),
        (nn.CrossEntropyLoss, "forward"),
        (F, "conv2d"),
        (F, "relu"),
        (F, "cross_entropy"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_patched_methods_are_called(monkeypatch, owner, name, when):
    """A method patched on torch's class or its base, or a function, is called as often as without the callback."""
    counts = []
    for callbacks in ([], [FuseKernels()]):
        calls, original = [], getattr(owner, name)

        @functools.wraps(original)
        def patched(*args, original=original, calls=calls, **kwargs):
            calls.append(name)
            return original(*args, **kwargs)

        with monkeypatch.context() as patch:
            if when == "before":
                patch.setattr(owner, name, patched)
                trainer(*callbacks, max_epochs=1).fit(Network(), batches())
            else:
                during(lambda *_, patch=patch, new=patched: patch.setattr(owner, name, new), *callbacks)
        counts.append(len(calls))
    assert counts[0] == counts[1] > 0


def by_pickle(thing):
    return pickle.loads(pickle.dumps(thing))


def by_cloudpickle(thing):
    cloudpickle = pytest.importorskip("cloudpickle")
    return pickle.loads(cloudpickle.dumps(thing))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle, by_cloudpickle])
def test_copies_of_the_trainer(duplicate):
    """A trainer that is copied during a run trains by itself on the kernels, and the run continues."""

    def look(trainer, module):
        copied = duplicate(trainer)
        (optimizer,) = copied.optimizers
        assert not is_converted(optimizer) and "step" not in vars(optimizer)
        assert is_converted(trainer.optimizers[0]) and is_captured(module.net)
        net = duplicate(module.net)
        assert type(net) is nn.Sequential and not is_captured(net) and not is_captured(net[0])
        return copied

    module = Network()
    copied = during(look, FuseKernels(), module=module)
    seen = []
    copied.callbacks.append(Looking(lambda trainer, module: seen.append(is_converted(trainer.optimizers[0]))))
    copied.fit_loop.max_epochs = 2
    copied.fit(Network(), batches())
    assert seen and all(seen) and not is_captured(module.net)


def test_other_ways_into_a_fused_net():
    """torch.jit, torch.fx, torch.export and torch.compile see torch's layers; compiled code stays torch's."""
    images = torch.randn(2, 1, 8, 8)

    def look(trainer, module):
        net = module.net
        expected = copy.deepcopy(net)(images)
        graphs = []

        def backend(graph, _):
            graphs.append(graph.code)
            return graph.forward

        results = {
            "script": torch.jit.script(net)(images),
            "trace": torch.jit.trace(net, images)(images),
            "fx": torch.fx.symbolic_trace(net)(images),
            "export": torch.export.export(net, (images,)).module()(images),
            "compile": torch.compile(net, backend=backend, fullgraph=True)(images),
        }
        torch.testing.assert_close(net(input=images), expected)
        assert graphs and not any("lightkit" in code for code in graphs)
        for name, result in results.items():
            assert torch.equal(result, expected), name
        handle = net.register_forward_hook(lambda *_: graphs.append("hook"))
        net(images)
        handle.remove()
        assert graphs[-1] == "hook"
        net.compile(backend="eager")
        return net

    net = during(look, FuseKernels())
    assert vars(net)["_compiled_call_impl"] is not None


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 3, 8, 8),
        torch.zeros(2, 1, 2, 2),
        torch.zeros(2, 1, 9, 12),
        torch.zeros(2, 1, 8, 8, dtype=torch.float64),
        torch.zeros(2, 1, 8, 8, dtype=torch.int64),
        torch.zeros(8),
        torch.zeros(2, 1, 8, 8, 1),
        torch.zeros(0, 1, 8, 8),
        None,
    ],
    ids=lambda images: "None" if images is None else f"{tuple(images.shape)} {images.dtype}",
)
def test_errors_are_torchs(images):
    """A fused net accepts what a Sequential accepts, and rejects the rest with the same class."""

    def run(net):
        try:
            return net(images).shape
        except Exception as error:
            return type(error)

    plain = Network().net
    assert run(fused_sequential.FusedSequential(*plain)) == run(plain)


_REGISTRIES = """
import importlib, sys
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry
import torch
before = set(StrategyRegistry), set(AcceleratorRegistry)
state = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
for name in sys.argv[1:]:
    importlib.import_module(name)
    assert (set(StrategyRegistry), set(AcceleratorRegistry)) == before, name
assert (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()) == state
import lightkit.strategies
assert "local_sgd" in StrategyRegistry
"""


def test_imports_register_nothing():
    """Only lightkit.strategies registers strategies and accelerators."""
    names = [f"lightkit.{name}" for name in ("callbacks", "loops", "nn", "ops", "optim", "models", "data", "tasks")]
    subprocess.run([sys.executable, "-c", _REGISTRIES, *names], check=True)


def test_a_checkpoint_during_a_run_has_torchs_names():
    """A checkpoint from within a run names nothing of lightkit."""

    def look(trainer, module):
        file = io.BytesIO()
        torch.save([trainer.optimizers, module.net, module.loss], file)
        return file.getvalue()

    assert b"lightkit" not in during(look, FuseKernels())
