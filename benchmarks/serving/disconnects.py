"""Clients that go away at any moment, while an honest stream runs: what is left of them.

Hypothesis: nothing. Soon after the last one no request is under way and no KV block is held, few
tokens were made for nobody, and the stream beside them has the tokens that it has alone.

    python -m benchmarks.serving.disconnects --count 500 --save
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from benchmarks import results
from benchmarks.serving.exchanges import Exchange, Way
from benchmarks.serving.idle import Use, growth, use_of, wait_until_idle
from benchmarks.serving.report import report
from benchmarks.serving.served import CHAT_FLAGS, Served, served
from benchmarks.serving.streams import Stream, run_stream

IDLE_AFTER_S = 1.0
# made for one client after it was gone
MOST_TOKENS = 100
# few sequences and small pieces of prompts: clients also go while they wait or theirs is read
FLAGS = (
    *CHAT_FLAGS, "--max-num-seqs", "12", "--max-prefill-chunk", "32", "--stats-interval", "0",
)  # fmt: skip
AT_ONCE = 24
MOMENTS = ("sent", "prefill", "stream", "end")
Moment = Literal["sent", "prefill", "stream", "end"]
HONEST: dict[str, Any] = {
    "prompt": [17, 4000, 23, 5],
    "max_tokens": 400,
    "temperature": 0.8,
    "seed": 7,
    "ignore_eos": True,
    "stream": True,
    "return_token_ids": True,
}


@dataclass(frozen=True)
class Visit:
    """A client's request, when it goes away, and how. num_tokens: that it reads before it does."""

    path: str
    body: dict[str, Any]
    moment: Moment
    how: Way
    pause_s: float
    num_tokens: int

    @property
    def kind(self) -> str:
        return f"{'streamed' if self.body['stream'] else 'whole'}, {self.moment}, {self.how}"


@dataclass
class Disconnects:
    """What came of many visits. tokens_after: of each single client that went away.

    num_different: honest streams that had other tokens than alone.
    """

    visits: Counter[str] = field(default_factory=Counter)
    num_honest: int = 0
    num_different: int = 0
    idle_after_s: float = 0.0
    tokens_after: list[int] = field(default_factory=list)
    grown_bytes: int = 0

    @property
    def faults(self) -> list[str]:
        found = []
        if self.num_different:
            found.append(f"{self.num_different} honest streams were different")
        if not self.num_honest:
            found.append("no honest stream has ended")
        if self.idle_after_s > IDLE_AFTER_S:
            found.append(f"idle {self.idle_after_s:.2f} s after the last")
        if max(self.tokens_after, default=0) > MOST_TOKENS:
            found.append(f"{max(self.tokens_after)} tokens were made for a client that was gone")
        return found


