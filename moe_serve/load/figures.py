"""Figures of a run: rates, latencies and their tails, goodput, and what failed."""

from __future__ import annotations

import platform
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from moe_serve.errors import ConfigError, nearest
from moe_serve.figures import Row
from moe_serve.load.records import RequestRecord
from moe_serve.load.run import LoadRun

GOALS = ("ttft", "tpot", "e2e")
MAX_KINDS_SHOWN = 12
# of one core: above it the figures may be those of the instrument
BUSY_SHARE = 0.8
BUSY_AFTER_S = 1.0


@dataclass(frozen=True, slots=True)
class LoadRow(Row):
    """A figure; of latencies, in seconds, also the mean and the tail."""

    mean: float | None = None
    p90: float | None = None
    p99: float | None = None


def counted(name: str, value: float, unit: str) -> LoadRow:
    """Return what was counted once."""
    return LoadRow.of(name, [value], unit)


def latency(name: str, samples_s: Sequence[float]) -> LoadRow | None:
    """Summarise seconds; None without any."""
    if not samples_s:
        return None
    ordered = sorted(samples_s)
    return replace(
        LoadRow.of(name, ordered, "s"),
        mean=statistics.fmean(ordered),
        p90=percentile(ordered, 0.90),
        p99=percentile(ordered, 0.99),
    )


def percentile(ordered: Sequence[float], share: float) -> float:
    """Return the value below which `share` of sorted samples lie, interpolated."""
    place = (len(ordered) - 1) * share
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def read_goals(given: Sequence[str]) -> dict[str, float]:
    """Read "ttft:2000" (milliseconds) into seconds by name. Raises ConfigError."""
    goals: dict[str, float] = {}
    for text in given:
        name, colon, number = text.partition(":")
        if not colon or name not in GOALS:
            raise ConfigError(
                f"--goodput is {text!r}{'' if name in GOALS else nearest(name, GOALS)}; write "
                "ttft:MS, tpot:MS or e2e:MS"
            )
        if name in goals:
            raise ConfigError(f"--goodput names {name} twice")
        try:
            goals[name] = float(number) / 1000
        except ValueError:
            raise ConfigError(f"--goodput is {text!r}; {number!r} is no number") from None
        if not 0 < goals[name] < float("inf"):
            raise ConfigError(f"--goodput is {text!r}; the milliseconds must be above 0")
    return goals


def is_good(record: RequestRecord, goals: Mapping[str, float], from_sending: bool = False) -> bool:
    """Whether a request was answered within all goals; one token alone has no tpot to miss."""
    if not record.is_ok:
        return False
    taken = {
        "ttft": record.ttft_s(from_sending),
        "tpot": record.tpot_s,
        "e2e": record.e2e_s(from_sending),
    }
    return all((taken[name] or 0.0) <= limit_s for name, limit_s in goals.items())


def rows_of(run: LoadRun, goals: Mapping[str, float]) -> list[LoadRow]:
    """Return all figures. Latencies and tokens are of requests that were answered in full."""
    done = [record for record in run.records if record.is_ok]
    wall_s = max(run.wall_s, 1e-9)
    num_output = sum(record.output_tokens for record in done)
    num_input = sum(record.input_tokens or record.asked_input_tokens or 0 for record in done)
    rows: list[LoadRow | None] = [
        counted("requests", len(done) / wall_s, "requests/s"),
        counted("output", num_output / wall_s, "tokens/s"),
        counted("total", (num_input + num_output) / wall_s, "tokens/s"),
    ]
    if goals:
        for name, from_sending in (("goodput", False), ("goodput from send", True)):
            num_good = sum(is_good(record, goals, from_sending) for record in done)
            rows.append(counted(name, num_good / wall_s, "requests/s"))
    rows += [
        latency("ttft", _known(record.ttft_s() for record in done)),
        latency("tpot", _known(record.tpot_s for record in done)),
        latency("itl", [gap for record in done for gap in record.itl_s]),
        latency("e2e", _known(record.e2e_s() for record in done)),
        latency("ttft from send", _known(record.ttft_s(from_sending=True) for record in done)),
        latency("e2e from send", _known(record.e2e_s(from_sending=True) for record in done)),
        latency(
            "sent late",
            [r.sent_s - r.intended_s for r in run.records if r.sent_s is not None],
        ),
    ]
    return [row for row in rows if row is not None]


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def failures_of(run: LoadRun) -> dict[str, dict[str, Any]]:
    """Return for each kind of failure how often it was, one message, and Retry-After if given."""
    counts = Counter(record.failure for record in run.records if record.failure is not None)
    found = {}
    for kind, count in counts.most_common():
        of_kind = [record for record in run.records if record.failure == kind]
        found[kind] = {
            "count": count,
            "message": next((record.message for record in of_kind if record.message), ""),
            "num_retry_after": sum(record.retry_after is not None for record in of_kind),
            "retry_after": next((r.retry_after for r in of_kind if r.retry_after), None),
        }
    return found


