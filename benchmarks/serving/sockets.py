"""Raw sockets that do all that a client should not, beside honest streams.

Hypothesis: 200 clients that send their headers byte by byte, 50 that do so with bodies, endless
bodies and headers, requests in heaps, half-closed and reset connections cost the server less than
50 MiB; /live takes under 100 ms at the 99th percentile; the honest streams have the tokens that
they have alone, the first ones in less than twice the time; and no bad connection is open 15 s
after the time that the limits give it.

    python -m benchmarks.serving.sockets --save
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from benchmarks import results
from benchmarks.serving.exchanges import Exchange, request_bytes
from benchmarks.serving.idle import Use, growth, use_of, wait_until_idle
from benchmarks.serving.live import p99, sample
from benchmarks.serving.report import report
from benchmarks.serving.served import Served, served
from benchmarks.serving.streams import Stream, run_stream
from moe_serve.server.limits import DEFAULT_LIMITS

FLAGS = ("--stats-interval", "0")
MOST_GROWN_BYTES = 50 * 2**20
MOST_LIVE_S = 0.1
MOST_RATIO, MOST_FIRST_S = 2.0, 0.1
# beyond what limits give: the machine is busy, and refused clients may linger
MARGIN_S = 15.0
_BYTE_S = 0.5
_CHUNK = b"10000\r\n" + b"x" * 2**16 + b"\r\n"
_GIGABYTE = 2**30
_PIPELINED = 20
# between two rounds of those that are quickly refused
_PAUSE_S = 0.3
HONEST: dict[str, Any] = {
    "prompt": [17, 4000, 23, 5],
    "max_tokens": 24,
    "temperature": 0.8,
    "seed": 7,
    "ignore_eos": True,
    "stream": True,
    "return_token_ids": True,
}


@dataclass(frozen=True)
class Counts:
    """How many of each kind at once; slow_bodies are ended by body_s only, which is long."""

    slow_heads: int = 200
    slow_bodies: int = 50
    others: int = 8


@dataclass
class Bad:
    """What came of bad connections. open_s: for how long they were, by kind; ended: how."""

    open_s: dict[str, list[float]] = field(default_factory=dict)
    ended: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


@dataclass
class Sockets:
    """What came of it all.

    first_s: times to the honest streams' first tokens, without and with bad ones beside.
    """

    bad: Bad = field(default_factory=Bad)
    first_s: dict[bool, list[float]] = field(default_factory=lambda: {False: [], True: []})
    num_different: int = 0
    live_s: list[float] = field(default_factory=list)
    grown_bytes: list[int] = field(default_factory=list)
    idle_after_s: float = 0.0
    faults: list[str] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        return p99(self.first_s[True]) / p99(self.first_s[False])

    def judge(self) -> None:
        if self.num_different:
            self.faults.append(f"{self.num_different} honest streams were different")
        if p99(self.live_s) > MOST_LIVE_S:
            self.faults.append(f"/live took {1e3 * p99(self.live_s):.0f} ms")
        if self.ratio > MOST_RATIO:
            self.faults.append(f"the first token took {self.ratio:.2f} times as long")
        if p99(self.first_s[True]) > MOST_FIRST_S:
            self.faults.append(f"a first token took {1e3 * p99(self.first_s[True]):.0f} ms")
        if max(self.grown_bytes) > MOST_GROWN_BYTES:
            self.faults.append(f"the server grew by {max(self.grown_bytes) / 2**20:.0f} MiB")
        self.faults += self.bad.faults
        for kind, samples in self.bad.open_s.items():
            if max(samples) > limit_s(kind):
                self.faults.append(f"{kind}: open for {max(samples):.1f} s")


def limit_s(kind: str) -> float:
    """Return how long a bad connection of a kind may be open."""
    owed_s = {"slow head": DEFAULT_LIMITS.header_s, "slow body": DEFAULT_LIMITS.body_s}
    return owed_s.get(kind, DEFAULT_LIMITS.linger_s) + MARGIN_S


# -- bad clients -----------------------------------------------------------------------------------


async def _dribble(port: int, head: bytes, byte: bytes) -> str:
    """Send a head at once, then bytes one by one until the server has enough."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(head)
        answer = asyncio.create_task(reader.read(2**12))
        while not answer.done():
            writer.write(byte)
            await asyncio.wait([answer], timeout=_BYTE_S)
        return _status(answer.result())
    finally:
        writer.transport.abort()


