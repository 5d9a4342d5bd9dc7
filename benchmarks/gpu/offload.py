"""Decoding with few of the experts on the card, routed as a trace was, beside what bounds it.

The least time of a token is that with all experts on the card, or that of the bytes which Belady's
rule would bring in over the link that was measured in the same call, whichever is longer. A model
has 8 layers of the real sizes (and a small head): the others would do the same again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.gpu.engines import beside_cache, release
from benchmarks.gpu.figures import Failure, Figure, attempted, compared, plain
from benchmarks.gpu.limits import Limits
from benchmarks.gpu.routing import first_layers, made_up, widened
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.shapes import DEEPSEEK_V2_LITE_LIKE, QWEN3_30B, TINY
from benchmarks.offload import figures as offload_figures
from benchmarks.offload.limits import TraceLimits
from benchmarks.offload.subject import Case, Sample, Subject, write_model
from benchmarks.peers.shape import Shape
from benchmarks.results import Row
from moe_serve.errors import ConfigError
from moe_serve.experts.trace import Trace, read_trace

GOAL_OF_LIMIT = 1.5
GOAL_OVER_STATIC = 1.2
FULL_PERCENT = 25
BASE = "as it is"
_LAYERS = 8
_VOCABULARY = 4096
_NEVER_COPIED_S = 1e6


@dataclass(frozen=True, slots=True)
class Sizes:
    """percents: of the experts that have a slot; steps: of each of `rounds`, after `warm`."""

    percents: tuple[int, ...]
    batches: tuple[int, ...]
    warm: int
    steps: int
    rounds: int


REAL = Sizes((FULL_PERCENT, 10, 50), (1, 8), warm=96, steps=16, rounds=7)
DRY = Sizes((50,), (1,), warm=0, steps=1, rounds=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class HostCase(Case):
    """Experts beyond the slots are in host memory; is_on_host: they are run there, none is copied.

    more: what the engine needs for that.
    """

    more: Mapping[str, Any]
    is_on_host: bool = False

    @property
    def tier(self) -> str:
        return "CPU only" if self.is_on_host else "host memory"

    def slots(self, num_experts: int) -> int:
        return max(2, round(self.resident / 100 * num_experts))

    def options(self, num_experts: int, store: object) -> dict[str, object]:
        return {
            "expert_cache_slots": self.slots(num_experts),
            "eviction": self.eviction,
            "predictor": self.predictor,
            "prefetch": self.prefetch,
            "miss": self.miss,
            **self.more,
        }


def variants(base: HostCase, is_full: bool) -> dict[str, HostCase]:
    """Return what is compared, by name; the first is how the engine runs unasked."""
    found = {
        BASE: base,
        "no prefetch": dataclasses.replace(base, prefetch="off"),
    }
    if is_full:
        found |= {
            "prefetch": dataclasses.replace(base, prefetch="on"),
            "static": dataclasses.replace(base, eviction="static"),
            "copy": dataclasses.replace(base, miss="copy", prefetch="off"),
            "split": dataclasses.replace(base, miss="split", prefetch="off"),
            "host": dataclasses.replace(base, miss="split", prefetch="off", is_on_host=True),
        }
    return found


def run(setting: Setting) -> Iterator[Figure | Failure]:
    """Measure each shape and batch, with the same model all on the card first."""
    limits, sizes = Limits(setting), setting.pick(REAL, DRY)
    for name, (trace, shape) in _subjects(setting).items():
        for batch in sizes.batches:
            where = f"{name}, batch {batch}"
            if not setting.wants(where):
                continue
            one = partial(_batch, setting, limits, sizes, where, trace, shape, batch)
            yield from attempted(where, one)


def _subjects(setting: Setting) -> dict[str, tuple[Trace, Shape]]:
    if setting.is_dry:
        return {"tiny": (made_up(1, TINY.num_experts, TINY.top_k), TINY)}
    if not setting.traces:
        raise ConfigError("no routing to replay: give --trace FILE.npz")
    found = {}
    for path in setting.traces:
        trace = first_layers(read_trace(path), _LAYERS)
        wide = widened(trace, QWEN3_30B.num_experts, QWEN3_30B.top_k)
        pairs = (
            ("deepseek-v2-lite-like", trace, DEEPSEEK_V2_LITE_LIKE),
            ("qwen3-30b", wide, QWEN3_30B),
        )
        for name, routing, shape in pairs:
            small = dataclasses.replace(shape, num_layers=_LAYERS, vocab_size=_VOCABULARY)
            found[f"{name}, {routing.name}"] = (routing, small)
    return found


def _batch(
    setting: Setting,
    limits: Limits,
    sizes: Sizes,
    where: str,
    trace: Trace,
    shape: Shape,
    batch: int,
) -> Iterator[Figure | Failure]:
    resident = samples_of(setting, sizes, trace, shape, batch, None)[0]
    yield plain(f"{where}: all on the card", [one.ms_per_token for one in resident], "ms/token")
    bounds = TraceLimits(trace)
    for percent in sizes.percents:
        base = HostCase(resident=percent, batch=batch, more=beside_cache(setting))
        seconds: dict[str, list[float]] = {}
        cases = variants(base, setting.is_dry or percent == FULL_PERCENT)
        for name, case in cases.items():
            told = f"{where}, {percent} %, {name}"
            taken = seconds.setdefault(name, [])
            one = partial(
                _case, setting, limits, sizes, told, trace, shape, case, resident, bounds, taken
            )
            yield from attempted(told, one)
        yield from _comparisons(f"{where}, {percent} %", seconds)


def _case(
    setting: Setting,
    limits: Limits,
    sizes: Sizes,
    told: str,
    trace: Trace,
    shape: Shape,
    case: HostCase,
    resident: list[Sample],
    bounds: TraceLimits,
    taken: list[float],
) -> Iterator[Figure]:
    """Measure one engine; `taken` is given the seconds of a token, one of each round."""
    samples, record_bytes = samples_of(setting, sizes, trace, shape, case.batch, case)
    taken += [sample.seconds / sample.num_tokens for sample in samples]
    last = sizes.warm + sizes.rounds * sizes.steps
    slots = case.slots(trace.num_experts)
    least = bounds.least_misses(case.batch, slots, sizes.warm, last)
    figure = offload_figures.Figure(
        case=case,
        routing=trace.name,
        samples=samples,
        resident=resident,
        gb_per_s=[limits.link_gb_s],
        least_bytes=least * record_bytes,
    )
    times = [sample.ms_per_token for sample in samples]
    row = Row.of(
        f"{told}: time (ratio: to the limit)",
        times,
        "ms/token",
        limit=figure.limit_ms,
        ratio=figure.ratio,
    )
    yield Figure(row=row, goal=GOAL_OF_LIMIT if told.endswith(BASE) else None, is_most=True)
    fetched = [sample.per_token("bytes") / 1e6 for sample in samples]
    least_mb = figure.least_bytes / figure.num_tokens / 1e6
    yield Figure(row=Row.of(f"{told}: brought in", fetched, "MB/token", limit=least_mb))
    yield plain(f"{told}: stall", [one.stall_ms_per_token for one in samples], "ms/token")


def samples_of(
    setting: Setting,
    sizes: Sizes,
    trace: Trace,
    shape: Shape,
    batch: int,
    case: HostCase | None,
) -> tuple[list[Sample], int]:
    """Run one engine; return what its steps cost, and the bytes of an expert's record."""
    release()
    more = {"kernels": setting.kernels, "numerics": "fast"}
    folder = write_model(shape, setting.scratch)
    with closing(Subject(trace, folder, batch, case, setting.scratch, more)) as subject:
        if case is not None and case.is_on_host:
            _never_copy(subject)
        subject.run(sizes.warm)
        samples = [subject.run(sizes.steps) for _ in range(sizes.rounds)]
        record_bytes = 0 if case is None else subject.record_bytes
    if case is not None and case.is_on_host and any(one.counters["bytes"] for one in samples):
        raise RuntimeError("experts were copied that should have run in host memory")
    return samples, record_bytes


def _never_copy(subject: Subject) -> None:
    """Let what is missing run in host memory, whatever a copy would cost."""
    assert subject.offloaded is not None
    host = subject.offloaded._host
    if host is None or host.planner is None:
        raise ConfigError("this engine runs no experts in host memory")
    costs = host.planner.costs
    host.planner.costs = dataclasses.replace(costs, copy_s=_NEVER_COPIED_S)


def _comparisons(where: str, seconds: dict[str, list[float]]) -> Iterator[Figure]:
    """Yield variants beside each other, where both were measured."""
    for ours, theirs, goal, is_most in (
        ("static", BASE, GOAL_OVER_STATIC, False),
        ("no prefetch", "prefetch", None, False),
        ("split", "copy", 1.0, True),
        ("split", "host", 1.0, True),
    ):
        if seconds.get(ours) and seconds.get(theirs):
            name = f"{where}: {ours}, against {theirs}"
            yield compared(name, seconds[ours], seconds[theirs], goal, is_most)
