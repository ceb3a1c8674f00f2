"""What lightkit says of its own installation, and of the other project that is called lightkit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import lightkit
from lightkit._util import installation

_PACKAGE = Path(lightkit.__file__).parent

# What each module says when it is imported first.
_IMPORTS = """
import importlib, sys
for name in ("lightkit.train", "lightkit.build", "lightkit.launch.__main__", "lightkit.optim", "lightkit.callbacks"):
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(name, error)
    for loaded in [name for name in sys.modules if name.partition(".")[0] == "lightkit"]:
        del sys.modules[loaded]
"""


def _install_other(site: Path, entry_points: str = "") -> None:
    """Writes the metadata of a distribution ``lightkit``."""
    metadata = site / "lightkit-0.5.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: lightkit\nVersion: 0.5.0\n")
    (metadata / "entry_points.txt").write_text(entry_points)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that Python finds distributions in first."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_a_checkout_is_told_the_editable_command():
    """The tests run in a checkout."""
    assert installation.how_to_install("app").startswith("pip install -e '.[app]'")


def test_an_installation_is_told_the_distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Never ``lightkit`` alone: the index answers that name with another project."""
    monkeypatch.setattr(lightkit, "__file__", str(tmp_path / "lightkit" / "__init__.py"))
    assert installation.how_to_install("app").startswith("pip install 'lightkit-train[app]'")


def test_the_other_distribution_is_named_with_its_remedy(site: Path):
    """Each message that proposes an installation names the conflict too."""
    _install_other(site)
    conflict = installation.find_conflict()
    assert "lightkit 0.5.0 is another project's" in conflict and "pip uninstall lightkit" in conflict
    assert conflict in installation.how_to_install("app")


def test_a_checkout_installed_under_the_former_name_is_no_conflict(site: Path):
    """The commands show whose a distribution is."""
    _install_other(site, "[console_scripts]\nlightkit-train = lightkit.train:command\n")
    assert installation.find_conflict() is None


def test_a_command_warns_of_the_other_distribution_in_one_line(site: Path, call, recwarn: pytest.WarningsRecorder):
    """The command runs all the same: only an uninstallation of the other one removes lightkit's files."""
    _install_other(site)
    assert call("train", "+experiment=cnn", "+unknown=1", cwd=site).returncode == 1
    assert [str(w.message) for w in recwarn if "another project" in str(w.message)] == [installation.find_conflict()]


def test_an_overwritten_package_is_named(tmp_path: Path):
    """The other project's ``__init__.py`` is in the place of lightkit's: each import says so."""
    package = tmp_path / "lightkit"
    package.mkdir()
    for path in _PACKAGE.iterdir():
        (package / path.name).symlink_to(path)
    (package / "__init__.py").unlink()
    (package / "__init__.py").write_text("__all__ = []\n")
    result = subprocess.run([sys.executable, "-c", _IMPORTS], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 5 and all("was overwritten by another project's distribution" in line for line in lines)
