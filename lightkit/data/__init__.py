"""LightningDataModules and the readers of their data sets."""

from lightkit.data.batches import TensorBatches
from lightkit.data.images import ImageDataModule, ImageSet
from lightkit.data.mnist import MNIST, FashionMNIST
from lightkit.data.mnist_5k import MNIST5k
from lightkit.data.series import Series, SeriesDataModule
from lightkit.data.slices import fetch_slices
from lightkit.data.statsmodels import CO2, Sunspots
from lightkit.data.text import Text

__all__ = [
    "CO2",
    "MNIST",
    "FashionMNIST",
    "ImageDataModule",
    "ImageSet",
    "MNIST5k",
    "Series",
    "SeriesDataModule",
    "Sunspots",
    "TensorBatches",
    "Text",
    "fetch_slices",
]
