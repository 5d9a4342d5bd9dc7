"""Whole measurements of a server whose delays and faults are known."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moe_serve.errors import CommError, ConfigError
from moe_serve.load.session import LoadOptions, measure
from tests.load.scripted_server import (
    DONE,
    END,
    SSE_HEAD,
    Call,
    Script,
    ScriptedServer,
    answer,
    chunk,
    event,
    serving,
    stream_of,
    token,
    usage,
)


@contextlib.contextmanager
def served(script: Script, models: bytes = b"") -> Iterator[ScriptedServer]:
    """Run a scripted server in a thread of its own: `measure` has a loop of its own, too."""
    started = threading.Event()
    found: list[ScriptedServer] = []
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve() -> None:
        async with serving(script, models) as server:
            found.append(server)
            started.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert started.wait(20)
    try:
        yield found[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(20)
        loop.close()


def measured(server: ScriptedServer, **options: Any) -> dict[str, Any]:
    sizes = {"input_len": 4, "output_len": 5} if "dataset" not in options else {}
    return measure(LoadOptions(base_url=server.url, **(sizes | options)), "a command")


def row(report: dict[str, Any], name: str) -> dict[str, Any]:
    return next(row for row in report["rows"] if row["name"] == name)


def test_latencies_are_those_of_the_script(tmp_path: Path) -> None:
    with served(stream_of(5, first_s=0.1, gap_s=0.03)) as server:
        report = measured(
            server, num_prompts=6, max_concurrency=3, save_requests=tmp_path / "r.jsonl"
        )
    assert (report["num_answered"], report["num_requests"], report["failures"]) == (6, 6, {})
    assert (report["peak_concurrency"], report["num_connections"]) == (3, 3)
    assert (report["input_tokens"], report["output_tokens"], report["num_chunks"]) == (42, 30, 30)
    assert (report["settings"]["loop"], report["settings"]["model"]) == ("closed", "first-model")
    for name, least_s, number in (
        ("ttft", 0.1, 6), ("itl", 0.02, 24), ("tpot", 0.03, 6), ("e2e", 0.22, 6),
    ):  # fmt: skip
        assert row(report, name)["n"] == number
        assert row(report, name)["mean"] >= least_s * 0.95
        assert row(report, name)["median"] <= least_s + 1
    assert report["duration_s"] >= 0.44
    assert row(report, "requests")["value"] == pytest.approx(6 / report["duration_s"])
    assert row(report, "total")["value"] == pytest.approx(72 / report["duration_s"])
    records = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [record["index"] for record in records] == list(range(6))
    assert all(len(record["chunk_s"]) == 5 and record["ttft_s"] >= 0.095 for record in records)
    assert {call.path for call in server.calls} == {"/v1/completions"}
    assert all(len(call.body["prompt"]) == 4 for call in server.calls)


def test_queueing_here_counts_from_when_a_request_was_due() -> None:
    with served(stream_of(1, first_s=0.1)) as server:
        report = measured(
            server, num_prompts=4, max_concurrency=1, request_rate=1000.0, goodput=["ttft:250"]
        )
    assert report["peak_concurrency"] == 1
    assert report["settings"]["loop"] == "open"
    # one after the other: 0.1, 0.2, 0.3, 0.4 s after they were due
    assert row(report, "ttft")["max"] >= 0.38
    assert row(report, "sent late")["max"] >= 0.28
    assert row(report, "ttft from send")["min"] >= 0.095
    assert row(report, "ttft")["mean"] - row(report, "ttft from send")["mean"] >= 0.12
    assert report["num_good"] <= 2 <= report["num_good_from_send"]


def test_goodput_counts_who_meets_all_goals() -> None:
    async def script(call: Call) -> None:  # every third is slow to begin, every third to go on
        first_s, gap_s = ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0))[call.number % 3]
        await stream_of(2, first_s=first_s, gap_s=gap_s)(call)

    with served(script) as server:
        report = measured(server, num_prompts=12, goodput=["ttft:700", "tpot:700", "e2e:60000"])
    assert (report["num_answered"], report["num_good"]) == (12, 4)
    assert row(report, "goodput")["value"] == pytest.approx(4 / report["duration_s"])
    assert report["goodput_ms"] == {"ttft": 700, "tpot": 700, "e2e": 60000}


async def faulty(call: Call) -> None:
    """Answer by number: well, 503, dropped inside, never, an error event, nonsense."""
    match call.number % 6:
        case 0:
            head, data = SSE_HEAD[:20], SSE_HEAD[20:]
            text = token("\u00e9")
            place = text.index("\u00e9".encode()) + 1
            await call.write(head)
            for part in (data, chunk(b": ping\n\nda"), chunk(b"ta:" + text[5:place])):
                await asyncio.sleep(0.01)
                await call.write(part)
            await call.write(chunk(text[place:]), chunk(usage(4, 1)), chunk(DONE), END)
        case 1:
            body = {"error": {"message": "the queue is full", "type": "x", "code": None}}
            await call.write(answer(503, body, Retry_After="2"))
        case 2:
            await call.write(SSE_HEAD, chunk(token()))
            call.writer.close()
        case 3:
            await asyncio.sleep(60)
        case 4:
            await call.write(SSE_HEAD, chunk(token()), chunk(event(error={"message": "gone"})), END)
        case 5:
            await call.write(answer(200, {"choices": []}))


def test_failures_are_told_by_kind_and_nothing_hangs() -> None:
    begin_s = time.monotonic()
    with served(faulty) as server:
        report = measured(server, num_prompts=12, timeout=2.0)
    assert time.monotonic() - begin_s < 30
    counts = {kind: failure["count"] for kind, failure in report["failures"].items()}
    assert counts == {
        "http 503": 2, "connection": 2, "timeout": 2, "error event": 2, "bad answer": 2,
    }  # fmt: skip
    refused = report["failures"]["http 503"]
    assert (refused["message"], refused["retry_after"]) == ("the queue is full", "2")
    assert refused["num_retry_after"] == 2
    assert report["failures"]["error event"]["message"] == "gone"
    assert report["num_answered"] == 2
    assert report["output_tokens"] == 2  # of what failed nothing counts
    assert row(report, "ttft")["n"] == 2


def test_the_end_of_a_duration() -> None:
    with served(stream_of(1, first_s=0.02)) as server:
        report = measured(server, duration=0.5, request_rate=100.0)
        assert report["num_requests"] == report["num_answered"] == len(server.calls)
        assert 20 <= report["num_requests"] <= 90
        closed = measured(server, duration=0.3, max_concurrency=2)
    assert closed["num_requests"] == closed["num_answered"] <= 2 * 0.3 / 0.02 + 2
    assert closed["duration_s"] >= 0.3 * 0.9


def test_a_trace_sets_arrivals_and_lengths(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    times = ("18:00:00.0", "18:00:00.5", "18:00:04.0")
    rows = [f"2023-11-16 {time},{10 * i + 10},{i + 1}" for i, time in enumerate(times)]
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(rows) + "\n")
    with served(stream_of(1)) as server:
        report = measured(server, dataset="trace", trace=path, time_scale=0.1, max_len=25)
    assert report["num_answered"] == 3
    assert report["duration_s"] >= 0.4
    lengths = [(len(call.body["prompt"]), call.body["max_tokens"]) for call in server.calls]
    assert lengths == [(10, 1), (20, 2), (22, 3)]


def test_a_file_of_conversations(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "hi"}]}\n{"prompt": "you"}\n')
    with served(stream_of(1)) as server:
        report = measured(
            server, dataset="file", prompts=path, endpoint="chat", model="m", max_concurrency=1,
            extra_body='{"top_k": 3}', temperature=0.5, ignore_eos=True,
        )  # fmt: skip
    assert report["num_answered"] == 2
    assert [call.body["messages"][0]["content"] for call in server.calls] == ["hi", "you"]
    body = server.calls[0].body
    assert (body["model"], body["top_k"], body["temperature"]) == ("m", 3, 0.5)
    assert body["ignore_eos"] is True
    assert {call.path for call in server.calls} == {"/v1/chat/completions"}


def test_a_server_that_is_not_there_or_none() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        begin_s = time.monotonic()
        with pytest.raises(CommError, match=r"did not answer within 2\.5 s"):
            measure(LoadOptions(base_url=url), "")
        assert time.monotonic() - begin_s < 5
    with pytest.raises(CommError, match=r"no server at .*connection refused.*--base-url"):
        measure(LoadOptions(base_url=url), "")


@pytest.mark.parametrize(
    ("models", "error", "says"),
    [
        (answer(401, {"error": {"message": "no"}}), ConfigError, "refuses the key.*--api-key"),
        (answer(503, {"error": {"message": "loading"}}), CommError, "status 503: loading"),
        (answer(200, {"data": []}), CommError, "lists no model"),
        (b"SSH-2.0-x\r\n\r\n", CommError, "no HTTP server"),
    ],
)
def test_a_server_that_says_no(models: bytes, error: type[Exception], says: str) -> None:
    with served(stream_of(1), models) as server, pytest.raises(error, match=says):
        measured(server)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"dataset": "rand"}, "did you mean 'random'"),
        ({"endpoint": "messages"}, "there are: completions, chat"),
        ({"dataset": "file"}, "needs --prompts FILE"),
        ({"dataset": "trace"}, "needs --trace FILE"),
        ({"trace": Path("t")}, "--trace has no effect with --dataset random"),
        ({"dataset": "trace", "trace": Path("t"), "request_rate": 1.0}, "--request-rate has no"),
        ({"dataset": "file", "prompts": Path("p"), "input_len": 1}, "--input-len has no effect"),
        ({"num_prompts": 0}, "--num-prompts is 0"),
        ({"duration": 1.0}, "has no end"),
        ({"duration": 0.0, "max_concurrency": 1}, "--duration is 0.0"),
        ({"max_concurrency": 0}, "--max-concurrency is 0"),
        ({"timeout": 0.0}, "--timeout is 0.0"),
        ({"extra_body": "{"}, "--extra-body is not JSON"),
        ({"extra_body": "[]"}, "must be a JSON object"),
        ({"extra_body": '{"n": 2}'}, "'n', which is set"),
        ({"endpoint": "chat"}, "need --endpoint completions"),
        ({"goodput": ["ttf:3"]}, "did you mean 'ttft'"),
        ({"save_requests": Path("/no/such/folder/r")}, "cannot be written"),
    ],
)
def test_bad_options_are_found_before_a_server_is_asked(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        measure(LoadOptions(**{"base_url": "http://127.0.0.1:1", **given}), "")
