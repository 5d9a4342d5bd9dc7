"""Requests that are wrong, hostile or merely odd, sent to a server that also has an honest client.

Hypothesis: whatever is sent, the answer is what the API says (no 5xx but 503 and 504 that say when
to come again), an error is no longer than the request and 4 KB, no process ends, and the honest
client's tokens stay the same. Schemathesis makes bodies from the server's own document, right and
wrong ones, with NUL; besides, all curated bodies, bytes and grammars of the tests are sent.

    python -m benchmarks.serving.bad_inputs --count 20000 --save
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import multiprocessing
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from benchmarks import results
from benchmarks.serving.idle import use_of, wait_until_idle
from benchmarks.serving.report import report
from benchmarks.serving.served import CHAT_FLAGS, Served, served
from benchmarks.serving.streams import Stream, run_stream

NUM_WORKERS = 4
MOST_BEYOND_BYTES = 4096
# an answer of the embedded model takes less; grammars may take their ten seconds, and wait for it
MOST_S = 60.0
RETRIED = (503, 504)
HONEST = {
    "prompt": [5, 17, 260, 99],
    "max_tokens": 40,
    "temperature": 0.8,
    "seed": 7,
    "ignore_eos": True,
    "stream": True,
    "return_token_ids": True,
}
# routes and how many of the tries they get; those that are given nothing get few
WEIGHTS = {
    "POST /v1/completions": 10, "POST /v1/chat/completions": 10, "POST /tokenize": 5,
    "POST /detokenize": 5, "POST /v1/abort": 3, "GET /v1/models": 0.2,
    "GET /v1/models/{model}": 1, "GET /live": 0.2, "GET /ready": 0.2, "GET /health": 0.2,
    "GET /version": 0.2,
}  # fmt: skip


@dataclass
class Tries:
    """What came of some tries. statuses: by what was sent and the answer's status."""

    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    slowest_s: float = 0.0

    def note(
        self, sent: str, status: int, retry_after: str | None, num_sent: int, body: bytes, s: float
    ) -> None:
        """Judge one answer. status 0: there was none."""
        self.statuses[sent, status] += 1
        self.slowest_s = max(self.slowest_s, s)
        why = None
        if status == 0:
            why = "no answer"
        elif status >= 500 and not (status in RETRIED and retry_after):
            why = f"{status}, Retry-After {retry_after}"
        elif status >= 400 and len(body) > num_sent + MOST_BEYOND_BYTES:
            why = f"{status} of {len(body)} bytes to {num_sent}"
        elif s > MOST_S:
            why = f"{status} after {s:.0f} s"
        if why is not None:
            self.faults.append(f"{sent}: {why}: {body[:200]!r}")

    def add(self, other: Tries) -> None:
        self.statuses.update(other.statuses)
        self.faults += other.faults
        self.slowest_s = max(self.slowest_s, other.slowest_s)


# -- what is sent ----------------------------------------------------------------------------------


def curated() -> Iterator[tuple[str, str, bytes]]:
    """Yield (kind, path, body) of what the tests have: each is known to be hard, or wrong."""
    from tests.engine.hard_grammars import HARD
    from tests.server.test_bodies import BAD_BYTES, cases

    for case in cases():
        path, body, _ = case.values
        yield "curated body", path, json.dumps(body).encode()
    for _, data, _ in BAD_BYTES:
        yield "curated bytes", "/v1/completions", data
    for kind, text, _ in HARD:
        body = {"prompt": "a", "max_tokens": 4, "structured_outputs": {kind: text}}
        yield "hard grammar", "/v1/completions", json.dumps(body).encode()


def send_curated(url: str) -> Tries:
    found = Tries()
    for kind, path, data in curated():
        request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
        begun_s, status, retry_after, body = time.monotonic(), 0, None, b""
        try:
            with urllib.request.urlopen(request, timeout=2 * MOST_S) as answer:
                status, body = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, body = error.code, error.read()
            retry_after = error.headers.get("Retry-After")
        except OSError as error:
            body = str(error).encode()
        found.note(kind, status, retry_after, len(data), body, time.monotonic() - begun_s)
    return found


