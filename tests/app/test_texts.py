"""Texts on the command line: what the user types is the value that the command gets."""

from __future__ import annotations

import os
import sys
import typing
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from support.commands import run_python

from lightkit.app.processes import with_processes_of_torchrun
from lightkit.app.texts import PATHS, TEXTS, escape_interpolations, literal_texts
from lightkit.errors import ConfigError
from lightkit.targets import find_class

CONF = Path(__file__).parents[2] / "conf"

# Names of files and columns that people have. Hydra's parser gives most of them another meaning, or rejects them.
NAMES = [
    *("scan (1).png", "müller.png", "it's.png", "新.png", "epoch=3.png", "#1.png", "a,b.png", "[x].png", "50%.png"),
    *("a: b.png", "C:\\x", '"q".png', " x", "x ", "-", "{a}.png", "a&b", "null.png", "$HOME.png", "${x}.png"),
    *("1e5", "0x10", "on", "007", "1.50", "true", "inf", "-1", "2020", "Hello, world!", "choice(1,2)", "a=b", "None"),
    *(
        "",
        "é\u0301",
        "\udcff.png",
        "Price $",
        "US$ and $",
        "\\alpha",
        "a\\,b",
        "'",
        '"',
        "''a",
        "a\nb",
        "!x",
        "a;b",
        "~~",
    ),
    *(
        "\\${x}",
        "\\\\${x}\\",
        "+1",
        "a@b",
        "x]",
        "(",
        "NULL",
        "?",
        "*.png",
        "a|b",
        "<b>",
        "`x`",
        "👩‍👧",
        "\t",
        "/",
        "~no one/x",
    ),
]


def parsed(word):
    """Returns the value that the configuration has after Hydra has read a word of the command line."""
    config = OmegaConf.create({"key": None})
    OmegaConf.update(config, "key", OverridesParser.create().parse_override(word).value())
    return OmegaConf.to_container(config, resolve=True)["key"]


@pytest.mark.parametrize("typed", NAMES)
@pytest.mark.parametrize("start", ["text=", "+text=", "++data.column=", "data.path="])
def test_texts_are_taken_as_they_were_typed(start, typed):
    """The value of a text key is the text itself, and the words of other keys stay unchanged."""
    if not typed and start == "data.path=":
        return
    other = f"other={typed}"
    word, same = literal_texts([start + typed, other], ["text"], is_sweep=False)
    assert word.startswith(start) and parsed(word) == typed and same == other


@given(st.text(st.characters(codec=None) | st.sampled_from("\\'\"${},=()[] ~"), max_size=12))
@example("\\'${")
def test_any_text_is_taken_as_it_was_typed(typed):
    """No text is changed, except null, the marker of a missing value and a text wholly in quotes."""
    if typed in ("null", "???") or typed[:1] in ("'", '"'):
        return
    (word,) = literal_texts([f"text={typed}"], ["text"], is_sweep=False)
    assert parsed(word) == typed


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ("null", None),
        ("'null'", "null"),
        ('"def main("', "def main("),
        (r"'it\'s'", "it's"),
        ("'~/x'", "~/x"),
        ("'${oc.env:HOME}/x'", f"{os.path.expanduser('~')}/x"),
    ],
)
def test_null_and_quotes_mean_what_they_mean_to_hydra(monkeypatch, typed, value):
    """null is no text, and of a value wholly in quotes Hydra takes the inside, with interpolations."""
    monkeypatch.setenv("HOME", os.path.expanduser("~"))
    assert literal_texts([f"text={typed}", f"input={typed}"], ["text"], False) == [f"text={typed}", f"input={typed}"]
    assert parsed(f"text={typed}") == value


def test_home_directories(monkeypatch):
    """A path begins at the home directory that ``~`` and ``~user`` name; a text does not."""
    monkeypatch.setenv("HOME", "/home/me (1)")
    root = os.path.expanduser("~root")
    words = ["data.path=~/v.csv", "+input=~", "output=~root/x", "text=~/v", "run_dir=a/~/b"]
    words = literal_texts(words, ["text"], is_sweep=False)
    assert [parsed(w) for w in words] == ["/home/me (1)/v.csv", "/home/me (1)", f"{root}/x", "~/v", "a/~/b"]


def values_of_sweep(word):
    (override,) = OverridesParser.create().parse_overrides([word])
    return [OverridesParser.create().parse_override(f"k={v}").value() for v in override.sweep_string_iterator()]


@pytest.mark.parametrize(
    ("typed", "values"),
    [
        ("a,b", ["a", "b"]),
        ("a (1).csv, müller.csv,2020", ["a (1).csv", "müller.csv", "2020"]),
        ("'a,b',it's,\"c, d\"", ["a,b", "it's", "c, d"]),
        ("null,x", [None, "x"]),
        ("choice(a,b)", ["a", "b"]),
        ("[a],{b}", ["[a]", "{b}"]),
    ],
)
def test_commas_of_a_sweep(typed, values):
    """With -m commas separate values, each of which is literal; functions such as choice(...) are Hydra's."""
    assert values_of_sweep(*literal_texts([f"data.column={typed}"], [], is_sweep=True)) == values


def test_one_value_in_a_sweep():
    """A text without commas is literal in a sweep too."""
    (word,) = literal_texts(["data.path= scan (1).csv "], [], is_sweep=True)
    assert parsed(word) == " scan (1).csv "


