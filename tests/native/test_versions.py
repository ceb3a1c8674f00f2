"""The versions that every command prints, and the state of the kernels, without an import of torch."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch

import lightkit
from lightkit import __main__ as main
from lightkit.native import cache, installed_torch, versions


def test_version_lines():
    """The lines have the versions of the installed packages."""
    lines = versions.version_lines().splitlines()
    assert lines[:3] == [
        f"lightkit {lightkit.__version__}",
        f"torch {torch.__version__}",
        f"lightning {version('lightning')}",
    ]
    assert lines[-1].startswith("kernels built for this machine (")


def test_kernel_state(monkeypatch, tmp_path):
    """Kernels for another torch or processor, a damaged library and an empty cache are not built for this machine."""
    monkeypatch.setattr(versions, "policy", lambda: "auto")
    build = cache.find().parent
    assert versions.kernel_state().startswith("built for this machine (")
    monkeypatch.setenv("LIGHTKIT_CACHE_DIR", str(tmp_path))
    assert versions.kernel_state().startswith("not built for this machine")
    # A build with CUDA is judged by its manifest, because torch alone knows the GPUs.
    copy = tmp_path / "native" / build.name
    copy.mkdir(parents=True, mode=0o700)
    for path in build.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(installed_torch, "cuda_version", lambda: "12.6")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert versions.kernel_state().startswith("built for this machine")
    manifest = json.loads((copy / cache.MANIFEST).read_text())
    for change in ({"torch": "1.0"}, {"instructions": ["avx9000"]}, {"python": "x"}, {"sha256": "0"}):
        (copy / cache.MANIFEST).write_text(json.dumps({**manifest, **change}))
        assert versions.kernel_state().startswith("not built for this machine"), change
    monkeypatch.setattr(versions, "policy", lambda: "off")
    assert versions.kernel_state() == "off: LIGHTKIT_NATIVE=off"


def test_the_installed_torch(monkeypatch, forget_keys):
    """The facts from torch's files are those of the imported torch, and reading them imports nothing.

    The key of a build for CUDA needs the architectures, too, which torch is imported for where no variable has them.
    """
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    forget_keys()
    code = (
        "import sys; from lightkit.native import installed_torch as t, target, versions; "
        "print(t.version(), t.git_version(), t.cuda_version(), target.base_key()); versions.version_lines(); "
        "assert 'torch' not in sys.modules"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    facts = (torch.__version__, torch.version.git_version, torch.version.cuda, versions.target.base_key())
    assert said == [str(fact) for fact in facts]


@pytest.mark.parametrize("name", ["train", "evaluate", "predict", "build", "launch.__main__", "runs"])
def test_every_command_has_it(monkeypatch, capsys, name):
    """--version of each command prints the versions and ends with status 0."""
    module = __import__(f"lightkit.{name}", fromlist=["main"])
    monkeypatch.setattr(sys, "argv", ["x", "--version"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    try:
        status = module.main()
    except SystemExit as error:
        status = error.code
    assert status == 0 and capsys.readouterr().out == versions.version_lines() + "\n"


def test_the_list_of_commands(capsys):
    """``python -m lightkit`` names every command in one line, and says what is wrong with another word."""
    assert main.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in ("train", "evaluate", "predict", "runs", "build", "launch"):
        assert sum(f"python -m lightkit.{name} " in line for line in lines) >= 1
    assert main.main(["train", "+experiment=cnn"]) == 1
    assert "python -m lightkit.train, with a dot" in capsys.readouterr().err
    assert main.main(["--version"]) == 0 and "torch" in capsys.readouterr().out
