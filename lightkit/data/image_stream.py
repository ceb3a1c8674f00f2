"""Images that are decoded whenever they are asked for, since all of them together are too large for the memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightkit.data.batches import Batches
from lightkit.data.image_decoder import ignore_warnings_of_pillow
from lightkit.data.image_files import ImageFormat, count_threads, read_picture
from lightkit.data.image_walk import ImageFile

# The number of batches that are decoded ahead of the training.
_AHEAD = 3


class StreamedImages:
    """A sequence of images, each of which is decoded when it is indexed.

    Args:
        files: the files.
        form: the format of the images.
    """

    def __init__(self, files: Sequence[ImageFile], form: ImageFormat) -> None:
        self.files = list(files)
        self.form = form

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor that all images would be: ``(N, H, W)`` or ``(N, C, H, W)``."""
        return (len(self.files), *self.form.shape)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        """Returns the image at ``index``, uint8.

        Raises:
            DataError: the file cannot be read any more.
        """
        return torch.from_numpy(read_picture(self.files[index].path, self.form).pixels)


class StreamedBatches(Batches):
    """An iterable over batches of images and labels, which threads decode while the training computes.

    Order and position are those of `lightkit.data.batches.Batches`.

    Args:
        images: the images.
        labels: their classes, int64 ``(N)``.
        batch_size: the number of samples in a batch of this process; the last batch may be smaller.
        **options: the other arguments of `Batches`.

    Raises:
        ValueError: ``batch_size`` is below 1.
    """

    def __init__(self, images: StreamedImages, labels: Tensor, batch_size: int, **options: Any) -> None:
        super().__init__(len(images), batch_size, **options)
        self.images = images
        self.labels = labels

    def _serve(self, order: Tensor | None, first: int) -> Iterator[tuple[Tensor, ...]]:
        # The threads work between two batches too, so that no context of this function would hold their warnings.
        ignore_warnings_of_pillow()
        order = torch.arange(len(self.images)) if order is None else order
        pool = ThreadPoolExecutor(count_threads())
        waiting: deque[tuple[Tensor, list[Future[np.ndarray]]]] = deque()
        try:
            for chosen in self._slices(first):
                indices = order[chosen]
                waiting.append((indices, [pool.submit(self._decode, index) for index in indices.tolist()]))
                if len(waiting) > _AHEAD:
                    yield self._collect(*waiting.popleft())
            while waiting:
                yield self._collect(*waiting.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _decode(self, index: int) -> np.ndarray:
        return read_picture(self.images.files[index].path, self.images.form).pixels

    def _collect(self, indices: Tensor, pixels: list[Future[np.ndarray]]) -> tuple[Tensor, ...]:
        return torch.from_numpy(np.stack([future.result() for future in pixels])), self.labels[indices]
