"""A server whose every byte and delay is a test's own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

SSE_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
END = b"0\r\n\r\n"
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Call:
    """One POST: its number from 0, its path, headers and body, and where its answer goes."""

    number: int
    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    writer: asyncio.StreamWriter

    async def write(self, *parts: bytes) -> None:
        for part in parts:
            self.writer.write(part)
            await self.writer.drain()


Script = Callable[[Call], Awaitable[None]]


@dataclass
class ScriptedServer:
    """Serves POSTs by a script; GETs (of /v1/models) by `models`, an answer as bytes."""

    script: Script
    models: bytes = b""
    port: int = 0
    calls: list[Call] = field(default_factory=list)
    num_connections: int = 0
    _open: set[asyncio.Task[Any]] = field(default_factory=set)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        self.num_connections += 1
        try:
            while not writer.is_closing():
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                first, *lines = head.strip().split("\r\n")
                method, path, _ = first.split()
                headers = {k.lower(): v.strip() for k, _, v in (x.partition(":") for x in lines)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                if method == "GET":
                    writer.write(self.models or answer(200, {"data": [{"id": "first-model"}]}))
                    continue
                call = Call(len(self.calls), path, headers, json.loads(body), writer)
                self.calls.append(call)
                await self.script(call)
        except (asyncio.IncompleteReadError, ConnectionError):
            return  # the client has gone
        finally:
            self._open.discard(task)
            writer.transport.abort()


@asynccontextmanager
async def serving(script: Script, models: bytes = b"") -> AsyncIterator[ScriptedServer]:
    """Give a server on a port of its own; what still runs at the end is cancelled."""
    scripted = ScriptedServer(script, models)
    server = await asyncio.start_server(scripted.serve, "127.0.0.1", 0)
    scripted.port = server.sockets[0].getsockname()[1]
    try:
        yield scripted
    finally:
        server.close()
        running = list(scripted._open)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await asyncio.sleep(0)  # for the transports that were just aborted


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def answer(status: int, body: Any, **headers: str) -> bytes:
    data = json.dumps(body).encode()
    named = "".join(f"{k.replace('_', '-')}: {v}\r\n" for k, v in headers.items())
    head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\n{named}"
    return f"{head}content-length: {len(data)}\r\n\r\n".encode() + data


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields, ensure_ascii=False).encode() + b"\n\n"


def token(text: str = "x", finish_reason: str | None = None) -> bytes:
    return event(choices=[{"index": 0, "text": text, "finish_reason": finish_reason}])


def usage(num_prompt: int, num_output: int) -> bytes:
    return event(choices=[], usage={"prompt_tokens": num_prompt, "completion_tokens": num_output})


def stream_of(num_tokens: int, *, first_s: float = 0.0, gap_s: float = 0.0) -> Script:
    """Return a script: so many chunks of one token, with these delays before them."""

    async def script(call: Call) -> None:
        await call.write(SSE_HEAD)
        for index in range(num_tokens):
            await asyncio.sleep(gap_s if index else first_s)
            await call.write(chunk(token()))
        await call.write(chunk(token("", "length")), chunk(usage(7, num_tokens)), chunk(DONE), END)

    return script
