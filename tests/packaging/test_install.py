"""The package is the same from a wheel, editable, and as a bare checkout; the wheel of an sdist is that wheel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

_CHECKOUT = Path(__file__).resolve().parents[2]

# What an installation says of itself, as JSON.
_PROBE = """
import json
from importlib.resources import files
from pathlib import Path
import lightkit
from lightkit.native import target, toolchain
print(json.dumps({
    "package": str(Path(lightkit.__file__).parent),
    "sources": [str(path.relative_to(toolchain.SOURCE_DIR)) for path in toolchain.sources(False)],
    "key": target.base_key(),
    "conf": str(files("lightkit.conf")),
    "train.yaml": files("lightkit.conf").joinpath("train.yaml").is_file(),
    "py.typed": files("lightkit").joinpath("py.typed").is_file(),
}))
"""

_IMPORT_LIBRARY = """
import sys
for name in ("lightkit.ops", "lightkit.nn", "lightkit.optim", "lightkit.models"):
    __import__(name)
    for heavy in ("lightning", "pytorch_lightning", "hydra", "omegaconf"):
        if heavy in sys.modules:
            sys.exit(f"importing {name} imports {heavy}")
"""


@dataclass(frozen=True)
class Installation:
    """An environment with lightkit in it, and where that must come from."""

    python: Path
    package: Path
    variables: dict[str, str]

    def run(self, *command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=cwd, env=self.variables, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )


def _checked(*command: str | Path, env: dict[str, str] | None = None) -> None:
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=env)
    assert result.returncode == 0, result.stdout + result.stderr


def _clean_environment() -> dict[str, str]:
    """Without what would bring in another lightkit than the one that is installed."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


def _site_packages(python: Path) -> Path:
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(subprocess.check_output([python, "-I", "-c", code], text=True).strip())


def _new_environment(directory: Path) -> Path:
    """A virtual environment of its own that finds this one's packages after its own; returns its interpreter."""
    venv.create(directory, with_pip=False, symlinks=True)
    python = directory / "bin" / "python"
    borrowed = [path for path in sys.path if path.endswith(("site-packages", "dist-packages")) and Path(path).is_dir()]
    # Files like this one are read in the order of their names: an editable lightkit's comes before.
    (_site_packages(python) / "zz_borrowed.pth").write_text("\n".join(borrowed) + "\n")
    return python


def _install(directory: Path, *what: str | Path) -> Path:
    pytest.importorskip("pip")
    python = _new_environment(directory)
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation", "--no-index"]
    # The borrowed packages may hold another lightkit, which is not this environment's to remove.
    options.append("--ignore-installed")
    _checked(python, "-m", "pip", "install", *options, *what, env=_clean_environment())
    return python


@pytest.fixture(scope="session")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sdist, the wheel of the checkout, and the wheel of the sdist."""
    direct, through = tmp_path_factory.mktemp("direct"), tmp_path_factory.mktemp("through-sdist")
    command = (sys.executable, "-m", "build", "--no-isolation", _CHECKOUT, "--outdir")
    _checked(*command, direct, "--wheel", env=_clean_environment())
    _checked(*command, through, env=_clean_environment())
    (sdist,), (direct_wheel,), (sdist_wheel,) = (
        through.glob("*.tar.gz"),
        direct.glob("*.whl"),
        through.glob("*.whl"),
    )
    return {"sdist": sdist, "wheel": direct_wheel, "sdist-wheel": sdist_wheel}


@pytest.fixture(scope="session", params=["wheel", "editable", "checkout"])
def installation(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    directory = tmp_path_factory.mktemp(request.param) / "venv"
    variables = _clean_environment()
    if request.param == "checkout":
        python = _new_environment(directory)
        return Installation(python, _CHECKOUT / "lightkit", {**variables, "PYTHONPATH": str(_CHECKOUT)})
    if request.param == "editable":
        return Installation(_install(directory, "--editable", _CHECKOUT), _CHECKOUT / "lightkit", variables)
    python = _install(directory, request.getfixturevalue("distributions")["wheel"])
    return Installation(python, _site_packages(python) / "lightkit", variables)


@pytest.fixture(scope="session")
def own_key() -> str:
    """The key that the checkout's own sources have for this torch and this machine."""
    variables = {**_clean_environment(), "PYTHONPATH": str(_CHECKOUT)}
    return json.loads(subprocess.check_output([sys.executable, "-c", _PROBE], env=variables, text=True))["key"]


