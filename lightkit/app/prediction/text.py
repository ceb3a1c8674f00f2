"""Continues a text."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig

from lightkit._util.atomic_write import write_atomically
from lightkit._util.printable import printable
from lightkit._util.regular_files import open_regular
from lightkit.app.restore import Restored
from lightkit.data.text import SEPARATOR, Text
from lightkit.errors import ConfigError

_LENGTH = 400
_TEMPERATURE = 0.8

# Bytes of a file to go on from.
_MOST_BYTES = 16 << 20

# Seeds that torch takes.
_SEEDS = 2**64


@dataclass(frozen=True)
class Continuation:
    """A text, as bytes: what was given and what the model has added."""

    prompt: bytes
    added: bytes

    def show(self) -> None:
        """Prints all of it, with replacement characters for what is no text and escapes for control characters."""
        print(printable((self.prompt + self.added).decode(errors="replace"), keep="\n\t"))
        sys.stdout.flush()

    def write(self, path: Path) -> None:
        """Writes the bytes as they are."""
        write_atomically(path, lambda stream: stream.write(self.prompt + self.added))


def predict(config: DictConfig, restored: Restored) -> Continuation:
    """Continues the text of a file or of the command line; an empty one as a file begins."""
    data = restored.build_data()
    if not isinstance(data, Text):
        raise ConfigError(f"the checkpoint is of a model for {type(data).__name__}, which is not text")
    length = _LENGTH if config.length is None else config.length
    temperature = _TEMPERATURE if config.temperature is None else config.temperature
    if length < 1:
        raise ConfigError(f"length must be at least 1, got {length}")
    if temperature < 0:
        raise ConfigError(f"temperature must be at least 0, got {temperature}")
    if config.top_k is not None and config.top_k < 1:
        raise ConfigError(f"top_k must be at least 1, got {config.top_k}")
    if config.seed is not None and not 0 <= config.seed < _SEEDS:
        raise ConfigError(f"seed must be from 0 to {_SEEDS - 1}, got {config.seed}")
    prompt = _prompt(config)
    generator = torch.Generator()
    if config.seed is None:
        generator.seed()
    else:
        generator.manual_seed(config.seed)
    added = restored.task.generate(
        data.encode(prompt or SEPARATOR), length, temperature, config.top_k, generator=generator
    )
    return Continuation(prompt, data.decode(added))


def _prompt(config: DictConfig) -> bytes:
    given = [key for key in ("input", "text") if config.get(key) is not None]
    if len(given) != 1:
        raise ConfigError(f"input=FILE or text=TEXT says what is to be continued: give one of them, not {len(given)}")
    if config.text is None:
        with open_regular(config.input, _MOST_BYTES, name=f"input={config.input}") as file:
            return file.read(_MOST_BYTES)
    return config.text.encode(errors="surrogateescape")
