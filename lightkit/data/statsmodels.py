"""Data modules of two series from the package statsmodels, which need no network."""

from __future__ import annotations

import csv
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightkit._util.installation import how_to_install
from lightkit.data.columns import Column, check_missing, close_gaps
from lightkit.data.series import SeriesDataModule
from lightkit.errors import DataError


class Sunspots(SeriesDataModule):
    """A data module of the mean number of sunspots in each of the 309 years from 1700 to 2008.

    Source: the yearly means of SIDC, Royal Observatory of Belgium, from a file of statsmodels. The arguments are those
    of `SeriesDataModule`.
    """

    def read(self) -> Column:
        """Reads the column of the means, one value for each year."""
        rows = _read_rows("sunspots")
        values = torch.tensor([float(value) for _, value in rows], dtype=torch.float64)
        return Column("SUNACTIVITY", values, torch.ones(len(rows), dtype=torch.bool), tuple(year for year, _ in rows))


class CO2(SeriesDataModule):
    """A data module of carbon dioxide over Mauna Loa in ppm: 2,284 weeks from March 1958 to December 2001.

    59 weeks, the last of them in 1985, have no measurement. Source: Keeling and Whorf, Atmospheric CO2 concentrations
    derived from flask air samples at sites in the SIO network, Oak Ridge National Laboratory 2004, from a file of
    statsmodels.

    Args:
        missing: ``"error"`` rejects the weeks without a measurement, ``"interpolate"`` interpolates them linearly,
            ``"drop"`` leaves them out.
        **options: the arguments of `SeriesDataModule`.
    """

    def __init__(self, missing: str = "interpolate", **options: Any) -> None:
        super().__init__(**options)
        check_missing(missing)
        self.missing = missing

    def read(self) -> Column:
        """Reads the column of the concentrations, one value for each week."""
        rows = _read_rows("co2")
        values = np.array([float(value or "nan") for _, value in rows])
        times = tuple(f"{day[:4]}-{day[4:6]}-{day[6:]}" for day, _ in rows)
        where = f"{_source('co2')}, column co2"
        return Column("co2", *close_gaps(values, times, self.missing, where, _describe_gap))


def _describe_gap(row: int) -> str:
    # The first line is the header.
    return f"line {row + 2} is empty"


def _read_rows(name: str) -> list[list[str]]:
    """Returns the rows of the file of a series, each a time and a value.

    `lightkit.data.tables` would find out how the file is written, which is known, and load pandas, which takes longer
    than an epoch.
    """
    with open(_source(name), newline="", encoding="utf-8") as file:
        return list(csv.reader(file))[1:]


def _source(name: str) -> Path:
    # An import of statsmodels would load pandas.
    spec = find_spec("statsmodels")
    if spec is None:
        raise DataError(f"data={name} reads a file of the package statsmodels: {how_to_install('app')}")
    source = Path(str(spec.origin)).parent / "datasets" / name / f"{name}.csv"
    if not source.is_file():
        raise DataError(f"statsmodels is installed but {source} is missing: reinstall statsmodels")
    return source
