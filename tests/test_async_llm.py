"""`AsyncLLM` gives what `LLM` gives, to many tasks at once, whatever ends below or above it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Coroutine, Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest

from moe_serve import LLM, AsyncLLM, SamplingParams
from moe_serve.errors import (
    CapacityError,
    CheckpointError,
    CommError,
    ConfigError,
    RequestError,
    TraceError,
)
from moe_serve.text.prompts import Prompt
from moe_serve.types import RequestOutput
from tests.async_script import LONG, OPTIONS

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
PROMPTS: list[Prompt] = [
    "Once upon a time",
    [5, 6, 7],
    {"prompt": "def add(a, b):"},
    "The capital of",
]
SAMPLED = SamplingParams(max_tokens=12, temperature=0.9, ignore_eos=True, logprobs=1)
FORKED = SamplingParams(max_tokens=8, temperature=1.0, ignore_eos=True, n=3)
LONGEST = SamplingParams(max_tokens=240, ignore_eos=True, seed=1)
Result = TypeVar("Result")


def run(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """Run it, for a minute at most."""
    return asyncio.run(asyncio.wait_for(coroutine, 60))


def comparable(output: RequestOutput) -> Any:
    return output.request_id, output.prompt, output.outputs, output.finished


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "chat.jinja"
    path.write_text(TEMPLATE)
    return path


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


@pytest.fixture(autouse=True)
def _no_process_is_left() -> Iterator[None]:
    before = children()
    yield
    end_s = time.monotonic() + 5
    while left := {
        pid
        for pid in children() - before
        if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    }:
        assert time.monotonic() < end_s, left
        time.sleep(0.05)


def test_it_gives_what_llm_gives_and_tasks_do_not_disturb_each_other(template: Path) -> None:
    messages = [{"role": "user", "content": "Once upon a time"}]
    with LLM(seed=3, chat_template=template, **OPTIONS) as llm:
        wanted = [llm.generate(prompt, SAMPLED, use_tqdm=False)[0] for prompt in PROMPTS]
        wanted += llm.generate("Once", FORKED, use_tqdm=False)
        wanted += llm.chat(messages, SAMPLED, use_tqdm=False)

    async def go() -> None:
        async with AsyncLLM.create(seed=3, chat_template=template, **OPTIONS) as llm:
            assert (llm.model, llm.has_chat_template) == ("demo-moe", True)
            asked = [llm.generate(prompt, SAMPLED) for prompt in PROMPTS]
            found = await asyncio.gather(
                *asked, llm.generate("Once", FORKED), llm.chat(messages, SAMPLED)
            )
            assert list(map(comparable, found)) == list(map(comparable, wanted))
            assert found[0].metrics.e2e_s is not None
            await streams_grow(llm)
            await what_is_refused_harms_nobody(llm)
            await who_goes_away_is_aborted(llm)
            stats = await llm.stats()
            assert stats.max_num_seqs > 1
            await what_is_on_its_way_is_not_taken_for_another(llm)
            left = llm.stream("Once", LONGEST)
            await anext(left)
        assert [output async for output in left][-1].outputs[0].finish_reason == "abort"
        await llm.close()
        with pytest.raises(ConfigError, match="closed"):
            await llm.generate("Once")

    run(go())


async def streams_grow(llm: AsyncLLM) -> None:
    whole = await llm.generate("Once", LONG)
    lengths, text = [0], ""
    async for output in llm.stream("Once", LONG, request_id="mine"):
        (one,) = output.outputs
        assert output.request_id == "mine"
        assert one.text.startswith(text)
        lengths.append(len(one.token_ids))
        text = one.text
    assert lengths == sorted(set(lengths))
    assert len(lengths) > 3
    assert output.outputs == whole.outputs
    found = []
    async for output in llm.stream_chat([{"role": "user", "content": "Once"}], LONG):
        await asyncio.sleep(0.3)  # who is slow gets more at once
        found.append(output)
    assert len(found) < 10
    assert found[-1].outputs == whole.outputs


async def what_is_refused_harms_nobody(llm: AsyncLLM) -> None:
    before = (await llm.generate("Once", LONG)).outputs
    number = llm._num_made
    for prompt, params, options, text in (
        ("", LONG, {}, "empty"),
        ([1] * 300, LONG, {}, "300 tokens"),
        ([10**6], LONG, {}, "token id"),
        ("x" * 10**6, LONG, {}, "characters"),
        ("a", SamplingParams(stop=["\ud800"]), {}, "cannot be sent"),
        ("a", LONG, {"request_id": 5}, "must be a string"),
        ("a", LONG, {"priority": 2**70}, "priority"),
    ):
        with pytest.raises(RequestError, match=text):
            await llm.generate(prompt, params, **options)  # type: ignore[arg-type]
    assert llm._num_made == number + 2  # those that are refused where they are sent
    running = asyncio.create_task(llm.generate("Once", LONG, request_id="twice"))
    await asyncio.sleep(0.02)
    with pytest.raises(RequestError, match="in use"):
        await llm.generate("Once", LONG, request_id="twice")
    assert (await running).outputs == before


async def what_is_on_its_way_is_not_taken_for_another(llm: AsyncLLM) -> None:
    whole = (await llm.generate("def add(", LONG)).outputs
    for _ in range(20):
        async for output in llm.stream("Once", LONGEST, request_id="same"):
            if len(output.outputs[0].token_ids) > 2:
                break
        llm.abort("same")
        assert (await llm.generate("def add(", LONG, request_id="same")).outputs == whole


async def who_goes_away_is_aborted(llm: AsyncLLM) -> None:
    before = (await llm.stats()).num_finished
    task = asyncio.create_task(llm.generate("Once", LONGEST, request_id="a"))
    await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not llm.abort("a")
    async for output in llm.stream("Once", LONG, request_id="b"):
        assert not output.finished
        break
    found = []
    async for output in llm.stream("Once", LONG, request_id="c"):
        found.append(output)
        assert llm.abort("c") is (len(found) == 1)
    assert output.outputs[0].finish_reason == "abort"
    end_s = time.monotonic() + 10
    while (await llm.stats()).num_finished.get("abort", 0) < before.get("abort", 0) + 3:
        assert time.monotonic() < end_s
        await asyncio.sleep(0.1)


def test_a_killed_rank_makes_streams_pause_and_a_killed_host_ends_them() -> None:
    async def go() -> tuple[list[Any], list[Any]]:
        async with AsyncLLM.create(ep_size=2, dispatcher="static", seed=1, **OPTIONS) as llm:
            asked = [llm.generate([2 + i, 3], LONG) for i in range(4)]
            whole = await asyncio.gather(*asked)
            streams = [asyncio.create_task(collected(llm, [2 + i, 3])) for i in range(4)]
            await asyncio.sleep(0.1)
            ranks = psutil.Process(llm._host.pid).children()
            assert len(ranks) == 2
            ranks[1].kill()
            found = await asyncio.gather(*streams)
            left = asyncio.create_task(llm.generate("Once", LONG))
            await asyncio.sleep(0.1)
            os.kill(llm._host.pid, signal.SIGKILL)
            with pytest.raises(CommError, match="lost"):
                await left
            with pytest.raises(CommError, match="ended"):
                await llm.generate("Once")
        return [one.outputs for one in whole], [one.outputs for one in found]

    whole, found = run(go())
    assert found == whole


async def collected(llm: AsyncLLM, prompt: list[int]) -> RequestOutput:
    async for output in llm.stream(prompt, LONG):
        last = output
    return last


@cache
def long_tokens() -> list[int]:
    with LLM(**OPTIONS) as llm:
        return list(llm.generate("Once", LONG, use_tqdm=False)[0].outputs[0].token_ids)


def test_a_script_may_have_several_be_busy_and_be_killed() -> None:
    script = subprocess.Popen(
        [sys.executable, "-m", "tests.async_script"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert script.stdout is not None
    assert script.stderr is not None
    line = script.stdout.readline()
    assert line, script.stderr.read()
    result = json.loads(line)
    below = psutil.Process(script.pid).children(recursive=True)
    assert len(below) == 2  # a host and its rank: the other was closed
    script.kill()
    script.communicate()
    assert result == {"found": [long_tokens()] * 4, "forked": 7}
    assert not psutil.wait_procs(below, 5)[1]


def test_what_cannot_be_loaded_or_written_is_raised_as_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def made(**options: Any) -> None:
        async with AsyncLLM.create(**{**OPTIONS, **options}) as llm:
            await llm.generate("Once", SAMPLED)
            if "record_trace" in options:
                (tmp_path / "traces").rmdir()

    with pytest.raises(ConfigError, match="no option 'slotz'"):
        run(made(slotz=1))
    with pytest.raises(CheckpointError):
        run(made(model=str(tmp_path / "none")))
    with pytest.raises(CapacityError, match="a token uses 4 experts of each layer"):
        run(made(expert_cache_slots=3, expert_store=str(tmp_path)))
    (tmp_path / "traces").mkdir()
    with pytest.raises(TraceError, match="traces"):
        run(made(record_trace=str(tmp_path / "traces" / "a.npz")))
    with pytest.raises(ConfigError, match=r"await AsyncLLM\.create"):
        AsyncLLM("demo-moe", ep_size=2)
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "2"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="one of 2 processes of torchrun"):
        run(made())
