"""Answers requests with a model: decodes them, predicts for all of them together, and encodes the answers."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
from torch import nn

import lightkit
from lightkit._util import strict_json
from lightkit._util.printable import printable
from lightkit.app.parts import model_of
from lightkit.app.serving.kinds import Kind
from lightkit.app.serving.messages import Reply, Request, RequestError
from lightkit.errors import CheckpointError, LightkitError

_FAULT = "the server has failed to answer this request; its output has the reason"


class Responder:
    """Answers the requests for one model.

    An answer does not depend on the other requests of its batch, beyond the rounding of the model: a request that is
    wrong, or with which the model fails, costs no other its answer.

    Args:
        kind: the kind of input with its model.
    """

    def __init__(self, kind: Kind) -> None:
        self._kind = kind

    def answer(self, requests: Sequence[Request], reply: Callable[[int, Reply], None]) -> None:
        """Answers requests.

        Args:
            requests: the requests of a batch.
            reply: a function that gets the index and the reply of each request, once.
        """
        samples: dict[int, Any] = {}
        for index, request in enumerate(requests):
            outcome = _attempt(self._kind.decode, request)
            if isinstance(outcome, Reply):
                reply(index, outcome)
            else:
                samples[index] = outcome
        if samples:
            for index, outcome in self._predict(samples).items():
                reply(index, outcome)

    def _predict(self, samples: dict[int, Any]) -> dict[int, Reply]:
        outputs = _attempt(self._kind.predict, list(samples.values()), is_input=False)
        if isinstance(outputs, Reply) and len(samples) > 1:
            # The others of the batch may be well.
            return {index: reply for one in samples for index, reply in self._predict({one: samples[one]}).items()}
        if isinstance(outputs, Reply):
            return dict.fromkeys(samples, outputs)
        return {
            index: _attempt(lambda sample=sample, output=output: self._encode(sample, output), is_input=False)
            for (index, sample), output in zip(samples.items(), outputs, strict=True)
        }

    def _encode(self, sample: Any, output: Any) -> Reply:
        return Reply.of(200, self._kind.encode(sample, output))


def _attempt(function: Callable[..., Any], *arguments: Any, is_input: bool = True) -> Any:
    """Returns the result of a function, or the reply of its error.

    Args:
        function: the function.
        *arguments: its arguments.
        is_input: True if an error in the input is the client's.
    """
    try:
        return function(*arguments)
    except RequestError as error:
        return Reply.error(error.status, printable(str(error), keep="\n"))
    except CheckpointError as error:
        return Reply.error(500, printable(str(error)))
    except LightkitError as error:
        return Reply.error(400 if is_input else 500, printable(str(error)))
    except Exception:
        # No traceback goes to the client, who might learn of files of the server from it.
        print(printable(traceback.format_exc(), keep="\n"), file=sys.stderr, flush=True)
        return Reply.error(500, _FAULT)


def describe(kind: Kind, task: pl.LightningModule) -> dict[str, Any]:
    """Returns a description of a model and of its requests, plain containers for JSON.

    The function answers the example of the kind, so that the first request need not wait for what the model loads
    then, and a model that does not work is found when the server starts.

    Args:
        kind: the kind of input with its model.
        task: the task of the model.

    Raises:
        CheckpointError: the model cannot answer the example.
    """
    example = kind.example()
    replies: list[Reply] = []
    request = Request(strict_json.dumps(example).encode(), "application/json")
    Responder(kind).answer([request], lambda index, reply: replies.append(reply))
    text = replies[0].body.decode()
    if replies[0].status != 200:
        raise CheckpointError(f"the model does not answer an example: {json.loads(text)['error']}")
    model = model_of(task)
    return {
        "about": {
            "kind": kind.name,
            "task": type(task).__name__,
            "model": type(model).__name__ if isinstance(model, nn.Module) else None,
            **kind.about(),
            "version": lightkit.__version__,
        },
        "is_batched": kind.is_batched,
        "media_types": list(kind.media_types),
        "options": dict(kind.options),
        "file_options": dict(kind.file_options),
        "content": kind.content_schema(),
        "example": example,
        "answer": json.loads(text),
    }