def send_made(work: tuple[str, str, str, int, int]) -> Tries:
    """Send `count` requests that schemathesis makes for a route. work: url, route, mode, count."""
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, seed, settings
    from schemathesis import GenerationMode

    url, route, mode_name, count, number = work
    mode = GenerationMode[mode_name]
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    schema.config.generation.update(modes=[mode], allow_x00=True)
    method, path = route.split(" ")
    found = Tries()

    @seed(number)
    @settings(
        max_examples=count,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(case=schema[path][method].as_strategy(generation_mode=mode))
    def send(case: object) -> None:
        begun_s = time.monotonic()
        try:
            answer = case.call(timeout=2 * MOST_S)  # type: ignore[attr-defined]
        except OSError as error:  # as those of `requests` are
            found.note(f"{route}, {mode_name.lower()}", 0, None, 0, str(error).encode(), 0.0)
            return
        sent = answer.request.body or b""
        retry_after = answer.headers.get("retry-after", [None])[0]
        taken_s = time.monotonic() - begun_s
        name = f"{route}, {mode_name.lower()}"
        found.note(name, answer.status_code, retry_after, len(sent), answer.content, taken_s)

    send()
    return found


def plan(url: str, count: int) -> list[tuple[str, str, str, int, int]]:
    """Return the work that comes to about so many tries, in pieces for several processes."""
    parts = [
        (route, mode, weight)
        for route, weight in WEIGHTS.items()
        for mode in ("POSITIVE", "NEGATIVE")
        if mode == "POSITIVE" or route.startswith("POST")
    ]
    total = sum(weight for _, _, weight in parts)
    work: list[tuple[str, str, str, int, int]] = []
    for route, mode, weight in parts:
        left = math.ceil(count * weight / total)
        while left > 0:
            piece = min(left, 500)
            work.append((url, route, mode, piece, len(work)))
            left -= piece
    return work


# -- the honest client -----------------------------------------------------------------------------


class HonestClient:
    """Streams the same completion again and again, from a thread, and compares."""

    def __init__(self, server: Served) -> None:
        self._server = server
        self._expected = self._tokens()
        self._is_over = threading.Event()
        self.num_streams = self.num_different = 0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        self._is_over.set()
        self._thread.join()

    def _tokens(self) -> tuple[list[int], str | None]:
        stream = Stream(dict(HONEST))
        asyncio.run(run_stream(self._server.port, stream, MOST_S))
        return stream.token_ids, stream.error

    def _run(self) -> None:
        while not self._is_over.wait(0.2):
            self.num_streams += 1
            self.num_different += self._tokens() != self._expected


# -- all of it -------------------------------------------------------------------------------------


@dataclass
class BadInputs:
    tries: Tries
    num_honest: int
    num_different: int
    grown_bytes: dict[str, int]
    faults: list[str]


def run(
    server: Served, count: int, num_workers: int = NUM_WORKERS, *, has_curated: bool = True
) -> BadInputs:
    """Send about `count` requests, and the curated ones, some of which take their 10 s each."""
    before, uses = server.processes(), use_of(server)
    honest = HonestClient(server)
    tries = Tries()
    try:
        with multiprocessing.get_context("spawn").Pool(num_workers) as pool:
            first = pool.apply_async(send_curated, (server.url,)) if has_curated else None
            for done, found in enumerate(
                pool.imap_unordered(send_made, plan(server.url, count)), start=1
            ):
                tries.add(found)
                if done % 10 == 0:
                    print(f"  {sum(tries.statuses.values())} tries", flush=True)
            if first is not None:
                tries.add(first.get())
    finally:
        honest.stop()
    wait_until_idle(server)
    faults = list(tries.faults)
    after = server.processes()
    lost = [name for name, pid in before.items() if after.get(name) != pid]
    # a compiler of grammars that takes too long is ended, and another one is started
    faults += [f"{name} was lost" for name in lost if "grammar_compiler" not in name]
    if honest.num_different:
        faults.append(f"{honest.num_different} honest streams were different")
    grown = {
        name: use.own_bytes - uses[name].own_bytes
        for name, use in use_of(server).items()
        if name in uses and name not in lost
    }
    return BadInputs(tries, honest.num_streams, honest.num_different, grown, faults)


def rows_of(found: BadInputs) -> list[results.Row]:
    """Return the figures."""
    row = results.Row.of
    statuses: Counter[int] = Counter()
    kinds: Counter[str] = Counter()
    for (kind, status), num in found.tries.statuses.items():
        statuses[status] += num
        kinds[kind] += num
    rows = [row("tries", [sum(statuses.values())], "count")]
    rows += [row(f"tries: {kind}", [num], "count") for kind, num in sorted(kinds.items())]
    rows += [row(f"answers: {status}", [num], "count") for status, num in sorted(statuses.items())]
    return [
        *rows,
        row("answers that should not be", [len(found.tries.faults)], "count", limit=0),
        row("slowest answer", [found.tries.slowest_s], "s", limit=MOST_S),
        row("honest streams beside", [found.num_honest], "count"),
        row("of these different", [found.num_different], "count", limit=0),
        *(
            row(f"{name}: memory grown", [n / 2**20], "MiB")
            for name, n in found.grown_bytes.items()
        ),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=NUM_WORKERS)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args(arguments)
    with served("--stats-interval", "0", *CHAT_FLAGS) as server:
        found = run(server, given.count, given.workers)
    for (kind, status), num in sorted(found.tries.statuses.items()):
        print(f"  {kind}: {status}: {num}")
    return report("bad_inputs", rows_of(found), found.faults, is_saved=given.save)


if __name__ == "__main__":
    sys.exit(main())
