"""Figures of a server: for Prometheus, by vLLM's names where it has one, and for the dashboard.

Requests and times are counted here; what the engine counts is shown as its host last told it, and
begins anew with each world of ranks, as Prometheus expects of a process that was restarted.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from moe_serve.engine.engine import EngineStats
from moe_serve.server.answers import without_folders
from moe_serve.server.dashboard import (
    ExpertBytes,
    ExpertCounters,
    ExpertsPart,
    KvGroup,
    LatencyPart,
    PrefixPart,
    Quantiles,
    RankPart,
    RequestsPart,
    ServerPart,
    Snapshot,
    TokensPart,
)
from moe_serve.server.distribution import Distribution
from moe_serve.server.doorway import Doorway
from moe_serve.server.engine_client import EngineClient
from moe_serve.server.guard import Guard
from moe_serve.server.serving import Serving
from moe_serve.server.state import Finished, FrontState

PREFIX = "moe_serve:"
_STATES = ("loading", "serving", "reforming", "draining", "failed")
# of an expert cache, by layer: what the engine calls them, and what they are
_EXPERT_COUNTERS = {
    "hits": "Experts that a step used and that were resident",
    "misses": "Experts that a step used and that were not resident",
    "fetched": "Experts brought into slots",
    "computed_on_cpu": "Misses that were computed where they lay",
    "evictions": "Experts that left their slot for another one",
}
_PREFETCH_COUNTERS = {
    "issued": "Guesses that were fetched",
    "useful": "Guesses that were there when they were needed",
    "late": "Guesses that were still on their way when they were needed",
    "wasted": "Guesses that left their slot unused",
}


class Metrics(Collector):
    """What is counted of one front end. For the event loop's thread."""

    def __init__(self, client: EngineClient, state: FrontState) -> None:
        """Begin to count what `client` and `state` tell of."""
        self._client = client
        self._state = state
        self._begun_s = time.monotonic()
        self.ttft, self.e2e, self.itl, self.tpot = (Distribution() for _ in range(4))
        self.prompt_tokens = Distribution(1.0, 24)
        self.generation_tokens = Distribution(1.0, 24)
        self._events: Counter[int] = Counter()
        self._finished: Counter[str] = Counter()
        self._num_prompt_tokens = self._num_generation_tokens = 0
        self._door: Doorway | None = None
        self._serving: Serving | None = None
        self._guard: Guard | None = None
        client.on_gap = self.itl.add
        client.on_tokens = self._tokens
        state.on_finished = self._request_finished
        state.metrics = self.exposition
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def watch(self, door: Doorway, serving: Serving, guard: Guard) -> None:
        """Count the errors that these send, too."""
        self._door, self._serving, self._guard = door, serving, guard

    def exposition(self) -> tuple[bytes, str]:
        """Return the text that Prometheus reads, and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    # -- counting ----------------------------------------------------------------------------------

    def _tokens(self, num_tokens: int) -> None:
        self._num_generation_tokens += num_tokens

    def _request_finished(self, finished: Finished) -> None:
        if finished.is_event:  # all other errors are seen where they are sent
            self._events[finished.status] += 1
        if not finished.finish_reasons:
            return
        self._finished.update(finished.finish_reasons)
        self._num_prompt_tokens += finished.num_prompt_tokens
        self.prompt_tokens.add(finished.num_prompt_tokens)
        self.generation_tokens.add(finished.num_output_tokens)
        self.e2e.add(finished.total_s)
        if finished.first_token_s is not None:
            self.ttft.add(finished.first_token_s)
            if finished.num_output_tokens > 1:
                decode_s = finished.total_s - finished.first_token_s
                self.tpot.add(decode_s / (finished.num_output_tokens - 1))

    def _errors(self) -> Counter[int]:
        found = self._events.copy()
        if self._guard is not None:
            found.update(self._guard.errors)
        if self._serving is not None:
            found.update(self._serving.refused)
        if self._door is not None:
            found[503] += self._door.counts["over"] + self._door.counts["not_live"]
        return +found

    # -- Prometheus --------------------------------------------------------------------------------

    def collect(self) -> Iterable[Metric]:
        """Yield every metric family. All have the label model_name."""
        yield from self._of_requests()
        yield from self._of_service()
        report = self._client.report
        if report is not None:
            yield from self._of_engine(report.stats)
            yield self._counter("requests_resubmitted", "Given to a new world of ranks with the "
                                "tokens they had", report.num_resubmitted)  # fmt: skip
            yield self._counter("worlds_lost", "Worlds of ranks that were lost and formed anew",
                                report.num_worlds_lost)  # fmt: skip

    def _of_requests(self) -> Iterator[Metric]:
        yield self._counter("prompt_tokens", "Prompt tokens of requests that have ended",
                            self._num_prompt_tokens)  # fmt: skip
        yield self._counter(
            "generation_tokens", "Tokens given to requests", self._num_generation_tokens
        )
        yield self._counters(
            "request_success", "Outputs that have ended", "finished_reason", self._finished
        )
        yield self._counters(
            "http_errors",
            "Answers with a status of 400 and above, and error events",
            "status",
            self._errors(),
        )
        for name, about, values in (
            (
                "time_to_first_token_seconds",
                "From a request's arrival to its first token",
                self.ttft,
            ),
            (
                "inter_token_latency_seconds",
                "Between two tokens of an output; of those that came together, the same share",
                self.itl,
            ),
            ("request_time_per_output_token_seconds", "After the first, in the mean", self.tpot),
            ("e2e_request_latency_seconds", "Of whole requests", self.e2e),
            ("request_prompt_tokens", "Of each request", self.prompt_tokens),
            ("request_generation_tokens", "Of each request, all outputs", self.generation_tokens),
        ):
            family = HistogramMetricFamily(PREFIX + name, about, labels=["model_name"])
            family.add_metric([self._state.model], values.buckets(), values.sum)
            yield family

    def _of_service(self) -> Iterator[Metric]:
        client = self._client
        yield self._gauge("num_requests_running", "Requests that have their first token",
                          client.num_running - client.num_queued)  # fmt: skip
        yield self._gauge(
            "num_requests_waiting", "Requests without their first token", client.num_queued
        )
        yield self._gauge("queued_prompt_tokens", "Prompt tokens of waiting requests",
                          client.queued_tokens)  # fmt: skip
        connections = 0 if self._door is None else self._door.num_connections
        yield self._gauge("open_connections", "Connections of clients", connections)
        states = {name: float(client.state == name) for name in _STATES}
        yield self._gauges("engine_state", "1 for the state the engine is in", "state", states)
        yield self._gauge("engine_silent_seconds", "Since the engine's last sign of life",
                          client.silent_s)  # fmt: skip
        beat = client.beat
        if beat is not None:
            yield self._gauge(
                "engine_generation", "Worlds of ranks that were formed before", beat.generation
            )
            up = {rank.rank: float(rank.is_up) for rank in beat.ranks}
            yield self._gauges("rank_up", "1 for a rank that is there", "rank", up)
            ages = {rank.rank: rank.age_s for rank in beat.ranks}
            yield self._gauges(
                "rank_heartbeat_age_seconds", "Since a rank's last sign of life", "rank", ages
            )

    def _of_engine(self, stats: EngineStats) -> Iterator[Metric]:
        num_blocks, num_free = sum(stats.num_kv_blocks), sum(stats.num_free_kv_blocks)
        in_use = num_blocks - num_free - sum(stats.num_cached_kv_blocks)
        yield self._gauge("kv_cache_usage_perc", "Share of KV blocks that sequences hold, 0 to 1",
                          in_use / max(1, num_blocks))  # fmt: skip
        counters = {
            "engine_steps": ("Steps", stats.num_steps),
            "num_preemptions": ("Sequences that had to be computed anew", stats.num_preemptions),
            "prefix_cache_queries": ("Prompt tokens looked up", stats.prefix_query_tokens),
            "prefix_cache_hits": ("Prompt tokens found", stats.prefix_hit_tokens),
        }
        for name, (about, value) in counters.items():
            yield self._counter(name, about, value)
        if stats.experts:
            yield from self._of_experts(stats)
        if stats.rank_imbalance is not None:
            yield self._gauge(
                "ep_imbalance_ratio",
                "Rows of the busiest rank's experts over the mean, of the latest steps",
                stats.rank_imbalance,
            )
        if len(stats.ranks) > 1:
            yield from self._of_ranks(stats.ranks)

    def _of_experts(self, stats: EngineStats) -> Iterator[Metric]:
        layers = stats.expert_layers
        per_layer, total = stats.experts["per_layer"], stats.experts["total"]
        for name, about in _EXPERT_COUNTERS.items():
            values = dict(zip(layers, per_layer[name], strict=True))
            yield self._counters(f"expert_cache_{name}", about, "layer", values)
        for name, about in _PREFETCH_COUNTERS.items():
            yield self._counter(f"expert_prefetch_{name}", about, total[name])
        yield self._counter(
            "expert_stall_seconds", "Time that steps waited for experts", total["stall_s"]
        )
        tiers = {tier: total[f"{tier}_bytes"] for tier in ("disk", "host", "link")}
        yield self._counters("expert_bytes", "Of experts brought in, by where from", "tier", tiers)
        resident = dict(zip(layers, stats.experts["resident"], strict=True))
        yield self._gauges("expert_cache_resident", "Experts in slots", "layer", resident)

    def _of_ranks(self, ranks: list[dict[str, Any]]) -> Iterator[Metric]:
        for name, about, key in (
            ("ep_tokens_received", "(Token, expert) pairs that a rank's experts were given",
             "pairs_computed"),
            ("ep_tokens_sent", "(Token, expert) pairs that a rank sent to others", "pairs_sent"),
            ("ep_bytes", "Bytes that a rank sent to others", "bytes_sent"),
            ("ep_exchange_seconds", "Time in exchanges, waiting for others too", "exchange_s"),
            ("placement_migration_bytes", "Of experts that moved, on all ranks", "bytes_moved"),
        ):  # fmt: skip
            values = {rank["rank"]: rank[key] for rank in ranks if rank[key] is not None}
            if values:  # nobody has measured how long GPUs exchange
                yield self._counters(name, about, "rank", values)
        epochs = {rank["rank"]: rank["epoch"] for rank in ranks}
        yield self._gauges("placement_epoch", "Layers that were placed anew", "rank", epochs)

    def _counter(self, name: str, about: str, value: float) -> Metric:
        family = CounterMetricFamily(PREFIX + name, about, labels=["model_name"])
        family.add_metric([self._state.model], value)
        return family

    def _gauge(self, name: str, about: str, value: float) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, about, labels=["model_name"])
        family.add_metric([self._state.model], value)
        return family

    def _counters(self, name: str, about: str, label: str, values: Any) -> Metric:
        family = CounterMetricFamily(PREFIX + name, about, labels=["model_name", label])
        for key, value in sorted(values.items()):
            family.add_metric([self._state.model, str(key)], value)
        return family

    def _gauges(self, name: str, about: str, label: str, values: Any) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, about, labels=["model_name", label])
        for key, value in sorted(values.items()):
            family.add_metric([self._state.model, str(key)], value)
        return family

    # -- the dashboard -----------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """Return what the dashboard shows."""
        client = self._client
        stats = None if client.report is None else client.report.stats
        return Snapshot(
            server=self._server_part(),
            requests=RequestsPart(
                num_running=client.num_running - client.num_queued,
                num_waiting=client.num_queued,
                queue_tokens=client.queued_tokens,
                open_connections=0 if self._door is None else self._door.num_connections,
                finished=dict(self._finished),
                errors={str(status): count for status, count in sorted(self._errors().items())},
            ),
            tokens=TokensPart(
                prompt_total=self._num_prompt_tokens,
                generation_total=self._num_generation_tokens,
            ),
            latency=LatencyPart(
                ttft=_quantiles(self.ttft), itl=_quantiles(self.itl), e2e=_quantiles(self.e2e)
            ),
            kv=[] if stats is None else _kv_groups(stats),
            prefix=PrefixPart(
                query_tokens=0 if stats is None else stats.prefix_query_tokens,
                hit_tokens=0 if stats is None else stats.prefix_hit_tokens,
            ),
            experts=None if stats is None else _experts_part(stats),
            ranks=[] if stats is None else self._ranks(stats),
        )

    def _server_part(self) -> ServerPart:
        client, state = self._client, self._state
        beat, report = client.beat, client.report
        return ServerPart(
            model=state.model,
            numerics_id="" if client.welcome is None else client.welcome.numerics_id,
            version=state.version,
            state=client.state,
            why=without_folders(client.why_not_ready or ""),
            uptime_s=time.monotonic() - self._begun_s,
            generation=0 if beat is None else beat.generation,
            num_resubmitted=0 if report is None else report.num_resubmitted,
        )

    def _ranks(self, stats: EngineStats) -> list[RankPart]:
        beat = self._client.beat
        if len(stats.ranks) < 2 or beat is None:
            return []
        ages = {rank.rank: rank for rank in beat.ranks}
        return [
            RankPart(
                rank=rank["rank"],
                is_up=rank["rank"] not in ages or ages[rank["rank"]].is_up,
                heartbeat_age_s=ages[rank["rank"]].age_s if rank["rank"] in ages else 0.0,
                num_tokens=rank["num_tokens"],
                rows_computed=rank["pairs_computed"],
                bytes_sent=rank["bytes_sent"],
                model_bytes=rank["model_bytes"],
                kv_bytes=rank["kv_bytes"],
                peak_rss_bytes=rank["peak_rss_bytes"],
                epoch=rank["epoch"],
            )
            for rank in stats.ranks
        ]


def _quantiles(values: Distribution) -> Quantiles:
    p50_s, p99_s = values.quantiles((0.5, 0.99))
    return Quantiles(p50_s=p50_s, p99_s=p99_s)


def _kv_groups(stats: EngineStats) -> list[KvGroup]:
    columns = (stats.num_kv_blocks, stats.num_free_kv_blocks, stats.num_cached_kv_blocks)
    return [
        KvGroup(name=f"group {index}", num_blocks=total, num_free=free, num_cached=cached)
        for index, (total, free, cached) in enumerate(zip(*columns, strict=True))
    ]


def _experts_part(stats: EngineStats) -> ExpertsPart | None:
    if not stats.expert_layers:
        return None
    total: dict[str, Any] = dict(stats.experts.get("total", {}))
    return ExpertsPart(
        layers=stats.expert_layers,
        num_experts=max(map(len, stats.expert_uses), default=0),
        uses=stats.expert_uses,
        resident=stats.resident,
        counters=ExpertCounters(
            hits=total.get("hits", 0),
            misses=total.get("misses", 0),
            fetched=total.get("fetched", 0),
            computed_on_cpu=total.get("computed_on_cpu", 0),
            prefetch_useful=total.get("useful", 0),
            prefetch_late=total.get("late", 0),
            prefetch_wasted=total.get("wasted", 0),
            evictions=total.get("evictions", 0),
            stall_s=total.get("stall_s", 0.0),
            num_bytes=ExpertBytes(
                disk=total.get("disk_bytes", 0),
                host=total.get("host_bytes", 0),
                link=total.get("link_bytes", 0),
            ),
        ),
    )
