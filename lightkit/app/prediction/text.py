"""Continues a text."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from lightkit._util.atomic_write import write_atomically
from lightkit._util.printable import printable
from lightkit._util.regular_files import open_regular
from lightkit.app.prediction.request import PredictionRequest
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


def predict(restored: Restored, request: PredictionRequest) -> Continuation:
    """Continues the text of a file or of the command line; an empty one as a file begins."""
    data = restored.build_data()
    if not isinstance(data, Text):
        raise ConfigError(f"the checkpoint is of a model for {type(data).__name__}, which is not text")
    length = _LENGTH if request.length is None else request.length
    temperature = _TEMPERATURE if request.temperature is None else request.temperature
    if length < 1:
        raise ConfigError(f"length must be at least 1, got {length}")
    if temperature < 0:
        raise ConfigError(f"temperature must be at least 0, got {temperature}")
    if request.top_k is not None and request.top_k < 1:
        raise ConfigError(f"top_k must be at least 1, got {request.top_k}")
    if request.seed is not None and not 0 <= request.seed < _SEEDS:
        raise ConfigError(f"seed must be from 0 to {_SEEDS - 1}, got {request.seed}")
    prompt = _prompt(request)
    generator = torch.Generator()
    if request.seed is None:
        generator.seed()
    else:
        generator.manual_seed(request.seed)
    added = restored.task.generate(
        data.encode(prompt or SEPARATOR), length, temperature, request.top_k, generator=generator
    )
    return Continuation(prompt, data.decode(added))


def _prompt(request: PredictionRequest) -> bytes:
    given = [key for key in ("input", "text") if getattr(request, key) is not None]
    if len(given) != 1:
        raise ConfigError(f"input=FILE or text=TEXT says what is to be continued: give one of them, not {len(given)}")
    if request.text is None:
        with open_regular(request.input, _MOST_BYTES, name=f"input={request.input}") as file:
            return file.read(_MOST_BYTES)
    return request.text.encode(errors="surrogateescape")
