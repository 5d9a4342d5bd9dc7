"""The threads for texts: what waits for one is bounded, and is ended as anything else is."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from moe_serve.server.bodies import parse_body
from moe_serve.server.guard import Guard
from moe_serve.server.limits import Limits
from moe_serve.server.options import ServerConfig, ServiceConfig
from moe_serve.server.state import TEXT_THREADS, Finished, FrontState
from moe_serve.text.chat_template import ChatTemplate
from tests.server.fronts import demo_texts, front
from tests.server.test_stream import CHAT, COMPLETIONS, HI, Exchange, exchange

LONG = {"prompt": "word " * 2000}


@contextmanager
def busy_threads(state: FrontState) -> Iterator[None]:
    """Keep all threads for texts busy."""
    gate = threading.Event()
    for _ in range(TEXT_THREADS):
        state.pool.submit(gate.wait)
    try:
        yield
    finally:
        gate.set()


@pytest.mark.parametrize(
    ("path", "body"), [(CHAT, {"messages": HI}), (COMPLETIONS, LONG), ("/tokenize", LONG)]
)
def test_who_waits_for_a_thread_has_a_deadline(path: str, body: dict[str, Any]) -> None:
    config = ServerConfig(service=ServiceConfig(request_timeout=0.1))
    app, state = front(server=config)

    async def go() -> Exchange:
        one = Exchange(app, path, body)
        with busy_threads(state):
            await asyncio.wait_for(one.run(), 2)
        return one

    one = asyncio.run(go())
    assert one.status == 504
    assert json.loads(one.text)["error"]["code"] == "request_timeout"


def test_who_goes_away_waits_for_no_thread() -> None:
    finished: list[Finished] = []
    app, state = front(on_finished=finished.append)

    async def go() -> None:
        one = Exchange(app, CHAT, {"messages": HI})
        with busy_threads(state):
            task = asyncio.create_task(one.run())
            await asyncio.sleep(0.05)
            one.gone.set()
            await asyncio.wait_for(task, 2)
        assert await asyncio.wait_for(served(app), 2) == 200

    asyncio.run(go())
    assert [f.status for f in finished] == [499, 200]


async def served(app: Any) -> int:
    one = Exchange(app, CHAT, {"messages": HI, "max_tokens": 1})
    await one.run()
    return one.status


def test_bodies_of_who_went_away_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    app, state = front()
    read: list[bytes] = []

    def parse(data: bytes, *rest: Any) -> Any:
        read.append(data)
        return parse_body(data, *rest)

    monkeypatch.setattr("moe_serve.server.routes.parse_body", parse)

    async def go() -> None:
        many = [Exchange(app, "/tokenize", LONG) for _ in range(20)]
        with busy_threads(state):
            tasks = [asyncio.create_task(one.run()) for one in many]
            await asyncio.sleep(0.05)
            for one in many:
                one.gone.set()
            await asyncio.wait_for(asyncio.gather(*tasks), 2)
        assert await asyncio.wait_for(served(app), 2) == 200

    asyncio.run(go())
    assert len(read) <= TEXT_THREADS


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
def test_routes_of_texts_count_for_limits(path: str) -> None:
    app, state = front()
    guard = Guard(app, Limits(), listens_on="127.0.0.1", max_per_key=1)
    body = LONG if path == "/tokenize" else {"tokens": [5] * 2000}
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]

    async def go() -> list[int]:
        both = [Exchange(guard, path, body, headers=headers) for _ in range(2)]  # type: ignore[arg-type]
        with busy_threads(state):
            first = asyncio.create_task(both[0].run())
            await asyncio.sleep(0.05)
            assert guard.num_generating == 1
            await both[1].run()
        await first
        return [one.status for one in both]

    assert asyncio.run(go()) == [200, 429]
    assert guard.num_generating == 0


class WatchedTemplate(ChatTemplate):
    """A template, and in which threads it was rendered."""

    threads: set[str]

    def render(self, *given: Any, **options: Any) -> str:
        self.threads.add(threading.current_thread().name.partition("_")[0])
        return super().render(*given, **options)


@pytest.mark.parametrize("path", ["/tokenize", CHAT])
def test_a_template_is_never_rendered_on_the_event_loop(path: str) -> None:
    template = WatchedTemplate("{{ messages[0].content }}")
    template.threads = set()
    app, _ = front(texts=dataclasses.replace(demo_texts(), chat_template=template))

    async def go() -> int:
        one = Exchange(app, path, {})
        one._body = b'{"mess\\u0061ges": [{"role": "user", "content": "Hi"}]}'
        await one.run()
        return one.status

    assert asyncio.run(go()) == 200
    assert template.threads == {"texts"}


def test_a_large_body_of_abort_is_answered() -> None:
    body = {"request_id": "none", "n": "x" * 4000}
    app, _ = front()
    assert exchange(app, "/v1/abort", body).status == 400
    one = Exchange(app, "/v1/abort", {})
    one._body = b'{"request_id": "none"}' + b" " * 4000
    asyncio.run(one.run())
    assert json.loads(one.text)["num_aborted"] == 0
