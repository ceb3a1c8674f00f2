"""The worker's side of the connection to the server: reads batches of requests and writes the replies."""

from __future__ import annotations

from collections.abc import Sequence
from io import BufferedRWPair
from typing import Any

from lightkit.app.serving.frames import read_frame, write_frame
from lightkit.app.serving.messages import Reply, Request


def answer_frames(stream: BufferedRWPair, responder: Any) -> None:
    """Answers batches of requests until the server closes the connection.

    Args:
        stream: the connection for reading and writing.
        responder: the `lightkit.app.serving.responder.Responder`.
    """

    def reply(index: int, answer: Reply) -> None:
        write_frame(stream, {"index": index, "status": answer.status}, answer.body)

    try:
        while (frame := read_frame(stream)) is not None:
            header, content = frame
            responder.answer(_split(header["requests"], content), reply)
    except OSError:
        # Nobody waits for an answer any more.
        return


def _split(heads: Sequence[dict[str, Any]], content: bytes) -> list[Request]:
    requests, begin = [], 0
    for head in heads:
        body = content[begin : begin + head["size"]]
        requests.append(Request(body, head["media_type"], head["query"]))
        begin += head["size"]
    return requests
