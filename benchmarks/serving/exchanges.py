"""One HTTP exchange, of which its client has every part in hand: also how it leaves."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator
from typing import Any, Literal, Self

Way = Literal["fin", "rst"]
_NO_LINGER = struct.pack("ii", 1, 0)
_LEAVE_S = 30.0


class Exchange:
    """A request that was sent on a connection of its own, and what comes of it.

    status: of HTTP, 0 until `head` has returned. is_whole: the stream ended with [DONE].
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.status = 0
        self.headers: dict[str, str] = {}
        self.is_whole = False
        self._writer = writer

    @classmethod
    async def begin(
        cls,
        port: int,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        key: str | None = None,
        receive_buffer: int | None = None,
    ) -> Self:
        """Send a request, a GET where there is no body. Raises OSError.

        receive_buffer: bytes that the kernel may hold for this client; default: its own choice.
        """
        sock = socket.socket()
        sock.setblocking(False)
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        try:
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
            most = 2**22 if receive_buffer is None else receive_buffer
            reader, writer = await asyncio.open_connection(sock=sock, limit=most)
        except BaseException:
            sock.close()
            raise
        writer.write(request_bytes(path, body, key))
        return cls(reader, writer)

    async def head(self) -> int:
        """Read status and headers; return the status. Raises OSError."""
        line = await self.reader.readline()
        if not line:
            raise ConnectionResetError("closed without an answer")
        self.status = int(line.split()[1])
        while (line := await self.reader.readline()).strip():
            name, _, value = line.decode("latin-1").partition(":")
            self.headers[name.lower()] = value.strip()
        return self.status

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """Yield the events of a stream until its end, or the connection's."""
        while line := await self.reader.readline():
            if line.startswith(b"data: [DONE]"):
                self.is_whole = True
            elif line.startswith(b"data: "):
                yield json.loads(line[6:])

    async def answer(self) -> Any:
        """Return the body, which is JSON."""
        return json.loads(await self.reader.readexactly(int(self.headers["content-length"])))

    async def leave(self, how: Way) -> None:
        """Go away as a program that ends ("fin") or one whose machine does ("rst")."""
        transport = self._writer.transport
        if how == "rst":
            sock = self._writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
            transport.abort()
            return
        try:
            self._writer.write_eof()
            # bytes that nobody reads would make a reset of it
            async with asyncio.timeout(_LEAVE_S):
                while await self.reader.read(2**16):
                    pass
        except OSError:  # the server was quicker; TimeoutError is one, too
            pass
        transport.abort()

    def pause(self) -> None:
        """Read nothing more: what comes stays with the kernel."""
        transport = self._writer.transport
        assert isinstance(transport, asyncio.Transport)
        transport.pause_reading()

    def close(self) -> None:
        self._writer.transport.abort()


def request_bytes(path: str, body: dict[str, Any] | None, key: str | None = None) -> bytes:
    """Return a request for one answer."""
    data = b"" if body is None else json.dumps(body).encode()
    head = (
        f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nHost: localhost\r\n"
        "Connection: close\r\n"
    )
    if key is not None:
        head += f"Authorization: Bearer {key}\r\n"
    if body is not None:
        head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n"
    return head.encode() + b"\r\n" + data


async def ask(
    port: int, path: str, body: dict[str, Any] | None = None, *, key: str | None = None
) -> tuple[int, Any]:
    """Return status and body of one answer that is JSON. Raises OSError."""
    exchange = await Exchange.begin(port, path, body, key=key)
    try:
        await exchange.head()
        return exchange.status, await exchange.answer()
    finally:
        exchange.close()