async def slow_head(port: int) -> str:
    return await _dribble(port, b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX-A: ", b"a")


async def slow_body(port: int) -> str:
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 100000\r\n\r\n"
    )
    return await _dribble(port, head, b" ")


async def _pour(port: int, head: bytes, piece: bytes, most: int) -> str:
    """Send a head and then pieces, up to `most` bytes, as fast as they are taken."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answer = asyncio.create_task(reader.read(2**12))
    try:
        writer.write(head)
        sent = 0
        while sent < most:
            writer.write(piece)
            sent += len(piece)
            await writer.drain()
            await asyncio.sleep(0)
        assert sent < most, "all was taken"
        return ""
    except ConnectionError:
        return _status(await answer)
    finally:
        writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await answer


async def endless_body(port: int) -> str:
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n"
    )
    return await _pour(port, head, _CHUNK, _GIGABYTE)


async def large_head(port: int) -> str:
    """Send 2 MiB of one header."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX-A: " + b"a" * 2**21)
        return _status(await reader.read(2**12))
    finally:
        writer.transport.abort()


async def pipelined(port: int) -> str:
    """Send a heap of requests at once, and read all answers."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        one = request_bytes("/v1/completions", {"prompt": [5], "max_tokens": 2})
        keep = one.replace(b"Connection: close\r\n", b"")
        writer.write(keep * (_PIPELINED - 1) + one)
        num = (await reader.read()).count(b"HTTP/1.1 200")
        return f"{num} answers" if num != _PIPELINED else "all answers"
    finally:
        writer.transport.abort()


async def half_closed(port: int) -> str:
    """Ask for a stream and say at once that nothing more will come."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request_bytes("/v1/completions", {**HONEST, "max_tokens": 900}))
        writer.write_eof()
        while await reader.read(2**16):
            pass
        return "closed"
    finally:
        writer.transport.abort()


async def reset(port: int) -> str:
    """Reset the connection of a stream after some tokens."""
    exchange = await Exchange.begin(port, "/v1/completions", {**HONEST, "max_tokens": 900})
    assert await exchange.head() == 200
    num = 0
    async for _ in exchange.events():
        num += 1
        if num == 10:
            break
    await exchange.leave("rst")
    return "reset"


def _status(answer: bytes) -> str:
    return answer.split(b" ", 2)[1].decode() if answer.startswith(b"HTTP/1.1 ") else "closed"


# -- all together ----------------------------------------------------------------------------------

_OTHERS: tuple[Callable[[int], Coroutine[Any, Any, str]], ...] = (
    endless_body, large_head, pipelined, half_closed, reset,
)  # fmt: skip


async def _bad(port: int, kind: Callable[[int], Coroutine[Any, Any, str]], found: Bad) -> None:
    name = kind.__name__.replace("_", " ")
    begun_s = time.monotonic()
    try:
        async with asyncio.timeout(limit_s(name) + MARGIN_S):
            how = await kind(port)
    except ConnectionError:
        how = "closed"
    except TimeoutError:
        how = "still open"
        found.faults.append(f"{name}: still open")
    found.ended[f"{name}: {how}"] += 1
    found.open_s.setdefault(name, []).append(time.monotonic() - begun_s)


