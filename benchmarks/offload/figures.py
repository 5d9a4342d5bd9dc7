"""From what engines cost, round by round, to figures: each beside its limit and its base."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.offload.subject import Case, Sample
from benchmarks.results import Row

_COUNTS = ("misses", "computed_on_cpu", "issued", "useful", "late", "wasted", "given_up")


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One case, measured in turn with the same model all in memory.

    samples, resident: one a round, of the same steps. gb_per_s: what the tier gave, one a round (of
    an emulated link: what it was set to). least_bytes: what Belady would have brought in, over all
    rounds. routing: of which trace.
    """

    case: Case
    routing: str
    samples: list[Sample]
    resident: list[Sample]
    gb_per_s: list[float]
    least_bytes: float

    @property
    def num_tokens(self) -> int:
        return sum(sample.num_tokens for sample in self.samples)

    @property
    def compute_ms(self) -> float:
        """Per token, with all experts in memory."""
        return statistics.median(sample.ms_per_token for sample in self.resident)

    @property
    def tier_ms(self) -> float:
        """Per token, for Belady's bytes."""
        rate = statistics.median(self.gb_per_s) * 1e9
        return 1e3 * self.least_bytes / rate / self.num_tokens

    @property
    def limit_ms(self) -> float:
        return max(self.compute_ms, self.tier_ms)

    @property
    def ratio(self) -> float:
        """Of our time per token to the limit: 1 is the best there is."""
        return self.ms / self.limit_ms

    @property
    def ms(self) -> float:
        """Our time per token, over all rounds: they run other tokens each."""
        return 1e3 * sum(sample.seconds for sample in self.samples) / self.num_tokens

    @property
    def stall_ms(self) -> float:
        """Of it waiting for experts."""
        return 1e3 * sum(sample.stall_s for sample in self.samples) / self.num_tokens

    @property
    def fetched_bytes(self) -> float:
        """Per token."""
        return sum(sample.counters["bytes"] for sample in self.samples) / self.num_tokens

    @property
    def over_resident(self) -> float:
        """Of our time to that with all in memory, the median of the rounds' ratios."""
        return _median_ratio(
            [sample.ms_per_token for sample in self.samples],
            [sample.ms_per_token for sample in self.resident],
        )

    def count(self, name: str) -> float:
        """Return a counter's mean over tokens."""
        return sum(sample.counters.get(name, 0) for sample in self.samples) / self.num_tokens

    @property
    def planning_us(self) -> list[float]:
        return [us for sample in self.samples for us in sample.planning_us]

    @property
    def predictor_us(self) -> list[float]:
        return [us for sample in self.samples for us in sample.predictor_us]


def rows_of(figure: Figure) -> list[Row]:
    """Return the figures of one case."""
    name = f"{figure.case.name}, routing {figure.routing}"
    samples, tokens = figure.samples, figure.num_tokens
    times = [sample.ms_per_token for sample in samples]
    rates = [1e3 / ms for ms in times]
    bytes_of_rounds = [sample.per_token("bytes") for sample in samples]
    rows = [
        Row.of(f"{name}: time", times, "ms/token", limit=figure.limit_ms, ratio=figure.ratio),
        Row.of(f"{name}: speed", rates, "tokens/s", limit=1e3 / figure.limit_ms),
        Row.of(
            f"{name}: time against all in memory",
            times,
            "ms/token",
            limit=figure.compute_ms,
            ratio=figure.over_resident,
        ),
        Row.of(f"{name}: stall", [sample.stall_ms_per_token for sample in samples], "ms/token"),
        Row.of(
            f"{name}: fetched", bytes_of_rounds, "bytes/token", limit=figure.least_bytes / tokens
        ),
    ]
    for counter in _COUNTS:
        if figure.count(counter):
            values = [sample.per_token(counter) for sample in samples]
            rows.append(Row.of(f"{name}: {counter}", values, "experts/token"))
    if figure.case.link_gb_per_s is None:
        rows += _disk_rows(name, figure)
    if figure.predictor_us:
        rows.append(Row.of(f"{name}: predictor", figure.predictor_us, "us/layer", limit=20.0))
        rows.append(Row.of(f"{name}: predictor and planning", figure.planning_us, "us/layer"))
    return rows


def _disk_rows(name: str, figure: Figure) -> list[Row]:
    rows = [Row.of(f"{name}: disk, direct reads of records", figure.gb_per_s, "GB/s")]
    told = [sample.disk_bytes for sample in figure.samples if sample.disk_bytes is not None]
    fetched = sum(sample.counters["bytes"] for sample in figure.samples)
    if len(told) == len(figure.samples) and fetched:
        per_token = [
            count / sample.num_tokens for count, sample in zip(told, figure.samples, strict=True)
        ]
        rows.append(
            Row.of(
                f"{name}: read as the kernel says, against fetched",
                per_token,
                "bytes/token",
                ratio=sum(told) / fetched,
            )
        )
    return rows


def comparison(figure: Figure, base: Figure) -> list[Row]:
    """Return time and stall of a case against those of another that ran in turn with it."""
    name = f"{figure.case.name}, routing {figure.routing}, against ({base.case.name})"
    times = [sample.ms_per_token for sample in figure.samples]
    stalls = [sample.stall_ms_per_token for sample in figure.samples]
    ratio = _median_ratio(times, [sample.ms_per_token for sample in base.samples])
    rows = [Row.of(f"{name}: time", times, "ms/token", ratio=ratio)]
    base_stalls = [sample.stall_ms_per_token for sample in base.samples]
    if all(base_stalls):
        ratio = _median_ratio(stalls, base_stalls)
        rows.append(Row.of(f"{name}: stall", stalls, "ms/token", ratio=ratio))
    return rows


def _median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


HEADER = (
    f"{'case':<62} {'ms/tok':>8} {'limit':>8} {'ratio':>6} {'stall':>8} {'MB/tok':>7} "
    f"{'least':>7} {'miss':>6} {'guess':>6} {'used':>6} {'pred us':>8}"
)


def line(figure: Figure) -> str:
    """Return the row of a table as HEADER names it; times in ms, misses and guesses per token."""
    us = f"{statistics.median(figure.predictor_us):8.1f}" if figure.predictor_us else f"{'-':>8}"
    return (
        f"{figure.case.name:<62} {figure.ms:8.2f} {figure.limit_ms:8.2f} {figure.ratio:6.2f} "
        f"{figure.stall_ms:8.2f} {figure.fetched_bytes / 1e6:7.1f} "
        f"{figure.least_bytes / figure.num_tokens / 1e6:7.1f} {figure.count('misses'):6.1f} "
        f"{figure.count('issued'):6.1f} {figure.count('useful'):6.1f} {us}"
    )
