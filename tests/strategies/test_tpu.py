"""Tests of the TPU strategy without a TPU: a CPU stands in for torch_tpu's device (fake_tpu), or for torch_xla's.

The tests show what reaches the device, what is read from it, and the errors; they show nothing about hardware.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch.utils.cpp_extension import include_paths, library_paths

from lightkit.app.checks import check_accelerator
from lightkit.checkpoints import load_checkpoint
from lightkit.errors import ConfigError
from lightkit.strategies import TorchTPU, TorchTPUAccelerator, tpu

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
QUICK = ["+experiment=cnn", "+debug=quick", "trainer=tpu", "hydra.run.dir=out"]

needs_xla = pytest.mark.skipif(find_spec("torch_xla") is None, reason="needs torch_xla")
# torch_xla comes before torch_tpu where both are installed.
needs_no_xla = pytest.mark.skipif(find_spec("torch_xla") is not None, reason="torch_xla is installed")

BACKENDS = [pytest.param("tpu", marks=needs_no_xla), pytest.param("xla", marks=needs_xla)]


def run(*command, cwd, fake=None):
    """Runs a Python program; ``fake`` is torch_tpu's device library, "" without a device, None without torch_tpu."""
    path = [] if fake is None else [str(HERE / "fake_tpu")]
    path += filter(None, [os.environ.get("PYTHONPATH")])
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "FAKE_TPU": str(fake or ""), "PJRT_DEVICE": "CPU"},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
    )


def the_error(result):
    """Returns the single error line of a failed command."""
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    return error


@pytest.fixture(scope="session")
def fake(tmp_path_factory):
    """Builds the library of the device that stands in for a TPU; returns its path."""
    library = tmp_path_factory.mktemp("fake_tpu") / "device.so"
    places = [f"-isystem{path}" for path in include_paths()] + [f"-L{path}" for path in library_paths()]
    options = ["-std=c++20", "-O0", "-shared", "-fPIC", "-o", str(library)]
    source = str(HERE / "fake_tpu" / "device.cpp")
    subprocess.run(["g++", *options, source, *places, "-ltorch", "-ltorch_cpu", "-lc10"], check=True)
    return library


@pytest.fixture(scope="session")
def outcomes(request, tmp_path_factory):
    """Returns a function of the outcome of `on_tpu` on a back end, which runs it once."""
    known = {}

    def outcome(backend):
        if backend not in known:
            file = tmp_path_factory.mktemp(backend) / "results.pt"
            fake = request.getfixturevalue("fake") if backend == "tpu" else None
            result = run(str(HERE / "on_tpu.py"), backend, str(file), cwd=HERE, fake=fake)
            assert result.returncode == 0, result.stderr
            known[backend] = torch.load(file, weights_only=False)
            # The test of the fallback needs kernels on the CPU.
            assert known[backend]["kernels"]
        return known[backend]

    return outcome


