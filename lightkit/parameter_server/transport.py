"""A connection between a worker and a server: signed frames over a TCP socket.

Every size is checked before a byte of the frame's content is read, so that what one side sends wrongly costs its own
connection and nothing else. The head of each frame is signed with a key of this connection, and with it the content,
except the bytes of tensors: whoever can change packets on their way can change numbers in a gradient or read it, and
cannot add, repeat, leave out or reorder a frame.
"""

from __future__ import annotations

import contextlib
import hmac
import select
import socket
import struct
import threading
import time
from enum import IntEnum
from typing import Any

from torch import Tensor

from lightkit.errors import LightkitError
from lightkit.parameter_server.encoding import bytes_of, decode, encode

# Whole numbers in the header of a request or an answer; what they mean is in the protocol.
HEADER = struct.Struct("<4q")

# A frame: what it is, bytes of its content, signature.
_FRAME = struct.Struct("<BQ16s")
_SIGNED = struct.Struct("<QBQ")

# Bytes of a message beside its tensors: a description of 100,000 parameters takes about as many.
_LONGEST = 1 << 24

# Bytes a second: a frame that comes slower than this, beyond the seconds of silence that are allowed, does not come.
_SLOWEST = 1 << 20

# Longest seconds between two signs of life, however long a silence is allowed.
_LONGEST_HEARTBEAT = 60.0

# Shortest, however short a silence is allowed.
_SHORTEST_HEARTBEAT = 0.05


class TransportError(LightkitError, ConnectionError):
    """The other side of a connection is gone, is silent, or cannot be understood."""


class SilenceError(TransportError):
    """The other side of a connection said nothing, or took nothing, for too long."""


class ProtocolError(TransportError):
    """The other side of a connection sent something else than was expected."""


class Frame(IntEnum):
    """The kinds of frames. A heartbeat has no content; a header has that of `HEADER`; a message has JSON."""

    HEARTBEAT = 0
    HEADER = 1
    MESSAGE = 2
    TENSOR = 3


