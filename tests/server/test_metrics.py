"""What /metrics and the dashboard say of known requests, and of a known engine."""

from __future__ import annotations

import re
import time
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from moe_serve.engine.engine import EngineStats
from moe_serve.server.dashboard import Snapshot
from moe_serve.server.messages import Beat, RankState, StatsReport, Welcome
from moe_serve.server.metrics import Metrics
from moe_serve.server.options import ServerConfig
from moe_serve.server.state import Finished, FrontState
from moe_serve.text.model_texts import ModelTexts
from tests.server.fake_host import InProcessClient

TOTAL = {
    "hits": 7, "misses": 3, "fetched": 3, "computed_on_cpu": 1, "evictions": 2, "issued": 5,
    "useful": 3, "late": 1, "wasted": 1, "bytes": 30, "disk_bytes": 20, "link_bytes": 10,
    "host_bytes": 4, "stall_s": 0.25,
}  # fmt: skip


def stats(**given: Any) -> EngineStats:
    per_layer = {name: [value, 0] for name, value in TOTAL.items()}
    rank = {
        "num_tokens": 9, "pairs_computed": 60, "pairs_sent": 20, "bytes_sent": 4096,
        "exchange_s": 0.5, "bytes_moved": 0, "epoch": 2, "model_bytes": 10, "kv_bytes": 11,
        "peak_rss_bytes": 12,
    }  # fmt: skip
    told: dict[str, Any] = {
        "num_steps": 40, "step_tokens": 100, "num_prompt_tokens": 60, "num_generation_tokens": 40,
        "num_finished": {"stop": 1, "length": 2, "abort": 0, "error": 0}, "num_preemptions": 1,
        "prefix_query_tokens": 80, "prefix_hit_tokens": 16, "num_waiting": 0, "num_running": 2,
        "max_num_seqs": 8, "num_kv_blocks": [100], "num_free_kv_blocks": [60],
        "num_cached_kv_blocks": [15], "model_bytes": 1, "kv_bytes": 2, "expert_layers": [1, 3],
        "expert_uses": [[1, 2, 3], [4, 5, 6]], "resident": [[1, 0, 1], [0, 1, 1]],
        "experts": {"per_layer": per_layer, "total": TOTAL, "resident": [2, 2]},
        "ranks": [{"rank": 0, **rank}, {"rank": 1, **rank, "pairs_computed": 20}],
        "rank_imbalance": 1.5, **given,
    }  # fmt: skip
    return EngineStats(**told)


def finished(**given: Any) -> Finished:
    told: dict[str, Any] = {
        "kind": "completion", "status": 200, "is_streamed": True, "is_event": False,
        "num_prompt_tokens": 20,
        "num_output_tokens": 11, "num_cached_tokens": 16, "first_token_s": 0.5, "total_s": 2.5,
        "finish_reasons": ("length",), "key_id": "", **given,
    }  # fmt: skip
    return Finished(**told)


@pytest.fixture
def metrics() -> Metrics:
    client = InProcessClient.__new__(InProcessClient)
    super(InProcessClient, client).__init__()
    state = FrontState(
        client=client,
        texts=ModelTexts(vocab_size=100),
        server=ServerConfig(),
        model="m",
        created=0,
        version="1",
    )
    client.welcome = Welcome(64, "fake", "")
    ranks = (RankState(0, True, 0.1), RankState(1, True, 0.2))
    client.beat = Beat("serving", 3, 40, ranks)
    return Metrics(client, state)


def told_all(metrics: Metrics) -> None:
    """Let a server's metrics have everything there is to tell of."""
    metrics._state.on_finished(finished())
    metrics._state.on_finished(finished(status=500, is_event=True, finish_reasons=()))
    metrics._client.report = StatsReport(stats(), 3, 1)


def samples(metrics: Metrics) -> dict[str, float]:
    text, media_type = metrics.exposition()
    assert media_type.startswith("text/plain")
    found = {}
    for line in text.decode().splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            assert 'model_name="m"' in name
            name = re.sub(r'model_name="m",?', "", name).replace(",}", "}").replace("{}", "")
            found[name.removeprefix("moe_serve:")] = float(value)
    return found


