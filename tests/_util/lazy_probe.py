"""Does in a process of its own what deferred imports could break; prints what came of it, one line of JSON a way in.

The arguments say which ways in are taken first, each in a fork of its own: each is another first use of a stand-in.
"""

import json
import os
import sys

from lightkit._util.lazy_imports import defer

defer()

import lightning.pytorch as pl  # noqa: E402
import torch  # noqa: E402
import torchmetrics  # noqa: E402
from torch import nn  # noqa: E402

from lightkit.capture import Capture, capture_calls  # noqa: E402

DEFERRED = ("torch._dynamo.eval_frame", "torch._inductor", "scipy.stats", "matplotlib", "sympy")


class Convolutions(nn.Module):
    """A network whose operations can be captured."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 9, 2))

    def forward(self, x):
        return self.layers(x)


def imported() -> list[str]:
    return [n for n in DEFERRED if n in sys.modules and type(sys.modules[n]).__name__ != "_StandIn"]


def optimizer() -> list[str]:
    """Steps as a training does, and says what that has imported."""
    model = nn.Linear(2, 2)
    for optimizer in (torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.AdamW(model.parameters())):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.load_state_dict(optimizer.state_dict())
    # As `lightkit.callbacks.FuseKernels` does.
    capture, net = Capture(), Convolutions()
    release = capture_calls(net, capture)
    net(torch.randn(4, 1, 8, 8)).sum().backward()
    release()
    assert any(region.replacement is not None for region in capture.regions)
    torch.use_deterministic_algorithms(True)
    return imported()


def compiled() -> list:
    """A compiled module is what Lightning takes for one, and computes the same."""
    from lightning.fabric.wrappers import _unwrap_compiled

    model = nn.Linear(2, 2)
    wrapped = torch.compile(model, backend="eager", fullgraph=True)
    same = torch.equal(wrapped(torch.ones(1, 2)), model(torch.ones(1, 2)))
    return [same, _unwrap_compiled(wrapped)[0] is model, _unwrap_compiled(model)[0] is model]


def disabled() -> list:
    """The compiler leaves alone what was hidden from it before it was imported."""

    @torch.compiler.disable
    def hidden(x):
        return x + (1 if torch.compiler.is_compiling() else 2)

    assert hidden(torch.zeros(1)).item() == 2

    @torch.compile(backend="eager")
    def outer(x):
        return hidden(x * 1) + (10 if torch.compiler.is_compiling() else 0)

    return [outer(torch.zeros(1)).item(), hidden(torch.zeros(1)).item()]


def constant() -> bool:
    """The loss of lightkit compiles into one graph."""
    from lightkit.ops import cross_entropy

    x = torch.randn(4, 3)
    loss = torch.compile(lambda x: cross_entropy(x, torch.arange(3)[[0, 1, 2, 0]]), backend="eager", fullgraph=True)
    return torch.allclose(loss(x), nn.functional.cross_entropy(x, torch.tensor([0, 1, 2, 0])))


def plot() -> str:
    metric = torchmetrics.MeanMetric()
    metric.update(1.0)
    figure, _ = metric.plot()
    return type(figure).__module__


def scipy() -> list:
    """A metric that assigns by SciPy, and the function that torchmetrics gives back to it."""
    import scipy.signal

    prediction, target = torch.randn(2, 4, 50), torch.randn(2, 4, 50)
    measure = torchmetrics.functional.audio.scale_invariant_signal_distortion_ratio
    best, _ = torchmetrics.functional.audio.permutation_invariant_training(prediction, target, measure)
    return [best.shape[0], len(scipy.signal.hamming(5)), len(scipy.signal.butter(2, 0.3)[0])]


def profiler() -> bool:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.ones(3).sum()
    return any(event.key == "aten::sum" for event in profile.key_averages())


def submodule() -> list:
    """Importing from inside of a package that is deferred brings the package, and each module once."""
    import torch._dynamo.config as config
    from torch._dynamo.eval_frame import OptimizedModule

    torch._dynamo.config.cache_size_limit = 7
    return [config.cache_size_limit, OptimizedModule is torch._dynamo.OptimizedModule]


def deterministic() -> bool:
    """What was set on a stand-in is set on what it stood for."""
    torch.use_deterministic_algorithms(True)
    import torch._inductor.config as config

    return config.deterministic and "deterministic" in config.to_dict()


def trains() -> str | None:
    """The lean loop takes Lightning's functions for Lightning's own."""
    from lightkit._lightning.step import STEP_FUNCTIONS

    return None if STEP_FUNCTIONS.are_in_place() else STEP_FUNCTIONS.first_replaced()


WAYS = (compiled, disabled, constant, plot, scipy, profiler, submodule, deterministic)


def probe(first: int) -> dict:
    results = {"imported": imported(), "lightning": pl.__version__, "trains": trains(), "optimizer": optimizer()}
    for way in WAYS[first:] + WAYS[:first]:
        results[way.__name__] = way()
    return results


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        if (pid := os.fork()) == 0:
            print(json.dumps(probe(int(argument))), flush=True)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        if status != 0:
            sys.exit(f"the way {argument} has failed")
