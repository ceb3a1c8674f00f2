"""A program that uses lightkit on a TPU: ``python on_tpu.py tpu|xla FILE`` writes its results to FILE.

``tpu`` is the device of torch_tpu, which fake_tpu provides; ``xla`` is that of torch_xla, which runs on a CPU too.
"""

from __future__ import annotations

import sys
import warnings

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightkit.strategies  # noqa: F401 (registers names)
from lightkit import native
from lightkit.callbacks import FuseKernels, LeanLoop, Throughput
from lightkit.nn import CrossEntropyLoss, FusedSequential, LinearCrossEntropyLoss
from lightkit.ops import conv_relu_pool, cross_entropy, linear_cross_entropy
from lightkit.optim import SGD, Adam, AdamW

BACKEND = sys.argv[1]

if BACKEND == "xla":
    import torch_xla
    from torch_xla._internal import tpu
    from torch_xla.debug import metrics

    # Lightning checks for hardware.
    tpu.num_available_devices = lambda: 1
    DEVICE = torch_xla.device()
    TRAINER = {"accelerator": "tpu"}

    def reads() -> int:
        """Returns the number of values or tensors copied to the host so far."""
        return (metrics.metric_data("TransferFromDeviceTime") or (0,))[0]

else:
    import torch_tpu  # noqa: F401 (registers the device)

    DEVICE = torch.device("tpu")
    TRAINER = {"accelerator": "torch_tpu", "strategy": "torch_tpu"}

    def reads() -> int:
        """Returns the number of values copied to the host so far."""
        return torch.ops.fake_tpu.reads()


def operations(device):
    """Returns losses and gradients by operation."""
    generator = torch.Generator().manual_seed(1)

    def random(*sizes):
        return torch.randn(*sizes, generator=generator).to(device).requires_grad_()

    labels = (torch.arange(12) % 5).to(device)
    labels[3] = -100
    found = {}
    logits = random(12, 5)
    loss, lse = cross_entropy(logits, labels, label_smoothing=0.1, z_loss=0.1, softcap=5.0, return_lse=True)
    found["cross_entropy"] = (loss, logits)
    found["lse"] = (lse, None)
    found["CrossEntropyLoss"] = (CrossEntropyLoss()(logits := random(12, 5), labels), logits)
    hidden, weight = random(12, 8), random(5, 8)
    found["linear_cross_entropy"] = (linear_cross_entropy(hidden, weight, labels), weight)
    torch.manual_seed(1)
    head = LinearCrossEntropyLoss(8, 5).to(device)
    found["LinearCrossEntropyLoss"] = (head(hidden, labels), head.linear.weight)
    images, kernels, bias = random(2, 3, 8, 8), random(4, 3, 3, 3), random(4)
    found["conv_relu_pool"] = (conv_relu_pool(images, kernels, bias, padding=1).square().mean(), kernels)
    blocks = FusedSequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()).to(device)
    found["FusedSequential"] = (blocks(images).square().mean(), blocks[0].weight)
    results = {}
    for name, (result, leaf) in found.items():
        assert result.device.type == torch.device(device).type
        if leaf is not None:
            result.backward()
        results[name] = (result.detach().cpu(), None if leaf is None else leaf.grad.cpu())
    return results


OPTIMIZERS = {
    "SGD": (SGD, {"momentum": 0.9, "nesterov": True}),
    "Adam": (Adam, {}),
    "AdamW": (AdamW, {"amsgrad": True}),
    "SGD clipped": (SGD, {"momentum": 0.9, "max_grad_norm": 0.1}),
    "AdamW clipped and averaged": (AdamW, {"max_grad_norm": 0.1, "ema_decay": 0.9}),
    "SGD master": (SGD, {"master_weights": True}),
    "Adam master": (Adam, {"master_weights": True, "max_grad_norm": 0.1}),
    "SGD skipping": (SGD, {"skip_nonfinite": True}),
}


def optimizers(device):
    """Returns weights after steps by a closure, the reads of one step, and the norm of the last gradient."""
    results = {}
    for name, (cls, options) in OPTIMIZERS.items():
        dtype = torch.bfloat16 if "master" in name else torch.float32
        torch.manual_seed(2)
        weight = nn.Parameter(torch.randn(6, 4).to(dtype).to(device))
        target = torch.randn(6, 4).to(dtype).to(device)
        optimizer = cls([weight], lr=0.1, **options)

        def closure(weight=weight, target=target, optimizer=optimizer):
            optimizer.zero_grad()
            loss = F.mse_loss(weight, target)
            loss.backward()
            return loss

        for _ in range(4):
            before = reads()
            optimizer.step(closure)
            count = reads() - before
        results[name] = {"weight": weight.detach().cpu().float(), "reads": count, "norm": optimizer.grad_norm}
    return results


class Module(pl.LightningModule):
    """A module without lightkit."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 4))

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Reads(Callback):
    """A callback that counts the reads between two batches, in the middle of an epoch."""

    def __init__(self):
        self.counts, self.mark = [], None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        now = reads()
        if 3 <= batch_idx <= 6:
            self.counts.append(now - self.mark)
        self.mark = now


def train(directory, **options):
    """Runs a fit by Lightning's Trainer with all plug-ins of lightkit; returns the results."""
    generator = torch.Generator().manual_seed(4)
    data = TensorDataset(torch.randn(80, 1, 8, 8, generator=generator), torch.arange(80) % 4)
    fuse, lean, throughput, counter = FuseKernels(), LeanLoop(), Throughput(), Reads()
    checkpoint = ModelCheckpoint(directory, filename="fit")
    nothing = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(
        callbacks=[fuse, lean, throughput, counter, checkpoint], devices=1, max_epochs=2, **{**nothing, **options}
    )
    module = Module()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, DataLoader(data, batch_size=8))
    return {
        "device": trainer.strategy.root_device.type,
        "precision": getattr(trainer.precision_plugin, "device", None),
        "weights": {name: value.cpu() for name, value in module.state_dict().items()},
        "report": [str(found) for found in fuse.report],
        "warnings": [str(w.message) for w in caught],
        "obstacle": lean.unsupported_reason,
        "rate": throughput.total,
        "reads": counter.counts,
        "path": checkpoint.best_model_path,
    }


def main(file: str) -> None:
    results = {"kernels": native.available("cpu")}
    for device in ("cpu", DEVICE):
        name = torch.device(device).type
        results[name] = {"operations": operations(device), "optimizers": optimizers(device)}
    results["cpu"]["fit"] = train(f"{file}.cpu", accelerator="cpu")
    results[BACKEND]["fit"] = train(f"{file}.{BACKEND}", **TRAINER)
    if BACKEND == "tpu":
        results["mixed"] = train(f"{file}.mixed", precision="bf16-mixed", **TRAINER)
        results["waits"] = torch.ops.fake_tpu.waits()
    torch.save(results, file)


if __name__ == "__main__":
    main(sys.argv[2])