class Connection:
    """Sends and receives frames, in order.

    One thread at a time receives; one sends, and another one may send heartbeats. After an error the connection is of
    no use: the caller closes it.

    Args:
        connected: a TCP socket on which each side has shown the other that it knows the secret.
        keys: to sign what is sent, and to check what is received: 32 bytes each.
        silence: seconds without a sign of life from the other side after which it counts as gone.

    Attributes:
        heartbeat: seconds after which the other side wants to hear again that this one is there.
        last_sent: when something was sent, by `time.monotonic`.
    """

    def __init__(self, connected: socket.socket, keys: tuple[bytes, bytes], silence: float) -> None:
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected.settimeout(silence)
        self._socket = connected
        self._sending_key, self._receiving_key = keys
        self._silence = silence
        self._sent = self._received = 0
        self._sending = threading.Lock()
        self._head = memoryview(bytearray(_FRAME.size))
        self._head_filled = 0
        self._last_heard = time.monotonic()
        self._readable, self._writable = select.poll(), select.poll()
        self._readable.register(connected, select.POLLIN)
        self._writable.register(connected, select.POLLOUT)
        self.heartbeat = heartbeat_of(silence)
        self.last_sent = time.monotonic()

    # Sending.

    def send(self, *tensors: Tensor) -> None:
        """Sends tensors whose dtypes and shapes the other side knows; they must lie on a CPU without gaps.

        Raises:
            TransportError: the connection is gone, or the other side takes nothing.
        """
        for tensor in tensors:
            if tensor.numel():
                self._send(Frame.TENSOR, bytes_of(tensor))

    def send_header(self, *numbers: int) -> None:
        """Sends up to four whole numbers of 64 bits; those that are left out are 0."""
        self._send(Frame.HEADER, memoryview(HEADER.pack(*numbers, *[0] * (4 - len(numbers)))))

    def send_message(self, value: Any) -> None:
        """Sends what JSON can say, with tensors of any shapes and dtypes in it; tuples arrive as lists.

        Raises:
            TransportError: as `send`; also where the message would be longer than the other side takes.
        """
        text, tensors = encode(value)
        if len(text) > _LONGEST:
            raise ProtocolError(f"a message of {len(text)} bytes beside its tensors is too long: at most {_LONGEST}")
        self._send(Frame.MESSAGE, memoryview(text))
        self.send(*tensors)

    def send_heartbeat(self) -> None:
        """Gives a sign of life, from any thread. Does nothing while something else is sent: that is one too.

        Raises:
            TransportError: the connection is gone.
        """
        if not self._sending.acquire(blocking=False):
            return
        try:
            # Where there is no room, enough is under way.
            if self._writable.poll(0):
                self._write(Frame.HEARTBEAT, memoryview(b""))
        finally:
            self._sending.release()

    def _send(self, kind: Frame, content: memoryview) -> None:
        with self._sending:
            self._write(kind, content)

    def _write(self, kind: Frame, content: memoryview) -> None:
        signature = self._sign(self._sending_key, self._sent, kind, len(content), content)
        self._sent += 1
        parts = [memoryview(_FRAME.pack(kind, len(content), signature)), content]
        end = self._end_for(len(content))
        try:
            while parts:
                count = self._socket.sendmsg(parts)
                while parts and count >= len(parts[0]):
                    count -= len(parts.pop(0))
                if parts:
                    parts[0] = parts[0][count:]
                    self._check_time(end, "took")
        except OSError as error:
            # A part of a frame may be under way: nothing can follow it.
            self.close()
            raise _explained(error, "took", self._silence) from None
        self.last_sent = time.monotonic()

    # Receiving.

    def receive(self, *tensors: Tensor) -> None:
        """Fills tensors, which must lie on a CPU without gaps.

        Raises:
            ProtocolError: something else came, or a tensor of another size.
            TransportError: the connection is gone, or nothing came for too long.
        """
        for tensor in tensors:
            if tensor.numel():
                length, signature = self._receive_head(Frame.TENSOR)
                if length != tensor.nbytes:
                    raise ProtocolError(f"a tensor of {length} bytes came where one of {tensor.nbytes} was expected")
                self._check(signature, Frame.TENSOR, length, memoryview(b""))
                self._fill(bytes_of(tensor), self._end_for(length))

    def receive_header(self) -> list[int]:
        """Returns the numbers of a header.

        Raises:
            TransportError: as `receive`.
        """
        return list(HEADER.unpack(self._receive_content(Frame.HEADER, HEADER.size, HEADER.size)))

    def receive_message(self, most: int = 0) -> Any:
        """Returns what the other side gave to `send_message`.

        Args:
            most: bytes that the tensors in it may take together.

        Raises:
            ProtocolError: it is none, or has more tensors.
            TransportError: as `receive`.
        """
        text = self._receive_content(Frame.MESSAGE, 1, _LONGEST)
        try:
            return decode(text, most, lambda tensors: self.receive(*tensors))
        except (ValueError, RuntimeError) as error:
            # RuntimeError: of torch, which has no memory for it.
            raise ProtocolError(f"a message cannot be read: {error}") from None

    def poll(self) -> None:
        """Takes the heartbeats that have come, without waiting: for a side that has nothing else to receive now.

        Raises:
            ProtocolError: something else came.
            TransportError: the connection is gone, or there was no sign of life for too long.
        """
        while self._readable.poll(0):
            try:
                if not self._fill_head():
                    continue
            except OSError as error:
                raise _explained(error, "said", self._silence) from None
            kind, length, signature = self._take_head()
            if kind != Frame.HEARTBEAT:
                raise ProtocolError(f"a frame of kind {kind} came where only heartbeats were expected")
            self._check(signature, kind, length, memoryview(b""))
        if time.monotonic() - self._last_heard > self._silence:
            raise SilenceError(f"the other side said nothing for {self._silence:g} s")

    def _receive_content(self, kind: Frame, least: int, most: int) -> bytes:
        length, signature = self._receive_head(kind)
        if not least <= length <= most:
            raise ProtocolError(f"{length} bytes of a {kind.name.lower()} were announced, at most {most} are taken")
        content = bytearray(length)
        self._fill(memoryview(content), self._end_for(length))
        self._check(signature, kind, length, memoryview(content))
        return bytes(content)

    def _receive_head(self, wanted: Frame) -> tuple[int, bytes]:
        """Returns length and signature of the next frame that is no heartbeat."""
        while True:
            end = time.monotonic() + self._silence
            try:
                while not self._fill_head():
                    self._check_time(end, "said")
            except OSError as error:
                raise _explained(error, "said", self._silence) from None
            kind, length, signature = self._take_head()
            if kind == wanted:
                return length, signature
            if kind != Frame.HEARTBEAT:
                raise ProtocolError(f"a frame of kind {kind} came where one of kind {int(wanted)} was expected")
            self._check(signature, kind, length, memoryview(b""))

    def _fill_head(self) -> bool:
        """Reads once; returns whether the head is whole."""
        self._head_filled += self._read(self._head[self._head_filled :])
        return self._head_filled == _FRAME.size

    def _take_head(self) -> tuple[int, int, bytes]:
        self._head_filled = 0
        return _FRAME.unpack(self._head)

    def _fill(self, room: memoryview, end: float) -> None:
        try:
            while room:
                room = room[self._read(room) :]
                if room:
                    self._check_time(end, "said")
        except OSError as error:
            raise _explained(error, "said", self._silence) from None

    def _read(self, room: memoryview) -> int:
        count = self._socket.recv_into(room)
        if count == 0:
            raise TransportError("the other side closed the connection")
        self._last_heard = time.monotonic()
        return count

    # Both.

    def close(self) -> None:
        """Ends the connection, from any thread; whoever waits for something on either side of it finds it gone."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def release(self, seconds: float = 0.0) -> None:
        """Ends the connection and gives back its descriptor, for the thread that receives.

        Args:
            seconds: in which the other side may still read what was sent last: what it sends meanwhile is thrown away.
        """
        end = time.monotonic() + seconds
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
            while (left := end - time.monotonic()) > 0:
                self._socket.settimeout(left)
                if not self._socket.recv(1 << 16):
                    break
        self.close()
        with self._sending:
            self._socket.close()

    def _check(self, signature: bytes, kind: int, length: int, content: memoryview) -> None:
        expected = self._sign(self._receiving_key, self._received, kind, length, content)
        self._received += 1
        if not hmac.compare_digest(signature, expected):
            raise ProtocolError("a frame is not signed by the other side")

    @staticmethod
    def _sign(key: bytes, number: int, kind: int, length: int, content: memoryview) -> bytes:
        signed = b"" if kind == Frame.TENSOR else content
        return hmac.digest(key, b"".join([_SIGNED.pack(number, kind, length), signed]), "sha256")[:16]

    def _end_for(self, length: int) -> float:
        return time.monotonic() + self._silence + length / _SLOWEST

    def _check_time(self, end: float, verb: str) -> None:
        if time.monotonic() > end:
            raise SilenceError(f"the other side {verb} too little for {self._silence:g} s")


def heartbeat_of(silence: float) -> float:
    """Returns after how many seconds to give a sign of life to who takes so many of silence for an end."""
    return min(max(silence / 5, _SHORTEST_HEARTBEAT), _LONGEST_HEARTBEAT)


def _explained(error: OSError, verb: str, silence: float) -> TransportError:
    if isinstance(error, TransportError):
        return error
    if isinstance(error, TimeoutError):
        return SilenceError(f"the other side {verb} nothing for {silence:g} s")
    return TransportError(error.strerror or str(error) or type(error).__name__)