def test_package_is_complete(installation: Installation, own_key: str, tmp_path: Path) -> None:
    """Kernel sources, configuration and type marker are found, and every form shares one compiled library."""
    result = installation.run(installation.python, "-c", _PROBE, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert Path(found["package"]).resolve() == installation.package.resolve()
    assert Path(found["conf"]).resolve() == (installation.package / "conf").resolve()
    assert "bindings.cpp" in found["sources"]
    assert found["train.yaml"] and found["py.typed"]
    assert found["key"] == own_key


def test_module_lists_the_experiments(installation: Installation, tmp_path: Path) -> None:
    """`python -m lightkit.train --help` finds its configuration from any directory."""
    result = installation.run(installation.python, "-m", "lightkit.train", "--help", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "\nexperiment: char_rnn, cnn, " in result.stdout
    assert "+experiment=cnn" in result.stdout


@pytest.mark.parametrize("installation", ["wheel", "editable"], indirect=True)
def test_console_script_lists_the_experiments(installation: Installation, tmp_path: Path) -> None:
    """`lightkit-train --help` is the same command wherever there is an installation."""
    result = installation.run(installation.python.parent / "lightkit-train", "--help", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "\nexperiment: char_rnn, cnn, " in result.stdout


@pytest.mark.parametrize("installation", ["wheel"], indirect=True)
def test_installed_package_trains(installation: Installation, tmp_path: Path) -> None:
    """A job runs from a wheel alone, and writes where it was started."""
    command = ("-m", "lightkit.train", "+experiment=cnn", "+debug=quick")
    result = installation.run(installation.python, *command, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (metrics,) = tmp_path.glob("runs/cnn/*/metrics.json")
    assert json.loads(metrics.read_text())["epochs"] == 1


@pytest.mark.parametrize("installation", ["wheel"], indirect=True)
@pytest.mark.parametrize("command", [f"lightkit-{name}" for name in ("evaluate", "predict", "runs", "build", "launch")])
def test_every_console_script_starts(installation: Installation, command: str, tmp_path: Path) -> None:
    """Each other declared command resolves to a function that explains itself."""
    result = installation.run(installation.python.parent / command, "--help", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert command.replace("-", ".") in result.stdout


@pytest.mark.parametrize("installation", ["wheel"], indirect=True)
def test_library_does_not_import_the_application(installation: Installation, tmp_path: Path) -> None:
    """Ops, losses, optimizers and models cost no Lightning and no Hydra."""
    result = installation.run(installation.python, "-c", _IMPORT_LIBRARY, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_wheel_contents(distributions: dict[str, Path]) -> None:
    """A wheel holds the package with its configuration and sources as real files, once, and nothing else."""
    with zipfile.ZipFile(distributions["wheel"]) as wheel:
        entries = {entry.filename: entry for entry in wheel.infolist()}
        assert len(entries) == len(wheel.infolist())
        for folder in ("conf", "csrc"):
            expected = {
                f"lightkit/{path.relative_to(_CHECKOUT)}": path.read_bytes()
                for path in (_CHECKOUT / folder).rglob("*")
                if path.is_file() and "__pycache__" not in path.parts
            }
            packed = {name: wheel.read(name) for name in entries if name.startswith(f"lightkit/{folder}/")}
            assert packed == expected
    assert {name.partition("/")[0].partition("-")[0] for name in entries} == {"lightkit", "lightkit_train"}
    assert not [name for name in entries if name.endswith((".pyc", ".so", ".o")) or "__pycache__" in name]
    symlink = 0o120000
    assert not [name for name, entry in entries.items() if (entry.external_attr >> 16) & 0o170000 == symlink]
    assert "lightkit/py.typed" in entries
    assert any(name.endswith("/licenses/LICENSE") for name in entries)


def test_wheel_of_the_sdist_is_the_wheel_of_the_checkout(distributions: dict[str, Path]) -> None:
    """What is published as source builds what is published as wheel."""
    contents = []
    for kind in ("wheel", "sdist-wheel"):
        with zipfile.ZipFile(distributions[kind]) as wheel:
            contents.append({name: wheel.read(name) for name in wheel.namelist()})
    assert contents[0] == contents[1]
