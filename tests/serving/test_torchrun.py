"""A server on torchrun's ranks: the answers of one process, and what becomes of lost ranks."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.serving.served import Served, served, wait_until_gone
from benchmarks.serving.streams import Stream, run_stream

QUIET = ("--stats-interval", "0", "--dispatcher", "static")
BODY: dict[str, Any] = {
    "prompt": [5, 17, 260, 99],
    "max_tokens": 24,
    "temperature": 0.9,
    "seed": 3,
    "logprobs": 3,
    "return_token_ids": True,
}


@contextmanager
def torchrun(*agent: str) -> Iterator[Served]:
    """Give a server of two ranks on a port that stays the same, and end it."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    launcher = (
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *agent,
    )
    server = Served("--port", str(port), *QUIET, launcher=launcher)
    processes = list(server.processes().values())
    try:
        yield server
    finally:
        # rank 0 ends when its agent is killed, and the others with it
        processes += server.processes().values()
        server.kill()
        left = wait_until_gone(processes, 10.0)
        assert server.process.stderr is not None
        server.process.stderr.close()
    assert left == []


def choice(server: Served) -> Any:
    status, answer = server.post("/v1/completions", BODY)
    assert status == 200, answer
    return answer["choices"][0]


def strike(server: Served, pid: int, how: signal.Signals, num_tokens: int) -> list[Stream]:
    """Send a signal when streams have begun; return them when all have ended."""
    streams = [
        Stream({"prompt": [7, n], "max_tokens": num_tokens, "ignore_eos": True, "stream": True})
        for n in range(2, 6)
    ]

    async def run() -> None:
        tasks = [asyncio.create_task(run_stream(server.port, stream)) for stream in streams]
        while not all(stream.times_s for stream in streams):
            await asyncio.sleep(0.01)
        os.kill(pid, how)
        await asyncio.gather(*tasks)

    asyncio.run(run())
    return streams


def test_a_rank_that_dies_ends_streams_and_torchrun_makes_a_world_anew() -> None:
    with served(*QUIET) as alone:
        expected = choice(alone)
        alone.stop()
    with torchrun("--max-restarts", "1") as server:
        assert choice(server) == expected
        before = server.processes()
        ours = {pid for role, pid in before.items() if role != "supervisor"}
        streams = strike(server, before["rank 1"], signal.SIGKILL, 450)
        for stream in streams:
            assert stream.status == 200
            assert stream.error is not None
            assert "rank 1 is gone" in stream.error, stream.error
        server.wait_until_ready()
        assert choice(server) == expected
        assert ours.isdisjoint(server.processes().values())
        # the agent passes it on, waits, and ends with a code of its own
        streams = strike(server, server.process.pid, signal.SIGTERM, 60)
        assert [(stream.is_whole, stream.error) for stream in streams] == [(True, None)] * 4
        assert server.wait() == 1


def test_a_rank_0_that_is_stopped_is_no_failure() -> None:
    with torchrun() as server:
        streams = strike(server, server.processes()["rank 0"], signal.SIGTERM, 60)
        assert [(stream.is_whole, stream.error) for stream in streams] == [(True, None)] * 4
        assert server.wait() == 0, "".join(server.log)


def test_it_drains_when_its_agent_is_killed() -> None:
    with torchrun() as server:
        streams = strike(server, server.process.pid, signal.SIGKILL, 60)
        assert [(stream.is_whole, stream.error) for stream in streams] == [(True, None)] * 4
