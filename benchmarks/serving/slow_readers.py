"""32 clients that read a token's worth a second, or nothing, beside 8 that read at once.

Hypothesis: who reads slowly costs the others nothing. Rounds with 32 quick readers and with 32 slow
ones take turns, so that the engine has the same work in both: the 99th percentile of the time
between two tokens of the 8 stays below 1.5 times, the server's memory is bounded, and who reads
nothing at all for a minute is cut.

    python -m benchmarks.serving.slow_readers --rounds 5 --cut --save
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from benchmarks import results
from benchmarks.serving.exchanges import Exchange
from benchmarks.serving.idle import growth, load_of, use_of, wait_until_idle
from benchmarks.serving.report import report
from benchmarks.serving.served import Served, served
from benchmarks.serving.streams import Stream, run_stream
from moe_serve.server.limits import DEFAULT_LIMITS

NUM_SLOW = 32
NUM_HONEST = 8
MOST_RATIO = 1.5
MOST_GROWN_BYTES = 64 * 2**20
# so little that a client's kernel takes nothing for it
_RECEIVE_BUFFER = 2304
_EVENT_BYTES = 256
# tokens that wait for company would hide what a slow reader does to a step
FLAGS = ("--max-num-seqs", "64", "--stats-interval", "0", "--stream-interval", "0")
# who reads nothing must have more to read than the kernels of both sides hold
_MUCH = {"max_tokens": 1000, "n": 8, "return_token_ids": True, "logprobs": 5}


@dataclass
class Readers:
    """What came of all rounds. ratios: of the 99th percentiles with slow readers and with quick.

    itl_s: these percentiles, by whether the others were slow. cut_s: after so long who read nothing
    was cut; () where that was not tried.
    """

    ratios: list[float] = field(default_factory=list)
    itl_s: dict[bool, list[float]] = field(default_factory=lambda: {False: [], True: []})
    grown_bytes: list[int] = field(default_factory=list)
    cut_s: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def judge(self) -> None:
        ratio = statistics.median(self.ratios)
        if ratio > MOST_RATIO:
            self.faults.append(f"time between tokens grew {ratio:.2f} times, limit {MOST_RATIO}")
        if max(self.grown_bytes) > MOST_GROWN_BYTES:
            self.faults.append(f"the server grew by {max(self.grown_bytes) / 2**20:.0f} MiB")


def body(chance: random.Random, num_tokens: int) -> dict[str, Any]:
    return {
        "prompt": [chance.randrange(2, 6000) for _ in range(8)],
        "max_tokens": num_tokens,
        "temperature": 0.8,
        "seed": chance.randrange(1000),
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }


async def _read_slowly(port: int, asked: dict[str, Any], is_silent: bool) -> None:
    """Read a token's worth a second, or nothing, until cancelled."""
    exchange = await Exchange.begin(port, "/v1/completions", asked, receive_buffer=_RECEIVE_BUFFER)
    try:
        if is_silent:
            exchange.pause()
            await asyncio.Event().wait()
        while await exchange.reader.read(_EVENT_BYTES):
            await asyncio.sleep(1.0)
    finally:
        exchange.close()


