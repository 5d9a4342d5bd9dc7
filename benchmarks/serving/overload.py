"""A server that is asked for three times what it can do: what becomes of those it does serve.

Hypothesis: what cannot be served soon is refused at once with a 503 that says when to come again,
so that at three times the rate of the knee (the first at which p99 TTFT exceeds its goal, or more
than a hundredth is refused) at least four fifths of the best goodput are left. Nothing fails
otherwise, the queue keeps its cap, and memory does not grow.

    python -m benchmarks.serving.overload --seconds 120 --save
    python -m benchmarks.serving.overload --seconds 8 --step-seconds 6 --flags "--max-num-seqs 32"

Goodput counts answers that ended in full within the measured part of a run (all but its first
third, while places fill) and whose first token came within --goal seconds of when they were due.
The client is `moe-serve bench serve` in a process of its own, on the same cores as the server: at
three times the knee it takes time from the server too.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks import results
from benchmarks.serving.served import Served, served

FACTOR = 3.0
LEAST_SHARE = 0.8
MOST_REFUSED_SHARE = 0.01
# of a run: places of sequences fill, and no request has ended yet
_WARM_SHARE = 1 / 3
_STEP_FACTOR = 1.3
_MOST_STEPS = 20
_MOST_GROWTH_MB = 32.0
_SAMPLE_S = 0.25


@dataclass(frozen=True)
class Load:
    """One run at a rate (requests/s) for so many seconds; lengths in tokens, goal_s of TTFT."""

    rate: float
    seconds: float
    input_len: int
    output_len: int
    goal_s: float
    seed: int

    def command(self, url: str, requests_file: Path) -> list[str]:
        options = {
            "--base-url": url,
            "--request-rate": self.rate,
            "--duration": self.seconds,
            "--input-len": self.input_len,
            "--output-len": self.output_len,
            "--range-ratio": 0.25,
            "--vocab-size": 6000,
            "--seed": self.seed,
            "--save-requests": requests_file,
        }
        flags = [str(part) for pair in options.items() for part in pair]
        return [sys.executable, "-m", "moe_serve", "bench", "serve", "--ignore-eos", "--json",
                *flags]  # fmt: skip


@dataclass
class Outcome:
    """What came of a load. Times in seconds, memory in MiB, of the server's processes together.

    goodput: good answers a second. front_share, client_share: of one core.
    """

    load: Load
    goodput: float
    served_per_s: float
    ttft_s: list[float]
    failures: Counter[str]
    num_requests: int
    num_without_retry: int
    client_share: float
    most_queued: float = 0.0
    rss_mb: list[float] = field(default_factory=list)
    front_share: float = 0.0

    @property
    def p99_s(self) -> float:
        return sorted(self.ttft_s)[int(0.99 * (len(self.ttft_s) - 1))] if self.ttft_s else 0.0

    @property
    def refused_share(self) -> float:
        return self.failures["http 503"] / max(1, self.num_requests)

    @property
    def is_beyond_knee(self) -> bool:
        return self.p99_s > self.load.goal_s or self.refused_share > MOST_REFUSED_SHARE

    @property
    def num_failed_otherwise(self) -> int:
        return sum(self.failures.values()) - self.failures["http 503"]

    @property
    def growth_mb(self) -> float:
        """How much more memory its last third took, at most, than the third before it."""
        third = len(self.rss_mb) // 3
        return max(self.rss_mb[2 * third :]) - max(self.rss_mb[third : 2 * third] or [0.0])

    def line(self) -> str:
        return (
            f"{self.load.rate:6.1f}/s for {self.load.seconds:g} s: goodput {self.goodput:.2f}/s, "
            f"served {self.served_per_s:.2f}/s, p99 TTFT {self.p99_s:.2f} s, "
            f"refused {self.refused_share:.1%}, other failures {self.num_failed_otherwise}, "
            f"queue {self.most_queued:.0f}, front end {self.front_share:.0%}, "
            f"client {self.client_share:.0%} of a core"
        )


class Watch:
    """Samples a server's queue and memory, in a thread, from `with` to its end."""

    def __init__(self, server: Served) -> None:
        self.most_queued = 0.0
        self.rss_mb: list[float] = []
        self.front_share = 0.0
        self._server = server
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        found = self._server.processes()
        processes = [psutil.Process(pid) for pid in found.values()]
        front = psutil.Process(found["front end"])
        begun_s, cpu_s = time.monotonic(), _cpu_s(front)
        while not self._is_over.wait(_SAMPLE_S):
            queued = self._server.metrics().get("num_requests_waiting", 0.0)
            self.most_queued = max(self.most_queued, queued)
            self.rss_mb.append(sum(p.memory_info().rss for p in processes) / 2**20)
        self.front_share = (_cpu_s(front) - cpu_s) / (time.monotonic() - begun_s)


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def measure(server: Served, load: Load) -> Outcome:
    """Put a load on a server; return what came of it."""
    with tempfile.TemporaryDirectory() as folder, Watch(server) as watch:
        file = Path(folder, "requests.jsonl")
        done = subprocess.run(load.command(server.url, file), capture_output=True, text=True)
        if not file.exists():
            raise RuntimeError(f"the client failed: {done.stderr}")
        records = [json.loads(line) for line in file.read_text().splitlines()]
        report = json.loads(done.stdout)
    outcome = outcome_of(load, records, report["client_cpu_share"])
    outcome.most_queued, outcome.rss_mb = watch.most_queued, watch.rss_mb
    outcome.front_share = watch.front_share
    return outcome