def test_words_that_need_no_quotes_stay():
    """A word that Hydra reads as typed stays unchanged, since the records of earlier runs have it so."""
    words = ["input=runs/cnn/2026-01-01_12-00-00/best.ckpt", "-m", "text=a", "+experiment=cnn", "~scheduler", "--help"]
    assert literal_texts(words, ["text"], is_sweep=False) == words


def test_hydras_directories_keep_their_interpolations():
    """``hydra.run.dir`` keeps ``${now:...}``, by which Hydra's users name their directories."""
    (word,) = literal_texts(["hydra.run.dir=my runs (1)/${oc.env:HOME}"], [], is_sweep=False)
    assert parsed(word) == f"my runs (1)/{os.environ['HOME']}"


@pytest.mark.parametrize(
    ("word", "is_sweep"),
    [("text=???", False), ("data.path=${x}", True), ("input=", False)],
    ids=["missing", "interpolation", "no path"],
)
def test_texts_that_hydra_cannot_have(word, is_sweep):
    """A text that Hydra, OmegaConf or a file system would take for something else is an error that names it."""
    with pytest.raises(ConfigError) as error:
        literal_texts([word], ["text"], is_sweep)
    assert word in str(error.value)


@given(st.text(st.sampled_from("\\${}ab'"), max_size=10))
def test_resolved_values_are_not_resolved_again(text):
    """A process gets the resolved values of the leading process, in which ``${`` is part of a text."""
    plain = {"a": [text, 1, None], "b": {"c": text}}
    assert OmegaConf.to_container(OmegaConf.create(escape_interpolations(plain)), resolve=True) == plain


# Arguments of type str in the configurations that are a choice of a few words or of what is built, and no free text.
CHOICES = {
    "callbacks.checkpoint.mode",
    "callbacks.early_stopping.mode",
    "compress.distil.targets",
    "compress.quantize.activations",
    "data.fit",
    "data.kind",
    "data.layout",
    "data.missing",
    "model.blocks",
    "model.cell",
    "model.norm",
    "strategy.compression",
    "strategy.mode",
}


def hints_of(constructor):
    """Returns the types of arguments by name, without those whose names exist for a type checker alone."""
    found = {}
    for name, hint in getattr(constructor, "__annotations__", {}).items():
        try:
            found[name] = eval(hint, constructor.__globals__) if isinstance(hint, str) else hint
        except NameError:
            continue
    return found


def text_arguments(group):
    """Yields the keys below a group whose arguments are annotated as texts or paths, of every choice of the group."""
    for file in (CONF / group).glob("*.yaml"):
        yield from _text_arguments(OmegaConf.to_container(OmegaConf.load(file), resolve=False), group)


def _text_arguments(node, key):
    if not isinstance(node, dict):
        return
    target = node.get("_target_")
    constructors = [cls.__init__ for cls in reversed(find_class(target).__mro__)] if target else []
    hints = {name: hint for constructor in constructors for name, hint in hints_of(constructor).items()}
    # Of a data module also the arguments that the file does not name.
    own = hints if key == "data" else {}
    for name in {*node, *own}:
        members = set(typing.get_args(hints.get(name))) or {hints.get(name)}
        # A configuration file may have the name 2020 as a number.
        if str in members and members <= {str, int, Path, os.PathLike, type(None)}:
            yield f"{key}.{name}"
        yield from _text_arguments(node.get(name), f"{key}.{name}")


@pytest.mark.parametrize("group", sorted(p.name for p in CONF.iterdir() if p.is_dir() and p.name[0] not in "_h"))
def test_the_table_has_the_texts_of_the_groups(group):
    """`PATHS` and `TEXTS` have every argument of a group that is a free text; others are in `CHOICES` above."""
    known = {key for key in PATHS | TEXTS if key.startswith(f"{group}.")}
    if group in ("experiment", "debug"):
        assert not known
        return
    found = {*text_arguments(group)}
    if group == "scheduler":
        # A key of the schedule, which no class takes.
        found.add("scheduler.monitor")
    if group == "compress":
        # A path in place of a module, which the application loads.
        found.add("compress.distil.teacher")
    assert found - CHOICES == known
    assert {key for key in CHOICES if key.startswith(f"{group}.")} <= found


def test_the_paths_of_commands():
    """Each path without a dot is a key of a command."""
    keys: set[str] = set()
    for command in ("train", "evaluate", "predict"):
        with initialize_config_module("lightkit.conf", version_base="1.3"):
            keys.update(map(str, compose(command)))
    assert {key for key in PATHS if "." not in key} <= keys


def test_texts_need_no_torch():
    """The command line is read without importing torch, for which --help would have to wait."""
    code = "import sys, lightkit.app.texts, lightkit.app.cli; sys.exit('torch' in sys.modules)"
    run_python("-c", code, status=0, environment={"PYTHONPATH": os.pathsep.join(sys.path)})


def test_a_job_of_torchrun_keeps_its_texts(monkeypatch):
    """The configuration for torchrun's processes has the same texts, in which ``${`` is no reference."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    config = OmegaConf.create({"data": {"path": r"\${x} (1).csv"}, "trainer": {"devices": 1}})
    resolved = with_processes_of_torchrun(config)
    assert (resolved.data.path, resolved.trainer.devices) == ("${x} (1).csv", 2)
