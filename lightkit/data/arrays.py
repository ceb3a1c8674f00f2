"""A data module of arrays in memory: images, sequences, tables of numbers or tokens, with labels or targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from lightkit.data.batches import TensorBatches, after_setup, batches_for, check_positive
from lightkit.data.folds import Fold, Foldable
from lightkit.data.images import stratified_split
from lightkit.data.labels import encode_labels
from lightkit.errors import DataError

# How the arrays of a layout become the inputs of a model.
LAYOUTS = {
    "image": "(N, H, W) becomes (N, 1, H, W)",
    "channels_first": "(N, C, H, W) stays as it is",
    "channels_last": "(N, H, W, C) becomes (N, C, H, W)",
    "plain": "any shape stays as it is",
}

# The numbers of channels by which a dimension is taken for the channels.
_CHANNELS = (1, 2, 3, 4)

# The number of bytes to which texts are cut.
_MAX_TEXT = 512


@dataclass(frozen=True)
class ArrayFormat:
    """The form of the arrays of a training, which later arrays must have.

    Args:
        shape: the shape of a sample, as the user gives it.
        dtype: ``"uint8"`` for values from 0 to 255, ``"float"``, or ``"int"`` for tokens.
        layout: a key of `LAYOUTS`.
    """

    shape: tuple[int, ...]
    dtype: str
    layout: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        dimensions = {"image": 2, "channels_first": 3, "channels_last": 3}
        if self.layout not in LAYOUTS or self.dtype not in ("uint8", "float", "int"):
            raise DataError(f"layout must be one of {', '.join(LAYOUTS)}, got {self.layout!r} of {self.dtype!r}")
        if len(self.shape) != dimensions.get(self.layout, len(self.shape)):
            raise DataError(f"layout={self.layout}: {LAYOUTS[self.layout]}, got samples of shape {self.shape}")

    def check(self, x: Tensor) -> Tensor:
        """Returns the samples ``x`` if they have the form.

        Raises:
            DataError: the shape or the dtype of a sample is another one.
        """
        if tuple(x.shape[1:]) != self.shape:
            expected = ", ".join(map(str, self.shape))
            raise DataError(f"x must have the shape (N, {expected}) as in the training, got {tuple(x.shape)}")
        if (kind := _kind_of(x)) != self.dtype:
            raise DataError(
                f"x must be {self.dtype} as in the training, got {kind}: uint8 counts from 0 to 255, and float is "
                "taken as it is"
            )
        return x

    def to_input(self, x: Tensor) -> Tensor:
        """Converts samples to the input of a model: uint8 becomes float32 in [0, 1], and the layout channels first."""
        if x.dtype == torch.uint8:
            x = x.to(torch.float32).div_(255)
        if self.layout == "image":
            return x.unsqueeze(1)
        return x.movedim(-1, 1).contiguous() if self.layout == "channels_last" else x


class DataModule(Foldable, pl.LightningDataModule):
    """A data module of arrays: `from_arrays` makes it.

    Batches of training are shuffled; the order depends only on ``seed`` and on the epoch. A batch is ``(inputs,
    labels)``, or ``(inputs, targets)`` for targets of floating point. Images of uint8 stay uint8 until a batch is on
    its device, and become float32 in [0, 1] there.

    Attributes:
        format: the form of the arrays.
        classes: the names of the classes; None for targets of floating point, or without labels.
    """

    # The plural of a sample, which `lightkit.callbacks.Throughput` logs.
    unit = "samples"

    # The split is part of the data: it is the same for every seed of a run.
    split_seed = 0

    def __init__(
        self,
        format: ArrayFormat | dict[str, Any],
        classes: Sequence[str] | None = None,
        batch_size: int = 32,
        eval_batch_size: int = 500,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_positive(batch_size=batch_size, eval_batch_size=eval_batch_size)
        self.format = ArrayFormat(**format) if isinstance(format, dict) else format
        self.classes = None if classes is None else tuple(map(str, classes))
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.seed = seed
        self.parts: dict[str, tuple[Tensor, ...]] = {}
        # The samples for training and validation in the order that all folds share; None without folds.
        self._whole: tuple[Tensor, ...] | None = None

    @classmethod
    def from_arrays(
        cls,
        x: Any,
        y: Any = None,
        *,
        validation: float | tuple[Any, Any] = 0.1,
        test: tuple[Any, Any] | None = None,
        predict: Any = None,
        batch_size: int = 32,
        eval_batch_size: int = 500,
        classes: Sequence[str] | None = None,
        layout: str | None = None,
        seed: int = 0,
    ) -> DataModule:
        """Returns a data module of arrays of NumPy, tensors, or nested lists.

        Args:
            x: the samples, uint8 or floating point: images ``(N, H, W)``, ``(N, H, W, C)`` or ``(N, C, H, W)``,
                sequences ``(N, T, F)``, or rows of numbers ``(N, F)``. Other integers ``(N, T)`` are tokens.
            y: integers, truth values or texts ``(N)`` are the labels of classes, and so are one-hot rows ``(N, C)``;
                floating point ``(N)`` or ``(N, K)`` are targets. None serves inputs alone.
            validation: the share of the samples, below 1, that is held out for validation, for labels with the same mix
                of classes; or a pair of arrays. 0 holds out none.
            test: a pair of arrays for `test_dataloader`; None serves the validation samples there.
            predict: samples for `predict_dataloader`; None serves the test or, without one, all of ``x``.
            batch_size: the number of samples in a batch of training.
            eval_batch_size: the number of samples in a batch elsewhere; it changes the speed only.
            classes: the names of the classes 0 to C - 1, for integer labels. Default: the sorted values of ``y``.
            layout: a key of `LAYOUTS`. Default: one to three colour channels are found at the end or after N.
            seed: the seed of the order of the training batches. The split does not depend on it.

        Raises:
            DataError: an array has another shape, a value that is not finite, or a label that is unknown.
        """
        inputs = to_tensor(x)
        layout = possible_layouts(inputs)[0] if layout is None else layout
        labels, names = (None, None) if y is None else encode_labels(y, classes)
        module = cls(
            ArrayFormat(tuple(inputs.shape[1:]), _kind_of(inputs), layout), names, batch_size, eval_batch_size, seed
        )
        whole = module._pair("x", inputs, labels)
        if isinstance(validation, (tuple, list)):
            module.parts["train"] = whole
            module.parts["validation"] = module.encode(*validation)
        else:
            module.parts["train"], module.parts["validation"] = module._split(whole, validation)
        if test is not None:
            module.parts["test"] = module.encode(*test)
        module.parts["predict"] = module.encode(predict) if predict is not None else module.parts.get("test", whole)
        return module

    def encode(self, x: Any, y: Any = None) -> tuple[Tensor, ...]:
        """Returns samples, and labels or targets if given, as tensors in the form of the training.

        Raises:
            DataError: the form differs from that of the training.
        """
        labels = None if y is None else encode_labels(y, self.classes, is_classification=self.classes is not None)[0]
        x = encode_texts(x, self.format.shape[0]) if are_texts(x) else to_tensor(x)
        return self._pair("x", self.format.check(x), labels)

    def to_input(self, x: Tensor) -> Tensor:
        """Converts samples to the input of a model: see `ArrayFormat.to_input`."""
        return self.format.to_input(x)

    @property
    def num_classes(self) -> int | None:
        """The number of classes; None without classes."""
        return None if self.classes is None else len(self.classes)

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The arguments from which a checkpoint builds a data module of the same form, as plain containers."""
        form = asdict(self.format)
        return {
            "format": {**form, "shape": list(form["shape"])},
            "classes": None if self.classes is None else list(self.classes),
        }

    def target_scale(self) -> tuple[Tensor, Tensor]:
        """Returns the mean and the standard deviation of the training targets, float64 ``(K)`` each.

        Raises:
            DataError: a target does not vary.
        """
        targets = self._part("train")[-1].double()
        targets = targets.unsqueeze(1) if targets.dim() == 1 else targets
        constant = (targets.min(dim=0).values == targets.max(dim=0).values).nonzero().flatten().tolist()
        if constant:
            raise DataError(f"y does not vary in column {constant[0]} of the training samples")
        return targets.mean(dim=0), targets.std(dim=0, correction=0)

    def _pair(self, name: str, x: Tensor, labels: Tensor | None) -> tuple[Tensor, ...]:
        if len(x) == 0:
            raise DataError(f"{name} has no samples")
        if labels is not None and len(labels) != len(x):
            raise DataError(f"{name} has {len(x)} samples, and y has {len(labels)}")
        return (x,) if labels is None else (x, labels)

    def _split(self, whole: tuple[Tensor, ...], share: float) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        total = len(whole[0])
        if not 0 <= share < 1:
            raise DataError(f"validation must be a share from 0 to below 1, or a pair of arrays, got {share!r}")
        size = min(round(total * share), total - 1)
        rest, held_out = stratified_split(self._classes_of(whole), size, self.split_seed)
        return tuple(t[rest] for t in whole), tuple(t[held_out] for t in whole)

    def _classes_of(self, whole: tuple[Tensor, ...]) -> Tensor:
        """Returns the classes of samples, int64 ``(N)``; without classes all samples count as one class."""
        has_classes = self.classes is not None and len(whole) == 2
        return whole[1] if has_classes else torch.zeros(len(whole[0]), dtype=torch.long)

    def _begin_fold(self, fold: Fold) -> None:
        if self._whole is None:
            pairs = zip(self._part("train"), self._part("validation"), strict=True)
            self._whole = tuple(map(torch.cat, pairs))
        rest, held_out = fold.split(self._classes_of(self._whole), self.split_seed)
        train, validation = (tuple(t[part] for t in self._whole) for part in (rest, held_out))
        # The original keeps its own parts.
        self.parts = {**self.parts, "train": train, "validation": validation}

    def _part(self, name: str) -> tuple[Tensor, ...]:
        return after_setup(self.parts.get(name))

    def _batches(self, name: str, batch_size: int, shuffle: bool = False) -> TensorBatches:
        return batches_for(self.trainer, self._part(name), batch_size, shuffle=shuffle, seed=self.seed)

    def train_dataloader(self) -> TensorBatches:
        """Returns shuffled batches of the training samples."""
        return self._batches("train", self.batch_size, shuffle=True)

    def val_dataloader(self) -> TensorBatches | list[Tensor]:
        """Returns batches of the validation samples in order; an empty list if there are none."""
        return self._batches("validation", self.eval_batch_size) if len(self._part("validation")[0]) else []

    def test_dataloader(self) -> TensorBatches | list[Tensor]:
        """Returns batches of the test samples in order; of the validation samples if there is no test."""
        return self._batches("test", self.eval_batch_size) if "test" in self.parts else self.val_dataloader()

    def predict_dataloader(self) -> TensorBatches:
        """Returns batches of the samples for predictions in order."""
        return self._batches("predict", self.eval_batch_size)

    def on_after_batch_transfer(self, batch: tuple[Tensor, ...], dataloader_idx: int) -> tuple[Tensor, ...]:
        """Converts the samples of a batch by `to_input` on their device."""
        x, *rest = batch
        inputs = self.to_input(x)
        # Lightning converted the batch to the precision of the training when it was still uint8.
        return (inputs if self.trainer is None else self.trainer.precision_plugin.convert_input(inputs), *rest)


