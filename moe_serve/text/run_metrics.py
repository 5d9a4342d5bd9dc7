"""The figures of one run, as users of this field read them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from moe_serve.engine.memory import peak_rss_bytes
from moe_serve.types import RequestOutput


class EngineStats(Protocol):
    """What an engine counts: preemptions and prefix hits since its start, bytes as they are."""

    @property
    def num_preemptions(self) -> int: ...
    @property
    def prefix_hit_tokens(self) -> int: ...
    @property
    def model_bytes(self) -> int: ...
    @property
    def kv_bytes(self) -> int: ...
    @property
    def experts(self) -> Mapping[str, Any]: ...
    @property
    def ranks(self) -> Sequence[Mapping[str, Any]]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class RunMetrics:
    """One run: some requests, served together.

    ttft_s: median time to first token since a request arrived. tpot_s: median time per output
    token after the first. Both are None where no request had such a token. output_tok_s and
    requests_s are over the whole run. peak_rss_bytes is the process's since its start, or that of
    all ranks together.
    """

    ttft_s: float | None
    tpot_s: float | None
    output_tok_s: float
    requests_s: float
    num_preemptions: int
    prefix_hit_tokens: int
    model_bytes: int
    kv_bytes: int
    peak_rss_bytes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def line(self) -> str:
        """Return all of it in one line; of a run that served nothing, only the memory."""
        memory = (
            f"model {_mib(self.model_bytes)}",
            f"KV reserved {_mib(self.kv_bytes)}",
            f"peak memory {_mib(self.peak_rss_bytes)}",
        )
        if not self.requests_s:
            return " | ".join(memory)
        return " | ".join(
            (
                f"first token {_milliseconds(self.ttft_s)}",
                f"per token {_milliseconds(self.tpot_s)}",
                f"{self.output_tok_s:.1f} tokens/s",
                f"{self.requests_s:.2f} requests/s",
                *memory,
            )
        )


class RunMeter:
    """Adds up a run, from its making to `read`; a request leaves three numbers."""

    def __init__(self, before: EngineStats) -> None:
        self._start_s = time.monotonic()
        self._num_preemptions = before.num_preemptions
        self._prefix_hit_tokens = before.prefix_hit_tokens
        self._ttft_s: list[float] = []
        self._tpot_s: list[float] = []
        self._num_tokens = 0
        self._num_requests = 0

    def add(self, output: RequestOutput) -> None:
        """Count a request that has ended."""
        self._num_requests += 1
        self._num_tokens += sum(len(o.token_ids) for o in output.outputs)
        if output.metrics.ttft_s is not None:
            self._ttft_s.append(output.metrics.ttft_s)
        tpot_s = _tpot_s(output)
        if tpot_s is not None:
            self._tpot_s.append(tpot_s)

    def read(self, after: EngineStats) -> RunMetrics:
        wall_s = max(time.monotonic() - self._start_s, 1e-9)
        return RunMetrics(
            ttft_s=statistics.median(self._ttft_s) if self._ttft_s else None,
            tpot_s=statistics.median(self._tpot_s) if self._tpot_s else None,
            output_tok_s=self._num_tokens / wall_s,
            requests_s=self._num_requests / wall_s,
            num_preemptions=after.num_preemptions - self._num_preemptions,
            prefix_hit_tokens=after.prefix_hit_tokens - self._prefix_hit_tokens,
            model_bytes=after.model_bytes,
            kv_bytes=after.kv_bytes,
            peak_rss_bytes=sum(rank["peak_rss_bytes"] for rank in after.ranks) or peak_rss_bytes(),
        )


def experts_line(report: Mapping[str, Any]) -> str:
    """Return in one line what an engine's offloaded experts did; see `EngineStats.experts`."""
    total = report["total"]
    uses = max(1, total["hits"] + total["misses"])
    shape = len(report["resident"]) * report["num_experts"]
    parts = [
        f"experts: {sum(report['resident'])} of {shape} held",
        f"{100 * total['misses'] / uses:.1f} % missed",
        f"{_mib(total['bytes'])} fetched",
        f"waited {total['stall_s']:.2f} s",
    ]
    if total["computed_on_cpu"]:
        parts.append(f"{total['computed_on_cpu']} run where they lay")
    if "prefetch" in report:
        guesses = total["useful"] + total["late"] + total["wasted"]
        state = "" if report["prefetch"]["is_on"] else " (off: it did not pay)"
        parts.append(f"prefetch {total['useful']} useful of {guesses}{state}")
    return " | ".join(parts)


def ranks_line(ranks: Sequence[Mapping[str, Any]]) -> str:
    """Return in one line what ranks exchanged; see `EngineStats.ranks`."""
    steps = {name: count for name, count in ranks[0]["steps_by_dispatcher"].items() if count}
    parts = [
        f"ranks: {len(ranks)}",
        f"{_mib(sum(rank['bytes_sent'] for rank in ranks))} sent",
        f"tokens {' '.join(str(rank['num_tokens']) for rank in ranks)}",
    ]
    if steps:
        parts.append("steps by " + ", ".join(f"{name} {count}" for name, count in steps.items()))
    if "rebalance" in ranks[0]:
        told = ranks[0]["rebalance"]
        parts.append(
            f"rebalance: {told['adopted']} of {told['considered']} placements taken over, "
            f"{ranks[0]['experts_moved']} experts moved"
        )
    return " | ".join(parts)


def _tpot_s(output: RequestOutput) -> float | None:
    """Seconds per token after the first; of n outputs, which run together, the longest counts."""
    num_later = max(len(o.token_ids) for o in output.outputs) - 1
    times = output.metrics
    if num_later < 1 or times.e2e_s is None or times.ttft_s is None:
        return None
    return (times.e2e_s - times.ttft_s) / num_later


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.1f} ms"


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"
