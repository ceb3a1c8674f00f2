"""Measures a step with rounded weights beside one in float, and the labels of quantized models in several runtimes.

    python benchmarks/quantization.py step [--rounds 7]
    python benchmarks/quantization.py labels CHECKPOINT [CHECKPOINT ...]

A step is one of the documented CNN at batch 32 with Adam on one thread, in a Trainer with LeanLoop: in float and with
`Quantize`, in turn. `libraries` trains the same layers with the fake quantization of torch.ao, whose steps are in turn
as well. The labels are those of the test set by the layers in float with rounded weights and inputs, beside those of
lightkit's integers, and of each installed runtime that reads an export.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from rows import append
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightkit.app.evaluation import build_test_data
from lightkit.app.exporting import export_checkpoints
from lightkit.app.restore import restore
from lightkit.callbacks import LeanLoop
from lightkit.compress import Quantize
from lightkit.models import CNN
from lightkit.nn.int8_layers import find_int8_chain
from lightkit.optim import Adam

_BATCH, _STEPS, _WARM = 32, 120, 60


class _Module(pl.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.seconds = model, []
        self._before = 0.0

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        now = time.perf_counter()
        self.seconds.append(now - self._before)
        self._before = now
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return Adam(self.parameters(), lr=1e-3)


def _torchs_fake_quantization(model: nn.Module) -> nn.Module:
    """Returns the layers of a CNN with the fake quantization of torch.ao, with frozen observers."""
    from torch.ao.quantization import disable_observer, get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    plain = nn.Sequential(*model.features, *model.classifier).train()
    prepared = prepare_qat_fx(plain, get_default_qat_qconfig_mapping("x86"), (torch.rand(2, 1, 28, 28),))
    prepared(torch.rand(_BATCH, 1, 28, 28))
    return prepared.apply(disable_observer)


def step_milliseconds(kind: str) -> float:
    """Returns the median milliseconds from one step to the next of a training.

    Args:
        kind: ``"float"``, ``"8 bits"``, ``"2 bits"``, or ``"torch.ao"``.
    """
    torch.manual_seed(0)
    images = torch.rand(_BATCH * _STEPS, 1, 28, 28)
    data = DataLoader(TensorDataset(images, torch.randint(10, (len(images),))), batch_size=_BATCH)
    callbacks: list[pl.Callback] = [LeanLoop()]
    model = CNN()
    if kind == "torch.ao":
        model = _torchs_fake_quantization(model)
    elif kind != "float":
        # The ranges are known before the steps that count.
        callbacks.append(Quantize(int(kind[0]), start=0.0, end=0.0, rounds=1, batches=4))
    module = _Module(model)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    pl.Trainer(max_epochs=1, callbacks=callbacks, enable_model_summary=False, **options).fit(module, data)
    return statistics.median(module.seconds[_WARM:]) * 1e3


def measure_steps(rounds: int) -> None:
    """Appends the median of several rounds of each kind of step, in turn."""
    torch.set_num_threads(1)
    kinds = ("float", "8 bits", "2 bits", "torch.ao")
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind in kinds:
            found[kind].append(step_milliseconds(kind))
    rows = []
    for kind, values in found.items():
        ratio = statistics.median(v / f for v, f in zip(values, found["float"], strict=True))
        rows.append({"what": kind, "ms": round(statistics.median(values), 3), "times_float": round(ratio, 3)})
    append("quantized_step", rows)


def measure_labels(checkpoints: list[Path]) -> None:
    """Appends the number of labels that differ between the rounded layers in float and each runtime."""
    rows = []
    for path in checkpoints:
        restored = restore(path, for_evaluation=True)
        data: Any = build_test_data(restored, None, False)
        data.prepare_data()
        data.setup("test")
        model = restored.task.model
        chain = find_int8_chain((model.features, model.classifier))
        assert chain is not None
        total = differing = right = 0
        for batch in data.test_dataloader():
            images, target = data.on_after_batch_transfer(batch, 0)
            # With autograd the layers run in float.
            expected, labels = model(images).argmax(1), chain(images).argmax(1)
            total, differing = total + len(target), differing + int((expected != labels).sum())
            right += int((labels == target).sum())
        counts: dict[str, Any] = {"lightkit": differing}
        for name, suffix, package in (("onnxruntime", ".onnx", "onnxruntime"), ("openvino", ".xml", "openvino")):
            if importlib.util.find_spec(package) is not None:
                with tempfile.TemporaryDirectory() as directory:
                    counts[name] = export_checkpoints([path], Path(directory) / f"model{suffix}").differing
        if importlib.util.find_spec("executorch") is not None:
            with tempfile.TemporaryDirectory() as directory:
                counts["executorch"] = export_checkpoints([path], Path(directory) / "model.pte").differing
        bits = sorted({value[0] for value in restored.checkpoint["lightkit_quantization"]["weights"].values()})
        for runtime, count in counts.items():
            rows.append(
                {
                    "data": type(data).__name__,
                    "bits": min(bits),
                    "runtime": runtime,
                    "samples": total,
                    "differing": count,
                    "accuracy": round(right / total, 4),
                }
            )
    append("quantized_labels", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("step", "labels"))
    parser.add_argument("checkpoints", nargs="*", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    if options.what == "step":
        measure_steps(options.rounds)
    else:
        measure_labels(options.checkpoints)


if __name__ == "__main__":
    main()
