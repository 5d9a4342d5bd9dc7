"""What the client of `bench serve` costs: processor time per chunk and per request.

Hypothesis: one core takes what a server of this machine's size could send many times over, so the
instrument does not show up in its figures. A server of bytes made beforehand runs in a process of
its own, on another core where there is one. The same chunks are read three ways: by our client, by
our framing over asyncio's streams, and by httpx.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx

from benchmarks.results import Row, recorded_command, write_results
from moe_serve.load.connection import Address, ConnectionPool
from moe_serve.load.framing import AnswerFramer
from moe_serve.load.records import RequestRecord, StreamedAnswer

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
TOKEN = (
    b'data: {"id":"cmpl-0123456789abcdef0123456789abcdef","object":"text_completion",'
    b'"created":1700000000,"model":"a-model","choices":[{"index":0,"text":" word",'
    b'"logprobs":null,"finish_reason":null}]}\n\n'
)
CHUNK = b"%x\r\n%s\r\n" % (len(TOKEN), TOKEN)
LAST = TOKEN.replace(b'"finish_reason":null', b'"finish_reason":"length"')
END = b"%x\r\n%s\r\ne\r\ndata: [DONE]\n\n\r\n0\r\n\r\n" % (len(LAST), LAST)
BODY = b'{"stream": true}'


async def _serve(num_chunks: int, gap_s: float) -> None:
    """Answer every request with so many chunks, one write each; gap 0: as fast as they are taken.

    A request whose body begins with a blank has one chunk only.
    """

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length:")[2].split()[0])
                body = await reader.readexactly(length)
                writer.write(HEAD)
                due_s = time.perf_counter()
                for _ in range(0 if body[:1] == b" " else num_chunks - 1):
                    writer.write(CHUNK)
                    if gap_s:
                        due_s += gap_s
                        await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
                    else:
                        await writer.drain()
                writer.write(END)
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            writer.close()

    server = await asyncio.start_server(one, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def _answer() -> tuple[RequestRecord, StreamedAnswer]:
    record = RequestRecord(index=0, intended_s=0.0)
    return record, StreamedAnswer(record)


async def _ours(pool: ConnectionPool, _: httpx.AsyncClient, body: bytes) -> int:
    record, answer = _answer()
    await pool.exchange(pool.request("POST", "/v1/completions", body), answer)
    answer.finish()
    return len(record.chunk_s)


async def _over_streams(pool: ConnectionPool, _: httpx.AsyncClient, body: bytes) -> int:
    record, answer = _answer()
    framer = AnswerFramer(answer)
    reader, writer = await asyncio.open_connection(pool.address.host, pool.address.port)
    writer.write(pool.request("POST", "/v1/completions", body))
    while not framer.is_complete:
        framer.feed(await reader.read(65_536))
    answer.finish()
    writer.close()
    return len(record.chunk_s)


async def _by_httpx(pool: ConnectionPool, client: httpx.AsyncClient, body: bytes) -> int:
    record, answer = _answer()
    answer.head(200, {"content-type": "text/event-stream"})
    url = f"{pool.address.url}/v1/completions"
    async with client.stream("POST", url, content=body) as response:
        async for data in response.aiter_raw():
            answer.body(data)
    answer.finish()
    return len(record.chunk_s)


WAYS: dict[str, Callable[[ConnectionPool, httpx.AsyncClient, bytes], Awaitable[int]]] = {
    "ours": _ours,
    "asyncio streams": _over_streams,
    "httpx": _by_httpx,
}


async def _streams(way: str, port: int, num_streams: int) -> tuple[int, float, float]:
    """Return chunks, seconds and processor seconds of so many requests at once."""
    pool = ConnectionPool(Address("127.0.0.1", port, False, ""), {})
    async with httpx.AsyncClient(timeout=None, limits=httpx.Limits()) as client:
        await asyncio.gather(*(WAYS[way](pool, client, b" ") for _ in range(num_streams)))
        begin_s, cpu_s = time.perf_counter(), time.process_time()  # it has connected
        counts = await asyncio.gather(*(WAYS[way](pool, client, BODY) for _ in range(num_streams)))
        measured = sum(counts), time.perf_counter() - begin_s, time.process_time() - cpu_s
    await pool.close()
    return measured


async def _requests(port: int, num_clients: int, num_each: int) -> float:
    """Return requests a second of one chunk each, over kept connections."""
    pool = ConnectionPool(Address("127.0.0.1", port, False, ""), {})

    async def one(client: httpx.AsyncClient) -> None:
        for _ in range(num_each):
            await _ours(pool, client, b" ")

    async with httpx.AsyncClient() as client:
        begin_s = time.perf_counter()
        await asyncio.gather(*(one(client) for _ in range(num_clients)))
        wall_s = time.perf_counter() - begin_s
    await pool.close()
    return num_clients * num_each / wall_s


def _measure(rounds: int, num_streams: int, num_chunks: int, gap_s: float) -> list[Row]:
    rows = []
    arguments = [sys.executable, "-m", "benchmarks.load_client", "--serve", str(num_chunks)]
    servers = {}
    for name, gap in (("paced", gap_s), ("flood", 0.0)):
        servers[name] = subprocess.Popen([*arguments, str(gap)], stdout=subprocess.PIPE, text=True)
    try:
        ports = {}
        cores = sorted(os.sched_getaffinity(0))
        for name, server in servers.items():
            assert server.stdout is not None
            ports[name] = int(server.stdout.readline())
        os.sched_setaffinity(0, cores[:1])
        for server in servers.values():
            os.sched_setaffinity(server.pid, cores[1:] or cores)
        samples: dict[str, list[float]] = {}
        for _ in range(rounds):
            for way in WAYS:
                chunks, _, cpu_s = asyncio.run(_streams(way, ports["paced"], num_streams))
                samples.setdefault(f"chunk, paced, {way}", []).append(cpu_s / chunks * 1e6)
            for way in WAYS:
                chunks, wall_s, _ = asyncio.run(_streams(way, ports["flood"], num_streams))
                samples.setdefault(f"chunks, flood, {way}", []).append(chunks / wall_s)
            rate = asyncio.run(_requests(ports["flood"], 16, 500))
            samples.setdefault("requests, ours", []).append(rate)
    finally:
        for server in servers.values():
            server.kill()
            server.communicate()
    os.sched_setaffinity(0, cores)  # the machine is described by them
    for name, values in samples.items():
        unit = "us" if name.startswith("chunk,") else f"{name.split(',')[0]}/s"
        rows.append(Row.of(name, values, unit))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", nargs=2, metavar=("CHUNKS", "GAP_S"), help="be the server")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, default=32, help="requests at once")
    parser.add_argument("--chunks", type=int, default=500, help="of each request")
    parser.add_argument("--gap-s", type=float, default=0.008, help="between a request's chunks")
    parser.add_argument("--folder", type=Path, help="write the figures there")
    given = parser.parse_args()
    if given.serve is not None:
        asyncio.run(_serve(int(given.serve[0]), float(given.serve[1])))
        return
    rows = _measure(given.rounds, given.streams, given.chunks, given.gap_s)
    for row in rows:
        print(f"{row.name:<28} {row.value:>10.4g} {row.unit:<10} ({row.min:.4g} to {row.max:.4g})")
    command = recorded_command("benchmarks.load_client", sys.argv[1:])
    if given.folder is not None:
        print(write_results("load-client", rows, command=command, folder=given.folder))


if __name__ == "__main__":
    main()
