"""Streams of a server against the engine alone, on the same work, in turns.

Hypothesis: tokenising, HTTP and streaming cost little of the engine's speed: a server gives 32
streams at least nine tenths of the tokens per second that `LLM.generate` gives 32 prompts. Client
and server share the cores with the engine; the client only counts bytes and looks for the end.

    python -m benchmarks.serving.speed --rounds 5 --save
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from benchmarks import results
from benchmarks.serving.served import Served, served

NUM_STREAMS = 32
LEAST_RATIO = 0.9
OPTIONS: dict[str, Any] = {"max_num_seqs": 64}


def prompts(num_tokens: int, chance: random.Random) -> list[list[int]]:
    """Make prompts that no prefix cache knows."""
    return [[chance.randrange(2, 6000) for _ in range(num_tokens)] for _ in range(NUM_STREAMS)]


def _alone(connection: Connection) -> None:
    """Answer [prompts, max_tokens] with the seconds that they took, until told None."""
    from moe_serve.llm import LLM
    from moe_serve.types import SamplingParams

    with LLM(**OPTIONS) as llm:
        connection.send(llm.engine.numerics_id)
        while (work := connection.recv()) is not None:
            listed, max_tokens = work
            sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
            begun_s = time.perf_counter()
            outputs = llm.generate(listed, sampling, use_tqdm=False)
            taken_s = time.perf_counter() - begun_s
            assert all(len(o.outputs[0].token_ids) == max_tokens for o in outputs)
            connection.send(taken_s)


@contextmanager
def alone() -> Iterator[Connection]:
    """Give the engine alone, in a process of its own that sleeps while nothing is asked."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_alone, args=(theirs,))
    process.start()
    try:
        yield ours
    finally:
        ours.send(None)
        process.join(10)


async def _stream(port: int, body: dict[str, Any]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    data = json.dumps(body).encode()
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Connection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(data), data)
    )
    last = b""
    while part := await reader.read(2**18):
        last = (last + part)[-4096:]
    assert b"[DONE]" in last, last
    assert b'"completion_tokens":%d' % body["max_tokens"] in last, last
    writer.close()


async def _all_streams(port: int, listed: list[list[int]], max_tokens: int) -> None:
    common = {
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    await asyncio.gather(*(_stream(port, {"prompt": prompt, **common}) for prompt in listed))


def serve_s(server: Served, listed: list[list[int]], max_tokens: int) -> float:
    """Return how long the server took for prompts that all come at once."""
    begun_s = time.perf_counter()
    asyncio.run(_all_streams(server.port, listed, max_tokens))
    return time.perf_counter() - begun_s


def measure(rounds: int, num_prompt: int, num_output: int) -> tuple[list[results.Row], str]:
    """Return tokens a second of both, and the ratio of each round."""
    chance = random.Random(1)
    rates: dict[str, list[float]] = {"alone": [], "server": []}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
    with alone() as engine, served(*flags, "--stats-interval", "0") as server:
        numerics_id = engine.recv()
        for number in range(rounds + 1):
            listed = prompts(num_prompt, chance)
            engine.send((listed, num_output))
            taken = {"alone": engine.recv(), "server": serve_s(server, listed, num_output)}
            for name, taken_s in taken.items():
                if number:  # the first warms up
                    rates[name].append(NUM_STREAMS * num_output / taken_s)
    ratios = [s / a for s, a in zip(rates["server"], rates["alone"], strict=True)]
    case = f"{NUM_STREAMS} x {num_prompt}/{num_output}"
    rows = [
        results.Row.of(f"{case}: alone", rates["alone"], "tok/s"),
        results.Row.of(f"{case}: server", rates["server"], "tok/s"),
        results.Row.of(f"{case}: server to alone", ratios, "ratio", limit=LEAST_RATIO),
    ]
    return rows, numerics_id


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=256)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    rows, numerics_id = measure(given.rounds, given.input_len, given.output_len)
    for row in rows:
        limit = "" if row.limit is None else f", limit {row.limit:g}"
        print(f"{row.name}: {row.median:.4g} ({row.min:.4g} to {row.max:.4g}) {row.unit}{limit}")
    if given.save:
        command = results.recorded_command("benchmarks.serving.speed", sys.argv[1:])
        path = results.write_results(
            "serving-speed", rows, command=command, numerics_id=numerics_id
        )
        print(path)
    return int(rows[-1].median < LEAST_RATIO)


if __name__ == "__main__":
    sys.exit(main())
