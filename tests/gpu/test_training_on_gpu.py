"""Training on a GPU: the lean loop against Lightning's own, and the commands."""

from __future__ import annotations

import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightkit.callbacks import FuseKernels, LeanLoop
from lightkit.data.batches import TensorBatches
from lightkit.optim import SGD, Adam
from lightkit.tasks import ClassificationTask


def model() -> nn.Module:
    with torch.device("cpu"):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(20, 50), nn.ReLU(), nn.Dropout(0.3), nn.BatchNorm1d(50), nn.Linear(50, 10))


def tensors() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(500, 20, generator=generator, device="cpu")
    return inputs, torch.randint(10, (500,), generator=generator, device="cpu")


def fit(callbacks, data, optimizer=Adam, **options):
    """Weights and what was logged, after two epochs."""
    pl.seed_everything(3, verbose=False)
    task = ClassificationTask(model(), optimizer)
    nothing = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(accelerator="gpu", devices=1, max_epochs=2, callbacks=callbacks, **nothing, **options)
    with torch.device("cpu"):
        trainer.fit(task, data())
    weights = {name: value.cpu() for name, value in task.state_dict().items()}
    return weights, {name: value.cpu() for name, value in trainer.callback_metrics.items()}, trainer.global_step


def loader():
    return DataLoader(TensorDataset(*tensors()), batch_size=32, shuffle=True)


def sliced():
    return TensorBatches([t.cuda() for t in tensors()], 32, shuffle=True)


@pytest.mark.parametrize("data", [loader, sliced])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"precision": "bf16-mixed"},
        {"precision": "16-mixed"},
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("optimizer", [SGD, Adam, torch.optim.Adam])
def test_the_lean_loop_is_lightnings_to_the_bit(optimizer, options, data):
    """Weights, metrics and steps are those of Lightning's own loop."""
    own = fit([], data, optimizer, **options)
    ours = fit([LeanLoop()], data, optimizer, **options)
    assert own[2] == ours[2]
    for mine, theirs in zip(ours[:2], own[:2], strict=True):
        assert mine.keys() == theirs.keys()
        for name in theirs:
            assert torch.equal(mine[name], theirs[name]), name


def test_fused_kernels_train_as_torchs():
    """FuseKernels changes no more than roundings."""
    own = fit([], sliced, torch.optim.Adam)[0]
    ours = fit([FuseKernels()], sliced, torch.optim.Adam)[0]
    for name in own:
        torch.testing.assert_close(ours[name], own[name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "arguments",
    [
        ("+experiment=cnn", "trainer.max_epochs=2"),
        ("+experiment=cnn", "trainer.precision=bf16-mixed", "trainer.max_epochs=2"),
        ("+experiment=cnn", "trainer.precision=16-mixed", "trainer.max_epochs=2"),
        ("+experiment=cnn", "optim=sgd", "optim.lr=0.05", "strategy=ddp", "trainer.max_epochs=2"),
        ("+experiment=rnn", "trainer.max_epochs=1"),
    ],
    ids=" ".join,
)
def test_command(command, tmp_path, arguments):
    """The commands train, test and predict on the GPU that is there."""
    result = command("train", *arguments, "name=job", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    (run,) = Path(tmp_path, "runs", "job").iterdir()
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["test/accuracy"] > 0.8
    assert json.loads((run / "environment.json").read_text())["gpus"]