def outcome_of(load: Load, records: Sequence[dict[str, Any]], client_share: float) -> Outcome:
    """Return what the client's records say of a load."""
    begin_s = load.seconds * _WARM_SHARE
    done = [record for record in records if record["failure"] is None]
    ended = [record for record in done if begin_s <= record["end_s"] <= load.seconds]
    num_good = sum(record["ttft_s"] <= load.goal_s for record in ended)
    refused = [record for record in records if record["failure"] == "http 503"]
    return Outcome(
        load=load,
        goodput=num_good / (load.seconds - begin_s),
        served_per_s=len(ended) / (load.seconds - begin_s),
        ttft_s=[record["ttft_s"] for record in done],
        failures=Counter(r["failure"] for r in records if r["failure"] is not None),
        num_requests=len(records),
        num_without_retry=sum(record["retry_after"] is None for record in refused),
        client_share=client_share,
    )


def until_knee(server: Served, first: Load) -> list[Outcome]:
    """Step the rate up until the knee; return what came of each step, the knee last."""
    found = []
    rate = first.rate
    for step in range(_MOST_STEPS):
        load = Load(**{**vars(first), "rate": rate, "seed": first.seed + step})
        found.append(measure(server, load))
        print(found[-1].line(), flush=True)
        if found[-1].is_beyond_knee:
            return found
        rate *= _STEP_FACTOR
    raise RuntimeError(f"no knee up to {rate:.0f} requests a second")


def rows_of(steps: Sequence[Outcome], over: Outcome, most_queued: float) -> list[results.Row]:
    """Return the figures; each limit is the most, of the goodput at overload the least."""
    peak = max(step.goodput for step in steps)
    row = results.Row.of
    rows = [
        row("knee", [steps[-1].load.rate], "requests/s"),
        row("best goodput", [peak], "requests/s"),
        row("overload", [over.load.rate], "requests/s"),
        row(
            "goodput at overload, ratio to the best",
            [over.goodput],
            "requests/s",
            limit=LEAST_SHARE * peak,
            ratio=over.goodput / peak,
        ),
        row("TTFT of answers at overload", over.ttft_s, "s"),
        row("p99 TTFT of answers at overload", [over.p99_s], "s"),
        row("front end's share of a core at overload", [over.front_share], "cores"),
        row("client's share of a core at overload", [over.client_share], "cores"),
        row("queued at once", [over.most_queued], "count", limit=most_queued),
        row("memory's growth", [over.growth_mb], "MiB", limit=_MOST_GROWTH_MB),
    ]
    counts = {
        "requests at overload": over.num_requests,
        "refused with a 503": over.failures["http 503"],
        "of these without Retry-After": over.num_without_retry,
        "failed otherwise": over.num_failed_otherwise,
    }
    return rows + [row(name, [value], "count") for name, value in counts.items()]


def faults_of(steps: Sequence[Outcome], over: Outcome, most_queued: float) -> list[str]:
    """Return what was not as it must be."""
    peak = max(step.goodput for step in steps)
    found = []
    if over.goodput < LEAST_SHARE * peak:
        found.append(f"goodput {over.goodput:.2f}/s is {over.goodput / peak:.0%} of {peak:.2f}/s")
    if over.num_without_retry:
        found.append(f"{over.num_without_retry} 503 without Retry-After")
    if over.num_failed_otherwise:
        found.append(f"failures: {dict(over.failures)}")
    if over.most_queued > most_queued:
        found.append(f"{over.most_queued:.0f} queued, and {most_queued:.0f} may")
    if over.growth_mb > _MOST_GROWTH_MB:
        found.append(f"memory grew by {over.growth_mb:.0f} MiB")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0, help="of the overload")
    parser.add_argument("--step-seconds", type=float, default=30.0, help="of each step before it")
    parser.add_argument("--first-rate", type=float, default=10.0)
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--goal", type=float, default=2.0, help="seconds to the first token")
    parser.add_argument("--max-queue-requests", type=int, default=256)
    parser.add_argument("--flags", default="--max-queue-wait 1", help="more of the server")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    most_queued = given.max_queue_requests
    flags = ("--max-queue-requests", str(most_queued), *shlex.split(given.flags))
    load = Load(
        rate=given.first_rate,
        seconds=given.step_seconds,
        input_len=given.input_len,
        output_len=given.output_len,
        goal_s=given.goal,
        seed=given.seed,
    )
    with served("--stats-interval", "0", *flags) as server:
        steps = until_knee(server, load)
        more = {"rate": FACTOR * steps[-1].load.rate, "seconds": given.seconds}
        over = measure(server, Load(**{**vars(load), **more}))
        print(over.line(), flush=True)
    rows = rows_of(steps, over, most_queued)
    for row in rows:
        ratio = "" if row.ratio is None else f", ratio {row.ratio:.2f}"
        print(f"{row.name}: {row.median:.4g} ({row.min:.4g} to {row.max:.4g}) {row.unit}{ratio}")
    faults = faults_of(steps, over, most_queued)
    for fault in faults:
        print(f"FAULT: {fault}")
    if given.save:
        command = results.recorded_command("benchmarks.serving.overload", sys.argv[1:])
        print(results.write_results("serving-overload", rows, command=command))
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
