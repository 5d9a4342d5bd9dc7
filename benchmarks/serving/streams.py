"""Streams of completions, and what became of each: a client that notes everything."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Stream:
    """One streamed completion. Times are of time.monotonic.

    status: of HTTP, 0: no answer came. error: of an error event, or why the connection ended.
    is_whole: it ended with [DONE].
    """

    body: dict[str, Any]
    status: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    seed: int | None = None
    finish_reason: str | None = None
    error: str | None = None
    is_whole: bool = False
    end_s: float = 0.0

    @property
    def has_ended(self) -> bool:
        return self.end_s > 0

    def take(self, event: dict[str, Any]) -> None:
        """Take an event in."""
        if "error" in event:
            self.error = event["error"]["message"]
            return
        self.seed = event.get("seed", self.seed)
        for choice in event["choices"]:
            self.text += choice["text"]
            self.token_ids += choice.get("token_ids") or []
            self.finish_reason = choice["finish_reason"] or self.finish_reason
            self.times_s.append(time.monotonic())


async def run_stream(port: int, stream: Stream, limit_s: float = 120.0) -> None:
    """Run one stream to its end, whatever that is."""
    try:
        async with asyncio.timeout(limit_s):
            await _run(port, stream)
    except TimeoutError:
        stream.error = f"hung: nothing more for {limit_s:.0f} s"
    except (OSError, asyncio.IncompleteReadError) as error:
        stream.error = stream.error or f"connection: {type(error).__name__}"
    stream.end_s = time.monotonic()


async def _run(port: int, stream: Stream) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**22)
    try:
        data = json.dumps(stream.body).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Connection: close\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        writer.write(head.encode() + data)
        status = await reader.readline()
        if not status:
            raise ConnectionResetError
        stream.status = int(status.split()[1])
        while (await reader.readline()).strip():
            pass
        if stream.status != 200:
            stream.error = (await reader.read()).decode(errors="replace")
            return
        while line := await reader.readline():
            if line.startswith(b"data: [DONE]"):
                stream.is_whole = True
            elif line.startswith(b"data: "):
                stream.take(json.loads(line[6:]))
        if not stream.is_whole and stream.error is None:
            stream.error = "connection: closed before its end"
    finally:
        writer.close()


async def run_streams(port: int, bodies: Sequence[dict[str, Any]], **options: Any) -> list[Stream]:
    """Run streams at once; return them when all have ended."""
    streams = [Stream(body) for body in bodies]
    await asyncio.gather(*(run_stream(port, stream, **options) for stream in streams))
    return streams
