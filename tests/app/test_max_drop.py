"""``compress.max_drop`` of a training: which search the entries of the group ask for, and which are rejected."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from lightkit.app.compression import build_compression, find_request
from lightkit.errors import ConfigError

PRUNE = {"prune": {"_target_": "lightkit.compress.Prune", "keep_macs": 0.5}}
SPARSE = {"sparse": {"_target_": "lightkit.compress.Sparsify", "zeros": 0.8}}
DISTIL = {"distil": {"_target_": "lightkit.compress.Distil", "weight": 0.7, "teacher": None}}
QUANTIZE = {"quantize": {"_target_": "lightkit.compress.Quantize", "bits": 8}}


def job(**compress):
    return OmegaConf.create({"compress": compress, "trainer": {"accelerator": "cpu"}, "seed": 3, "run_dir": "runs/a"})


@pytest.mark.parametrize(
    ("entries", "widths", "bits", "zeros", "distil"),
    [
        ({}, True, "auto", None, 0.0),
        (DISTIL, True, "auto", None, 0.7),
        (PRUNE, True, None, None, 0.0),
        (QUANTIZE, False, "auto", None, 0.0),
        ({**PRUNE, **QUANTIZE}, True, "auto", None, 0.0),
        ({**PRUNE, **SPARSE}, True, None, 0.8, 0.0),
    ],
)
def test_what_is_searched(entries, widths, bits, zeros, distil):
    request = find_request(job(max_drop=0.01, **entries))
    assert request is not None
    assert (request.keep_macs is not None, request.bits, request.zeros, request.distil) == (widths, bits, zeros, distil)
    assert request.max_drop == 0.01 and request.seed == 3 and request.accelerator == "cpu"
    assert request.output == "runs/a/compressed"


def test_the_training_before_is_dense():
    """The entries say what the search may change, and the training has none of their callbacks."""
    assert build_compression(job(max_drop=0.01, **PRUNE)) == []
    assert [type(callback).__name__ for callback in build_compression(job(max_drop=None, **PRUNE))] == ["Prune"]
    assert find_request(job(max_drop=None, **PRUNE)) is None and find_request(job()) is None


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"max_drop": "little"}, "compress.max_drop must be a share of the validation set.*'little'"),
        ({"max_drop": True}, "compress.max_drop must be a share.*True"),
        ({"max_drop": 1.5}, "max_drop must be a share.*1.5"),
        ({"max_drop": 0.1, **SPARSE}, r"compress=\[prune,sparse\] alone"),
        ({"max_drop": 0.1, **PRUNE, **QUANTIZE, **SPARSE}, r"compress=\[prune,sparse\] alone"),
        ({"max_drop": 0.1, "mine": {"_target_": "lightkit.callbacks.LeanLoop"}}, "does not search with LeanLoop"),
        ({"max_drop": 0.1, "distil": {**DISTIL["distil"], "teacher": "a.ckpt"}}, "takes the trained model"),
    ],
)
def test_mistakes(entries, message):
    with pytest.raises(ConfigError, match=message):
        find_request(job(**entries))
