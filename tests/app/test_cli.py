"""The command line before a job runs: flags, keys and the state that a command leaves."""

from __future__ import annotations

import pytest
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from support.commands import the_error

from lightkit.app.schema import default_config, top_level


def test_a_command_leaves_no_job_behind(call, tmp_path):
    """A command restores `HydraConfig`, which Hydra leaves set after a sweep and a later job would read."""
    words = ("-m", "+experiment=cnn", "model=nothing,cnn")
    assert call("train", *words, cwd=tmp_path).returncode == 1
    assert not HydraConfig.initialized()


@pytest.mark.parametrize("name", ["train", "evaluate", "predict"])
def test_top_level(name):
    """`top_level` reads the same keys from the file that composing gives."""
    with initialize_config_module("lightkit.conf", version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        assert set(top_level(name)[0]) == set(default_config(loader, name))


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("seed=#3", """'seed=#3' on the command line: the value cannot be read"""),
        ("seed=it's", "the shell's quotes: 'seed=\"it'\"'\"'s\"'"),
        ("scans", "'scans' on the command line is not KEY=VALUE; if it belongs to the word before it"),
        ("a b=3", "'a b' cannot be the name of a key"),
        ("seed=range(a)", "TypeError while evaluating 'range(a)'"),
        ("seed=1,2", "seed=1,2: the key has one value; -m runs a job for each of several"),
    ],
)
def test_words_that_hydra_cannot_read(call, tmp_path, word, expected):
    """The error names the word of the command line and the quotes that it needs, not Hydra's lexer."""
    result = call("train", word, cwd=tmp_path)
    assert the_error(result).startswith("error: ") and expected in result.stderr
    assert "Lexer" not in result.stderr and "hydra.cc" not in result.stderr and "mismatched input" not in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["", " ", "..", "../x", "/x", "a//b", "a/..", "x" * 256, "${seed}", "a\nb"])
def test_names_that_are_no_directories(call, tmp_path, name):
    """A name whose runs would lie outside ``runs``, or nowhere, is an error before anything is written."""
    assert "name=" in the_error(call("train", "+experiment=cnn", f"name={name}", cwd=tmp_path))
    assert "name=" in the_error(call("train", "-m", "+experiment=cnn", f"name=good,{name}", cwd=tmp_path))
    assert not list(tmp_path.iterdir())
