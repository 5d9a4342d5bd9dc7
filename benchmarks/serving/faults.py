"""Faults in the code of a server under load: which requests they end, and what becomes of the rest.

Hypothesis: an exception, or a NaN, ends the requests of the step, or the one request, that it is
of, with an error that says so. All others get the tokens of an undisturbed run, and so does the
next one; no process ends but a rank whose books may be wrong, and then no request does.

    python -m benchmarks.serving.faults --count 100 --save

How faults come into processes: `tests/serving/faulty`, which is in no package.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.serving.served import Served, served
from benchmarks.serving.streams import Stream, run_stream

SHIM = results.ROOT / "tests" / "serving" / "faulty"
TEMPLATE = Path(__file__).with_name("chat.jinja")
NUM_TOKENS = 24
TEXT = "Once upon a time, there was"
# what a step may fail of by itself, and what only a mistake of ours can be
OF_STEPS = ("RuntimeError", "MemoryError", "ArithmeticError", "ValueError")
OF_OURS = ("AssertionError", "KeyError")
EXCEPTIONS = (*OF_STEPS, *OF_OURS)
OF_TEXTS = ("tokenise", "template", "detokenise", "answer", "event")
# how many calls of a site there are before the one that fails, at most
MOST_SKIPPED = {
    "forward": 20, "hidden": 20, "dispatch": 100, "combine": 100, "experts": 100, "logits": 20,
    "kv": 4, "add": 5, "read": 100, "copy": 100, "tokenise": 1, "detokenise": 80, "event": 30,
    "host-says": 10, "front-says": 4,
}  # fmt: skip
SETUPS: dict[str, tuple[str, ...]] = {
    "offloaded": ("--expert-cache-slots", "6", "--prefetch", "off", "--no-fused"),
    "over a link": (
        *("--expert-cache-slots", "6", "--prefetch", "off", "--no-fused"),
        *("--emulate-link", "4"),
    ),
    "2 ranks": ("--ep", "2", "--dispatcher", "static"),
}
SITES = {
    "offloaded": (
        "forward", "hidden", "experts", "logits", "kv", "add", "read", *OF_TEXTS,
        "host-says", "front-says",
    ),
    "over a link": ("copy",),
    "2 ranks": ("forward", "hidden", "dispatch", "combine", "experts", "logits", "kv", "add"),
}  # fmt: skip
_FLAGS = ("--max-worlds", "1000", "--stats-interval", "0", "--threads", "1")
_REACHED_S, _COUNTED_S = 0.2, 5.0


@dataclass(frozen=True)
class Fault:
    """What goes wrong, and where."""

    setup: str
    site: str
    kind: str

    @property
    def ends(self) -> str:
        """Whom it ends: "one", "step" (one or more), "any" (none or more), "none", "all" (may)."""
        if self.site in ("host-says", "front-says"):
            return "all"
        if self.kind == "NaN" or self.site == "add" or self.site in OF_TEXTS:
            return "one"
        if self.site in ("combine", "kv") or self.kind in OF_OURS:
            return "none"
        # of ranks, one may have no tokens of its own in the step
        return "any" if self.setup == "2 ranks" and self.site in ("dispatch", "experts") else "step"

    @property
    def lost(self) -> str:
        """Which processes end: "ranks", "front end", "" for none, "maybe ranks"."""
        if self.ends == "all":
            return "front end"
        if self.ends == "none":
            return "ranks"
        return "maybe ranks" if self.site == "dispatch" else ""


@dataclass
class Answer:
    """What came of one request. error: of its body or its last event; None: it is whole."""

    status: int
    text: str
    token_ids: Sequence[int]
    error: str | None


@dataclass
class Outcome:
    """What came of one fault. problems: what was not as it must be."""

    fault: Fault
    num_ended: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)

    def line(self) -> str:
        told = "; ".join(f"{count} x {error[:90]}" for error, count in self.errors.items())
        return (
            f"{self.fault.setup}, {self.fault.site}, {self.fault.kind}: ended {self.num_ended}"
            + (f" ({told})" if told else "")
            + "".join(f"; {problem.upper()}" for problem in self.problems)
        )


class Subject:
    """A server in whose processes faults can be had, and what it answers undisturbed."""

    def __init__(self, server: Served, folder: Path, setup: str) -> None:
        self.server = server
        self.setup = setup
        self._folder = folder
        self._asked = _requests()
        self.expected = asyncio.run(self.answers())
        assert all(answer.error is None for answer in self.expected), self.expected

    def arm(self, site: str, kind: str, **when: Any) -> None:
        """Have a call of a site fail. when: `skip` calls before it, or `prompt`, a first token."""
        path = self._folder / f"{site}.new"
        path.write_text(json.dumps({"kind": kind, "at": time.monotonic(), **when}))
        path.rename(self._folder / site)

    def disarm(self, site: str) -> bool:
        """Have no call of a site fail any more; return whether one did."""
        (self._folder / site).unlink(missing_ok=True)
        done = self._folder / f"{site}.done"
        has_failed = done.exists()
        done.unlink(missing_ok=True)
        return has_failed

    async def answers(self) -> list[Answer]:
        """Ask for all at once; return the answers."""
        asking = [self._ask(path, body) for path, body in self._asked]
        return list(await asyncio.gather(*asking))

    def next_is_as_expected(self) -> bool:
        """Ask for the first again, alone."""
        return asyncio.run(self._ask(*self._asked[0])) == self.expected[0]

    async def _ask(self, path: str, body: dict[str, Any]) -> Answer:
        if body.get("stream"):
            stream = Stream(body)
            await run_stream(self.server.port, stream, 60.0)
            error = stream.error
            if error is not None and stream.status not in (0, 200):
                error = json.loads(error)["error"]["message"]
            return Answer(stream.status, stream.text, stream.token_ids, error)
        status, answer = await asyncio.to_thread(self.server.post, path, body)
        if status != 200:
            error = "connection" if answer is None else answer["error"]["message"]
            return Answer(status, "", (), error)
        choice = answer["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        return Answer(status, text, choice.get("token_ids") or (), None)

    # -- one fault ---------------------------------------------------------------------------------

    def strike(self, fault: Fault, skip: int) -> Outcome:
        """Have one call fail while requests run; return what came of it."""
        outcome = Outcome(fault)
        begun_s = time.monotonic()
        before = self.server.processes()
        while True:
            self.arm(fault.site, fault.kind, skip=skip)
            answers = asyncio.run(self.answers())
            if fault.lost == "front end":
                self.server.wait_until_ready()
                time.sleep(_REACHED_S)  # what a host says, it says also when nobody asks
            if self.disarm(fault.site):
                break
            skip //= 2  # there were not so many calls
        self._judge(outcome, answers)
        self.server.wait_until_ready()
        self._see_processes(outcome, before)
        if not self.next_is_as_expected():
            outcome.problems.append("the next request has other tokens")
        if not self._is_all_given_back():
            outcome.problems.append("KV blocks are held by nobody")
        self.server.read_log()  # or the pipe fills, and who writes to it waits
        outcome.seconds = time.monotonic() - begun_s
        return outcome

    def _judge(self, outcome: Outcome, answers: Sequence[Answer]) -> None:
        ends = outcome.fault.ends
        for answer, whole in zip(answers, self.expected, strict=True):
            if answer.error is None:
                if answer != whole:
                    outcome.problems.append("another request has other tokens")
                continue
            outcome.num_ended += 1
            outcome.errors[answer.error] += 1
            given = list(answer.token_ids)
            if given != list(whole.token_ids[: len(given)]):
                outcome.problems.append("what it was given before its end is other")
            if answer.error.startswith("hung"):
                outcome.problems.append("hung")
            if ends != "all" and answer.status not in (200, 500):
                outcome.problems.append(f"status {answer.status}")
            if ends != "all" and answer.error.startswith("connection"):
                outcome.problems.append("its connection was cut")
        num = outcome.num_ended
        is_right = {
            "one": num == 1, "step": num >= 1, "none": num == 0, "any": True, "all": True
        }[ends]  # fmt: skip
        if not is_right:
            outcome.problems.append(f"{num} were ended, not {ends}")

    def _see_processes(self, outcome: Outcome, before: dict[str, int]) -> None:
        after = self.server.processes()
        lost = {name for name in before if after.get(name) != before[name]}
        ranks = {name for name in before if name.startswith("rank")}
        wanted: dict[str, list[set[str]]] = {
            "ranks": [ranks],
            "front end": [{"front end"}],
            "": [set()],
        }
        if lost not in wanted.get(outcome.fault.lost, [set(), ranks]):
            outcome.problems.append(f"lost {sorted(lost)}")

    def _is_all_given_back(self) -> bool:
        end_s = time.monotonic() + _COUNTED_S
        while time.monotonic() < end_s:
            figures = self.server.metrics()
            if figures.get("kv_cache_usage_perc") == 0 == figures["num_requests_running"]:
                return True
            time.sleep(0.05)
        return False

    def poison(self, kind: str = "AssertionError") -> list[str]:
        """Ask for the usual, and for what every step fails of; return what was not as it must be.

        Such a request ends with an error, after the ranks were lost three times; no other does.
        """
        token = 5000
        guilty = {**_BODY, "prompt": [token, 7, 8], "seed": 1}
        self.arm("forward", kind, prompt=token)

        async def both() -> tuple[Answer, list[Answer]]:
            others = asyncio.create_task(self.answers())
            return await self._ask("/v1/completions", guilty), await others

        try:
            answer, others = asyncio.run(both())
        finally:
            self.disarm("forward")
        problems = []
        if answer.status not in (200, 500) or "lost 3 times" not in (answer.error or ""):
            problems.append(f"the guilty one: {answer}")
        if others != self.expected:
            problems.append("another request has other tokens")
        if not self.next_is_as_expected():
            problems.append("the next request has other tokens")
        return problems


_BODY = {
    "max_tokens": NUM_TOKENS,
    "temperature": 0.8,
    "ignore_eos": True,
    "return_token_ids": True,
}


def _requests() -> list[tuple[str, dict[str, Any]]]:
    """Return what is asked for at once: four streams, an answer of text, one of a chat."""
    chance = random.Random(5)
    asked: list[tuple[str, dict[str, Any]]] = []
    for seed in range(4):
        prompt = [chance.randrange(2, 4000) for _ in range(chance.randint(3, 40))]
        body = {**_BODY, "prompt": prompt, "seed": seed, "stream": True}
        asked.append(("/v1/completions", body))
    asked.append(("/v1/completions", {**_BODY, "prompt": TEXT, "seed": 4}))
    messages = [{"role": "user", "content": TEXT}]
    asked.append(("/v1/chat/completions", {**_BODY, "messages": messages, "seed": 5}))
    return asked


@contextlib.contextmanager
def subject(setup: str, *flags: str) -> Iterator[Subject]:
    """Give a server in which faults can be had, and end it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = {"PYTHONPATH": str(SHIM), "FAULTS_FOLDER": name}
        given = [*SETUPS[setup], "--chat-template", str(TEMPLATE), *_FLAGS, *flags]
        if setup != "2 ranks":
            given += ["--expert-store", str(folder / "store")]
        with served(*given, environment=environment) as server:
            yield Subject(server, folder, setup)


