"""The name of lightkit's distribution, the command that adds an extra, and the other project called lightkit.

On the package index the name ``lightkit`` belongs to another project. Its distribution installs a package ``lightkit``,
too, so that the two overwrite each other's files.
"""

from __future__ import annotations

from pathlib import Path

import lightkit

DISTRIBUTION = "lightkit-train"

_REMEDY = f"run pip uninstall lightkit, then pip install --force-reinstall --no-deps {DISTRIBUTION}"


def how_to_install(extra: str) -> str:
    """Returns the pip command that adds the extra ``extra`` to this copy of lightkit.

    For a checkout the command is ``pip install -e '.[EXTRA]'``, else ``pip install 'lightkit-train[EXTRA]'``. If the
    other project called lightkit is installed, the result of `find_conflict` follows in parentheses.
    """
    is_checkout = (Path(lightkit.__file__).parents[1] / "pyproject.toml").is_file()
    command = f"pip install -e '.[{extra}]'" if is_checkout else f"pip install '{DISTRIBUTION}[{extra}]'"
    return f"{command} ({conflict})" if (conflict := find_conflict()) else command


def find_conflict() -> str | None:
    """Returns a sentence with a remedy if the other project's distribution lightkit is installed; else None."""
    # Imported here: the import takes milliseconds, and importing lightkit does not need it.
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        found = distribution("lightkit")
    except PackageNotFoundError:
        return None
    # A checkout that was installed before the distribution was renamed declares lightkit's own commands.
    if any(command.name == "lightkit-train" for command in found.entry_points):
        return None
    return f"the distribution lightkit {found.version} is another project's and shares the directory: {_REMEDY}"


def check_package() -> None:
    """Rejects a package whose ``__init__.py`` is the other project's, which has no ``__version__``.

    Raises:
        ImportError: the other project's distribution was installed later and has overwritten files of this one.
    """
    if not hasattr(lightkit, "__version__"):
        raise ImportError(f"{lightkit.__file__} was overwritten by another project's distribution lightkit: {_REMEDY}")
