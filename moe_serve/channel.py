"""Messages over a stream socket: length, then msgpack. No pickle: data and nothing else.

A `Channel` waits for its other end; a `Mailbox` never does.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from typing import Any, Generic, TypeVar

import msgspec

from moe_serve.errors import CommError, RequestError

_LENGTH = struct.Struct("<I")
MOST_BYTES = 2**30

Incoming = TypeVar("Incoming")


class Closed(CommError):
    """The other side is gone."""


def encoded(message: msgspec.Struct) -> bytes:
    """Return a message as it travels. Raises RequestError for what cannot be said."""
    try:
        data = msgspec.msgpack.encode(message)
    except (ValueError, OverflowError, TypeError) as error:
        raise RequestError(f"a request that cannot be sent to a rank: {error}") from error
    if len(data) > MOST_BYTES:
        raise RequestError(f"a request of {len(data)} bytes; {MOST_BYTES} are the most")
    return data


class Channel(Generic[Incoming]):
    """One end of a connection. Any thread may send; one may receive."""

    def __init__(self, connection: socket.socket, incoming: Any) -> None:
        """incoming: the type, a union of Structs, of what the other side may say."""
        self._socket = connection
        self._decoder: msgspec.msgpack.Decoder[Incoming] = msgspec.msgpack.Decoder(incoming)
        self._sending = threading.Lock()
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, message: msgspec.Struct) -> None:
        """Send one message. Raises Closed."""
        self.send_encoded(encoded(message))

    def send_encoded(self, data: bytes) -> None:
        """Send what `encoded` gave. Raises Closed."""
        try:
            with self._sending:
                self._socket.sendall(_LENGTH.pack(len(data)) + data)
        except OSError as error:
            raise Closed(f"the connection is gone ({error.strerror or error})") from error

    def receive(self, limit_s: float | None = None) -> Incoming:
        """Wait for one message. Raises Closed at the end, CommError for what is no message.

        limit_s: TimeoutError is raised after so long without a byte.
        """
        self._socket.settimeout(limit_s)
        (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size))
        if length > MOST_BYTES:
            raise CommError(f"a message of {length} bytes; {MOST_BYTES} are the most")
        try:
            return self._decoder.decode(self._exactly(length))
        except msgspec.DecodeError as error:
            raise CommError(f"not a message: {error}") from error

    def check(self) -> None:
        """Raise Closed if the other side is gone, as far as what it said was read."""
        self._peek()

    @property
    def has_message(self) -> bool:
        """Whether the other side has said something that was not read. Raises Closed."""
        return self._peek()

    def _peek(self) -> bool:
        try:
            if self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                return True
        except BlockingIOError:
            return False
        except OSError as error:
            raise Closed(f"the connection is gone ({error.strerror or error})") from error
        raise Closed("the connection was closed")

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        """Close it; who receives at the other end, or at this one, gets Closed."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _exactly(self, size: int) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            try:
                part = self._socket.recv(min(size - len(parts), 2**20))
            except TimeoutError:
                raise
            except OSError as error:
                raise Closed(f"the connection is gone ({error.strerror or error})") from error
            if not part:
                raise Closed("the connection was closed")
            parts += part
        return bytes(parts)


class Mailbox(Generic[Incoming]):
    """One end of a connection whose other end may be slow, or frozen: nothing here waits for it.

    What cannot be written yet is kept, up to `most_bytes`. Any thread may send; one may receive.
    """

    def __init__(
        self, connection: socket.socket, incoming: Any, most_bytes: int = MOST_BYTES
    ) -> None:
        """incoming: the type, a union of Structs, of what the other side may say."""
        connection.setblocking(False)
        self._socket = connection
        self._decoder: msgspec.msgpack.Decoder[Incoming] = msgspec.msgpack.Decoder(incoming)
        self._encoder = msgspec.msgpack.Encoder()
        self._most_bytes = most_bytes
        self._sending = threading.Lock()
        self._unsent = bytearray()
        self._unread = bytearray()

    def send(self, message: msgspec.Struct) -> None:
        """Send a message, or keep what does not go yet for `flush`.

        Raises Closed where the other side is gone, or has not read for so long that too much waits.
        """
        with self._sending:
            data = self._encoder.encode(message)
            self._unsent += _LENGTH.pack(len(data))
            self._unsent += data
            self._write()

    def flush(self) -> bool:
        """Write what goes of what is kept; return whether nothing is left. Raises Closed."""
        with self._sending:
            self._write()
            return not self._unsent

    @property
    def has_unsent(self) -> bool:
        """Whether something is kept: `flush` when the socket can be written to."""
        return bool(self._unsent)

    def receive(self) -> list[Incoming]:
        """Return the messages that are there, [] where there are none.

        Raises Closed at the end, CommError for what is no message.
        """
        is_closed = False
        while True:
            try:
                part = self._socket.recv(2**18)
            except BlockingIOError:
                break
            except OSError as error:
                raise Closed(f"the connection is gone ({error.strerror or error})") from error
            if not part:
                is_closed = True
                break
            self._unread += part
            if len(part) < 2**18:
                break
        messages = self._messages()
        if is_closed and not messages:
            raise Closed("the connection was closed")
        return messages

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        """Close it; what was kept is lost."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _write(self) -> None:
        while self._unsent:
            try:
                sent = self._socket.send(self._unsent)
            except BlockingIOError:
                if len(self._unsent) > self._most_bytes:
                    raise Closed(f"the other side has not read {len(self._unsent)} bytes") from None
                return
            except OSError as error:
                raise Closed(f"the connection is gone ({error.strerror or error})") from error
            del self._unsent[:sent]

    def _messages(self) -> list[Incoming]:
        """Take the whole messages out of what was read."""
        unread, start = self._unread, 0
        messages: list[Incoming] = []
        while len(unread) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(unread, start)
            if length > MOST_BYTES:
                raise CommError(f"a message of {length} bytes; {MOST_BYTES} are the most")
            end = start + _LENGTH.size + length
            if len(unread) < end:
                break
            try:
                messages.append(self._decoder.decode(bytes(unread[start + _LENGTH.size : end])))
            except msgspec.DecodeError as error:
                raise CommError(f"not a message: {error}") from error
            start = end
        del unread[:start]
        return messages