def plan(setup: str, count: int, chance: random.Random) -> list[Fault]:
    """Return so many faults of a setup: each site and kind in turns."""
    all_: list[Fault] = []
    for site in SITES[setup]:
        kinds: tuple[str, ...] = EXCEPTIONS
        if site.endswith("-says"):
            kinds = ("garbage",)
        elif site == "hidden":
            kinds = ("NaN",)
        elif site == "logits":
            kinds = (*EXCEPTIONS, "NaN")
        all_ += [Fault(setup, site, kind) for kind in kinds]
    chance.shuffle(all_)
    rounds = -(-count // len(all_))
    return (all_ * rounds)[:count]


def run(setup: str, count: int, chance: random.Random) -> list[Outcome]:
    """Strike one server so often, and print what came of it."""
    found = []
    with subject(setup) as target:
        for fault in plan(setup, count, chance):
            outcome = target.strike(fault, chance.randint(0, MOST_SKIPPED.get(fault.site, 0)))
            print(outcome.line(), flush=True)
            found.append(outcome)
    return found


def rows_of(outcomes: Sequence[Outcome]) -> list[results.Row]:
    """Return the figures of many faults."""
    count = len(outcomes)
    totals: dict[str, float] = {
        "faults": count,
        "requests": count * len(_requests()),
        "requests ended": sum(outcome.num_ended for outcome in outcomes),
        "faults with a problem": sum(bool(outcome.problems) for outcome in outcomes),
    }
    for lost in ("ranks", "front end"):
        totals[f"faults that end {lost}"] = sum(outcome.fault.lost == lost for outcome in outcomes)
    return [results.Row.of(name, [value], "count") for name, value in totals.items()]


def table(outcomes: Sequence[Outcome]) -> str:
    """Return a line for each setup and site: faults, what they ended, problems."""
    lines = [f"{'setup':12} {'site':11} {'faults':>6} {'ended':>6} {'problems':>8}"]
    sites = sorted({(outcome.fault.setup, outcome.fault.site) for outcome in outcomes})
    for setup, site in sites:
        of_site = [o for o in outcomes if (o.fault.setup, o.fault.site) == (setup, site)]
        ended = sum(outcome.num_ended for outcome in of_site)
        problems = sum(bool(outcome.problems) for outcome in of_site)
        lines.append(f"{setup:12} {site:11} {len(of_site):6} {ended:6} {problems:8}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    chance = random.Random(given.seed)
    num_sites = {setup: len(sites) for setup, sites in SITES.items()}
    outcomes: list[Outcome] = []
    for setup, weight in num_sites.items():
        share = round(given.count * weight / sum(num_sites.values()))
        outcomes += run(setup, max(1, share), chance)
    with subject("2 ranks") as target:
        problems = target.poison()
        print("a request that ends every step:", problems or "it alone was ended")
    print(table(outcomes))
    rows = rows_of(outcomes)
    for row in rows:
        print(f"{row.name}: {row.value:g}")
    if given.save:
        command = results.recorded_command("benchmarks.serving.faults", sys.argv[1:])
        print(results.write_results("serving-faults", rows, command=command))
    return int(bool(problems) or any(outcome.problems for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
