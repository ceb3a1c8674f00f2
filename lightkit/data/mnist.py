"""Data modules of MNIST and Fashion-MNIST: 60,000 training and 10,000 test images of 28x28."""

from __future__ import annotations

import hashlib
import math
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, ClassVar

from lightkit._util.atomic_write import write_atomically
from lightkit._util.cache_dir import cache_root
from lightkit.data.advice import advise
from lightkit.data.idx import MAX_BYTES, read_idx, read_idx_shape
from lightkit.data.images import ImageDataModule, ImageSet, check_same_size
from lightkit.errors import DataError

_FILES = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}
_TIMEOUT_SECONDS = 20

# Limits in bytes of a header and of a file of labels: the largest set of the family has a million labels.
_MAX_HEADER, _MAX_LABELS = 1024, 1 << 24


class MNIST(ImageDataModule):
    """A data module of the handwritten digits of LeCun et al. [1]_.

    It reads the four IDX files, compressed or not, from ``data_dir`` if that is given; else from ``mnist`` below
    ``/usr/share/datasets``; else from the cache directory. If none of these has all four files, it downloads them from
    public mirrors to the cache directory and checks their published MD5 sums.

    Args:
        data_dir: a directory with the four files, which are then not searched elsewhere. Their images may have any
            size, if all have the same.
        download: True downloads the files if they are not on this machine; False raises an error instead.
        **options: the arguments of `ImageDataModule`.

    Raises:
        DataError: the files are missing, damaged or cannot be downloaded; raised by `prepare_data` and `setup`.

    References:
        .. [1] LeCun et al., Gradient-based learning applied to document recognition, Proc. IEEE 1998.
    """

    classes = tuple("0123456789")
    image_size = 28

    directory_name = "mnist"
    debian_package: str | None = None
    mirrors = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/")
    md5: ClassVar[dict[str, str]] = {
        "train_images": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train_labels": "d53e105ee54ea40749a09fcbcd1e9432",
        "test_images": "9fb629c4189551a2d022fa330f9573f3",
        "test_labels": "ec29112dd5afa0611ce80d1b7f02629c",
    }

    def __init__(self, data_dir: str | None = None, download: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self.data_dir = data_dir
        self.download = download

    def prepare_data(self) -> None:
        """Downloads the files that are missing. Lightning calls this method in one process of each machine."""
        if self._find_directory() is None:
            self._download()

    def read(self) -> tuple[ImageSet, ImageSet]:
        """Reads the training set and the test set; the official ones have 60,000 and 10,000 images."""
        directory = self._find_directory() or self._download()
        return self._read_set(directory, "train"), self._read_set(directory, "test")

    def image_shape(self) -> tuple[int, int]:
        """Returns height and width of the images in pixels; with ``data_dir``, those in the headers of its files.

        Raises:
            DataError: ``data_dir`` lacks a file, a header is damaged, or the training and the test set differ.
        """
        if self.train is not None or self.data_dir is None or (directory := self._find_directory()) is None:
            return super().image_shape()
        paths = [_existing_file(directory, _FILES[f"{part}_images"]) for part in ("train", "test")]
        shapes = [read_idx_shape(path)[1:] for path in paths]
        if any(len(shape) != 2 for shape in shapes):
            # `setup` says what is wrong with such files.
            return super().image_shape()
        check_same_size(type(self).__name__, *shapes)
        height, width = shapes[0]
        return height, width

    def _read_set(self, directory: Path, part: str) -> ImageSet:
        labels = read_idx(_existing_file(directory, _FILES[f"{part}_labels"]), _MAX_LABELS)
        # One image more than there are labels may be read: `ImageSet.check` then reports both numbers.
        pixels = math.prod(super().image_shape())
        max_bytes = max(MAX_BYTES, _MAX_HEADER + (len(labels) + 1) * pixels)
        return ImageSet(read_idx(_existing_file(directory, _FILES[f"{part}_images"]), max_bytes), labels.long())

    def _find_directory(self) -> Path | None:
        """Returns ``data_dir``, else the first known directory with all four files, or None.

        Raises:
            DataError: ``data_dir`` lacks a file.
        """
        if self.data_dir is not None:
            directory = Path(self.data_dir).expanduser()
            missing = [file for file in _FILES.values() if _find_file(directory, file) is None]
            if missing:
                raise DataError(f"data_dir={directory} lacks {', '.join(missing)} (as they are, or with .gz)")
            return directory
        return next((d for d in self._known_directories() if all(self._is_intact(d, name) for name in _FILES)), None)

    def _is_intact(self, directory: Path, name: str) -> bool:
        """Returns True if the file of ``name`` exists in ``directory`` and, if it was downloaded, has its MD5 sum."""
        path = _find_file(directory, _FILES[name])
        is_downloaded = path is not None and path.is_relative_to(cache_root()) and path.suffix == ".gz"
        return path is not None and (not is_downloaded or _md5(path.read_bytes()) == self.md5[name])

    def _known_directories(self) -> list[Path]:
        return [Path("/usr/share/datasets") / self.directory_name, cache_root() / "data" / self.directory_name]

    def _download(self) -> Path:
        if not self.download:
            raise DataError(f"{self._not_here()}; download=true downloads it")
        directory = cache_root() / "data" / self.directory_name
        for name, file in _FILES.items():
            path = directory / f"{file}.gz"
            if self._is_intact(directory, name):
                continue
            tried = []
            for mirror in self.mirrors:
                problem = _fetch(mirror + path.name, path, self.md5[name])
                if problem is None:
                    break
                tried.append(f"{mirror}: {problem}")
            else:
                raise DataError(self._no_network(tried))
        return directory

    def _not_here(self) -> str:
        looked = ", ".join(map(str, self._known_directories()))
        return f"{type(self).__name__} is not on this machine (looked in {looked})"

    def _no_network(self, tried: list[str]) -> str:
        files = ", ".join(_FILES.values())
        ways = [f"put the four files into a directory and pass {advise('data_dir=DIRECTORY')} ({files})"]
        if self.debian_package:
            ways.append(f"on Debian and Ubuntu: apt-get install {self.debian_package}")
        else:
            ways.append("train on mnist_5k (lightkit.data.MNIST5k), 5,000 of its digits, which needs no network")
        return (
            f"{self._not_here()} and could not be downloaded:\n  "
            + "\n  ".join(tried)
            + "\nTwo ways out: "
            + "; or ".join(ways)
        )


class FashionMNIST(MNIST):
    """A data module of articles of clothing in the format of MNIST [1]_.

    The arguments and the search for the files are those of `MNIST`; the directory's name is ``fashion-mnist``.

    References:
        .. [1] Xiao et al., Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms, 2017.
    """

    classes = (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    )
    directory_name = "fashion-mnist"
    debian_package = "dataset-fashion-mnist"
    mirrors = (
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
    )
    md5: ClassVar[dict[str, str]] = {
        "train_images": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train_labels": "25c81989df183df01b3e8a0aad5dffbe",
        "test_images": "bef4ecab320f06d8554ea6380940ec79",
        "test_labels": "bb300cfdad3c16e7a12a480ee83cd310",
    }


def _find_file(directory: Path, name: str) -> Path | None:
    return next((path for path in (directory / name, directory / f"{name}.gz") if path.is_file()), None)


def _existing_file(directory: Path, name: str) -> Path:
    if (path := _find_file(directory, name)) is None:
        raise DataError(f"{directory} lacks {name} (as it is, or with .gz)")
    return path


def _fetch(url: str, path: Path, md5: str) -> str | None:
    """Downloads ``url`` to ``path`` if its MD5 sum is ``md5``; returns the reason of a failure, or None."""
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response:
            data = response.read()
    except (urllib.error.URLError, OSError, TimeoutError) as error:
        return str(getattr(error, "reason", error))
    if (got := _md5(data)) != md5:
        return f"{path.name} has MD5 {got}, expected {md5}"
    write_atomically(path, lambda file: file.write(data))
    return None


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()
