"""A connection of a worker and a server: messages between two processes of torch.distributed's gloo."""

from __future__ import annotations

import json
import secrets
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroupGloo, TCPStore, Work

from lightkit.errors import LightkitError

# Numbers in the header of a request or an answer; what they mean is in the protocol.
HEADER = 4

# Bytes of a message beside its tensors: far beyond what the description of a model takes.
_LONGEST = 1 << 28

# Seconds for two processes that have found each other to connect and say who they are.
HANDSHAKE = 10.0


class LinkError(LightkitError, ConnectionError):
    """The other side is not there any more, or does not answer."""


class Link:
    """Messages between two processes, in the order in which they were sent.

    Args:
        group: of the two.
        rank: 0 for the server, 1 for the worker.
        store: of the server, by which they found each other.

    Attributes:
        heartbeat: seconds after which the other side wants to hear again that this one is there.
    """

    def __init__(self, group: ProcessGroupGloo, rank: int, store: TCPStore) -> None:
        self._group: ProcessGroupGloo | None = group
        # For signs of life, of another thread.
        self.store = store
        self.heartbeat = HANDSHAKE
        self._peer = 1 - rank
        self._silence = timedelta(seconds=HANDSHAKE)
        self._header = torch.zeros(HEADER, dtype=torch.int64)
        self._next: Expected | None = None

    def send(self, *tensors: Tensor, tag: int = 0) -> None:
        """Sends tensors whose sizes the other side knows; they must lie on a CPU without gaps.

        Raises:
            LinkError: the connection is gone.
        """
        try:
            self._wait([self._group.send([tensor], self._peer, tag) for tensor in tensors if tensor.numel()])
        except (RuntimeError, AttributeError) as error:
            raise LinkError(brief(error)) from None

    def expect(self, *tensors: Tensor, tag: int = 0) -> Expected:
        """Gets ready for tensors of these sizes, which then come without a question and an answer before each.

        Messages of the same tag come in the order in which they were sent; those of another do not wait for them.

        Raises:
            LinkError: the connection is gone.
        """
        try:
            return Expected(self, [self._group.recv([tensor], self._peer, tag) for tensor in tensors if tensor.numel()])
        except (RuntimeError, AttributeError) as error:
            raise LinkError(brief(error)) from None

    def receive(self, *tensors: Tensor) -> None:
        """Waits for tensors of these sizes.

        Raises:
            LinkError: the connection is gone, or nothing came for too long.
        """
        self.expect(*tensors).wait()

    def _wait(self, works: list[Work]) -> None:
        for work in works:
            work.wait(self._silence)

    def send_header(self, *numbers: int) -> None:
        """Sends up to `HEADER` whole numbers."""
        self.send(torch.tensor([*numbers, *[0] * (HEADER - len(numbers))]))

    def expect_header(self) -> None:
        """Gets ready for the next header."""
        if self._next is None:
            self._next = self.expect(self._header)

    def receive_header(self) -> list[int]:
        """The numbers of a header."""
        self.expect_header()
        self._next.wait()
        self._next = None
        return self._header.tolist()

    def send_message(self, value: Any) -> None:
        """Sends what JSON can say, with tensors of any shapes and dtypes in it; tuples arrive as lists."""
        tensors: list[Tensor] = []
        described = _take_out(value, tensors)
        forms = [[str(tensor.dtype).partition(".")[2], list(tensor.shape)] for tensor in tensors]
        text = json.dumps([described, forms]).encode()
        self.send(torch.tensor([len(text)]), torch.frombuffer(bytearray(text), dtype=torch.uint8), *tensors)

    def receive_message(self) -> Any:
        """What the other side gave to `send_message`.

        Raises:
            LinkError: not that.
        """
        length = torch.zeros(1, dtype=torch.int64)
        self.receive(length)
        if not 0 < length.item() <= _LONGEST:
            raise LinkError(f"a message of {length.item()} bytes was announced, at most {_LONGEST} are taken")
        text = torch.empty(int(length), dtype=torch.uint8)
        self.receive(text)
        try:
            described, forms = json.loads(bytes(text.numpy()))
            tensors = [torch.empty(shape, dtype=dtype_named(name)) for name, shape in forms]
            self.receive(*tensors)
            return _put_back(described, tensors)
        except (ValueError, TypeError, IndexError) as error:
            raise LinkError(f"a message cannot be read: {error}") from None

    def wait_for_at_most(self, seconds: float) -> None:
        """Sets after how long without a word the other side counts as gone; until then it is that of a handshake."""
        self._silence = timedelta(seconds=seconds)

    def live(self, rank: int) -> None:
        """Gives a sign of life of that worker, in a thread of its own or in this one."""
        try:
            self.store.set(f"alive/{rank}", secrets.token_hex(8))
        except RuntimeError as error:
            raise LinkError(brief(error)) from None

    def close(self) -> None:
        """Ends the connection; the other side finds it gone. For the thread that uses it."""
        # gloo closes it when nobody refers to it any more.
        self._group = self._next = None


class Expected:
    """Tensors that are to come."""

    def __init__(self, link: Link, works: list[Work]) -> None:
        self._link, self._works = link, works

    def wait(self) -> None:
        """Until they have come.

        Raises:
            LinkError: the connection is gone, or nothing came for too long.
        """
        try:
            self._link._wait(self._works)
        except RuntimeError as error:
            raise LinkError(brief(error)) from None


# In the place of a tensor, with its number.
_TENSOR = "__tensor__"


def _take_out(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors.append(value.detach().cpu().contiguous())
        return {_TENSOR: len(tensors) - 1}
    if isinstance(value, dict):
        return {key: _take_out(entry, tensors) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_take_out(entry, tensors) for entry in value]
    return value


def _put_back(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, dict):
        if _TENSOR in value:
            return tensors[value[_TENSOR]]
        return {key: _put_back(entry, tensors) for key, entry in value.items()}
    return [_put_back(entry, tensors) for entry in value] if isinstance(value, list) else value


def dtype_named(name: str) -> torch.dtype:
    """The dtype of that name.

    Raises:
        ValueError: there is none.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is not a dtype")
    return dtype


def brief(error: BaseException) -> str:
    """Of gloo's errors, what happened, without the file in which and the advice."""
    text = str(error).partition(". This is")[0].partition("\n")[0]
    return text.rpartition("] ")[2] if text.startswith("[") and "] " in text else text