async def _all_bad(port: int, counts: Counts) -> Bad:
    found = Bad()
    kinds = [slow_head] * counts.slow_heads + [slow_body] * counts.slow_bodies
    slow = [asyncio.create_task(_bad(port, kind, found)) for kind in kinds]
    for _ in range(counts.others):
        await asyncio.gather(*(_bad(port, kind, found) for kind in _OTHERS))
        await asyncio.sleep(_PAUSE_S)
    await asyncio.gather(*slow)
    return found


def misbehave(port: int, counts: Counts) -> Bad:
    """Do all that, and return when every connection has ended. For a process of its own."""
    return asyncio.run(_all_bad(port, counts))


async def _honest(port: int, count: int, *, is_beside: bool, found: Sockets) -> list[list[int]]:
    """Run honest streams one after another; return their tokens."""
    told = []
    for _ in range(count):
        stream = Stream(dict(HONEST))
        begun_s = time.monotonic()
        await run_stream(port, stream)
        if not stream.is_whole:
            found.faults.append(f"an honest stream ended: {stream.error}")
            continue
        found.first_s[is_beside].append(stream.times_s[0] - begun_s)
        told.append(stream.token_ids)
    return told


def _watch(port: int, bad: Future[Bad], found: Sockets) -> None:
    while not bad.done():
        found.live_s += sample(port, 10)


def run(server: Served, counts: Counts, num_honest: int) -> Sockets:
    """Have all do their worst, and judge what came of it."""
    found = Sockets()
    port = server.port
    # a process of their own, so that what is measured is the server and not this client
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(misbehave, port, Counts(0, 0, 1)).result()  # it is there, and has all it needs
        wait_until_idle(server)
        alone = asyncio.run(_honest(port, num_honest, is_beside=False, found=found))
        before: dict[str, Use] = use_of(server)
        bad = pool.submit(misbehave, port, counts)
        watching = threading.Thread(target=_watch, args=(port, bad, found))
        watching.start()
        beside = asyncio.run(_honest(port, num_honest, is_beside=True, found=found))
        found.grown_bytes.append(growth(before, use_of(server)))
        found.bad = bad.result()
        watching.join()
    found.grown_bytes.append(growth(before, use_of(server)))
    found.num_different = sum(one != alone[0] for one in alone + beside)
    found.idle_after_s = wait_until_idle(server)
    found.judge()
    return found


def rows_of(found: Sockets) -> list[results.Row]:
    """Return the figures."""
    row = results.Row.of
    first = {key: [1e3 * one for one in samples] for key, samples in found.first_s.items()}
    rows = [
        row(f"{kind}: open", samples, "s", limit=limit_s(kind))
        for kind, samples in sorted(found.bad.open_s.items())
    ]
    grown = [num / 2**20 for num in found.grown_bytes]
    return [
        *rows,
        row("memory grown", grown, "MiB", limit=MOST_GROWN_BYTES / 2**20),
        row("/live, p99", [1e3 * p99(found.live_s)], "ms", limit=1e3 * MOST_LIVE_S),
        row("first token alone", first[False], "ms"),
        row("first token beside", first[True], "ms"),
        row("first token, ratio of p99", [found.ratio], "times", limit=MOST_RATIO),
        row("first token beside, p99", [p99(first[True])], "ms", limit=1e3 * MOST_FIRST_S),
        row("honest streams that were different", [found.num_different], "count", limit=0),
        row("nothing under way after", [found.idle_after_s], "s"),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slow-heads", type=int, default=200)
    parser.add_argument("--slow-bodies", type=int, default=50)
    parser.add_argument("--others", type=int, default=8, help="rounds of each other kind")
    parser.add_argument("--honest", type=int, default=200, help="streams, without and with them")
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    counts = Counts(given.slow_heads, given.slow_bodies, given.others)
    with served(*FLAGS) as server:
        found = run(server, counts, given.honest)
    for how, count in sorted(found.bad.ended.items()):
        print(f"  {how}: {count}")
    return report("sockets", rows_of(found), found.faults, is_saved=given.save)


if __name__ == "__main__":
    sys.exit(main())
