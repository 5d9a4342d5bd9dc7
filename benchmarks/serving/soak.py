"""Thousands of requests of all kinds, good and bad, on one server: what grows?

Hypothesis: nothing. After a tenth of the requests, memory of each process grows by less than 50
bytes a request, files and threads not at all; whenever no request is under way every KV block is
free, and one and the same request has one and the same answer; the log neither grows nor has a
prompt or a key in it.

    python -m benchmarks.serving.soak --requests 20000 --save

Memory is sampled when nothing has been under way for a second, in which the front end gives back
what is free; its slope is that of least squares. What is
bounded is filled first: the names of tokens, the short strings that the parser of bodies remembers
(16,384), every KV block, and the buffers of the largest step. Allocators keep what was freed: of
few requests the slope says nothing, and only what has grown is judged.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks import results
from benchmarks.serving.exchanges import Exchange, Way, ask
from benchmarks.serving.idle import Use, use_of, wait_until_idle
from benchmarks.serving.report import report
from benchmarks.serving.served import CHAT_FLAGS, Served, served

NUM_CLIENTS = 32
MOST_SLOPE = 50.0
MOST_GROWN_BYTES = 24 * 2**20
MOST_LOG_BYTES = 64 * 2**10
# with fewer requests the slope is the allocator's
SLOPE_FROM = 10_000
# by when a front end that has nothing to do has given memory back
_GIVEN_BACK_S = 1.2
KEY = "sk-of-the-soak-29f1c3"
MARK = "zanzibarish"
# few KV blocks, so that all have been used soon: memory that was never touched is not there yet
FLAGS = (
    *CHAT_FLAGS, "--num-kv-blocks", "1024", "--max-num-seqs", "48", "--stats-interval", "2",
)  # fmt: skip
WORDS = ("red", "green", "blue", "seven", "north", "lamp", "river", MARK)
_SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "boolean"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
_FORMAT = {
    "type": "json_schema",
    "json_schema": {"name": "answer", "schema": _SCHEMA, "strict": True},
}
CANARY: dict[str, Any] = {
    "prompt": [17, 4000, 23, 5],
    "max_tokens": 64,
    "temperature": 0.8,
    "seed": 7,
    "ignore_eos": True,
    "return_token_ids": True,
}
_BAD: tuple[dict[str, Any], ...] = (
    {"prompt": [5], "temperature": -1},
    {"prompt": [5], "max_tokens": "many"},
    {"prompt": []},
    {"prompt": [10**6]},
    {"prompt": [5] * 2000},
    {"prompt": f"{MARK} " * 2000},
    {"prompt": [5], "n": 10**6},
    {"prompt": [5], MARK: 1},
    {"messages": [{"role": MARK, "content": 5}]},
)


@dataclass(frozen=True)
class Mix:
    """Shares of requests. structured: of good ones, with a JSON schema."""

    bad: float = 0.05
    aborted: float = 0.2
    structured: float = 0.1


@dataclass(frozen=True)
class Sample:
    """What processes used when so many requests were over and nothing was under way."""

    num_requests: int
    uses: dict[str, Use]


@dataclass
class Soak:
    """What came of it. ended: requests by kind and end; latencies_s: of whole ones, in order."""

    num_requests: int
    ended: Counter[str] = field(default_factory=Counter)
    latencies_s: list[float] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    log_bytes: int = 0
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def steady(self) -> list[Sample]:
        """The samples after a tenth of the requests."""
        return [one for one in self.samples if one.num_requests >= self.num_requests / 10]

    @property
    def processes(self) -> list[str]:
        """Those that were there all the time."""
        first, *others = [one.uses.keys() for one in self.steady]
        return [name for name in first if all(name in names for names in others)]

    def slope(self, process: str) -> float:
        """Return the bytes by which a process grows with a request."""
        requests = [float(one.num_requests) for one in self.steady]
        sizes = [float(one.uses[process].own_bytes) for one in self.steady]
        return statistics.linear_regression(requests, sizes).slope

    def grown(self, process: str, of: Callable[[Use], int]) -> int:
        """Return how much more a process has of something at the end than after the warm-up."""
        return of(self.steady[-1].uses[process]) - of(self.steady[0].uses[process])

    @property
    def tenths_s(self) -> tuple[float, float]:
        """The 99th percentiles of the latencies of the first tenth after warm-up, and the last."""
        size = max(2, len(self.latencies_s) // 10)
        first, last = self.latencies_s[size : 2 * size], self.latencies_s[-size:]
        return statistics.quantiles(first, n=100)[98], statistics.quantiles(last, n=100)[98]

    def judge(self) -> None:
        for process in self.processes:
            if self.num_requests >= SLOPE_FROM and self.slope(process) > MOST_SLOPE:
                slope = self.slope(process)
                self.faults.append(f"{process} grows by {slope:.0f} bytes a request")
            grown = self.grown(process, lambda use: use.own_bytes)
            if grown > MOST_GROWN_BYTES:
                self.faults.append(f"{process} has grown by {grown / 2**20:.1f} MiB")
            if (more := self.grown(process, lambda use: use.descriptors)) > 0:
                self.faults.append(f"{process} has {more} more files open")
            if (more := self.grown(process, lambda use: use.threads)) > 0:
                self.faults.append(f"{process} has {more} more threads")
        if self.log_bytes > MOST_LOG_BYTES:
            self.faults.append(f"the log has {self.log_bytes} bytes")


# -- one request -----------------------------------------------------------------------------------


def _good(chance: random.Random, mix: Mix) -> tuple[str, dict[str, Any]]:
    """Return a path and a body that will be served."""
    body: dict[str, Any] = {
        "max_tokens": chance.randint(1, 48),
        "temperature": chance.choice((0.0, 0.7, 1.1)),
        "stream": chance.random() < 0.5,
    }
    if chance.random() < 0.3:
        body |= {"n": chance.randint(2, 3), "temperature": 0.9}
    if chance.random() < 0.2:
        body |= {"stop": ["\n", "the"], "frequency_penalty": 0.3}
    if chance.random() < 0.5:
        body["seed"] = chance.randrange(2**40)
    if chance.random() < mix.structured:
        body |= {"response_format": _FORMAT, "max_tokens": 48}
    words = " ".join(chance.choices(WORDS, k=chance.randint(1, 60)))
    if chance.random() < 0.5:
        if chance.random() < 0.3:
            body |= {"logprobs": True, "top_logprobs": chance.randint(0, 5)}
        return "/v1/chat/completions", body | {"messages": [{"role": "user", "content": words}]}
    if chance.random() < 0.3:
        body["logprobs"] = chance.randint(0, 5)
    prompts = (words, [words, f"again {words}"], [5, *chance.choices(range(2, 6000), k=20)])
    return "/v1/completions", body | {"prompt": chance.choice(prompts)}


def _num_choices(body: dict[str, Any]) -> int:
    prompt = body.get("prompt")
    is_list = isinstance(prompt, list) and isinstance(prompt[0], str)
    return int(body.get("n", 1)) * (len(prompt) if is_list else 1)  # type: ignore[arg-type]


async def _whole(port: int, path: str, body: dict[str, Any], found: Soak) -> str:
    """Read an answer to its end; return what it was."""
    begun_s = time.monotonic()
    exchange = await Exchange.begin(port, path, body, key=KEY)
    try:
        if await exchange.head() != 200:
            found.faults.append(f"{exchange.status}: {await exchange.answer()} to {body}"[:2000])
            return str(exchange.status)
        ends: dict[int, str] = {}
        if body["stream"]:
            async for event in exchange.events():
                if "error" in event:
                    found.faults.append(f"an error in a stream: {event}")
                    return "error"
                for choice in event["choices"]:
                    if choice["finish_reason"] is not None:
                        ends[choice["index"]] = choice["finish_reason"]
            if not exchange.is_whole:
                found.faults.append("a stream without its end")
        else:
            choices = (await exchange.answer())["choices"]
            ends = {choice["index"]: choice["finish_reason"] for choice in choices}
    finally:
        exchange.close()
    if len(ends) != _num_choices(body) or not {"stop", "length"}.issuperset(ends.values()):
        found.faults.append(f"choices ended {ends} for {body}"[:2000])
    found.latencies_s.append(time.monotonic() - begun_s)
    return "whole"


async def _left(port: int, path: str, body: dict[str, Any], chance: random.Random) -> str:
    """Go away before the end, in any way."""
    exchange = await Exchange.begin(port, path, body | {"max_tokens": 300}, key=KEY)
    try:
        await asyncio.sleep(chance.uniform(0, 0.1))
        how: Way = "fin" if chance.random() < 0.5 else "rst"
        await exchange.leave(how)
    finally:
        exchange.close()
    return f"left, {how}"


async def _aborted(port: int, path: str, body: dict[str, Any], name: str, found: Soak) -> str:
    """Have a request aborted by its name; it still has an answer, which says so."""
    asked = body | {"max_tokens": 300, "request_id": name, "ignore_eos": True}
    exchange = await Exchange.begin(port, path, asked, key=KEY)
    try:
        await asyncio.sleep(0.02)
        status, told = await ask(port, "/v1/abort", {"request_id": name}, key=KEY)
        if status != 200:
            found.faults.append(f"abort: {status} {told}")
        await exchange.head()
        if exchange.status != 200:
            found.faults.append(f"aborted: {exchange.status} {await exchange.answer()}")
        while await exchange.reader.read(2**16):
            pass
    finally:
        exchange.close()
    return f"aborted, {'in time' if told.get('num_aborted') else 'too late'}"


async def _bad(port: int, chance: random.Random, found: Soak) -> str:
    body = chance.choice(_BAD)
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    status, told = await ask(port, path, body, key=KEY)
    if status != 400:
        found.faults.append(f"{status} for {body}: {told}"[:2000])
    return "bad"


async def _one(port: int, index: int, chance: random.Random, mix: Mix, found: Soak) -> None:
    is_bad, is_aborted = chance.random() < mix.bad, chance.random() < mix.aborted
    path, body = _good(chance, mix)
    work: Coroutine[Any, Any, str]
    if is_bad:
        work = _bad(port, chance, found)
    elif is_aborted and chance.random() < 0.5:
        work = _left(port, path, body, chance)
    elif is_aborted:
        work = _aborted(port, path, body, f"soak-{index}", found)
    else:
        work = _whole(port, path, body, found)
    try:
        async with asyncio.timeout(120):
            found.ended[await work] += 1
    except OSError as error:  # TimeoutError is one, too
        found.faults.append(f"request {index}: {type(error).__name__} {error}, {body}"[:2000])


async def _some(
    port: int, first: int, count: int, chance: random.Random, mix: Mix, found: Soak
) -> None:
    """Serve so many requests from clients that ask again when they have an answer."""
    indices = iter(range(first, first + count))

    async def client() -> None:
        for index in indices:
            await _one(port, index, chance, mix, found)

    await asyncio.gather(*(client() for _ in range(NUM_CLIENTS)))


async def fill(port: int, vocab_size: int = 6144) -> None:
    """Have a server fill all that it keeps and that is bounded."""
    tokens = [*range(2, vocab_size)]
    bodies: list[dict[str, Any]] = [
        {"prompt": tokens[at : at + 900], "max_tokens": 60, "n": 3, "logprobs": 5, "echo": True}
        for at in range(0, vocab_size, 400)
    ]
    paths = ["/v1/completions"] * len(bodies)
    # too long for the model, but they are read
    for at in range(0, 20_000, 4000):
        words = [{"role": "user", "content": f"word {at + one}"} for one in range(4000)]
        bodies.append({"messages": words})
        paths.append("/v1/chat/completions")
    bodies += [{"prompt": [5], "max_tokens": 8, "response_format": _FORMAT}] * 8
    paths += ["/v1/completions"] * 8
    await asyncio.gather(
        *(ask(port, path, body, key=KEY) for path, body in zip(paths, bodies, strict=True))
    )


def _settled_use(server: Served, samples: Sequence[Sample]) -> dict[str, Use]:
    """Return what processes use, once the connection that was closed last is closed there too."""
    end_s = time.monotonic() + 1
    while True:
        uses = use_of(server)
        before = samples[0].uses if samples else uses
        more = [
            name
            for name in uses
            if name in before and uses[name].descriptors > before[name].descriptors
        ]
        if not more or time.monotonic() > end_s:
            return uses
        time.sleep(0.02)


# -- all of them -----------------------------------------------------------------------------------


def run(
    server: Served,
    count: int,
    chance: random.Random,
    mix: Mix,
    *,
    num_samples: int = 50,
    num_fills: int = 3,
) -> Soak:
    """Serve `count` requests, with looks at what the server uses in between; judge them.

    num_fills: how often all that is bounded is filled before.
    """
    found = Soak(count)
    server.headers = {"Authorization": f"Bearer {KEY}"}
    for _ in range(num_fills):
        asyncio.run(fill(server.port))
    begun_s = time.monotonic()
    _, first = server.post("/v1/completions", CANARY)
    done = 0
    for index in range(num_samples):
        until = count * (index + 1) // num_samples
        asyncio.run(_some(server.port, done, until - done, chance, mix, found))
        done = until
        wait_until_idle(server)
        _, again = server.post("/v1/completions", CANARY)
        time.sleep(_GIVEN_BACK_S)
        if again["choices"] != first["choices"]:
            found.faults.append(f"after {done} requests the same one has another answer")
        found.samples.append(Sample(done, _settled_use(server, found.samples)))
        if index % 10 == 9:
            sizes = {name: use.own_bytes >> 10 for name, use in found.samples[-1].uses.items()}
            print(
                f"  {done} requests, {time.monotonic() - begun_s:.0f} s, KiB: {sizes}", flush=True
            )
    found.seconds = time.monotonic() - begun_s
    log = "".join(server.read_log())
    found.log_bytes = len(log)
    for secret in (KEY, MARK):
        if secret in log:
            at = log.index(secret)
            found.faults.append(f"the log has {secret!r}: {log[max(0, at - 200) : at + 200]}")
    found.judge()
    return found


def rows_of(found: Soak) -> list[results.Row]:
    """Return the figures."""
    row = results.Row.of
    rows = [
        row("requests", [found.num_requests], "count"),
        row("rate", [found.num_requests / found.seconds], "requests/s"),
    ]
    rows += [row(f"requests: {how}", [n], "count") for how, n in sorted(found.ended.items())]
    has_slope = found.num_requests >= SLOPE_FROM
    for process in found.processes:
        limit = MOST_SLOPE if has_slope else None
        rows.append(
            row(f"{process}: memory a request", [found.slope(process)], "bytes", limit=limit)
        )
        for name, unit, of, most in (
            ("memory", "MiB", lambda use: use.own_bytes / 2**20, MOST_GROWN_BYTES / 2**20),
            ("open files", "count", lambda use: use.descriptors, 0),
            ("threads", "count", lambda use: use.threads, 0),
        ):
            rows.append(
                row(f"{process}: {name} grown", [found.grown(process, of)], unit, limit=most)
            )
    first_s, last_s = found.tenths_s
    rows += [
        row("p99 latency of the second tenth", [first_s], "s"),
        row("p99 latency of the last tenth", [last_s], "s", ratio=last_s / first_s),
        row("log", [found.log_bytes], "bytes", limit=MOST_LOG_BYTES),
        row("faults", [len(found.faults)], "count", limit=0),
    ]
    return rows


def soaked(*flags: str) -> Any:
    """Return a server to be soaked, for `with`."""
    return served(*FLAGS, *flags, environment={"MOE_SERVE_API_KEY": KEY})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--structured", type=float, default=0.1, help="share with a JSON schema")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    with soaked() as server:
        mix = Mix(structured=given.structured)
        found = run(server, given.requests, random.Random(given.seed), mix)
    return report("soak", rows_of(found), found.faults[:50], is_saved=given.save)


if __name__ == "__main__":
    sys.exit(main())
