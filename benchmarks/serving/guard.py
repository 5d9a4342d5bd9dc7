"""What the server's door, its protocol and its guard cost, beside plain uvicorn with h11.

Hypothesis: with them the same application answers at least 85 % of the requests per second, and
sends at least 85 % of the chunks, that it does without. Two servers run, one client asks them in
turn over 8 connections that are kept: what else the machine does meets both. The client runs on
the same cores, so the processor time of the servers is measured too.

    python -m benchmarks.serving.guard [--rounds 5] [--seconds 2] [--save]

With --save the figures are also kept in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn

from benchmarks.results import Row, recorded_command, write_results
from moe_serve.server.doorway import Doorway
from moe_serve.server.guard import Guard
from moe_serve.server.limits import DEFAULT_LIMITS
from moe_serve.server.serving import Serving, serving

GOAL = 0.85
CONNECTIONS = 8
KEY = "sk-of-the-benchmark"
BODY = b'{"model": "demo-moe", "messages": [{"role": "user", "content": "%s"}]}' % (b"x" * 200)
CHUNK = b'data: {"choices": [{"index": 0, "delta": {"content": " word"}}]}\n\n'
CHUNKS = 200
HEADERS = (
    b"Host: localhost\r\nAuthorization: Bearer " + KEY.encode() + b"\r\nAccept: */*\r\n"
    b"User-Agent: benchmark\r\nContent-Type: application/json\r\n"
)
ECHO = b"POST /v1/completions HTTP/1.1\r\n%sContent-Length: %d\r\n\r\n%s" % (
    HEADERS,
    len(BODY),
    BODY,
)
STREAM = b"GET /v1/chat/completions HTTP/1.1\r\n%s\r\n" % HEADERS
SERVERS = ("plain", "guarded")


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Echo a body, or stream chunks as fast as they are taken."""
    start = {"type": "http.response.start", "status": 200}
    if scope["path"] == "/v1/completions":
        body, is_more = b"", True
        while is_more:
            message = await receive()
            body += message["body"]
            is_more = message["more_body"]
        await send({**start, "headers": [(b"content-length", b"%d" % len(body))]})
        await send({"type": "http.response.body", "body": body})
        return
    await send({**start, "headers": [(b"content-type", b"text/event-stream")]})
    for _ in range(CHUNKS):
        await send({"type": "http.response.body", "body": CHUNK, "more_body": True})
        await asyncio.sleep(0)
    await send({"type": "http.response.body", "body": b""})


def serve_plain(listener: socket.socket) -> None:
    config = uvicorn.Config(
        application, http="h11", loop="asyncio", ws="none", lifespan="off", log_config=None,
        access_log=False, proxy_headers=False,
    )  # fmt: skip
    uvicorn.Server(config).run(sockets=[listener])


def serve_guarded(listener: socket.socket) -> None:
    async def run() -> None:
        loop = asyncio.get_running_loop()
        server: Serving

        def hand_over(sock: socket.socket) -> None:
            loop.call_soon_threadsafe(server.take, sock)

        doorway = Doorway(listener, DEFAULT_LIMITS, lambda: (True, ""), hand_over)
        guard = Guard(application, DEFAULT_LIMITS, listens_on="127.0.0.1", keys=(KEY,))
        server = await serving(guard, DEFAULT_LIMITS, doorway.release)
        doorway.start()
        await asyncio.Event().wait()

    asyncio.run(run())


