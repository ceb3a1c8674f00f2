"""Continuation of a text."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import torch

from lightkit._util.atomic_write import write_atomically
from lightkit._util.printable import printable
from lightkit._util.regular_files import open_regular
from lightkit.app.prediction.output import is_json, write_json
from lightkit.app.prediction.request import PredictionRequest
from lightkit.compress.quantization import has_int8_rows
from lightkit.data.text import SEPARATOR, Text
from lightkit.errors import ConfigError
from lightkit.models.native_decoding import unsupported_reason
from lightkit.tasks import LanguageModelTask

DEFAULT_LENGTH = 400
DEFAULT_TEMPERATURE = 0.8

# The largest number of bytes that a prompt takes from a file.
_MAX_PROMPT_BYTES = 16 << 20

# torch accepts the seeds below this limit.
_SEED_LIMIT = 2**64


@dataclass(frozen=True)
class Continuation:
    """A text and its continuation.

    Args:
        prompt: the given bytes.
        added: the bytes that the model added.
    """

    prompt: bytes
    added: bytes

    def show(self) -> None:
        """Prints the text as UTF-8, with replacement characters for invalid bytes and escaped control characters."""
        print(printable((self.prompt + self.added).decode(errors="replace"), keep="\n\t"))
        sys.stdout.flush()

    def write(self, path: Path) -> None:
        """Writes the unchanged bytes; to a file whose suffix is that of JSON, ``prompt`` and ``added`` as UTF-8."""
        if is_json(path):
            write_json(path, [self.entry()])
            return
        write_atomically(path, lambda stream: stream.write(self.prompt + self.added))

    def entry(self) -> dict[str, str]:
        """Returns ``prompt`` and ``added`` as UTF-8, with replacement characters for invalid bytes."""
        parts = {"prompt": self.prompt, "added": self.added}
        return {name: part.decode(errors="replace") for name, part in parts.items()}


def predict(task: LanguageModelTask, data: pl.LightningDataModule, request: PredictionRequest) -> Continuation:
    """Continues the text of a file or of the command line; an empty text begins like a file of the training set.

    Args:
        task: the task in evaluation mode.
        data: the data module of the checkpoint, which encodes and decodes text.
        request: the request, of which the function reads ``input`` or ``text``, ``length``, ``temperature``, ``top_k``,
            ``seed``, ``weights`` and ``cache``.

    Raises:
        ConfigError: an option is wrong, or the data module has no text.
        DataError: the file cannot be read.
    """
    if not isinstance(data, Text):
        raise ConfigError(f"the checkpoint is of a model for {type(data).__name__}, which is not text")
    check_options(request)
    return continue_text(task, data, _read_prompt(request), request)


def check_options(request: PredictionRequest) -> None:
    """Checks the fields ``length``, ``temperature``, ``top_k`` and ``seed`` of a request.

    Raises:
        ConfigError: one of them is out of its range.
    """
    length = DEFAULT_LENGTH if request.length is None else request.length
    temperature = DEFAULT_TEMPERATURE if request.temperature is None else request.temperature
    if length < 1:
        raise ConfigError(f"length must be at least 1, got {length}")
    # A comparison with NaN is false.
    if not temperature >= 0:
        raise ConfigError(f"temperature must be at least 0, got {temperature}")
    if request.top_k is not None and request.top_k < 1:
        raise ConfigError(f"top_k must be at least 1, got {request.top_k}")
    if request.seed is not None and not 0 <= request.seed < _SEED_LIMIT:
        raise ConfigError(f"seed must be from 0 to {_SEED_LIMIT - 1}, got {request.seed}")


def continue_text(
    task: LanguageModelTask, data: Text, prompt: bytes, request: PredictionRequest, length: int = DEFAULT_LENGTH
) -> Continuation:
    """Continues a text: see `predict`.

    Args:
        task: the task in evaluation mode.
        data: the data module, which encodes and decodes text.
        prompt: the bytes of the text, which may be empty.
        request: the request, whose fields `check_options` accepts.
        length: the number of bytes to add if the request does not say it.
    """
    length = length if request.length is None else request.length
    temperature = DEFAULT_TEMPERATURE if request.temperature is None else request.temperature
    generator = torch.Generator(task.device)
    if request.seed is None:
        generator.seed()
    else:
        generator.manual_seed(request.seed)
    encoded = data.encode(prompt or SEPARATOR)
    # A request leaves the defaults to `generate`.
    precision = request.given(("weights", "cache"))
    if "weights" not in precision and has_int8_rows(task) and unsupported_reason(task.model) is None:
        # The integers of the decoder are those of the checkpoint, and are read faster than floats.
        precision["weights"] = "int8"
    added = task.generate(encoded, length, temperature, request.top_k, generator=generator, **precision)
    return Continuation(prompt, data.decode(added))


def _read_prompt(request: PredictionRequest) -> bytes:
    if request.text is not None and request.input is None:
        return request.text.encode(errors="surrogateescape")
    if request.input is not None and request.text is None:
        with open_regular(request.input, _MAX_PROMPT_BYTES, name=f"input={request.input}") as file:
            return file.read(_MAX_PROMPT_BYTES)
    given = 0 if request.text is None else 2
    raise ConfigError(f"input=FILE or text=TEXT is the text to continue: give one of them, not {given}")
