"""Strategies in two processes give the results of their arithmetic in one process by torch alone."""

from __future__ import annotations

import os
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import StrategyRegistry
from support.commands import python_path, run_python
from support.trainers import bare_trainer
from support.two_processes import BATCH, SAMPLES, Module, dealt, network, samples

from lightkit.errors import ConfigError
from lightkit.strategies import DataParallel, DiLoCo, LocalSGD

pytestmark = pytest.mark.slow

SCENARIOS = Path(__file__).with_name("scenarios.py")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("scenarios")


@pytest.fixture(scope="module")
def ranks(directory):
    """Returns the outcome of each scenario on each of the two ranks."""
    trainer = bare_trainer(devices=1)
    trainer.fit(Module(), dealt())
    trainer.save_checkpoint(directory / "one.ckpt")
    run_python(SCENARIOS, directory, environment=python_path(), status=0)
    return [torch.load(directory / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]


def flat(module):
    return torch.cat([p.detach().flatten().clone() for p in module.parameters()])


def flat_state(outcome):
    return torch.cat([value.flatten() for value in outcome["state"].values()])


def batches_of(rank, world=2):
    """Returns the batches of a rank in an epoch."""
    inputs, labels = samples()
    order = torch.arange(SAMPLES)[rank::world].split(BATCH)
    return [(inputs[i], labels[i]) for i in order]


class Worker:
    """The model and the optimizer of one worker, in this process."""

    def __init__(self, momentum=0.9):
        self.net = network()
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=momentum)

    def step(self, batch):
        self.optimizer.zero_grad()
        F.cross_entropy(self.net(batch[0]), batch[1]).backward()
        self.optimizer.step()


def give(workers, weights):
    for worker in workers:
        # A copy each: parameters become views of what they are given.
        torch.nn.utils.vector_to_parameters(weights.clone(), worker.net.parameters())


def simulate(merge, period, parts, epochs=2):
    """Trains locally, and calls `merge(workers)` after each period and at the end of each epoch.

    ``parts`` has the batches of each worker; a worker without further batches does not count any more.
    """
    workers = [Worker() for _ in parts]
    for _ in range(epochs):
        longest = max(map(len, parts))
        for index in range(longest):
            for worker, part in zip(workers, parts, strict=True):
                if index < len(part):
                    worker.step(part[index])
            if (index + 1) % period == 0 or index + 1 == longest:
                start = index - index % period
                active = [w for w, part in zip(workers, parts, strict=True) if len(part) > start]
                merge(active, workers)
    return flat(workers[0].net)


def mean(active, everyone):
    give(everyone, torch.stack([flat(worker.net) for worker in active]).mean(0))


class OuterSGD:
    """Returns DiLoCo's merge, with torch's SGD as the outer optimizer."""

    def __init__(self, lr=0.7, momentum=0.9):
        self.shared = torch.nn.Parameter(flat(network()))
        self.optimizer = torch.optim.SGD([self.shared], lr=lr, momentum=momentum, nesterov=True)

    def __call__(self, active, everyone):
        self.shared.grad = torch.stack([self.shared.detach() - flat(worker.net) for worker in active]).mean(0)
        self.optimizer.step()
        give(everyone, self.shared.detach())


def assert_near(found, expected, tolerance=1e-6):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


FINISHED = [
    "stock",
    "data_parallel",
    "data_parallel_fp16",
    "data_parallel_bf16",
    "data_parallel_powersgd",
    "local_sgd",
    "local_sgd by name",
    "diloco",
    "norm",
    "accumulate",
    "uneven",
    "uneven diloco",
    "two optimizers",
    "two optimizers, diloco",
    "thawing",
    "thawing, lean",
    "validation within",
    "resumed",
    "from one device",
]


@pytest.mark.parametrize("name", FINISHED)
def test_ranks_end_with_the_same_weights(ranks, name):
    """All ranks end with the same weights to the bit, except the batch counters of batch norms."""
    first, second = (rank[name]["state"] for rank in ranks)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first if "num_batches" not in key)


def test_data_parallel_is_lightnings(ranks):
    """Without compression the weights are those of Lightning's ddp, to the bit."""
    assert torch.equal(flat_state(ranks[0]["stock"]), flat_state(ranks[0]["data_parallel"]))


def test_data_parallel_equals_one_process(ranks):
    """The weights are those of one process with the whole batch, to 1e-6 after 14 steps."""
    worker = Worker()
    for _ in range(2):
        for a, b in zip(batches_of(0), batches_of(1), strict=True):
            worker.step((torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]])))
    assert_near(flat_state(ranks[0]["data_parallel"]), flat(worker.net))


