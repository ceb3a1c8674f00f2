"""Two series that come with the package statsmodels: no network needed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from lightkit._util.installation import how_to_install
from lightkit.data.columns import Column, read_column
from lightkit.data.series import SeriesDataModule
from lightkit.errors import DataError


class Sunspots(SeriesDataModule):
    """The mean number of sunspots in each of the 309 years from 1700 to 2008.

    Source: the yearly means of SIDC, Royal Observatory of Belgium, as shipped in statsmodels. Arguments: see
    `SeriesDataModule`.
    """

    def read(self) -> Column:
        """One value a year."""
        return read_column(_source("sunspots"), "SUNACTIVITY", "YEAR")


class CO2(SeriesDataModule):
    """Carbon dioxide in the air over Mauna Loa in ppm, weekly from March 1958 to December 2001: 2,284 weeks.

    59 weeks, the last of them in 1985, were not measured. Source: Keeling and Whorf, Atmospheric CO2 concentrations
    derived from flask air samples at sites in the SIO network, Oak Ridge National Laboratory 2004, as shipped in
    statsmodels.

    Args:
        missing: ``"error"`` or ``"interpolate"``: see `lightkit.data.columns.read_column`.
        **options: see `SeriesDataModule`.
    """

    def __init__(self, missing: str = "interpolate", **options: float | None) -> None:
        super().__init__(**options)
        self.missing = missing

    def read(self) -> Column:
        """One value a week."""
        return read_column(_source("co2"), "co2", "date", self.missing)


def _source(name: str) -> Path:
    # Found, not imported: importing statsmodels loads pandas, which takes longer than an epoch.
    spec = find_spec("statsmodels")
    if spec is None:
        raise DataError(f"data={name} reads a file of the package statsmodels: {how_to_install('app')}")
    source = Path(spec.origin).parent / "datasets" / name / f"{name}.csv"
    if not source.is_file():
        raise DataError(f"statsmodels is installed but {source} is missing: reinstall statsmodels")
    return source
