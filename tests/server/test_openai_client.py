"""OpenAI's own client takes the server for theirs: answers, streams and errors are of its types."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from moe_serve.types import Request
from tests.server.fake_host import FakeModel, Script
from tests.server.fronts import MODEL
from tests.server.served import Served

HI: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hello there"}]


def script(request: Request) -> Script:
    """Say the prompt again; priorities, which this model does not have, choose what goes wrong."""
    match request.priority:
        case 1:
            return Script(
                reply=request.prompt_ids, error="NaN in the logits", error_after=2, step_s=0.05
            )
        case 2:
            return Script(reply=request.prompt_ids, refusal=("request", "too large"))
        case 3:
            return Script(reply=request.prompt_ids, refusal=("engine", "broken"))
        case 4:
            return Script(reply=request.prompt_ids, step_s=0.01)
        case 5:
            return Script(reply=request.prompt_ids, is_frozen=True)
    return Script(reply=request.prompt_ids, num_cached=2)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with Served(tmp_path_factory.mktemp("host"), FakeModel(script)) as one:
        yield one


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    url = f"{served.url}/v1"
    with openai.OpenAI(base_url=url, api_key="-", max_retries=0, timeout=10) as one:
        yield one


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_a_chat(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(model=MODEL, messages=HI, n=3, max_tokens=5, seed=1)
    assert found.object == "chat.completion"
    assert [choice.index for choice in found.choices] == [0, 1, 2]
    assert found.choices[0].message.content == "user: Hello"
    assert found.choices[0].finish_reason == "length"
    assert found.usage is not None
    assert found.usage.total_tokens == found.usage.prompt_tokens + 15
    assert found.usage.prompt_tokens_details is not None
    assert found.usage.prompt_tokens_details.cached_tokens == 2
    assert (found.system_fingerprint or "").startswith("moe-serve-0-")
    assert found.to_dict()["seed"] == 1


def test_a_chats_logprobs(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(
        model=MODEL, messages=HI, max_tokens=3, logprobs=True, top_logprobs=2
    )
    logprobs = found.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert "".join(entry.token for entry in logprobs.content) == found.choices[0].message.content
    for entry in logprobs.content:
        assert bytes(entry.bytes or ()).decode() == entry.token
        assert len(entry.top_logprobs) == 2


def test_a_streamed_chat(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=HI,
            max_tokens=6,
            stream=True,
            n=2,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12
    texts = {0: "", 1: ""}
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts[0].startswith("user: ")
    assert texts[1].startswith(": ")
    ends = [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason]
    assert ends == ["length", "length"]


def test_completions(client: openai.OpenAI) -> None:
    found = client.completions.create(
        model=MODEL, prompt=["One two", "Three"], n=2, max_tokens=4, logprobs=1, echo=True
    )
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert found.choices[2].text.startswith("Three")
    logprobs = found.choices[0].logprobs
    assert logprobs is not None
    assert (logprobs.token_logprobs or [0])[0] is None
    assert "".join(logprobs.tokens or ()) == found.choices[0].text
    for token, offset in zip(logprobs.tokens or (), logprobs.text_offset or (), strict=True):
        assert found.choices[0].text[offset:].startswith(token)


def test_a_streamed_completion_with_a_stop_string(client: openai.OpenAI) -> None:
    chunks = list(
        client.completions.create(
            model=MODEL, prompt="a b c d e f", stop=["d e"], max_tokens=50, stream=True
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == "a b c "
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_fields_of_others_pass_by_extra_body(client: openai.OpenAI) -> None:
    found = client.completions.create(
        model=MODEL, prompt="a b c", max_tokens=2, extra_body={"min_p": 0.1, "ignore_eos": True}
    )
    assert found.choices[0].finish_reason == "length"


def errors() -> list[tuple[dict[str, Any], type[openai.APIStatusError], str | None]]:
    return [
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"n": 17}, openai.BadRequestError, "n"),
        ({"model": "other"}, openai.NotFoundError, "model"),
        ({"stop": ["x"] * 17}, openai.BadRequestError, "stop"),
        ({"extra_body": {"unheard_of": 1}}, openai.BadRequestError, "unheard_of"),
        ({"extra_body": {"priority": 2}}, openai.BadRequestError, None),
        ({"extra_body": {"priority": 3}}, openai.InternalServerError, None),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError,
         "tools"),
    ]  # fmt: skip


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("options", "kind", "param"), errors())
def test_errors_have_their_types(
    client: openai.OpenAI,
    options: dict[str, Any],
    kind: type[openai.APIStatusError],
    param: str | None,
    stream: bool,
) -> None:
    asked = {"model": MODEL, "messages": HI, "stream": stream, **options}
    with pytest.raises(kind) as found:
        client.chat.completions.create(**asked)
    assert found.value.param == param
    assert found.value.type in ("invalid_request_error", "internal_error")


def test_an_error_within_a_stream_is_raised(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model=MODEL, prompt="a b c", max_tokens=9, stream=True, extra_body={"priority": 1}
    )
    with pytest.raises(openai.APIError, match="NaN in the logits"):
        list(stream)


def test_a_client_that_gives_up_frees_its_request(served: Served, client: openai.OpenAI) -> None:
    with pytest.raises(openai.APITimeoutError):
        client.completions.create(
            model=MODEL, prompt="a", timeout=0.2, extra_body={"priority": 5, "request_id": "late"}
        )
    wait_until_cancelled(served, "cmpl-late")


def test_a_closed_stream_frees_its_request(served: Served, client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model=MODEL,
        prompt="a b c",
        max_tokens=200,
        stream=True,
        extra_body={"priority": 4, "request_id": "closed"},
    )
    next(stream)
    stream.close()
    wait_until_cancelled(served, "cmpl-closed")


def wait_until_cancelled(served: Served, response_id: str) -> None:
    end_s = time.monotonic() + 2
    while not any(name.startswith(response_id) for name in served.model.cancelled):
        assert time.monotonic() < end_s
        time.sleep(0.01)


def test_many_at_once(served: Served) -> None:
    async def go() -> None:
        async with openai.AsyncOpenAI(
            base_url=f"{served.url}/v1", api_key="-", max_retries=0
        ) as client:

            async def streamed(index: int) -> str:
                stream = await client.completions.create(
                    model=MODEL, prompt=f"{index} and {index}", max_tokens=20, stream=True
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            async def whole(index: int) -> str:
                found = await client.chat.completions.create(
                    model=MODEL,
                    messages=[{"role": "user", "content": f"{index}"}],
                    max_completion_tokens=3,
                )
                return found.choices[0].message.content or ""

            texts = await asyncio.gather(*map(streamed, range(20)), *map(whole, range(20)))
        assert [text.split(" ")[0] for text in texts[:20]] == [str(i) for i in range(20)]
        assert all(text.startswith("user: ") for text in texts[20:])

    asyncio.run(go())


def test_a_request_brings_its_own_id(served: Served) -> None:
    body = {"prompt": "a", "max_tokens": 1}
    answer = httpx.post(
        f"{served.url}/v1/completions", json=body, headers={"X-Request-Id": "abc-1"}
    )
    assert answer.json()["id"] == answer.headers["x-request-id"] == "cmpl-abc-1"
    bad = httpx.post(
        f"{served.url}/v1/completions", json=body, headers={"X-Request-Id": "a b" * 100}
    )
    assert bad.status_code == 200
    assert bad.json()["id"] != "cmpl-" + "a b" * 100
