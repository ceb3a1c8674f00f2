"""Data modules of Lightning, and the readers of their data sets."""

from lightkit._util.deprecated import renamed
from lightkit.data.arrays import ArrayFormat, DataModule
from lightkit.data.batches import TensorBatches
from lightkit.data.folds import Fold, Foldable
from lightkit.data.image_folder import ImageFolder
from lightkit.data.images import ImageDataModule, ImageSet
from lightkit.data.mnist import MNIST, FashionMNIST
from lightkit.data.mnist_5k import MNIST5k
from lightkit.data.series import Series, SeriesDataModule
from lightkit.data.sizes import sizes_for, sizes_of, with_sizes
from lightkit.data.statsmodels import CO2, Sunspots
from lightkit.data.tabular import TableDataModule
from lightkit.data.text import Text

__all__ = [
    "CO2",
    "MNIST",
    "ArrayFormat",
    "DataModule",
    "FashionMNIST",
    "Fold",
    "Foldable",
    "ImageDataModule",
    "ImageFolder",
    "ImageSet",
    "MNIST5k",
    "Series",
    "SeriesDataModule",
    "Sunspots",
    "TableDataModule",
    "TensorBatches",
    "Text",
    "sizes_for",
    "sizes_of",
    "with_sizes",
]

__getattr__ = renamed(__name__, {"fetch_slices": "lightkit.loops.slicing.fetch_slices"})
