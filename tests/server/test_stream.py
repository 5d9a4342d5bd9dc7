"""Streams say what whole answers say, as it comes; who goes away is noticed, and silence is not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from fastapi import FastAPI

from moe_serve.server.generation import Call
from moe_serve.server.messages import Beat
from moe_serve.server.options import ServerConfig, ServiceConfig
from moe_serve.server.state import Finished, FrontState
from tests.server.fake_host import FakeModel, Script
from tests.server.fronts import MODEL, front

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HI = [{"role": "user", "content": "Hello there"}]


class Exchange:
    """One request to an application, as a server makes it: what was sent, and when to hang up."""

    def __init__(self, app: FastAPI, path: str, body: dict[str, Any], **scope: Any) -> None:
        self.messages: list[dict[str, Any]] = []
        self.gone = asyncio.Event()
        self.may_send = asyncio.Event()
        self.may_send.set()
        self._news = asyncio.Event()
        self._app = app
        self._body = json.dumps(body).encode()
        self._has_sent_body = False
        self._scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
            "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
            "scheme": "http", "server": ("test", 80), "client": ("test", 1),
            "headers": [(b"content-type", b"application/json")], **scope,
        }  # fmt: skip

    async def run(self) -> None:
        await self._app(self._scope, self._receive, self._send)

    async def _receive(self) -> dict[str, Any]:
        if not self._has_sent_body:
            self._has_sent_body = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        await self.may_send.wait()
        self.messages.append(message)
        self._news.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not condition():
                await asyncio.sleep(0.002)

    @property
    def status(self) -> int:
        return int(self.messages[0]["status"])

    @property
    def bodies(self) -> list[bytes]:
        return [m["body"] for m in self.messages if m["type"] == "http.response.body"]

    @property
    def text(self) -> str:
        return b"".join(self.bodies).decode()

    @property
    def events(self) -> list[Any]:
        found = [e.removeprefix("data: ") for e in self.text.split("\n\n") if e[:6] == "data: "]
        return [e if e == "[DONE]" else json.loads(e) for e in found]


def exchange(app: FastAPI, path: str, body: dict[str, Any]) -> Exchange:
    """Return an exchange that is over."""

    async def go() -> Exchange:
        one = Exchange(app, path, body)
        await one.run()
        return one

    return asyncio.run(go())


def texts_of(chunks: list[Any]) -> dict[int, str]:
    found: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            piece = choice.get("text", choice.get("delta", {}).get("content"))
            found[choice["index"]] = found.get(choice["index"], "") + piece
    return found


@pytest.mark.parametrize(
    ("path", "extra"),
    [
        (COMPLETIONS, {"prompt": "Hello there, how are you today?"}),
        (COMPLETIONS, {"prompt": "Hello there, how are you today?", "n": 3, "logprobs": 2}),
        (COMPLETIONS, {"prompt": ["One two three", "Four five"], "n": 2, "logprobs": 0}),
        (COMPLETIONS, {"prompt": "One two", "echo": True, "logprobs": 1, "n": 2}),
        (COMPLETIONS, {"prompt": [2036, 487, 9], "echo": True}),
        (COMPLETIONS, {"prompt": "a b c d e f", "stop": ["d e"], "logprobs": 1}),
        (COMPLETIONS, {"prompt": "a b c", "stop": "c a", "include_stop_str_in_output": True}),
        (COMPLETIONS, {"prompt": "\u4f60\u597d \U0001f600 na\u00efve", "logprobs": 1}),
        (COMPLETIONS, {"prompt": "Hello there", "return_token_ids": True}),
        (CHAT, {"messages": HI}),
        (CHAT, {"messages": HI, "n": 2, "logprobs": True, "top_logprobs": 3}),
        (CHAT, {"messages": HI, "return_token_ids": True}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("tokens_per_step", [1, 3])
def test_a_stream_is_the_whole_answer(
    path: str, extra: dict[str, Any], tokens_per_step: int
) -> None:
    def script(request: Any) -> Script:
        return Script(
            reply=request.prompt_ids, tokens_per_step=tokens_per_step, num_cached=1, step_s=0.001
        )

    app, _ = front(FakeModel(script))
    body = {"seed": 7, "max_tokens": 12, **extra}
    whole = json.loads(exchange(app, path, body).text)
    streamed = exchange(
        app, path, {**body, "stream": True, "stream_options": {"include_usage": True}}
    )
    assert streamed.status == 200
    *chunks, usage, done = streamed.events
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"] == whole["usage"]
    assert usage["seed"] == chunks[0]["seed"] == whole["seed"] == 7
    assert all(chunk["usage"] is None for chunk in chunks)
    told = texts_of(chunks)
    for choice in whole["choices"]:
        index = choice["index"]
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert told[index] == choice.get("text", choice.get("message", {}).get("content"))
        assert [c["finish_reason"] for c in mine if c["finish_reason"]] == [choice["finish_reason"]]
        if path == CHAT:
            assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        if choice["logprobs"]:
            for name, values in choice["logprobs"].items():
                parts = [c["logprobs"][name] for c in mine if c["logprobs"]]
                joined = None if values is None else [value for part in parts for value in part]
                assert joined == values
        if "return_token_ids" in body:
            assert [i for c in mine for i in c.get("token_ids", [])] == choice["token_ids"]
    if "return_token_ids" in body:
        of_prompt = whole if path == CHAT else whole["choices"][0]
        first = chunks[0] if path == CHAT else chunks[0]["choices"][0]
        assert first["prompt_token_ids"] == of_prompt["prompt_token_ids"]


def test_choice_i_has_seed_plus_i() -> None:
    model = FakeModel()
    app, _ = front(model)
    found = json.loads(
        exchange(app, COMPLETIONS, {"prompt": ["a", "b"], "n": 3, "max_tokens": 1}).text
    )
    assert [request.seed - found["seed"] for request in model.started] == [0, 3]
    assert 0 <= found["seed"] < 2**53


def test_seeds_are_drawn_from_the_one_that_is_given() -> None:
    body = {"prompt": "a", "max_tokens": 1}

    def drawn(**options: Any) -> list[int]:
        app, _ = front(**options)
        return [json.loads(exchange(app, COMPLETIONS, body).text)["seed"] for _ in range(3)]

    assert drawn(seed=5) == drawn(seed=5) != drawn(seed=6)
    assert len({*drawn(), *drawn()}) == 6


def test_the_seed_is_in_the_first_and_the_last_chunk() -> None:
    app, _ = front()
    body = {"prompt": "a b c", "n": 2, "stream": True, "seed": -5}
    chunks = exchange(app, COMPLETIONS, body).events[:-1]
    assert chunks[0]["seed"] == -5
    assert chunks[-1]["seed"] == -5
    assert all("usage" not in chunk for chunk in chunks)


def test_usage_in_every_chunk() -> None:
    app, _ = front(FakeModel(lambda r: Script(reply=r.prompt_ids, step_s=0.005)))
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"messages": HI, "max_tokens": 4, "stream": True, "stream_options": options}
    chunks = exchange(app, CHAT, body).events[:-1]
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 4
    assert len(set(counts)) > 1


def test_usage_is_counted_once_for_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []

    def usage(self: Call) -> dict[str, Any]:
        found = true_usage(self)
        counted.append(found["completion_tokens"])
        return found

    true_usage = Call.usage
    monkeypatch.setattr(Call, "usage", usage)
    model = FakeModel(lambda r: Script(reply=r.prompt_ids, step_s=0.005))
    app, _ = front(model)
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"prompt": "a b c", "n": 16, "max_tokens": 4, "stream": True, "stream_options": options}
    chunks = exchange(app, COMPLETIONS, body).events[:-1]
    assert len(chunks) > 4 * 8
    assert chunks[-1]["usage"]["completion_tokens"] == 4 * 16
    assert len(counted) <= model.num_steps + 1


@pytest.mark.parametrize("n", [1, 3])
def test_the_last_chunk_of_all_choices_has_the_seed(n: int) -> None:
    body = {"prompt": "a b c", "n": n, "stream": True, "seed": 5, "max_tokens": 3, "echo": True}
    chunks = exchange(front()[0], COMPLETIONS, body).events[:-1]
    assert chunks[-1]["seed"] == 5
    assert sum("seed" in chunk for chunk in chunks) <= 3


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_client_that_goes_away_frees_its_request(is_streamed: bool) -> None:
    async def go() -> None:
        finished: list[Finished] = []
        model = FakeModel(lambda r: Script(reply=r.prompt_ids, step_s=0.01))
        app, state = front(model, on_finished=finished.append)
        body = {"prompt": ["a b", "c d"], "max_tokens": 100, "stream": is_streamed}
        one = Exchange(app, COMPLETIONS, body)
        task = asyncio.create_task(one.run())
        await one.until(lambda: len(model.started) == 2 and model.num_steps >= 4)
        one.gone.set()
        await asyncio.wait_for(task, 1)
        assert sorted(model.cancelled) == sorted(r.request_id for r in model.started)
        steps = model.num_steps
        await asyncio.sleep(0.05)
        assert model.num_steps == steps
        assert [f.status for f in finished] == [499]
        assert state.client.num_running == 0
        assert not state.serving

    asyncio.run(go())


def test_a_slow_client_gathers_tokens_and_has_no_queue() -> None:
    async def go() -> None:
        model = FakeModel(lambda r: Script(reply=r.prompt_ids, step_s=0.001))
        app, _ = front(model)
        one = Exchange(app, COMPLETIONS, {"prompt": "a b c", "max_tokens": 60, "stream": True})
        task = asyncio.create_task(one.run())
        await one.until(lambda: len(one.bodies) > 0)
        one.may_send.clear()
        num_sent = len(one.bodies)
        await one.until(lambda: model.num_steps >= 60)
        one.may_send.set()
        await asyncio.wait_for(task, 1)
        assert len(one.bodies) <= num_sent + 3
        assert sum(len(e["choices"]) for e in one.events[:-1]) < 60

    asyncio.run(go())


def test_silence_is_broken_by_comments() -> None:
    app, _ = front(FakeModel(lambda r: Script(reply=r.prompt_ids, first_s=0.25)), ping_s=0.05)
    one = exchange(app, COMPLETIONS, {"prompt": "a", "max_tokens": 2, "stream": True})
    assert 2 <= one.bodies.count(b": ping\n\n") <= 5
    assert one.events[-1] == "[DONE]"


def test_no_comments_while_there_are_chunks() -> None:
    model = FakeModel(lambda r: Script(reply=r.prompt_ids, step_s=0.01))
    app, _ = front(model, ping_s=0.1)
    one = exchange(app, COMPLETIONS, {"prompt": "a", "max_tokens": 30, "stream": True})
    assert b": ping\n\n" not in one.bodies


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("is_streamed", [True, False])
@pytest.mark.parametrize(
    ("script", "status"),
    [
        (Script(reply=(5,), refusal=("request", "too large for it")), 400),
        (Script(reply=(5,), refusal=("capacity", "too large for it")), 400),
        (Script(reply=(5,), refusal=("engine", "broken")), 500),
        (Script(reply=(5,), error="NaN in the logits"), 500),
    ],
)
def test_what_fails_before_its_first_token_is_a_plain_error(
    path: str, is_streamed: bool, script: Script, status: int
) -> None:
    app, _ = front(FakeModel(lambda r: script))
    body = {"stream": is_streamed, **({"messages": HI} if path == CHAT else {"prompt": "a"})}
    one = exchange(app, path, body)
    assert one.status == status
    assert set(json.loads(one.text)["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("asked", "says", "field"),
    [
        ({"structured_outputs": {"json": {}}}, "structured_outputs.json: no text can satisfy it",
         "structured_outputs"),
        ({"response_format": {"type": "json_object"}}, "response_format: no text can satisfy it",
         "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}},
         "response_format.json_schema.schema: no text can satisfy it", "response_format"),
    ],
)  # fmt: skip
def test_what_the_engine_refuses_names_what_was_sent(
    asked: dict[str, Any], says: str, field: str
) -> None:
    fault = "structured_outputs.json: no text can satisfy it"
    app, _ = front(FakeModel(lambda r: Script(reply=(5,), error=fault, is_refused=True)))
    one = exchange(app, COMPLETIONS, {"prompt": "a", **asked})
    assert one.status == 400
    error = json.loads(one.text)["error"]
    assert (error["message"], error["param"], error["code"]) == (says, field, "invalid_value")
    script = Script(reply=(5,), refusal=("request", "structured_outputs needs the package x"))
    app, _ = front(FakeModel(lambda r: script))
    error = json.loads(exchange(app, COMPLETIONS, {"prompt": "a", **asked}).text)["error"]
    assert (error["message"].partition(" ")[0], error["param"]) == (field, field)


def test_an_error_in_a_stream_is_its_last_event() -> None:
    finished: list[Finished] = []
    script = Script(reply=(500, 501), error="NaN in the logits", error_after=3)
    app, _ = front(FakeModel(lambda r: script), on_finished=finished.append)
    one = exchange(app, COMPLETIONS, {"prompt": "a", "stream": True})
    assert one.status == 200
    assert one.events[-1] == {
        "error": {
            "message": "NaN in the logits",
            "type": "internal_error",
            "param": None,
            "code": "engine_error",
        }
    }
    assert [f.status for f in finished] == [500]


def test_an_error_in_one_choice_ends_the_whole_answer() -> None:
    def script(request: Any) -> Script:
        is_first = request.request_id.split("-")[-2] == "0"
        return Script(reply=(500,), error="NaN" if is_first else None, step_s=0.005)

    model = FakeModel(script)
    app, _ = front(model)
    one = exchange(app, COMPLETIONS, {"prompt": ["a", "b"], "max_tokens": 100})
    assert one.status == 500
    assert len(model.cancelled) == 1


def late(**options: Any) -> tuple[FastAPI, FrontState]:
    server = ServerConfig(service=ServiceConfig(request_timeout=0.15))
    return front(FakeModel(lambda r: Script(reply=(500,), **options)), server=server)


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_request_has_a_deadline(is_streamed: bool) -> None:
    app, state = late(is_frozen=True)
    one = exchange(app, COMPLETIONS, {"prompt": "a", "stream": is_streamed})
    assert one.status == 504
    assert (b"retry-after", b"1") in one.messages[0]["headers"]
    assert json.loads(one.text)["error"]["type"] == "deadline_exceeded"
    assert state.client.num_running == 0


def test_the_deadline_of_a_stream_is_an_event() -> None:
    app, _ = late(step_s=0.02)
    one = exchange(app, COMPLETIONS, {"prompt": "a", "stream": True, "max_tokens": 200})
    assert one.status == 200
    assert one.events[-1]["error"]["type"] == "deadline_exceeded"


@pytest.mark.parametrize("is_streamed", [True, False])
def test_who_reads_slowly_is_cut_after_the_deadline(is_streamed: bool) -> None:
    async def go() -> None:
        app, state = late(step_s=0.01)
        state.limits = replace(state.limits, write_s=0.1)
        body = {"prompt": "a", "stream": is_streamed, "max_tokens": 200}
        one = Exchange(app, COMPLETIONS, body)

        def cut() -> None:
            one.gone.set()
            one.may_send.set()

        one._scope["state"] = {"cut_connection": cut}
        one.may_send.clear()
        await asyncio.wait_for(one.run(), 2)
        assert one.gone.is_set()
        assert state.client.num_running == 0

    asyncio.run(go())


def test_who_takes_an_answer_in_time_is_not_cut() -> None:
    async def go() -> None:
        app, state = late(step_s=0.01)
        state.limits = replace(state.limits, write_s=0.01)
        cuts: list[str] = []
        one = Exchange(app, COMPLETIONS, {"prompt": "a", "max_tokens": 200})
        one._scope["state"] = {"cut_connection": lambda: cuts.append("cut")}
        await one.run()
        await asyncio.sleep(0.05)
        assert one.status == 504
        assert cuts == []

    asyncio.run(go())


@pytest.mark.parametrize("is_streamed", [True, False])
def test_abort_ends_a_request_of_the_same_key_only(is_streamed: bool) -> None:
    async def go() -> None:
        model = FakeModel(lambda r: Script(reply=r.prompt_ids, step_s=0.005))
        app, _ = front(model)
        body = {"prompt": "a b", "max_tokens": 200, "request_id": "mine", "stream": is_streamed}
        one = Exchange(app, COMPLETIONS, body, state={"key_id": "k1"})
        task = asyncio.create_task(one.run())
        await one.until(lambda: model.num_steps >= 3)
        for key_id, count in (("k2", 0), ("k1", 1)):
            other = Exchange(app, "/v1/abort", {"request_id": "mine"}, state={"key_id": key_id})
            await other.run()
            assert json.loads(other.text)["num_aborted"] == count
        await asyncio.wait_for(task, 1)
        last = one.events[-2] if is_streamed else json.loads(one.text)
        assert last["choices"][0]["finish_reason"] == "abort"
        assert len(model.cancelled) == 1

    asyncio.run(go())


def test_the_keys_of_two_users_have_two_caches() -> None:
    async def go() -> list[str]:
        model = FakeModel()
        app, _ = front(model)
        for key_id, salt in (("k1", None), ("k2", None), ("k1", "s"), ("", "s"), ("", None)):
            body = {"prompt": "a", "max_tokens": 1, "cache_salt": salt}
            await Exchange(app, COMPLETIONS, body, state={"key_id": key_id}).run()
        return [request.cache_salt for request in model.started]

    assert asyncio.run(go()) == ["k1:", "k2:", "k1:s", "s", ""]


def test_a_lost_engine_is_a_503_or_an_event() -> None:
    async def go() -> None:
        app, state = front(FakeModel(lambda r: Script(reply=r.prompt_ids, step_s=0.01)))
        body = {"prompt": "a b", "max_tokens": 200}
        both = [Exchange(app, COMPLETIONS, {**body, "stream": flag}) for flag in (True, False)]
        tasks = [asyncio.create_task(one.run()) for one in both]
        await both[0].until(lambda: len(both[0].bodies) > 2)
        state.client.connection_lost(None)
        await asyncio.wait_for(asyncio.gather(*tasks), 1)
        assert both[0].events[-1]["error"]["type"] == "service_unavailable"
        assert both[1].status == 503
        assert (b"retry-after", b"5") in both[1].messages[0]["headers"]

    asyncio.run(go())


WHERE = "/srv/somebody/models"


def test_no_client_is_told_a_folder() -> None:
    async def go() -> None:
        app, state = front(FakeModel(lambda r: Script(reply=r.prompt_ids, step_s=0.01)))
        body = {"prompt": "a b", "max_tokens": 200}
        both = [Exchange(app, COMPLETIONS, {**body, "stream": flag}) for flag in (True, False)]
        tasks = [asyncio.create_task(one.run()) for one in both]
        await both[0].until(lambda: len(both[0].bodies) > 2)
        state.client._end(f"{WHERE}/weights.bin: cannot be read")
        await asyncio.wait_for(asyncio.gather(*tasks), 1)
        after = [Exchange(app, path, {}, method="GET") for path in ("/ready", "/health")]
        after.append(Exchange(app, COMPLETIONS, body))
        for one in after:
            await one.run()
            assert one.status == 503
        for one in (*both, *after):
            assert "weights.bin: cannot be read" in one.text
            assert "/srv" not in one.text
            assert "somebody" not in one.text

    asyncio.run(go())


def test_what_is_refused_names_no_folder_and_keeps_pointers() -> None:
    fault = f"structured_outputs.json: {WHERE}/tokenizer.json: no #/$defs/a in it"
    app, _ = front(FakeModel(lambda r: Script(reply=(5,), error=fault, is_refused=True)))
    one = exchange(app, COMPLETIONS, {"prompt": "a", "structured_outputs": {"json": {}}})
    message = json.loads(one.text)["error"]["message"]
    assert message == "structured_outputs.json: tokenizer.json: no #/$defs/a in it"


def test_requests_wait_while_the_world_is_formed_again() -> None:
    async def go() -> None:
        app, state = front(FakeModel(lambda r: Script(reply=r.prompt_ids, first_s=0.1)))
        state.client.beat = Beat("reforming", 2, 0)
        one = Exchange(app, COMPLETIONS, {"prompt": "a", "max_tokens": 2, "model": MODEL})
        await one.run()
        assert one.status == 200

    asyncio.run(go())
