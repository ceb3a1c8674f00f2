"""The command line before a job runs: quoting, flags, keys and the state that a command leaves."""

from __future__ import annotations

import sys

import pytest
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser

import lightkit
from lightkit.app.schema import default_config, quote_texts, top_level


@pytest.mark.parametrize("typed", ["1.50", "007", "1e3", "true", "-1", "inf", "def main", "'1.50'"])
def test_texts_are_taken_as_they_were_typed(monkeypatch, typed):
    """A str key keeps a value that looks like a number or a truth value; Hydra parses the values of other keys."""
    monkeypatch.setattr(sys, "argv", ["program", "-m", f"text={typed}", f"+text={typed}", f"other={typed}"])
    quote_texts(["text"])
    assert sys.argv[1] == "-m" and sys.argv[4] == f"other={typed}"
    for word in sys.argv[2:4]:
        assert OverridesParser.create().parse_override(word).value() == typed.strip("'")


def test_no_text_and_several_texts(monkeypatch):
    """`quote_texts` changes neither null nor the values of a sweep."""
    words = ["text=null", "text=1,2"]
    monkeypatch.setattr(sys, "argv", ["program", *words])
    quote_texts(["text"])
    assert sys.argv[1:] == words


def test_a_command_leaves_no_job_behind(call, tmp_path):
    """A command restores `HydraConfig`, which Hydra leaves set after a sweep and a later job would read."""
    words = ("-m", "+experiment=cnn", "model=nothing,cnn")
    assert call("train", *words, cwd=tmp_path).returncode == 1
    assert not HydraConfig.initialized()


def test_version(call, tmp_path):
    """--version prints lightkit's version, which Hydra's own flag would not."""
    result = call("train", "--version", cwd=tmp_path)
    assert result.returncode == 0 and result.stdout.startswith(f"lightkit {lightkit.__version__} ")


@pytest.mark.parametrize("name", ["train", "evaluate", "predict"])
def test_top_level(name):
    """`top_level` reads the same keys from the file that composing gives."""
    with initialize_config_module("lightkit.conf", version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        assert set(top_level(name)[0]) == set(default_config(loader, name))
