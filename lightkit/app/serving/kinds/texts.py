"""Texts, which the model continues: within JSON, or as the body."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightkit.app.prediction.request import PredictionRequest
from lightkit.app.prediction.text import DEFAULT_LENGTH, DEFAULT_TEMPERATURE, Continuation, check_options, continue_text
from lightkit.app.serving.bodies import is_json, one_of, read_object, shown, take_options
from lightkit.app.serving.kinds.kind import Kind
from lightkit.app.serving.messages import Request, RequestError
from lightkit.data.text import Text
from lightkit.tasks import LanguageModelTask

# The limit of a text. A recurrent model reads all of it.
_MAX_PROMPT_BYTES = 1 << 16


@dataclass(frozen=True)
class TextSample:
    """A text and the options of its continuation."""

    prompt: bytes
    options: PredictionRequest


class Texts(Kind):
    """Texts that the model continues, one after the other.

    Args:
        task: the task in evaluation mode.
        data: the data module, which encodes and decodes text.
        max_length: the largest number of bytes that a request may add.
    """

    name = "text"
    media_types = ("text/plain",)
    is_batched = False

    def __init__(self, task: LanguageModelTask, data: Text, max_length: int) -> None:
        self._task = task
        self._data = data
        self._max_length = max_length
        self.options = {
            "length": {
                "type": "integer",
                "minimum": 1,
                "maximum": max_length,
                "default": min(DEFAULT_LENGTH, max_length),
                "description": "The number of bytes to add.",
            },
            "temperature": {
                "type": "number",
                "minimum": 0,
                "default": DEFAULT_TEMPERATURE,
                "description": "The divisor of the logits. 0 takes the likeliest byte, 1 samples from the model.",
            },
            "top_k": {"type": "integer", "minimum": 1, "description": "Choose among this number of likeliest bytes."},
            "seed": {
                "type": "integer",
                "minimum": 0,
                "description": "The seed of the random choices; a new one for each request by default.",
            },
        }

    def about(self) -> dict[str, Any]:
        """Returns the number of bytes that the model sees, and the limits of a request."""
        form = {
            "context": getattr(self._task.model, "context", None),
            "max_text": _MAX_PROMPT_BYTES,
            "max_length": self._max_length,
        }
        return {"input": form, "classes": None}

    def content_schema(self) -> dict[str, Any]:
        """Returns the schema of the text."""
        description = "The text to continue; an empty one begins like a file of the training set."
        return {"text": {"type": "string", "description": description}}

    def example(self) -> dict[str, Any]:
        """Returns a short text."""
        return {"text": "The ", "length": min(8, self._max_length), "seed": 0}

    def decode(self, request: Request) -> TextSample:
        """Returns the text of a request and its options: see `Kind.decode`."""
        if is_json(request, self.media_types):
            fields = read_object(request.body)
            one_of(fields, ("text",))
            options = take_options(fields, request.query, tuple(self.options), ("text",))
            if not isinstance(fields["text"], str):
                raise RequestError(400, f"text must be a text, got {shown(fields['text'])}")
            # JSON may have one half of a surrogate pair, which UTF-8 has not.
            prompt = fields["text"].encode(errors="replace")
        else:
            options = take_options({}, request.query, tuple(self.options))
            prompt = request.body
        check_options(options)
        if options.length is not None and options.length > self._max_length:
            raise RequestError(400, f"length must be at most {self._max_length}, got {options.length}")
        if len(prompt) > _MAX_PROMPT_BYTES:
            raise RequestError(400, f"text must have at most {_MAX_PROMPT_BYTES:,} bytes, got {len(prompt):,}")
        return TextSample(prompt, options)

    def predict(self, samples: list[TextSample]) -> list[Continuation]:
        """Returns the continuation of each text."""
        return [
            continue_text(self._task, self._data, sample.prompt, sample.options, min(DEFAULT_LENGTH, self._max_length))
            for sample in samples
        ]

    def encode(self, sample: TextSample, output: Continuation) -> dict[str, Any]:
        """Returns the text and what the model added, with replacement characters where bytes are no UTF-8."""
        return output.entry()