def test_requests_are_counted(metrics: Metrics) -> None:
    state = metrics._state
    state.on_finished(finished())
    state.on_finished(finished(finish_reasons=("stop", "stop"), first_token_s=None))
    state.on_finished(finished(status=400, finish_reasons=()))
    state.on_finished(finished(status=504, is_event=True, finish_reasons=()))
    metrics._tokens(22)
    told = samples(metrics)
    assert told['request_success_total{finished_reason="length"}'] == 1
    assert told['request_success_total{finished_reason="stop"}'] == 2
    assert told['http_errors_total{status="504"}'] == 1
    assert 'http_errors_total{status="400"}' not in told, "it is counted where it is sent"
    assert told["prompt_tokens_total"] == 40
    assert told["generation_tokens_total"] == 22
    assert told["time_to_first_token_seconds_count"] == 1
    assert told["time_to_first_token_seconds_sum"] == 0.5
    assert told["request_time_per_output_token_seconds_sum"] == pytest.approx(0.2)
    assert told["e2e_request_latency_seconds_count"] == 2


def test_the_engine_is_shown_as_it_was_told_last(metrics: Metrics) -> None:
    client = metrics._client
    assert "engine_steps_total" not in samples(metrics)
    client.report = StatsReport(stats=stats(), num_resubmitted=4, num_worlds_lost=3)
    told = samples(metrics)
    assert told["kv_cache_usage_perc"] == 0.25
    assert told["prefix_cache_hits_total"] == 16
    assert told['expert_cache_hits_total{layer="1"}'] == 7
    assert told['expert_cache_hits_total{layer="3"}'] == 0
    assert told['expert_bytes_total{tier="disk"}'] == 20
    assert told["expert_stall_seconds_total"] == 0.25
    assert told["expert_prefetch_late_total"] == 1
    assert told['ep_tokens_received_total{rank="0"}'] == 60
    assert told["ep_imbalance_ratio"] == 1.5
    assert told["worlds_lost_total"] == 3
    assert told["requests_resubmitted_total"] == 4
    assert told["engine_generation"] == 3
    assert told['rank_heartbeat_age_seconds{rank="1"}'] == 0.2
    assert told['engine_state{state="serving"}'] == 1
    assert told['engine_state{state="reforming"}'] == 0


def test_what_nobody_measures_is_left_out(metrics: Metrics) -> None:
    """On GPUs, how long ranks exchange."""
    given = stats()
    metrics._client.report = StatsReport(given, 0, 0)
    assert samples(metrics)['ep_exchange_seconds_total{rank="0"}'] == 0.5
    for rank in given.ranks:
        rank["exchange_s"] = None
    told = samples(metrics)
    assert not any(name.startswith("ep_exchange_seconds") for name in told)
    assert told['ep_bytes_total{rank="0"}'] == 4096


def test_what_was_refused_before_a_route_counts(metrics: Metrics) -> None:
    door = SimpleNamespace(counts={"over": 2, "not_live": 1}, num_connections=5)
    refused = SimpleNamespace(refused={408: 1, 503: 1})
    metrics.watch(cast(Any, door), cast(Any, refused), cast(Any, SimpleNamespace(errors={401: 4})))
    told = samples(metrics)
    assert told['http_errors_total{status="401"}'] == 4
    assert told['http_errors_total{status="503"}'] == 4
    assert told["open_connections"] == 5


def test_the_dashboard_is_given_all_of_it(metrics: Metrics) -> None:
    client = metrics._client
    assert metrics.snapshot().experts is None
    client.report = StatsReport(stats=stats(), num_resubmitted=4, num_worlds_lost=3)
    metrics._state.on_finished(finished())
    told = msgspec.json.decode(msgspec.json.encode(metrics.snapshot()), type=Snapshot)
    assert told.server.generation == 3
    assert told.server.state == "serving"
    assert told.kv[0].num_blocks == 100
    assert told.experts is not None
    assert told.experts.uses == [[1, 2, 3], [4, 5, 6]]
    assert told.experts.counters.num_bytes.link == 10
    assert [rank.rows_computed for rank in told.ranks] == [60, 20]
    assert told.latency.ttft.p50_s == pytest.approx(0.5, rel=0.2)
    assert told.requests.finished == {"length": 1}


def test_one_process_has_no_ranks_and_a_dense_model_no_experts(metrics: Metrics) -> None:
    dense = stats(
        experts={}, expert_layers=[], expert_uses=[], resident=[], ranks=[], rank_imbalance=None
    )
    metrics._client.report = StatsReport(stats=dense, num_resubmitted=0, num_worlds_lost=0)
    told = metrics.snapshot()
    assert told.experts is None
    assert told.ranks == []
    assert not any(name.startswith(("ep_", "expert_")) for name in samples(metrics))


def test_an_exposition_is_cheap(metrics: Metrics) -> None:
    metrics._client.report = StatsReport(stats=stats(), num_resubmitted=0, num_worlds_lost=0)
    begun_s = time.process_time()
    for _ in range(20):
        metrics.exposition()
    assert (time.process_time() - begun_s) / 20 < 0.05
