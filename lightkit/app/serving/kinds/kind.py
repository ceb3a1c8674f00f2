"""What a server asks a kind of input for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch

from lightkit.app.serving.messages import Request


def device_of(task: pl.LightningModule) -> torch.device:
    """Returns the device on which a task computes.

    A program may have moved the model, of which Lightning's attribute ``device`` does not know.
    """
    parameter = next(task.parameters(), None)
    return task.device if parameter is None else parameter.device


class Kind(ABC):
    """A kind of input: decodes the bodies of requests, predicts for a batch of them, and encodes the answers.

    Attributes:
        name: the kind of input, such as ``images``.
        media_types: the content types of files that a body may be; one that ends in a slash stands for all below it.
        options: the description of each option of a request, a JSON schema by name.
        file_options: those of further options, which say how a file is read and stand in the query alone.
        is_batched: True if one call of the model answers several requests.
    """

    name: str
    media_types: Sequence[str] = ()
    options: Mapping[str, Any] = {}
    file_options: Mapping[str, Any] = {}
    is_batched = True

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """Returns the form of the input and the names of the output, for clients."""

    @abstractmethod
    def content_schema(self) -> dict[str, Any]:
        """Returns the JSON schema of each field of an object that holds the content, of which a request has one."""

    @abstractmethod
    def example(self) -> dict[str, Any]:
        """Returns a request as an object of JSON, which the model can answer."""

    @abstractmethod
    def decode(self, request: Request) -> Any:
        """Returns the sample of a request.

        Raises:
            LightkitError: the request is wrong; the message names the field, its value and what was expected.
        """

    @abstractmethod
    def predict(self, samples: list[Any]) -> list[Any]:
        """Returns the output of the model for each sample."""

    @abstractmethod
    def encode(self, sample: Any, output: Any) -> dict[str, Any]:
        """Returns the answer for a sample."""
