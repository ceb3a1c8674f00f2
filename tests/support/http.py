"""Sends requests to a server of this machine as a client does."""

from __future__ import annotations

import http.client
import json
from typing import Any
from urllib.parse import urlsplit


def send(
    url: str,
    path: str = "/predict",
    body: Any = None,
    media_type: str | None = None,
    method: str | None = None,
    timeout: float = 60,
) -> tuple[int, str]:
    """Sends a request on a connection of its own, and returns the status and the text of the answer.

    Args:
        url: the address of the server.
        path: the path with the query.
        body: bytes, or an object that becomes JSON; None for none. A generator is sent in chunks.
        media_type: the content type; None for JSON if the body is an object, else for none.
        method: GET by default, and POST with a body.
        timeout: seconds.
    """
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=timeout)
    headers = {} if media_type is None else {"Content-Type": media_type}
    if isinstance(body, (dict, list)):
        body, headers = json.dumps(body).encode(), {"Content-Type": media_type or "application/json"}
    try:
        connection.request(method or ("GET" if body is None else "POST"), path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def ask(url: str, body: Any, path: str = "/predict", media_type: str | None = None) -> tuple[int, dict[str, Any]]:
    """Sends a request that `send` sends, and returns the status and the object of the answer."""
    status, text = send(url, path, body, media_type)
    return status, json.loads(text)
