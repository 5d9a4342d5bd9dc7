"""What a front end costs beside FastAPI with nothing in it: answers and chunks of streams a second.

Hypothesis: with an engine that takes no time, answers of one token come at more than half the rate
of FastAPI's own echo of a validated body, and a chunk of a stream costs less than one of
StreamingResponse. The engine is a fake in its own process. One client for both, both on uvicorn
with h11, in turns.

    python -m benchmarks.serving.front_end [--seconds 3] [--rounds 5] [--save]

Rates are with the client and the fake engine on the same cores. "CPU" is the server's own time:
what counts when it has a core to itself. Streams are measured at a pace that leaves time
(--step-ms), where each token is a chunk, and as fast as the engine can, where tokens gather.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.results import Row, recorded_command, write_results

ROOT = Path(__file__).resolve().parent.parent.parent
KINDS = ("front", "bare")
STREAM_TOKENS = 200


@dataclass(frozen=True)
class Sample:
    """What one run gave: things a second (answers or events) and the server's CPU time for each."""

    per_s: float
    cpu_us: float


class Subject:
    """A server in a process of its own."""

    def __init__(self, stack: ExitStack, kind: str, path: Path, step_s: float) -> None:
        self.port = free_port()
        if kind == "front":
            host = start("tests.server.fake_host", str(path), "--step-s", str(step_s))
            stack.callback(stop, host)
            while not path.exists():
                time.sleep(0.05)
        server = start("benchmarks.serving.subject", kind, str(self.port), str(step_s), str(path))
        stack.callback(stop, server)
        self.process = psutil.Process(server.pid)
        wait_for(self.port)

    def cpu_s(self) -> float:
        times = self.process.cpu_times()
        return float(times.user + times.system)


def start(*command: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", *command], cwd=ROOT)


def stop(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for(port: int) -> None:
    for _ in range(600):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise SystemExit("a server did not start; what it said is above")


class Client(asyncio.Protocol):
    """One connection that asks again as soon as it has its answer. Counts answers and events."""

    def __init__(self, request: bytes) -> None:
        self.num_answers = 0
        self.num_events = 0
        self._request = request
        self._is_stream = b'"stream":true' in request
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.num_events += data.count(b"data: ")
        # an answer without chunks ends with its object, a stream with an empty chunk
        self._rest = (self._rest + data)[-16:] if self._is_stream else self._rest + data
        end = b"\r\n0\r\n\r\n" if self._is_stream else b"}"
        if self._rest.endswith(end):
            assert self._is_stream or self._rest.startswith(b"HTTP/1.1 200"), self._rest[:300]
            self._rest = b""
            self.num_answers += 1
            self._transport.write(self._request)

    def close(self) -> None:
        self._transport.close()


def request(*, stream: bool, tokens: int) -> bytes:
    body = b'{"model":"demo","prompt":"Once upon a time there was","max_tokens":%d,' % tokens
    body += b'"temperature":0.7,"stream":%s}' % (b"true" if stream else b"false")
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body)
    )
    return head + body


async def measured(
    subject: Subject, data: bytes, connections: int, seconds: float, count_tokens: int | None = None
) -> Sample:
    """Ask on some connections for some seconds; count events of streams, or tokens of answers."""
    loop = asyncio.get_running_loop()
    clients: list[Client] = []

    def made() -> Client:
        clients.append(Client(data))
        return clients[-1]

    for _ in range(connections):
        await loop.create_connection(made, "127.0.0.1", subject.port)
    await asyncio.sleep(0.5)

    def count() -> int:
        if count_tokens is None:
            return sum(client.num_events for client in clients)
        return sum(client.num_answers for client in clients) * count_tokens

    begun, begun_s, cpu_s = count(), time.perf_counter(), subject.cpu_s()
    await asyncio.sleep(seconds)
    done, spent_s, cpu_s = count() - begun, time.perf_counter() - begun_s, subject.cpu_s() - cpu_s
    for client in clients:
        client.close()
    await asyncio.sleep(0.3)
    return Sample(done / spent_s, cpu_s / max(done, 1) * 1e6)


def rows_of(name: str, unit: str, samples: dict[str, list[Sample]]) -> list[Row]:
    """Return the rows to keep of one case, and print them."""
    rows = []
    for kind in KINDS:
        pairs = list(zip(samples[kind], samples["bare"], strict=True))
        rate = statistics.median(one.per_s / other.per_s for one, other in pairs)
        cost = statistics.median(one.cpu_us / other.cpu_us for one, other in pairs)
        rows += [
            Row.of(f"{name}, {kind}", [s.per_s for s in samples[kind]], f"{unit}/s", ratio=rate),
            Row.of(
                f"{name}, {kind}: CPU of one", [s.cpu_us for s in samples[kind]], "us", ratio=cost
            ),
        ]
    for row in rows:
        print(
            f"{row.name:<42} {row.value:>10.1f} {row.unit:<10} "
            f"({row.min:.1f}-{row.max:.1f}, {row.ratio:.2f} of bare)"
        )
    return rows


def compare(
    name: str,
    unit: str,
    data: bytes,
    connections: int,
    step_s: float,
    rounds: int,
    seconds: float,
    count_tokens: int | None = None,
) -> list[Row]:
    """Measure both servers in turns."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        subjects = {kind: Subject(stack, kind, folder / "host", step_s) for kind in KINDS}
        samples: dict[str, list[Sample]] = {kind: [] for kind in KINDS}
        for _ in range(rounds):
            for kind, subject in subjects.items():
                samples[kind].append(
                    asyncio.run(measured(subject, data, connections, seconds, count_tokens))
                )
    return rows_of(name, unit, samples)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.serving.front_end", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="of one run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--step-ms", type=float, default=10.0, help="between tokens of a stream")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results")
    options = parser.parse_args(arguments)
    connections, step_s = options.connections, options.step_ms / 1e3
    spent = (options.rounds, options.seconds)
    one = request(stream=False, tokens=1)
    streamed = request(stream=True, tokens=STREAM_TOKENS)
    name = f"{connections} streams"
    paced = f"{name}, a token in {options.step_ms:g} ms"
    rows = [
        *compare("answers of one token", "answers", one, connections, 0.0, *spent, 1),
        *compare(paced, "events", streamed, connections, step_s, *spent),
        *compare(
            f"{name}, all at once", "tokens", streamed, connections, 0.0, *spent, STREAM_TOKENS
        ),
    ]
    if options.save:
        command = recorded_command("benchmarks.serving.front_end", arguments)
        print(write_results("serving-front-end", rows, command=command))


if __name__ == "__main__":
    main(sys.argv[1:])