def visit(chance: random.Random, moment: Moment) -> Visit:
    """Make a visit of a kind that chance says."""
    num_prompt = chance.randint(500, 900) if moment == "prefill" else chance.randint(2, 40)
    prompt: Any = [chance.randrange(2, 6000) for _ in range(num_prompt)]
    is_short = moment == "end"
    body: dict[str, Any] = {
        "max_tokens": chance.randint(1, 8) if is_short else 1000 - num_prompt,
        "temperature": chance.choice((0.0, 0.9)),
        "ignore_eos": True,
        "stream": chance.random() < 0.7,
    }
    path = "/v1/completions"
    match chance.randrange(4):
        case 0:
            body |= {"prompt": prompt, "n": 3}
        case 1:
            half = num_prompt // 2 + 1
            body["prompt"] = [prompt[:half], prompt[half - 1 :]]
        case 2:
            path = "/v1/chat/completions"
            text = " ".join(chance.choice(("red", "green", "blue")) for _ in range(num_prompt // 3))
            body["messages"] = [{"role": "user", "content": text}]
            body["max_tokens"] = min(body["max_tokens"], 400)
        case _:
            body["prompt"] = prompt
    how: Way = "fin" if chance.random() < 0.5 else "rst"
    return Visit(
        path=path,
        body=body,
        moment=moment,
        how=how,
        pause_s=chance.uniform(0.0, 0.004 if moment == "sent" else 0.15),
        num_tokens=chance.randint(1, 40),
    )


async def go(port: int, one: Visit, found: Disconnects) -> None:
    """Make a visit."""
    exchange = await Exchange.begin(port, one.path, one.body)
    try:
        if one.moment in ("sent", "prefill") or (not one.body["stream"] and one.moment == "stream"):
            await asyncio.sleep(one.pause_s)
        else:
            status = await exchange.head()
            assert status == 200, await exchange.reader.read(2**12)
            if one.body["stream"]:
                await _read_some(exchange, one)
        await exchange.leave(one.how)
    finally:
        exchange.close()
    found.visits[one.kind] += 1


async def _read_some(exchange: Exchange, one: Visit) -> None:
    """Read as many tokens as it is to have, or up to the last one's event."""
    num = 0
    async for event in exchange.events():
        num += 1
        choices = event["choices"]
        is_last = any(choice["finish_reason"] is not None for choice in choices)
        if is_last if one.moment == "end" else num >= one.num_tokens:
            return


async def _honest(port: int, alone: Sequence[int], is_over: asyncio.Event, f: Disconnects) -> None:
    while not is_over.is_set() or not f.num_honest:
        stream = Stream(dict(HONEST))
        await run_stream(port, stream)
        f.num_honest += 1
        f.num_different += stream.token_ids != alone or not stream.is_whole


async def disconnect(server: Served, count: int, chance: random.Random) -> Disconnects:
    """Have `count` clients go away, some at a time, and see what is left of them."""
    found = Disconnects()
    alone = Stream(dict(HONEST))
    await run_stream(server.port, alone)
    assert alone.is_whole, alone.error
    before: dict[str, Use] = await asyncio.to_thread(use_of, server)
    is_over, gate = asyncio.Event(), asyncio.Semaphore(AT_ONCE)
    honest = asyncio.create_task(_honest(server.port, alone.token_ids, is_over, found))

    async def one(index: int) -> None:
        async with gate:
            moment: Moment = MOMENTS[index % len(MOMENTS)]  # type: ignore[assignment]
            await go(server.port, visit(chance, moment), found)

    await asyncio.gather(*(one(index) for index in range(count)))
    is_over.set()
    await honest
    # the honest one has ended by itself: the very last is one of those that go away
    await go(server.port, visit(chance, "stream"), found)
    found.idle_after_s = await asyncio.to_thread(wait_until_idle, server)
    found.grown_bytes = growth(before, await asyncio.to_thread(use_of, server))
    return found


async def tokens_after(server: Served, chance: random.Random) -> int:
    """Return how many tokens were made for a single client after it was gone."""
    begun = _num_tokens(server)
    body = {**HONEST, "max_tokens": 1000, "seed": chance.randrange(1000)}
    exchange = await Exchange.begin(server.port, "/v1/completions", body)
    assert await exchange.head() == 200
    wanted, num = chance.randint(1, 300), 0
    async for event in exchange.events():
        num += sum(len(choice["token_ids"]) for choice in event["choices"])
        if num >= wanted:
            break
    await exchange.leave("rst")
    await asyncio.to_thread(wait_until_idle, server)
    return _num_tokens(server) - begun - num


def _num_tokens(server: Served) -> int:
    return int(server.metrics()["generation_tokens_total"])


def run(server: Served, count: int, num_single: int, chance: random.Random) -> Disconnects:
    """Have all go away; return what came of it."""
    found = asyncio.run(disconnect(server, count, chance))
    found.tokens_after = [asyncio.run(tokens_after(server, chance)) for _ in range(num_single)]
    return found


def rows_of(found: Disconnects) -> list[results.Row]:
    """Return the figures."""
    row = results.Row.of
    return [
        row("disconnects", [sum(found.visits.values())], "count"),
        row("nothing under way after", [found.idle_after_s], "s", limit=IDLE_AFTER_S),
        row("made for one that was gone", found.tokens_after, "tokens", limit=MOST_TOKENS),
        row("honest streams beside", [found.num_honest], "count"),
        row("of these different", [found.num_different], "count", limit=0),
        row("memory grown, all processes", [found.grown_bytes / 2**20], "MiB"),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--single", type=int, default=20, help="to count what each leaves behind")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    with served(*FLAGS) as server:
        found = run(server, given.count, given.single, random.Random(given.seed))
    for kind, count in sorted(found.visits.items()):
        print(f"  {kind}: {count}")
    return report("disconnects", rows_of(found), found.faults, is_saved=given.save)


if __name__ == "__main__":
    sys.exit(main())