async def _round(
    server: Served, chance: random.Random, num_tokens: int, *, is_slow: bool, found: Readers
) -> float:
    """Run honest streams beside the others; return the 99th percentile of their gaps in seconds."""
    port = server.port
    seeds = random.Random(5)
    honest = [Stream(body(seeds, num_tokens)) for _ in range(NUM_HONEST)]
    others = [body(chance, 3 * num_tokens) for _ in range(NUM_SLOW)]
    before = await asyncio.to_thread(use_of, server)
    if is_slow:
        tasks = [
            asyncio.create_task(_read_slowly(port, one, index % 2 == 0))
            for index, one in enumerate(others)
        ]
    else:
        tasks = [asyncio.create_task(run_stream(port, Stream(one))) for one in others]
    await asyncio.sleep(0.3)
    await asyncio.gather(*(run_stream(port, stream) for stream in honest))
    if not all(stream.is_whole and len(stream.token_ids) == num_tokens for stream in honest):
        found.faults.append(f"honest streams were not whole: {[s.error for s in honest]}")
    if is_slow:
        if any(task.done() for task in tasks):
            found.faults.append("a slow reader was at its end before the honest ones")
        found.grown_bytes.append(growth(before, await asyncio.to_thread(use_of, server)))
        for task in tasks:
            task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.to_thread(wait_until_idle, server)
    gaps = [
        after - before
        for stream in honest
        for before, after in zip(stream.times_s, stream.times_s[1:], strict=False)
    ]
    return statistics.quantiles(gaps, n=100)[98]


async def _cut(server: Served, chance: random.Random, found: Readers) -> None:
    """See that who reads nothing at all is cut, and not before its time."""
    asked = body(chance, 1000) | _MUCH
    exchange = await Exchange.begin(
        server.port, "/v1/completions", asked, receive_buffer=_RECEIVE_BUFFER
    )
    exchange.pause()
    while (await asyncio.to_thread(load_of, server)).running:
        await asyncio.sleep(0.1)
    # from here on, at the latest, the client takes nothing
    begun_s = time.monotonic()
    while (await asyncio.to_thread(load_of, server)).connections:
        await asyncio.sleep(0.2)
        if time.monotonic() - begun_s > 2 * DEFAULT_LIMITS.write_s:
            found.faults.append("who reads nothing was not cut")
            break
    found.cut_s.append(time.monotonic() - begun_s)
    if found.cut_s[-1] > DEFAULT_LIMITS.write_s + 5:
        found.faults.append(f"who reads nothing was cut after {found.cut_s[-1]:.1f} s")
    exchange.close()


def run(
    server: Served, rounds: int, num_tokens: int, chance: random.Random, *, has_cut: bool = False
) -> Readers:
    """Run rounds of both kinds in turns, and judge them."""
    found = Readers()
    asyncio.run(_round(server, chance, num_tokens, is_slow=False, found=found))  # to warm up
    for _ in range(rounds):
        for is_slow in (False, True):
            p99_s = asyncio.run(_round(server, chance, num_tokens, is_slow=is_slow, found=found))
            found.itl_s[is_slow].append(p99_s)
        found.ratios.append(found.itl_s[True][-1] / found.itl_s[False][-1])
    if has_cut:
        asyncio.run(_cut(server, chance, found))
    found.judge()
    return found


def rows_of(found: Readers) -> list[results.Row]:
    """Return the figures."""
    names = {False: "quick", True: "slow"}
    rows = [
        results.Row.of(
            f"p99 between tokens of {NUM_HONEST}, beside {NUM_SLOW} {names[is_slow]} readers",
            [1e3 * one for one in found.itl_s[is_slow]],
            "ms",
        )
        for is_slow in (False, True)
    ]
    rows.append(results.Row.of("ratio of both", found.ratios, "times", limit=MOST_RATIO))
    grown = [num / 2**20 for num in found.grown_bytes]
    limit = MOST_GROWN_BYTES / 2**20
    rows.append(results.Row.of("memory grown beside slow readers", grown, "MiB", limit=limit))
    if found.cut_s:
        limit = DEFAULT_LIMITS.write_s + 5
        rows.append(results.Row.of("who reads nothing is cut after", found.cut_s, "s", limit=limit))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=300, help="of each honest stream")
    parser.add_argument("--cut", action="store_true", help="wait until who reads nothing is cut")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    with served(*FLAGS) as server:
        chance = random.Random(given.seed)
        found = run(server, given.rounds, given.tokens, chance, has_cut=given.cut)
    return report("slow_readers", rows_of(found), found.faults, is_saved=given.save)


if __name__ == "__main__":
    sys.exit(main())
