"""Data modules of Lightning, and the readers of their data sets."""

from lightkit._util.deprecated import renamed
from lightkit.data.batches import TensorBatches
from lightkit.data.images import ImageDataModule, ImageSet
from lightkit.data.mnist import MNIST, FashionMNIST
from lightkit.data.mnist_5k import MNIST5k
from lightkit.data.series import Series, SeriesDataModule
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
]

__getattr__ = renamed(__name__, {"fetch_slices": "lightkit.loops.slicing.fetch_slices"})