class Subject:
    """A server in a process of its own."""

    def __init__(self, name: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port: int = listener.getsockname()[1]
            command = (sys.executable, "-m", "benchmarks.serving.guard", "--serve", name)
            self._process = subprocess.Popen(
                (*command, "--listener", str(listener.fileno())), pass_fds=(listener.fileno(),)
            )

    def cpu_s(self) -> float:
        """Return the processor time that it has used."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


class Client(asyncio.Protocol):
    """One connection that asks again as soon as it has its answer.

    is_whole: takes what has come of an answer, and says whether that is all of it.
    """

    def __init__(self, data: bytes, is_whole: Callable[[bytes], bool], gone: list[Any]) -> None:
        self.count = 0
        self._data = data
        self._is_whole = is_whole
        self._gone = gone
        self._received = b""
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._transport.write(self._data)

    def data_received(self, data: bytes) -> None:
        self._received += data
        if self._is_whole(self._received):
            self._received = b""
            self.count += 1
            self._transport.write(self._data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._gone.append(exc)


def is_whole_echo(received: bytes) -> bool:
    return received.startswith(b"HTTP/1.1 200 ") and received.endswith(BODY)


def is_whole_stream(received: bytes) -> bool:
    return received.startswith(b"HTTP/1.1 200 ") and received.endswith(b"\r\n0\r\n\r\n")


async def answers_per_second(
    port: int, data: bytes, is_whole: Callable[[bytes], bool], seconds: float
) -> tuple[float, int]:
    """Return whole answers per second, and how many there were."""
    loop = asyncio.get_running_loop()
    gone: list[Any] = []
    made = [
        await loop.create_connection(lambda: Client(data, is_whole, gone), "127.0.0.1", port)
        for _ in range(CONNECTIONS)
    ]
    start = time.perf_counter()
    await asyncio.sleep(seconds)
    count = sum(client.count for _, client in made)
    took_s = time.perf_counter() - start
    assert not gone, "a server closed a connection"
    assert all(client.count for _, client in made), "a connection was not answered"
    for transport, _ in made:
        transport.abort()
    await asyncio.sleep(0.05)
    return count / took_s, count


def measure(rounds: int, seconds: float) -> list[Row]:
    subjects = {name: Subject(name) for name in SERVERS}
    kinds = {
        "requests": (ECHO, is_whole_echo, 1),
        "streamed chunks": (STREAM, is_whole_stream, CHUNKS),
    }
    rows = []
    try:
        time.sleep(2.0)
        for kind, (data, is_whole, per_answer) in kinds.items():
            rates: dict[str, list[float]] = {name: [] for name in SERVERS}
            costs: dict[str, list[float]] = {name: [] for name in SERVERS}
            for turn in range(rounds + 1):
                for name in SERVERS if turn % 2 else SERVERS[::-1]:
                    before = subjects[name].cpu_s()
                    rate, count = asyncio.run(
                        answers_per_second(subjects[name].port, data, is_whole, seconds)
                    )
                    if turn:  # the first only warms up
                        used_s = subjects[name].cpu_s() - before
                        rates[name].append(rate * per_answer)
                        costs[name].append(used_s / (count * per_answer) * 1e6)
            rows += compared(f"{kind} per second", rates, "1/s")
            rows += compared(f"processor time of one of the {kind}", costs, "us")
    finally:
        for subject in subjects.values():
            subject.end()
    return rows


def compared(name: str, samples: dict[str, list[float]], unit: str) -> list[Row]:
    """Return a row for each server; the guarded one's ratio is the median of those of rounds."""
    ratios = [g / p for g, p in zip(samples["guarded"], samples["plain"], strict=True)]
    rows = [
        Row.of(f"{name}, plain uvicorn", samples["plain"], unit),
        Row.of(
            f"{name}, through the guard, over plain",
            samples["guarded"],
            unit,
            ratio=statistics.median(ratios),
        ),
    ]
    for row in rows:
        ratio = (
            "" if row.ratio is None else f"  {row.ratio:.3f} ({min(ratios):.3f}-{max(ratios):.3f})"
        )
        print(f"{row.name:<75} {row.median:>10.1f} {row.min:>10.1f} {row.max:>10.1f} {unit}{ratio}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each server in each round")
    parser.add_argument("--save", action="store_true", help="keep the figures in results/")
    parser.add_argument("--serve", choices=SERVERS, help=argparse.SUPPRESS)
    parser.add_argument("--listener", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve is not None:
        with socket.socket(fileno=arguments.listener) as listener:
            {"plain": serve_plain, "guarded": serve_guarded}[arguments.serve](listener)
        return
    rows = measure(arguments.rounds, arguments.seconds)
    print(f"goal: at least {GOAL:g} of the requests and chunks of plain uvicorn")
    if arguments.save:
        command = recorded_command("benchmarks.serving.guard", sys.argv[1:])
        print(write_results("serving-guard", rows, command=command))


if __name__ == "__main__":
    main()
