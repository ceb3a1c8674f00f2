"""Data modules of two series from the package statsmodels, which need no network."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightkit._util.installation import how_to_install
from lightkit.data.columns import Column, read_column
from lightkit.data.series import SeriesDataModule
from lightkit.errors import DataError


class Sunspots(SeriesDataModule):
    """A data module of the mean number of sunspots in each of the 309 years from 1700 to 2008.

    Source: the yearly means of SIDC, Royal Observatory of Belgium, from a file of statsmodels. The arguments are those
    of `SeriesDataModule`.
    """

    def read(self) -> Column:
        """Reads the column of the means, one value for each year."""
        return read_column(_source("sunspots"), "SUNACTIVITY", "YEAR")


class CO2(SeriesDataModule):
    """A data module of carbon dioxide over Mauna Loa in ppm: 2,284 weeks from March 1958 to December 2001.

    59 weeks, the last of them in 1985, have no measurement. Source: Keeling and Whorf, Atmospheric CO2 concentrations
    derived from flask air samples at sites in the SIO network, Oak Ridge National Laboratory 2004, from a file of
    statsmodels.

    Args:
        missing: ``"error"`` rejects the weeks without a measurement, ``"interpolate"`` interpolates them linearly.
        **options: the arguments of `SeriesDataModule`.
    """

    def __init__(self, missing: str = "interpolate", **options: Any) -> None:
        super().__init__(**options)
        self.missing = missing

    def read(self) -> Column:
        """Reads the column of the concentrations, one value for each week."""
        return read_column(_source("co2"), "co2", "date", self.missing)


def _source(name: str) -> Path:
    # An import of statsmodels would load pandas, which takes longer than an epoch.
    spec = find_spec("statsmodels")
    if spec is None:
        raise DataError(f"data={name} reads a file of the package statsmodels: {how_to_install('app')}")
    source = Path(str(spec.origin)).parent / "datasets" / name / f"{name}.csv"
    if not source.is_file():
        raise DataError(f"statsmodels is installed but {source} is missing: reinstall statsmodels")
    return source
