"""Measures training programs as people write them in a Trainer: as they are, and with lightkit's two callbacks.

    python benchmarks/own_code.py [NAME ...] [--rounds 3] [--steps 40] [--compiled] [--jax]

The programs are those of `networks`, with Adam and one logged value. The ways take turns in each round; a figure is the
median over the rounds of the median step. "floor" is the time of the step's multiply-adds at the rate of a square
matrix product in the same process. --compiled adds torch.compile, --jax the same networks in JAX where one is written.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import lightning.pytorch as pl
import torch
from networks import NETWORKS
from rows import append
from timing import median
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightkit.callbacks import FuseKernels, LeanLoop
from lightkit.flops import FlopCounter, matmul_rate

# Steps before the first one that counts: plans, comparisons and memory of the first steps.
WARM_UP = 12


class Module(pl.LightningModule):
    """A LightningModule as people write it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        loss = self.network.loss(self.network(inputs), targets)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class Clock(pl.Callback):
    """Measures the seconds of each step, from the end of one to the end of the next."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.ends.append(time.perf_counter())

    def step(self) -> float:
        """Returns the seconds of the median step after the first ones."""
        ends = self.ends[WARM_UP:]
        return median([after - before for before, after in pairwise(ends)])


def samples(network: Any, count: int) -> TensorDataset:
    """Returns random images or tokens, and random targets."""
    generator = torch.Generator().manual_seed(0)
    size = (count, *network.shape)
    is_tokens = len(network.shape) == 1
    inputs = torch.randint(0, 256, size, generator=generator) if is_tokens else torch.randn(size, generator=generator)
    per_token = network.__name__ == "SmallGpt"
    return TensorDataset(
        inputs, torch.randint(0, network.classes, size if per_token else (count,), generator=generator)
    )


def train(network: Any, steps: int, callbacks: Sequence[pl.Callback] = (), compiled: bool = False) -> float:
    """Returns the seconds of a median step of a fit."""
    torch.manual_seed(0)
    clock = Clock()
    module = Module(network())
    if compiled:
        module.network.compile()
    trainer = pl.Trainer(
        max_steps=steps + WARM_UP,
        accelerator="cpu",
        callbacks=[*callbacks, clock],
        **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
    )
    trainer.fit(module, DataLoader(samples(network, 40 * network.batch), network.batch, shuffle=True))
    return clock.step()


def count_operations(network: Any) -> float:
    """Returns the floating-point operations of a step, forward and backward."""
    net = network()
    inputs, targets = (tensor[: network.batch] for tensor in samples(network, network.batch).tensors)
    with FlopCounter() as counter:
        network.loss(net(inputs), targets).backward()
    assert counter.total is not None, counter.unsupported_reason
    return counter.total


def ways(network: Any, options: argparse.Namespace) -> dict[str, Callable[[], float]]:
    """Returns the contenders by name."""
    found = {
        "stock": lambda: train(network, options.steps),
        "lean loop": lambda: train(network, options.steps, [LeanLoop()]),
        "both callbacks": lambda: train(network, options.steps, [LeanLoop(), FuseKernels()]),
    }
    if options.compiled:
        found["torch.compile"] = lambda: train(network, options.steps, compiled=True)
    if options.jax:
        import networks_in_jax

        if network.__name__ in networks_in_jax.NETWORKS:
            tensors = samples(network, 40 * network.batch).tensors
            found["JAX"] = lambda: networks_in_jax.train(network, tensors, WARM_UP, options.steps)
    return found


def measure(network: Any, operations: float, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns a row for each way of one program, a step of which has so many floating-point operations."""
    contenders = ways(network, options)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    floors = []
    for _ in range(options.rounds):
        for name, contender in contenders.items():
            seconds[name].append(contender())
        floors.append(operations / matmul_rate("cpu", torch.float32))
    stock = median(seconds["stock"])
    return [
        {
            "program": network.__name__,
            "batch": network.batch,
            "what": name,
            "milliseconds": round(1e3 * median(times), 3),
            "times_stock": round(stock / median(times), 2),
            "share_of_matmul": round(median(floors) / median(times), 2),
            "rounds": options.rounds,
            "n": options.steps - 1,
        }
        for name, times in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"from {', '.join(NETWORKS)}; all without one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--jax", action="store_true")
    options = parser.parse_args()
    if unknown := set(options.names) - NETWORKS.keys():
        parser.error(f"there is no program {sorted(unknown)}; there are {', '.join(NETWORKS)}")
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    names = options.names or list(NETWORKS)
    # All before the first torch.compile, in whose code operations cannot be counted.
    operations = {name: count_operations(NETWORKS[name]) for name in names}
    for name in names:
        rows = measure(NETWORKS[name], operations[name], options)
        for row in rows:
            print(*(row[key] for key in ("program", "what", "milliseconds", "times_stock", "share_of_matmul")))
        append("own_code", rows)


if __name__ == "__main__":
    main()
