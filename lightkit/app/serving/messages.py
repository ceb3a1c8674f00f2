"""A request as it goes to a worker, and the reply that comes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightkit._util import strict_json
from lightkit.errors import LightkitError


@dataclass(frozen=True)
class Request:
    """The parts of an HTTP request that a worker reads.

    Attributes:
        body: the body.
        media_type: the content type without parameters, in small letters; empty without one.
        query: the parameters of the query, of which each occurs once.
    """

    body: bytes
    media_type: str = ""
    query: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Reply:
    """An answer.

    Attributes:
        status: the HTTP status.
        body: the JSON text in UTF-8.
    """

    status: int
    body: bytes

    @classmethod
    def of(cls, status: int, content: Mapping[str, Any]) -> Reply:
        """Returns the reply of a mapping, in which NaN and infinities become null."""
        return cls(status, strict_json.dumps(content).encode())

    @classmethod
    def error(cls, status: int, message: str) -> Reply:
        """Returns the reply of an error, ``{"error": message}``."""
        return cls.of(status, {"error": message})


class RequestError(LightkitError):
    """An error in a request.

    Args:
        status: the HTTP status, from 400 to 499.
        message: the message for the client.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