def to_tensor(x: Any) -> Tensor:
    """Returns samples as a tensor: uint8, float32, or int64 for other integers; floating point must be finite.

    Raises:
        DataError: ``x`` is no array of numbers with two dimensions or more, or a value is not finite.
    """
    if not isinstance(x, Tensor):
        array = np.asarray(x)
        if array.dtype.kind not in "buif":
            raise DataError(f"x must be an array of numbers, got {type(x).__name__} of dtype {array.dtype}")
        # torch has neither negative strides nor NumPy's other byte orders; a copy of a read-only array may be written.
        array = array.astype(array.dtype.newbyteorder("="), copy=False)
        x = torch.from_numpy(np.array(array, order="C"))
    x = x.detach()
    if x.dim() < 2:
        raise DataError(f"x must have a first dimension of samples and at least one more, got shape {tuple(x.shape)}")
    if x.dtype == torch.bool or x.is_floating_point():
        x = x.to(torch.float32)
        wrong = (~x.isfinite()).flatten(1).any(dim=1).nonzero()
        if len(wrong):
            raise DataError(f"x has a value that is not finite in sample {int(wrong[0])}")
    elif x.dtype != torch.uint8:
        x = x.long()
    return x.contiguous()


def are_texts(x: Any) -> bool:
    """Returns True for a list, tuple or array of texts."""
    if isinstance(x, np.ndarray):
        return x.ndim == 1 and x.dtype.kind in "OUS" and all(isinstance(text, str) for text in x)
    return isinstance(x, (list, tuple)) and bool(x) and all(isinstance(text, str) for text in x)


