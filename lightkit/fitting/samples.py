"""The data module of whatever `lightkit.fit` gets as samples, and the form in which the model takes them."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from lightkit.data.arrays import DataModule, are_texts, encode_texts, possible_layouts, to_tensor
from lightkit.data.columns import Column
from lightkit.data.images import stratified_split
from lightkit.data.series import SeriesDataModule
from lightkit.data.text import Text
from lightkit.errors import ConfigError, DataError


class ArraySeries(SeriesDataModule):
    """A data module of a series in memory: see `lightkit.data.SeriesDataModule`.

    Args:
        values: the values in the order of time, ``(T)``, finite.
        **options: the arguments of `SeriesDataModule`.
    """

    def __init__(self, values: Any, **options: Any) -> None:
        super().__init__(**options)
        self._values = torch.as_tensor(np.asarray(values, dtype=np.float64))
        if not self._values.isfinite().all():
            raise DataError(f"x has a value that is not finite at index {int((~self._values.isfinite()).nonzero()[0])}")

    def read(self) -> Column:
        """Returns the series."""
        return Column("x", self._values, torch.ones_like(self._values, dtype=torch.bool))


class ArrayText(Text):
    """A data module of a text in memory: see `lightkit.data.Text`.

    Args:
        content: the text as bytes.
        **options: the arguments of `Text`.
    """

    def __init__(self, content: bytes, **options: Any) -> None:
        super().__init__(**options)
        self._content = torch.frombuffer(bytearray(content), dtype=torch.uint8)

    def _parts(self) -> list[Tensor]:
        return self._split(self._content)


class DatasetModule(pl.LightningDataModule):
    """A data module of a torch Dataset, of which a share is held out for validation.

    Args:
        dataset: a dataset with a length, whose samples are pairs of an input and a label or target.
        validation: the share that is held out, or a dataset.
        batch_size: the number of samples in a batch.
        seed: the seed of the order of the training batches.
    """

    def __init__(self, dataset: Dataset, validation: float | Dataset, batch_size: int, seed: int) -> None:
        super().__init__()
        self.batch_size, self.seed = batch_size, seed
        if isinstance(validation, Dataset):
            self.train, self.validation = dataset, validation
            return
        total = len(dataset)  # pyright: ignore[reportArgumentType]
        rest, held_out = stratified_split(torch.zeros(total, dtype=torch.long), round(total * validation), 0)
        self.train, self.validation = Subset(dataset, rest.tolist()), Subset(dataset, held_out.tolist())

    def train_dataloader(self) -> DataLoader:
        """Returns shuffled batches of the training samples."""
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(self.train, self.batch_size, shuffle=True, generator=generator)

    def val_dataloader(self) -> DataLoader | list[Any]:
        """Returns batches of the validation samples in order; an empty list if there are none."""
        return DataLoader(self.validation, self.batch_size) if len(self.validation) else []  # pyright: ignore


def make_data(
    model: Any, x: Any, y: Any, validation: Any, batch_size: int, seed: int, history: int | None
) -> pl.LightningDataModule:
    """Returns the data module of samples of any kind that `lightkit.fit` takes.

    Args:
        model: the model, or the name of one.
        x: the samples.
        y: their labels or targets; None if ``x`` has them or needs none.
        validation: the share for validation, or validation samples of the same kind.
        batch_size: the number of samples in a batch of training.
        seed: the seed of the order of the training batches.
        history: the number of values or bytes that a model of a series or text reads; None takes the default.

    Raises:
        LightkitError: the samples cannot be used.
    """
    if isinstance(x, pl.LightningDataModule):
        return x
    if isinstance(x, TensorDataset) and len(x.tensors) == 2 and y is None:
        # Tensors in memory need no loader that collates single samples.
        if isinstance(validation, TensorDataset):
            validation = validation.tensors
        x, y = x.tensors
    if isinstance(x, Dataset):
        return DatasetModule(x, validation, batch_size, seed)
    if isinstance(x, (str, bytes)) or are_texts(x):
        if y is None:
            return _make_text(x, batch_size, seed, history)
        x = encode_texts([x] if isinstance(x, (str, bytes)) else x)
    if y is None and np.ndim(x if not isinstance(x, Tensor) else x.detach().cpu().numpy()) == 1:
        return _make_series(model, x, validation, batch_size, seed, history)
    if y is None:
        raise ConfigError("y must have the labels or targets of the samples in x")
    inputs = to_tensor(x)
    layout = find_layout(model, inputs)
    classes = _all_classes(model, inputs, y, layout)
    return DataModule.from_arrays(
        inputs, y, validation=validation, batch_size=batch_size, seed=seed, layout=layout, classes=classes
    )


def probe(model: nn.Module, *inputs: Tensor) -> Tensor:
    """Returns the outputs of a model for a few samples, without a trace in the model and the random numbers."""
    parameter = next((p for p in model.parameters() if not isinstance(p, nn.parameter.UninitializedParameter)), None)
    if parameter is not None:
        moved = (tensor.to(parameter.device) for tensor in inputs)
        inputs = tuple(tensor.to(parameter.dtype) if tensor.is_floating_point() else tensor for tensor in moved)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(range(torch.cuda.device_count())):
            return model(*inputs)
    finally:
        model.train(was_training)


def find_layout(model: Any, x: Tensor) -> str:
    """Returns the first possible layout of the samples that the model takes.

    Args:
        model: the model, or the name of one.
        x: the samples.

    Raises:
        ConfigError: the model takes the samples in none of the layouts; the message has the model's error.
    """
    layouts = possible_layouts(x)
    if isinstance(model, str):
        return "plain" if model == "rnn" and x.is_floating_point() and x.dim() == 3 else layouts[0]
    problems = []
    for layout in layouts:
        form = DataModule.from_arrays(x[:2], layout=layout, validation=0)
        inputs = form.to_input(x[:2])
        try:
            probe(model, inputs)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            problems.append(f"as {tuple(inputs.shape)}: {str(error).strip().partition(chr(10))[0]}")
        else:
            return layout
    shape = ", ".join(map(str, x.shape[1:]))
    raise ConfigError(f"the model does not take samples of shape (N, {shape}): {'; '.join(problems)}")


def _all_classes(model: Any, x: Tensor, y: Any, layout: str) -> list[str] | None:
    """Returns the names of all classes of a model if ``y`` has numbers below their count; None otherwise.

    Some classes may be missing in ``y``.
    """
    if isinstance(model, str):
        return None
    outputs = probe(model, DataModule.from_arrays(x[:2], layout=layout, validation=0).to_input(x[:2]))
    values = y.detach().cpu().numpy() if isinstance(y, Tensor) else np.asarray(y)
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    is_number = values.ndim == 1 and values.dtype.kind in "ui" and len(values)
    if not is_number or not isinstance(outputs, Tensor) or outputs.dim() != 2 or outputs.shape[1] < 2:
        return None
    count = outputs.shape[1]
    return [str(number) for number in range(count)] if values.min() >= 0 and values.max() < count else None


def _make_text(x: Any, batch_size: int, seed: int, history: int | None) -> Text:
    parts = [x] if isinstance(x, (str, bytes)) else x
    content = b"\0".join(part.encode() if isinstance(part, str) else part for part in parts)
    return ArrayText(content, context=history or 128, batch_size=batch_size, seed=seed)


def _make_series(
    model: Any, x: Any, validation: Any, batch_size: int, seed: int, history: int | None
) -> SeriesDataModule:
    if isinstance(model, str):
        raise ConfigError(
            f"model={model!r} does not forecast; use a module such as lightkit.models.RNN(1, 32, horizon)"
        )
    if not isinstance(validation, (int, float)) or not 0 < validation < 0.5:
        raise ConfigError("validation must be a share above 0 and below 0.5 for a series, which is split by time")
    values = np.asarray(x.detach().cpu() if isinstance(x, Tensor) else x, dtype=np.float64)
    history = min(48, max(1, len(values) // 4)) if history is None else history
    outputs = probe(model, torch.zeros(2, history, 1))
    if outputs.dim() != 2:
        shape = tuple(outputs.shape)
        raise ConfigError(f"the model must return (N, horizon) for histories (N, {history}, 1), got {shape}")
    return ArraySeries(
        values,
        history=history,
        horizon=outputs.shape[1],
        validation_size=validation,
        test_size=validation,
        batch_size=batch_size,
        seed=seed,
    )