def test_thawed_parameters_are_averaged_too(ranks):
    """A layer that trains from the second epoch on gets the weights of one process, to 1e-6."""
    worker = Worker(momentum=0)
    for epoch in range(3):
        worker.net[0].requires_grad_(epoch > 0)
        for a, b in zip(batches_of(0), batches_of(1), strict=True):
            worker.step((torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]])))
    assert_near(flat_state(ranks[0]["thawing"]), flat(worker.net))


@pytest.mark.parametrize(("name", "tolerance"), [("fp16", 2e-3), ("bf16", 2e-2)])
def test_half_the_bytes(ranks, name, tolerance):
    """The compression rounds gradients, by no more than the rounding error of the format."""
    compressed, plain = ranks[0][f"data_parallel_{name}"], ranks[0]["data_parallel"]
    difference = (flat_state(compressed) - flat_state(plain)).abs().max()
    assert 0 < difference < tolerance
    assert 2 * compressed["communication"]["communication/megabytes"] == pytest.approx(
        plain["communication"]["communication/megabytes"]
    )


def test_powersgd_learns(ranks):
    """PowerSGD sends fewer bytes, and reaches a similar loss by other weights."""
    inputs, labels = samples()
    losses = {}
    for name in ("data_parallel_powersgd", "data_parallel, 12 epochs"):
        net = network()
        net.load_state_dict({k.removeprefix("net."): v for k, v in ranks[0][name]["state"].items()})
        losses[name] = F.cross_entropy(net(inputs), labels).item()
    powersgd, plain = losses.values()
    untrained = F.cross_entropy(network()(inputs), labels).item()
    assert abs(powersgd - plain) < 0.1 * (untrained - plain) and powersgd != plain
    sent = [ranks[0][name]["communication"]["communication/megabytes"] for name in losses]
    assert sent[0] < 0.7 * sent[1]


def test_period_1_is_data_parallel(ranks):
    """With plain SGD, an average of the weights after each step equals an average of the gradients, to 1e-6."""
    local, parallel = ranks[0]["plain local_sgd of period 1"], ranks[0]["plain data_parallel"]
    assert_near(flat_state(local), flat_state(parallel))


def test_local_sgd_is_the_average(ranks):
    """Periods of 3 steps in epochs of 7 give the weights of torch alone in one process, to 1e-6."""
    expected = simulate(mean, 3, [batches_of(0), batches_of(1)])
    assert_near(flat_state(ranks[0]["local_sgd"]), expected)


def test_workers_go_their_own_ways_in_between(ranks):
    """The workers have equal weights after the steps 3, 6 and 7 of each epoch, and at no other time."""
    pairs = zip(ranks[0]["local_sgd"]["steps"], ranks[1]["local_sgd"]["steps"], strict=True)
    equal = [torch.equal(a, b) for a, b in pairs]
    assert [index + 1 for index, same in enumerate(equal) if same] == [3, 6, 7, 10, 13, 14]


def test_validation_sees_the_average(ranks):
    """A validation at the end of an epoch or within it measures the average."""
    names = ("local_sgd", "diloco as local_sgd", "validation within", "uneven", "uneven diloco")
    for name in (*names, "two optimizers", "two optimizers, diloco"):
        assert ranks[0][name]["metrics"]["same"] == 1, name


def test_diloco_is_an_outer_step(ranks):
    """DiLoCo gives the weights of one process with torch's SGD as the outer optimizer, to 2e-6."""
    expected = simulate(OuterSGD(), 3, [batches_of(0), batches_of(1)])
    assert_near(flat_state(ranks[0]["diloco"]), expected, 2e-6)


def test_diloco_of_rate_1_without_momentum_is_local_sgd(ranks):
    """With outer_lr=1 and without momentum DiLoCo equals LocalSGD, to 1e-6."""
    assert_near(flat_state(ranks[0]["diloco as local_sgd"]), flat_state(ranks[0]["local_sgd"]))


def test_accumulated_batches_are_one_step(ranks):
    """A period counts optimizer steps: an epoch of 7 batches has 4, and averages after the second and the fourth.

    The batch after an average steps no optimizer, so that the weights stay equal.
    """
    pairs = zip(ranks[0]["accumulate"]["steps"], ranks[1]["accumulate"]["steps"], strict=True)
    equal = [torch.equal(a, b) for a, b in pairs]
    assert [index + 1 for index, same in enumerate(equal) if same] == [1, 4, 5, 7, 8, 11, 12, 14]


def test_running_statistics_are_averaged(ranks):
    """The running statistics of batch norms are equal on both ranks, whose inputs differ."""
    first, second = (rank["norm"]["state"]["net.1.running_mean"] for rank in ranks)
    assert torch.equal(first, second) and first.abs().sum() > 0