def encode_texts(texts: Sequence[str | bytes], length: int | None = None) -> Tensor:
    """Returns texts as their bytes in UTF-8, int64 ``(N, T)``, padded with zeros.

    Args:
        texts: the texts.
        length: the number of bytes, T, to which longer texts are cut; None takes the longest, at most 512.
    """
    encoded = [text.encode() if isinstance(text, str) else text for text in texts]
    length = min(_MAX_TEXT, max(1, *map(len, encoded))) if length is None else length
    rows = torch.zeros(len(encoded), length, dtype=torch.long)
    for row, content in zip(rows, encoded, strict=True):
        part = torch.frombuffer(bytearray(content[:length] or b"\0"), dtype=torch.uint8)
        row[: len(part)] = part.long()
    return rows


def possible_layouts(x: Tensor) -> list[str]:
    """Returns the layouts that samples may have, the likeliest first.

    Args:
        x: samples ``(N, ...)``.
    """
    if x.dim() == 3 and _kind_of(x) != "int":
        # Floating point may be sequences (N, T, F) just as well.
        return ["image", "plain"]
    if x.dim() == 4:
        is_first, is_last = x.shape[1] in _CHANNELS, x.shape[3] in _CHANNELS
        return ["channels_last", "channels_first"] if is_last and not is_first else ["channels_first", "channels_last"]
    return ["plain"]


def _kind_of(x: Tensor) -> str:
    return "uint8" if x.dtype == torch.uint8 else "float" if x.is_floating_point() else "int"
