"""What GET /live takes while the server tokenises prompts that are far too long.

Hypothesis: under 100 ms at the 99th percentile, with 16 such prompts posted all the time. Each is
refused in the end (it has more tokens than the model's context), and only that.

    python -m benchmarks.serving.live --samples 200 --save
"""

from __future__ import annotations

import argparse
import asyncio
import random
import socket
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks import results
from benchmarks.serving.exchanges import ask
from benchmarks.serving.report import report
from benchmarks.serving.served import Served, served

NUM_PROMPTS = 16
NUM_TOKENS = 64 * 2**10
MOST_S = 0.1
FLAGS = ("--stats-interval", "0")
_REQUEST = b"GET /live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


@dataclass
class Live:
    """Seconds that each /live took, without and with prompts; statuses: of the prompts' answers."""

    alone_s: list[float] = field(default_factory=list)
    busy_s: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)

    @property
    def faults(self) -> list[str]:
        found = []
        if p99(self.busy_s) > MOST_S:
            found.append(f"/live took {1e3 * p99(self.busy_s):.0f} ms at the 99th percentile")
        if set(self.statuses) != {400}:
            found.append(f"answers to prompts that are too long: {dict(self.statuses)}")
        return found


def p99(samples: Sequence[float]) -> float:
    return statistics.quantiles(samples, n=100)[98]


def live_s(port: int) -> float:
    """Return how long one /live on a new connection takes. Raises OSError, AssertionError."""
    begun_s = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=30) as sock:
        sock.sendall(_REQUEST)
        first = sock.recv(2**12)
    assert first.startswith(b"HTTP/1.1 200"), first
    return time.monotonic() - begun_s


def sample(port: int, count: int) -> list[float]:
    """Return how long each of `count` took, with pauses between them."""
    found = []
    for _ in range(count):
        found.append(live_s(port))
        time.sleep(0.01)
    return found


def text(chance: random.Random, num_tokens: int = NUM_TOKENS) -> str:
    """Return a text of about so many tokens: words that no cache of words knows."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return " ".join(
        "".join(chance.choices(letters, k=chance.randint(3, 9))) for _ in range(num_tokens // 3)
    )


async def _post(port: int, prompts: Sequence[str], is_over: threading.Event, found: Live) -> None:
    async def again_and_again(prompt: str) -> None:
        while not is_over.is_set():
            status, _ = await ask(port, "/v1/completions", {"prompt": prompt, "max_tokens": 1})
            found.statuses[status] += 1

    await asyncio.gather(*(again_and_again(prompt) for prompt in prompts))


def run(server: Served, num_samples: int, chance: random.Random) -> Live:
    """Measure /live without and with prompts that are too long."""
    found = Live()
    prompts = [text(chance) for _ in range(NUM_PROMPTS)]
    found.alone_s = sample(server.port, num_samples)
    is_over = threading.Event()
    posting = threading.Thread(
        target=lambda: asyncio.run(_post(server.port, prompts, is_over, found))
    )
    posting.start()
    try:
        time.sleep(0.2)
        found.busy_s = sample(server.port, num_samples)
    finally:
        is_over.set()
        posting.join()
    return found


def rows_of(found: Live) -> list[results.Row]:
    """Return the figures."""
    rows = []
    for name, samples in (("alone", found.alone_s), ("beside long prompts", found.busy_s)):
        limit = 1e3 * MOST_S if samples is found.busy_s else None
        rows.append(results.Row.of(f"/live {name}, p99", [1e3 * p99(samples)], "ms", limit=limit))
        rows.append(results.Row.of(f"/live {name}", [1e3 * one for one in samples], "ms"))
    rows.append(results.Row.of("long prompts refused", [found.statuses[400]], "count"))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    with served(*FLAGS) as server:
        found = run(server, given.samples, random.Random(given.seed))
    return report("live", rows_of(found), found.faults, is_saved=given.save)


if __name__ == "__main__":
    sys.exit(main())