@pytest.mark.parametrize(("name", "period"), [("uneven", 3), ("uneven diloco", 2)])
def test_uneven_workers(ranks, name, period):
    """With seven and four batches, the worker at its end waits, and does not count in the other's averages."""
    inputs, labels = samples()
    parts = [
        [(inputs[i : i + BATCH], labels[i : i + BATCH]) for i in range(start, end, BATCH)]
        for start, end in ((0, 28), (28, 44))
    ]
    expected = simulate(mean if name == "uneven" else OuterSGD(), period, parts)
    assert_near(flat_state(ranks[0][name]), expected, 2e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("uneven data_parallel", "different numbers of batches in an epoch (7, 4)"),
        ("uneven max_steps", "max_steps needs equally many batches"),
        ("uneven validation within", "validate and save at the end of epochs"),
        ("wrapped", "LocalSGD keeps the whole model in every process, but net is sharded or wrapped already"),
        ("sync_batchnorm", "sync_batchnorm communicates in every step"),
    ],
)
def test_what_cannot_work_is_said_on_every_rank(ranks, name, expected):
    """Unsupported settings give an error, where they would hang or silently change the training."""
    assert all(expected in rank[name]["error"] for rank in ranks)


def test_resume_is_exact(ranks):
    """A run from a checkpoint within the second epoch has the same weights and momenta, to the bit."""
    for rank in ranks:
        whole, resumed = rank["whole"], rank["resumed"]
        assert len(resumed["steps"]) == 6 and len(whole["steps"]) == 14
        assert torch.equal(flat_state(whole), flat_state(resumed))
        buffers = [
            [entry["momentum_buffer"] for entry in outcome["optimizer"]["state"].values()]
            for outcome in (whole, resumed)
        ]
        assert all(torch.equal(a, b) for a, b in zip(*buffers, strict=True))
    momenta = [rank["whole"]["optimizer"]["state"][0]["momentum_buffer"] for rank in ranks]
    assert not torch.equal(*momenta)


def test_checkpoint_is_ordinary(ranks, directory):
    """A checkpoint loads with weights_only into a module, and into a Trainer without the strategy."""
    path = directory / "whole" / "step=12.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    Module().load_state_dict(checkpoint["state_dict"])
    module = Module()
    trainer = bare_trainer(devices=1, max_epochs=3)
    trainer.fit(module, dealt(), ckpt_path=path)
    assert trainer.current_epoch == 3
    # The strategy continued a checkpoint of one device: two more epochs of seven steps.
    assert len(ranks[0]["from one device"]["steps"]) == 14


def test_one_process():
    """With one device each strategy trains as that device does, and sends nothing."""
    expected = None
    for strategy in ("auto", LocalSGD(period=3), DiLoCo(period=3, outer_lr=1.0, outer_momentum=0.0), DataParallel()):
        module = Module()
        trainer = bare_trainer(devices=1, strategy=strategy)
        trainer.fit(module, dealt())
        expected = flat(module) if expected is None else expected
        assert_near(flat(module), expected)
        if strategy != "auto":
            assert trainer.strategy.communication["communication/megabytes"] == 0


@pytest.mark.parametrize("number", [1, 2])
def test_a_training_leaves_nothing_to_the_next_test(number):
    """Of two equal tests the second finds no rank and no process group of the first."""
    assert "LOCAL_RANK" not in os.environ and not torch.distributed.is_initialized()
    bare_trainer(devices=1, strategy="ddp", max_steps=1).fit(Module(), dealt())
    assert "LOCAL_RANK" in os.environ and torch.distributed.is_initialized()


def test_loss_scale():
    """LocalSGD rejects 16-mixed: each worker would have a loss scale of its own."""
    strategy = LocalSGD()
    strategy.connect(Module())
    strategy.precision_plugin = Mock(scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(ConfigError, match="precision 16-mixed gives each worker a loss scale of its own"):
        strategy.configure_ddp()


def test_names():
    """Lightning's registry has the names of the strategies."""
    names = {
        "data_parallel",
        "data_parallel_fp16",
        "data_parallel_bf16",
        "data_parallel_powersgd",
        "local_sgd",
        "diloco",
    }
    assert names <= set(StrategyRegistry.available_strategies())


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: DataParallel(compression="bf15"), "got 'bf15'; did you mean bf16"),
        (lambda: DataParallel(compression="fp16", ddp_comm_hook=print), "exclude each other"),
        (lambda: LocalSGD(period=0), "at least 1, got 0"),
        (lambda: LocalSGD(period=2.5), "got 2.5"),
        (lambda: DiLoCo(period=True), "got True"),
        (lambda: DiLoCo(outer_lr=0.0), "outer_lr must be above 0"),
        (lambda: DiLoCo(outer_momentum=1.0), "outer_momentum must be from 0 to below 1"),
    ],
)
def test_arguments(make, expected):
    """The error names a value that is out of range."""
    with pytest.raises(ConfigError, match=expected):
        make()