@pytest.mark.parametrize("backend", BACKENDS)
def test_operations(outcomes, backend):
    """Without kernels of lightkit, torch's operations give the same losses and gradients on the device."""
    outcome = outcomes(backend)
    for name, (value, gradient) in outcome["cpu"]["operations"].items():
        torch.testing.assert_close(outcome[backend]["operations"][name][0], value, msg=name)
        if gradient is not None:
            torch.testing.assert_close(outcome[backend]["operations"][name][1], gradient, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_optimizers(outcomes, backend):
    """Steps by a closure give the same weights; only skip_nonfinite reads a value from the device."""
    outcome = outcomes(backend)
    for name, expected in outcome["cpu"]["optimizers"].items():
        found = outcome[backend]["optimizers"][name]
        # Adam with float32 copies rounds to bfloat16, with a relative step of 1 / 256.
        tolerance = {"rtol": 1e-2, "atol": 1e-6} if "master" in name else {}
        torch.testing.assert_close(found["weight"], expected["weight"], msg=name, **tolerance)
        assert found["norm"] == (expected["norm"] and pytest.approx(expected["norm"], rel=1e-4)), name
        assert found["reads"] == (1 if name == "SGD skipping" else 0), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_trainer(outcomes, backend):
    """A fit with every plug-in gives the weights of a CPU, reads nothing between two steps, and saves CPU tensors."""
    outcome = outcomes(backend)
    fit, expected = outcome[backend]["fit"], outcome["cpu"]["fit"]
    assert (fit["device"], expected["device"]) == (backend, "cpu")
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(fit["weights"][name], weight, msg=name)
    assert fit["reads"] == [0] * 8
    assert fit["rate"] > 0
    # This process has no such device.
    state = load_checkpoint(fit["path"])["state_dict"]
    assert all(value.device.type == "cpu" for value in state.values())
    torch.testing.assert_close(state, fit["weights"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_plug_ins(outcomes, backend):
    """FuseKernels warns once that it replaces nothing; the lean loop runs on the device of torch_tpu."""
    fit = outcomes(backend)[backend]["fit"]
    assert len(fit["report"]) == 3 and all("kept" in line for line in fit["report"])
    assert sum("FuseKernels replaces nothing" in warning for warning in fit["warnings"]) == 1
    assert (fit["obstacle"] is None) == (backend == "tpu")


@needs_no_xla
def test_precision_and_clock(outcomes):
    """bf16-mixed autocasts on the TPU, not on a GPU; the clock of an epoch synchronizes the device."""
    outcome = outcomes("tpu")
    assert outcome["mixed"]["precision"] == "tpu"
    fits = (outcome["mixed"], outcome["tpu"]["fit"])
    mixed, exact = (torch.cat([weight.flatten() for weight in fit["weights"].values()]) for fit in fits)
    # The roundings of bfloat16 show, and the training is the same; how far single weights part differs by processor.
    difference = (mixed - exact).abs()
    assert 1e-6 < difference.max() and difference.mean() < 0.1
    # Two fits of two epochs.
    assert outcome["waits"] == 4


@needs_no_xla
def test_command_line(fake, tmp_path):
    """A job with trainer=tpu writes metrics and report, and a CPU evaluates its checkpoint to the same metrics."""
    result = run("-m", "lightkit.train", *QUICK, cwd=tmp_path, fake=fake)
    assert result.returncode == 0, result.stderr
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["steps"] == 1 and (tmp_path / "out" / "report.html").is_file()
    checkpoint = ["ckpt_path=out/checkpoints/last.ckpt", "output=figures.json"]
    figures = {}
    for accelerator in ("tpu", "cpu"):
        arguments = ["-m", "lightkit.evaluate", *checkpoint, f"accelerator={accelerator}"]
        result = run(*arguments, cwd=tmp_path, fake=fake if accelerator == "tpu" else None)
        assert result.returncode == 0, result.stderr
        figures[accelerator] = json.loads((tmp_path / "figures.json").read_text())
    assert figures["tpu"] == pytest.approx(figures["cpu"], rel=1e-4)


@needs_xla
def test_command_line_by_torch_xla(tmp_path):
    """A job with trainer=tpu runs on Lightning's strategy for torch_xla."""
    # Lightning checks for hardware.
    program = (
        "from torch_xla._internal import tpu; tpu.num_available_devices = lambda: 1; "
        "from lightkit.train import main; raise SystemExit(main())"
    )
    result = run("-c", program, *QUICK, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    state = load_checkpoint(tmp_path / "out" / "checkpoints" / "last.ckpt")["state_dict"]
    assert all(value.device.type == "cpu" for value in state.values())


@needs_no_xla
@pytest.mark.skipif(find_spec("torch_tpu") is not None, reason="torch_tpu is installed")
def test_nothing_installed(tmp_path):
    """The error is one line within seconds, and names the packages."""
    started = time.monotonic()
    error = the_error(run("-m", "lightkit.train", *QUICK, cwd=tmp_path))
    assert time.monotonic() - started < 30
    assert "pip install torch_tpu" in error and "neither is installed" in error
    assert not (tmp_path / "out" / "checkpoints").exists()
    with pytest.raises(ConfigError, match="torch_tpu is not installed"):
        TorchTPU()
    assert not TorchTPUAccelerator.is_available()


@needs_no_xla
def test_no_tpu(tmp_path):
    """torch_tpu without a TPU is an error, and not a training on a CPU."""
    error = the_error(run("-m", "lightkit.train", *QUICK, cwd=tmp_path, fake=""))
    assert error.endswith("torch_tpu finds no TPU on this machine")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"trainer": {"devices": 8}}, "trainer.devices=8: the command line trains on one TPU"),
        ({"trainer": {"devices": "auto"}}, "trainer.devices=auto"),
        (
            {"strategy": {"_target_": "lightkit.strategies.DiLoCo"}},
            "DiLoCo needs several processes",
        ),
    ],
)
def test_several(monkeypatch, changes, expected):
    """Several TPUs are rejected."""
    monkeypatch.setattr(tpu, "choose", dict)
    base = {"trainer": {"accelerator": "tpu", "devices": 1}, "strategy": {"_target_": None}}
    check_accelerator(OmegaConf.create(base))
    with pytest.raises(ConfigError, match=expected):
        check_accelerator(OmegaConf.merge(base, changes))


def test_devices_of_the_accelerator():
    """The accelerator accepts one device alone."""
    assert TorchTPUAccelerator.parse_devices("1") == 1
    for devices in (2, [0], "auto"):
        with pytest.raises(ConfigError, match="a process one TPU"):
            TorchTPUAccelerator.parse_devices(devices)


def test_which_package(monkeypatch):
    """torch_xla comes before torch_tpu, with strategy="auto": Lightning cannot build its strategy by name."""
    monkeypatch.setattr(tpu, "find_spec", lambda name: object() if name == "torch_xla" else None)
    assert tpu.choose() == {"accelerator": "tpu", "strategy": "auto"}


def test_a_broken_package(monkeypatch):
    """A torch_tpu that cannot be imported is an error of its own, and not a missing TPU."""
    monkeypatch.setattr(tpu, "find_spec", lambda name: object() if name == "torch_tpu" else None)
    monkeypatch.setitem(sys.modules, "torch_tpu", None)
    with pytest.raises(ConfigError, match="torch_tpu cannot be imported"):
        tpu.choose()
