"""Processes that are killed or frozen while 16 streams run: what becomes of the streams.

Hypothesis: a rank's end costs time and nothing else. The streams go on where they stopped with the
tokens they would have had; whoever else dies, no client hangs and nothing is left behind.

    python -m benchmarks.serving.kills --rounds 5 --ranks 1,2,4 --save
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from benchmarks import results
from benchmarks.serving.served import Served, served, shared_memory, wait_until_gone
from benchmarks.serving.streams import Stream, run_stream
from moe_serve.server.messages import BEAT_S, SILENT_AFTER_S

NUM_STREAMS = 16
# the limits, in seconds
DETECT_S = {signal.SIGKILL: 1.0, signal.SIGSTOP: SILENT_AFTER_S + BEAT_S}
SERVING_AGAIN_S = 5.0
FLAGS = ("--dispatcher", "static", "--max-worlds", "1000", "--stats-interval", "0")
_ALL_HUNG_S = 120.0


@dataclass
class Kill:
    """What came of one kill. Times are seconds after it.

    num_different: streams of which a whole run with the reported seed gives something else.
    num_cut: ended with an error, or their connection was; num_hung: neither.
    """

    victim: str
    how: signal.Signals
    num_ranks: int
    detected_s: float = 0.0
    serving_s: float = 0.0
    load_s: float = 0.0
    num_whole: int = 0
    num_cut: int = 0
    num_hung: int = 0
    num_different: int = 0
    orphans: list[int] = field(default_factory=list)
    listeners: list[tuple[str, int]] = field(default_factory=list)
    shared_memory: set[str] = field(default_factory=set)

    @property
    def faults(self) -> list[str]:
        """What was not as it must be."""
        found = []
        if self.detected_s > DETECT_S[self.how]:
            found.append(f"noticed after {self.detected_s:.2f} s")
        if self.serving_s - self.load_s - DETECT_S[self.how] > SERVING_AGAIN_S:
            found.append(f"serving again after {self.serving_s:.2f} s, load {self.load_s:.2f} s")
        if self.victim.startswith("rank") and self.num_whole < NUM_STREAMS:
            found.append(f"{NUM_STREAMS - self.num_whole} streams were not whole")
        for name in ("num_hung", "num_different", "orphans", "shared_memory"):
            if getattr(self, name):
                found.append(f"{name}: {getattr(self, name)}")
        if any(address not in ("127.0.0.1", "::1") for address, _ in self.listeners):
            found.append(f"listens on {self.listeners}")
        return found

    def line(self) -> str:
        how = "killed" if self.how == signal.SIGKILL else "frozen"
        return (
            f"{self.num_ranks} ranks, {self.victim} {how}: noticed {self.detected_s:.2f} s, "
            f"serving {self.serving_s:.2f} s (load {self.load_s:.2f} s), whole {self.num_whole}, "
            f"cut {self.num_cut}, hung {self.num_hung}, different {self.num_different}"
            + "".join(f"; {fault.upper()}" for fault in self.faults)
        )


def bodies(chance: random.Random, num_tokens: int) -> list[dict[str, Any]]:
    """Make requests that are sampled, without a seed."""
    return [
        {
            "prompt": [chance.randrange(2, 6000) for _ in range(chance.randint(2, 24))],
            "max_tokens": num_tokens,
            "temperature": 0.8,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        for _ in range(NUM_STREAMS)
    ]


async def strike(
    server: Served, victim: str, how: signal.Signals, num_ranks: int, chance: random.Random
) -> Kill:
    """Kill or freeze a process of a server with 16 streams; return what came of it."""
    kill = Kill(victim, how, num_ranks, load_s=server.start_s)
    before, memory = server.processes(), shared_memory()
    streams = [Stream(body) for body in bodies(chance, 330 if num_ranks == 1 else 100)]
    tasks = [asyncio.create_task(run_stream(server.port, s, _ALL_HUNG_S)) for s in streams]
    wanted = chance.randint(2, 60)
    while min(len(s.token_ids) for s in streams) < wanted:
        await asyncio.sleep(0.002)
        assert not any(s.has_ended for s in streams), [s.error for s in streams]
    begun_s = time.monotonic()
    os.kill(before[victim], how)
    kill.detected_s = await _until_noticed(server, victim, before, streams, begun_s)
    if victim == "supervisor" and how == signal.SIGSTOP:
        await asyncio.gather(*tasks)
        os.kill(before[victim], signal.SIGCONT)
        begun_s = time.monotonic() - DETECT_S[how]  # it may serve again from now on
    await asyncio.gather(*tasks)
    if victim == "supervisor" and how == signal.SIGKILL:
        server.process.wait()
        kill.orphans = wait_until_gone(list(before.values()), 5.0)
        kill.shared_memory = shared_memory() - memory
    else:
        await asyncio.to_thread(server.wait_until_ready)
        kill.serving_s = time.monotonic() - begun_s
        after = server.processes()
        lost = [pid for pid in before.values() if pid not in after.values()]
        kill.orphans = wait_until_gone(lost, 5.0)
        kill.listeners = server.listeners()
        kill.shared_memory = shared_memory() - memory
        await asyncio.to_thread(_compare, server, streams, kill)
    kill.num_whole = sum(s.is_whole and s.error is None for s in streams)
    kill.num_hung = sum((s.error or "").startswith("hung") for s in streams)
    kill.num_cut = NUM_STREAMS - kill.num_whole - kill.num_hung
    return kill


async def _until_noticed(
    server: Served, victim: str, before: dict[str, int], streams: Sequence[Stream], begun_s: float
) -> float:
    """Return after how long the rest of the server acted as if the victim were gone."""
    while time.monotonic() - begun_s < 3 * SILENT_AFTER_S:
        if victim.startswith("rank"):
            is_noticed = (await asyncio.to_thread(server.get, "/ready"))[0] != 200
        elif victim == "front end":
            is_noticed = server.processes().get(victim, before[victim]) != before[victim]
        else:
            is_noticed = any(s.has_ended for s in streams)
        if is_noticed:
            return time.monotonic() - begun_s
        await asyncio.sleep(0.005)
    return time.monotonic() - begun_s


def _compare(server: Served, streams: Sequence[Stream], kill: Kill) -> None:
    """Run each stream again with the seed it reported: what it gave must be the begin of that."""

    def is_same(stream: Stream) -> bool:
        body = {**stream.body, "stream": False, "seed": stream.seed}
        status, answer = server.post("/v1/completions", body)
        whole = answer["choices"][0] if status == 200 else {"token_ids": [], "text": ""}
        tokens = whole["token_ids"]
        if stream.is_whole:
            return bool(stream.token_ids == tokens and stream.text == whole["text"])
        return bool(stream.token_ids == tokens[: len(stream.token_ids)])

    told = [stream for stream in streams if stream.seed is not None and stream.token_ids]
    with ThreadPoolExecutor(len(streams)) as pool:
        kill.num_different += sum(not same for same in pool.map(is_same, told))


def plan(num_ranks: int) -> list[tuple[str, signal.Signals]]:
    """Return each process of a server, killed and frozen; who takes the server along comes last."""
    victims = [*(f"rank {rank}" for rank in range(num_ranks)), "front end", "supervisor"]
    found = [(v, how) for v in victims for how in (signal.SIGSTOP, signal.SIGKILL)]
    return sorted(found, key=lambda one: one == ("supervisor", signal.SIGKILL))


def run(num_ranks: int, chance: random.Random, cases: Sequence[tuple[str, Any]]) -> list[Kill]:
    """Strike one server again and again, and print what came of it."""
    found = []
    with served("--ep", str(num_ranks), *FLAGS) as server:
        for victim, how in cases:
            kill = asyncio.run(strike(server, victim, how, num_ranks, chance))
            print(kill.line(), flush=True)
            found.append(kill)
    return found


def rows_of(kills: Sequence[Kill]) -> list[results.Row]:
    """Return the figures of many kills."""
    rows = []
    for how, name in ((signal.SIGKILL, "killed"), (signal.SIGSTOP, "frozen")):
        of_kind = [kill for kill in kills if kill.how == how]
        if of_kind:
            noticed = [kill.detected_s for kill in of_kind]
            rows.append(results.Row.of(f"{name}: noticed", noticed, "s", limit=DETECT_S[how]))
            again = [
                kill.serving_s - kill.load_s for kill in of_kind if kill.victim.startswith("rank")
            ]
            limit = DETECT_S[how] + SERVING_AGAIN_S
            if again:
                rows.append(
                    results.Row.of(f"{name}: serving again beyond load", again, "s", limit=limit)
                )
    totals = {
        "kills": len(kills),
        "streams": NUM_STREAMS * len(kills),
        "streams of killed ranks": sum(
            NUM_STREAMS for kill in kills if kill.victim.startswith("rank")
        ),
        "of these whole": sum(k.num_whole for k in kills if k.victim.startswith("rank")),
        "different from an undisturbed run": sum(kill.num_different for kill in kills),
        "clients hung": sum(kill.num_hung for kill in kills),
        "orphans": sum(len(kill.orphans) for kill in kills),
        "shared memory left": sum(len(kill.shared_memory) for kill in kills),
        "kills with a fault": sum(bool(kill.faults) for kill in kills),
    }
    rows += [results.Row.of(name, [value], "count") for name, value in totals.items()]
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--ranks", default="1,2,4")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    chance = random.Random(given.seed)
    kills: list[Kill] = []
    for _ in range(given.rounds):
        for num_ranks in map(int, given.ranks.split(",")):
            kills += run(num_ranks, chance, plan(num_ranks))
    rows = rows_of(kills)
    for row in rows:
        print(f"{row.name}: {row.median:g} ({row.min:g} to {row.max:g}) {row.unit}")
    if given.save:
        command = results.recorded_command("benchmarks.serving.kills", sys.argv[1:])
        print(results.write_results("serving-kills", rows, command=command))
    return int(any(kill.faults for kill in kills))


if __name__ == "__main__":
    sys.exit(main())
