"""Helpers of the tests of FuseKernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback

from lightkit.optim.convert import is_converted

CODE = F.cross_entropy.__code__


def each(callback, name):
    return next(found for found in callback.report if found.name == name)


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


class Watch(Callback):
    """Records during batches whether the optimizers are on lightkit's kernels; their class is torch's."""

    def __init__(self):
        self.converted = set()

    def on_train_batch_end(self, trainer, *_):
        assert all(type(optimizer) is torch.optim.SGD for optimizer in trainer.optimizers)
        self.converted |= {is_converted(optimizer) for optimizer in trainer.optimizers}
