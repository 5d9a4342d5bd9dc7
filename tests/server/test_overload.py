"""A real server that is asked for more than it takes: who is refused, how, and who is served."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.serving.served import Served, served
from benchmarks.serving.streams import Stream, run_stream

BODY = {"prompt": [5, 6, 7], "max_tokens": 200, "ignore_eos": True, "temperature": 0.0}


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    flags = ("--max-requests-per-key", "3", "--max-num-seqs", "4", "--stats-interval", "0")
    keys = {"MOE_SERVE_API_KEY": "greedy,modest", "OMP_NUM_THREADS": "1"}
    with served(*flags, environment=keys) as one:
        yield one


def ask(server: Served, key: str, body: dict[str, Any]) -> tuple[int, dict[str, Any], str | None]:
    """Return status, body and Retry-After of a completion."""
    request = urllib.request.Request(
        f"{server.url}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {key}"},
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read()), answer.headers["retry-after"]
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read()), error.headers["retry-after"]


async def at_once(server: Served, keys: list[str]) -> list[tuple[int, dict[str, Any], str | None]]:
    return await asyncio.gather(*(asyncio.to_thread(ask, server, key, BODY) for key in keys))


def test_a_greedy_key_is_held_back_and_another_is_served(server: Served) -> None:
    keys = ["greedy"] * 10 + ["modest"] * 3
    answers = asyncio.run(at_once(server, keys))
    greedy, modest = answers[:10], answers[10:]
    assert [status for status, _, _ in modest] == [200] * 3
    # at least as many as it may have at once; more where one ended before another came
    assert 3 <= sum(status == 200 for status, _, _ in greedy) < 10
    for status, body, retry_after in greedy:
        if status != 200:
            assert status == 429
            assert body["error"]["type"] == "rate_limit_error"
            assert body["error"]["code"] == "too_many_requests"
            assert retry_after is not None
            assert int(retry_after) > 0
    assert ask(server, "greedy", {**BODY, "max_tokens": 1})[0] == 200


def test_a_key_that_is_wrong_gets_nothing(server: Served) -> None:
    assert ask(server, "greed", BODY)[0] == 401


def test_what_does_not_fit_is_refused_before_it_is_read() -> None:
    """A full queue is told even of what is no request: it costs nothing to refuse."""
    flags = ("--max-num-seqs", "1", "--max-queue-requests", "1", "--stats-interval", "0")
    with served(*flags, environment={"OMP_NUM_THREADS": "1"}) as server:

        async def go() -> tuple[list[str | None], list[tuple[int, dict[str, Any], str | None]]]:
            streams = [Stream({**BODY, "max_tokens": 600, "stream": True}) for _ in range(2)]
            tasks = []
            for stream, name in zip(streams, ("running", "waiting"), strict=True):
                tasks.append(asyncio.create_task(run_stream(server.port, stream)))
                async with asyncio.timeout(20):
                    while server.metrics()[f"num_requests_{name}"] != 1:
                        await asyncio.sleep(0.002)
            refused = [
                await asyncio.to_thread(ask, server, "", body)
                for body in (BODY, {"prompt": "a", "temperature": "hot"})
            ]
            await asyncio.gather(*tasks)
            return [stream.finish_reason for stream in streams], refused

        reasons, refused = asyncio.run(go())
        assert reasons == ["length"] * 2
        for status, body, retry_after in refused:
            assert status == 503
            assert body["error"]["type"] == "service_unavailable"
            assert "1 requests wait for their first token" in body["error"]["message"]
            assert retry_after is not None
            assert int(retry_after) > 0
        status, body, _ = ask(server, "", {"prompt": "a", "temperature": "hot"})
        assert (status, body["error"]["param"]) == (400, "temperature")
        assert server.stop() == 0
