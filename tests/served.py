"""A small application behind the server's own door, in a thread, and what clients do to it."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import Any, Self

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from moe_serve.server import guard
from moe_serve.server.doorway import Doorway
from moe_serve.server.limits import Limits
from moe_serve.server.serving import Serving, serving

# so short that tests of what is too slow are quick
QUICK = Limits(
    header_s=0.3, body_s=0.4, idle_s=0.3, write_s=0.4, linger_s=0.3, body_bytes=2**20
)  # fmt: skip
ROUTES = {
    **guard.ROUTES,
    "/stream": guard.Route(generates=True),
    "/flood": guard.Route(generates=True),
}


class Served:
    """The application on a free port, from `with` to its end.

    alive: what /live goes by. events: what happened to requests, by their paths.
    """

    def __init__(
        self,
        limits: Limits = QUICK,
        *,
        keys: Sequence[str] = (),
        listens_on: str = "127.0.0.1",
        allowed_hosts: Sequence[str] = (),
        max_per_key: int | None = None,
    ) -> None:
        self.limits = limits
        self.alive = (True, "")
        self.events: list[str] = []
        self.gate = threading.Event()
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
        self.address: tuple[str, int] = self.listener.getsockname()
        routes = [
            *(
                Route(path, self.plain)
                for path in ("/live", "/ready", "/health", "/metrics", "/dashboard", "/v1/models")
            ),
            Route("/v1/completions", self.echo, methods=["POST"]),
            Route("/v1/chat/completions", self.echo, methods=["POST"]),
            Route("/stream", self.stream),
            Route("/flood", self.flood),
            Route("/slow-start", self.slow_start),
            Route("/unread", self.unread, methods=["POST"]),
            Route("/wait", self.wait),
            Route("/block", self.block),
            Route("/boom", self.boom),
            Route("/late-boom", self.late_boom),
            Route("/secret", self.plain),
        ]
        self.guard = guard.Guard(
            Starlette(routes=routes),
            limits,
            listens_on=listens_on,
            keys=keys,
            allowed_hosts=allowed_hosts,
            max_per_key=max_per_key,
            routes=ROUTES,
        )
        self.doorway = Doorway(self.listener, limits, lambda: self.alive, self.hand_over)
        self.loop = asyncio.new_event_loop()
        self.server: Serving
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run)

    # -- the server --------------------------------------------------------------------------------

    def hand_over(self, sock: socket.socket) -> None:
        self.loop.call_soon_threadsafe(self.server.take, sock)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.server = self.loop.run_until_complete(
            serving(self.guard, self.limits, self.doorway.release)
        )
        self.doorway.start()
        self._started.set()
        self.loop.run_forever()
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._started.wait(5)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.gate.set()
        self.doorway.stop()
        self.stop(0.2)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.listener.close()
        if kind is None:
            assert self.doorway.num_connections == 0, "a connection was never released"
            assert self.guard.num_generating == 0, "a request was never released"

    @property
    def errors(self) -> dict[int, int]:
        """How often each status of 400 and above was told, as /metrics counts them."""
        found = self.guard.errors + self.server.refused
        found[503] += self.doorway.counts["over"] + self.doorway.counts["not_live"]
        return dict(+found)

    def stop(self, limit_s: float) -> None:
        asyncio.run_coroutine_threadsafe(self.server.stop(limit_s), self.loop).result(10)

    # -- the application ---------------------------------------------------------------------------

    async def plain(self, request: Request) -> Response:
        self.events.append(request.url.path)
        return JSONResponse({"path": request.url.path, "key_id": request.scope["state"]["key_id"]})

    async def echo(self, request: Request) -> Response:
        body = await request.body()
        self.events.append(f"{request.url.path} {len(body)}")
        return JSONResponse({"bytes": len(body)})

    async def stream(self, request: Request) -> Response:
        return StreamingResponse(self._pieces(request, b"piece\n", 0.005))

    async def flood(self, request: Request) -> Response:
        return StreamingResponse(self._pieces(request, bytes(2**16), 0.0))

    async def _pieces(self, request: Request, piece: bytes, pause_s: float) -> AsyncIterator[bytes]:
        path = request.url.path
        self.events.append(f"{path} begins")
        try:
            while not self.gate.is_set():
                yield piece
                await asyncio.sleep(pause_s)
        finally:
            self.events.append(f"{path} ends")

    async def slow_start(self, request: Request) -> Response:
        async def pieces() -> AsyncIterator[bytes]:
            self.events.append("/slow-start begins")
            while not self.gate.is_set():
                await asyncio.sleep(0.005)
            self.events.append("/slow-start ends")
            yield b"last"

        return StreamingResponse(pieces())

    async def unread(self, request: Request) -> Response:
        return PlainTextResponse("early")

    async def wait(self, request: Request) -> Response:
        self.events.append("/wait begins")
        while not await request.is_disconnected():
            if self.gate.is_set():
                return PlainTextResponse("waited")
            await asyncio.sleep(0.005)
        self.events.append("/wait disconnected")
        return PlainTextResponse("nobody hears")

    async def block(self, request: Request) -> Response:
        self.events.append("/block")
        time.sleep(float(request.query_params["s"]))
        return PlainTextResponse("blocked")

    async def boom(self, request: Request) -> Response:
        raise ValueError("a secret of ours")

    async def late_boom(self, request: Request) -> Response:
        async def pieces() -> AsyncIterator[bytes]:
            yield b"begun"
            raise ValueError("a secret of ours")

        return StreamingResponse(pieces())

    # -- clients -----------------------------------------------------------------------------------

    def connect(self, *, receive_buffer: int | None = None) -> socket.socket:
        sock = socket.socket()
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.settimeout(5)
        sock.connect(self.address)
        return sock

    def send(self, data: bytes) -> bytes:
        """Return all that comes for `data`, until the server closes."""
        with self.connect() as sock:
            sock.sendall(data)
            return read_all(sock)

    def ask(self, method: str, path: str, body: bytes = b"", *headers: str) -> tuple[int, bytes]:
        """Return status and body of an honest request on a connection of its own."""
        return parsed(self.send(request(method, path, body, "Connection: close", *headers)))

    def eventually(self, is_so: Callable[[], bool], within_s: float = 3.0) -> None:
        """Wait until something is so; fail if it does not come to be."""
        end = time.monotonic() + within_s
        while not is_so():
            assert time.monotonic() < end, "it did not come to be"
            time.sleep(0.005)


def request(method: str, path: str, body: bytes = b"", *headers: str) -> bytes:
    """Return the bytes of a request; a Host header is added where `headers` have none."""
    lines = [f"{method} {path} HTTP/1.1", *headers]
    if not any(line.lower().startswith("host:") for line in headers):
        lines.append("Host: localhost")
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def read_all(sock: socket.socket) -> bytes:
    """Return what comes until the other end closes; a reset ends it too."""
    received = bytearray()
    try:
        while piece := sock.recv(2**16):
            received += piece
    except ConnectionError:
        received += b""
    return bytes(received)


def read_response(sock: socket.socket) -> tuple[int, bytes]:
    """Return status and body of one response that has a Content-Length, and nothing beyond it."""
    received = bytearray()
    while b"\r\n\r\n" not in received:
        piece = sock.recv(1)
        assert piece, "closed within a head"
        received += piece
    length = int(header(bytes(received), "content-length") or 0)
    body = b""
    while len(body) < length:
        piece = sock.recv(length - len(body))
        assert piece, "closed within a body"
        body += piece
    return parsed(bytes(received) + body)


def parsed(response: bytes) -> tuple[int, bytes]:
    """Return status and body of a response; 0 for none at all."""
    if not response:
        return 0, b""
    head, _, body = response.partition(b"\r\n\r\n")
    version, status, _ = head.split(b" ", 2)
    assert version == b"HTTP/1.1"
    return int(status), body


def header(response: bytes, name: str) -> str | None:
    """Return the value of a header of a response, or None if it has none such."""
    head = response.partition(b"\r\n\r\n")[0].decode("latin-1")
    for line in head.split("\r\n")[1:]:
        key, _, value = line.partition(":")
        if key.lower() == name:
            return value.strip()
    return None


def error_of(response: bytes) -> tuple[int, dict[str, Any]]:
    """Return status and error of a response that is one in the form of the OpenAI API."""
    status, body = parsed(response)
    assert len(body) <= Limits().error_bytes
    content = json.loads(body)
    assert set(content) == {"error"}
    error: dict[str, Any] = content["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return status, error