def report_of(
    run: LoadRun, goals: Mapping[str, float], command: str, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the figures in the form of the other benchmarks' reports, and what is of a load."""
    done = [record for record in run.records if record.is_ok]
    return {
        "schema": 1,
        "command": command,
        "commit": None,
        "dirty": None,
        "machine": f"{platform.system().lower()}-{platform.machine()}",
        "numerics_id": None,
        "rows": [asdict(row) for row in rows_of(run, goals)],
        "settings": dict(settings),
        "duration_s": run.wall_s,
        "num_requests": len(run.records),
        "num_answered": len(done),
        "num_counted_by_server": sum(record.is_counted for record in done),
        "num_good": sum(is_good(record, goals) for record in done) if goals else None,
        "num_good_from_send": (
            sum(is_good(record, goals, from_sending=True) for record in done) if goals else None
        ),
        "goodput_ms": {name: limit_s * 1000 for name, limit_s in goals.items()},
        "input_tokens": sum(r.input_tokens or r.asked_input_tokens or 0 for r in done),
        "output_tokens": sum(record.output_tokens for record in done),
        "num_chunks": sum(len(record.chunk_s) for record in done),
        "peak_concurrency": run.peak_concurrency,
        "num_connections": run.pool.num_connections,
        "num_resent": run.pool.num_resent,
        "client_cpu_share": run.cpu_share,
        "is_interrupted": run.is_interrupted,
        "failures": failures_of(run),
    }


def lines_of(report: Mapping[str, Any]) -> list[str]:
    """Return the table that is printed: a report as lines."""
    lines = [
        f"{report['num_answered']} of {report['num_requests']} requests answered in "
        f"{report['duration_s']:.4g} s, {report['peak_concurrency']} at once at most, over "
        f"{report['num_connections']} connections",
        f"{report['input_tokens']} input tokens, {report['output_tokens']} output tokens in "
        f"{report['num_chunks']} chunks",
    ]
    if report["num_good"] is not None:
        asked = ", ".join(f"{name} <= {ms:g} ms" for name, ms in report["goodput_ms"].items())
        lines.append(f"{report['num_good']} requests were good: {asked}")
    rows = report["rows"]
    for row in rows:
        if row["mean"] is None:
            lines.append(f"{row['name']:<18} {row['value']:>10.4g} {row['unit']}")
    latencies = [row for row in rows if row["mean"] is not None]
    if latencies:
        columns = ("mean", "median", "p90", "p99", "max")
        lines.append(f"{'ms':<18} " + " ".join(f"{name:>10}" for name in columns) + "       n")
        for row in latencies:
            cells = " ".join(f"{row[name] * 1000:>10.2f}" for name in columns)
            lines.append(f"{row['name']:<18} {cells} {row['n']:>7}")
    failures = list(report["failures"].items())
    for kind, failure in failures[:MAX_KINDS_SHOWN]:
        after = f", Retry-After {failure['retry_after']}" if failure["retry_after"] else ""
        why = f": {failure['message']}" if failure["message"] else ""
        lines.append(f"failed, {kind}: {failure['count']}{after}{why}")
    if len(failures) > MAX_KINDS_SHOWN:
        lines.append(f"and {len(failures) - MAX_KINDS_SHOWN} more kinds of failures")
    return lines


def notes_of(report: Mapping[str, Any]) -> list[str]:
    """Return what a reader of the figures should know about how they were made."""
    notes = []
    if report["is_interrupted"]:
        notes.append("interrupted: figures are of what was answered so far")
    num_guessed = report["num_answered"] - report["num_counted_by_server"]
    if num_guessed:
        notes.append(
            f"{num_guessed} answers came without usage: their output tokens are counted chunks"
        )
    if report["client_cpu_share"] > BUSY_SHARE and report["duration_s"] >= BUSY_AFTER_S:
        notes.append(
            f"this client used {report['client_cpu_share']:.0%} of a core: latencies may be its own"
        )
    return notes
