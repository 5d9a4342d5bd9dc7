"""What an engine counts is what happened, wherever experts are."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from moe_serve.engine.engine import Engine, EngineStats
from moe_serve.experts.trace import read_trace
from moe_serve.llm import LLM
from moe_serve.types import SamplingParams
from tests.models import tiny
from tests.offloaded import HALF, LEAST, NUM_EXPERTS, NUM_LAYERS, TOP_K, generate, make

WHOLE: dict[str, dict[str, Any]] = {
    "fused": {},
    "layer by layer": {"fused": False},
    "reference": {"kernels": "reference"},
}
CACHED: dict[str, dict[str, Any]] = {
    "cached": {"expert_cache_slots": LEAST},
    "cached, layer by layer": {"expert_cache_slots": HALF, "fused": False},
    "cached, reference": {"expert_cache_slots": HALF, "kernels": "reference"},
    "guessing": {"expert_cache_slots": HALF, "prefetch": "on"},
    "behind a link": {"expert_cache_slots": HALF, "emulate_link": 5.0},
    "run in host memory": {"expert_cache_slots": LEAST, "emulate_link": 0.01, "miss": "split"},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


def stats_of(llm: LLM) -> EngineStats:
    stats = llm.engine.stats()
    assert isinstance(stats, EngineStats)
    return stats


@pytest.mark.parametrize("name", [*WHOLE, *CACHED])
def test_every_row_of_an_expert_is_counted_once(store: Path, tmp_path: Path, name: str) -> None:
    options = {**WHOLE, **CACHED}[name]
    path = tmp_path / "a.npz"
    with make(store, record_trace=str(path), num_kv_blocks=24, **options) as llm:
        for _ in range(2):
            generate(llm, 8)
        stats = stats_of(llm)
    trace = read_trace(path)
    counted = [np.bincount(ids.ravel(), minlength=NUM_EXPERTS) for ids in trace.ids.swapaxes(0, 1)]
    np.testing.assert_array_equal(stats.expert_uses, counted)
    assert stats.expert_layers == list(range(NUM_LAYERS))
    assert sum(stats.expert_uses[0]) == stats.step_tokens * TOP_K
    assert stats.num_finished == {"stop": 0, "length": 16, "abort": 0, "error": 0}


@pytest.mark.parametrize("name", CACHED)
def test_what_experts_took_is_told_by_layer_and_by_tier(store: Path, name: str) -> None:
    with make(store, **CACHED[name]) as llm:
        generate(llm)
        stats = stats_of(llm)
        assert isinstance(llm.engine, Engine)
        experts: Any = llm.engine.runner.model.experts
    per_layer, total = stats.experts["per_layer"], stats.experts["total"]
    assert set(per_layer) == set(total) == {
        "hits", "misses", "fetched", "computed_on_cpu", "evictions", "issued", "useful", "late",
        "wasted", "bytes", "disk_bytes", "link_bytes", "host_bytes", "stall_s",
    }  # fmt: skip
    for key, values in per_layer.items():
        assert len(values) == NUM_LAYERS
        assert sum(values) == pytest.approx(total[key])
    is_linked = "emulate_link" in CACHED[name]
    assert total["bytes"] == total["link_bytes" if is_linked else "disk_bytes"]
    assert total["disk_bytes" if is_linked else "link_bytes"] == 0
    assert total["host_bytes"] == is_linked * total["computed_on_cpu"] * experts.slot_bytes
    if name == "run in host memory":
        assert total["computed_on_cpu"] > 0
    else:
        assert total["bytes"] > 0
    if name == "guessing":
        assert total["issued"] == stats.experts["prefetch"]["issued"]
        assert total["issued"] >= total["useful"] + total["late"] + total["wasted"]
    # who came is still there, or has left
    assert total["fetched"] - total["evictions"] == sum(map(sum, stats.resident))
    assert [sum(layer) for layer in stats.resident] == stats.experts["resident"]
    assert all(len(layer) == NUM_EXPERTS for layer in stats.resident)


def test_blocks_and_prefixes_are_counted(store: Path) -> None:
    prompt, sampling = list(range(10, 50)), SamplingParams(max_tokens=1, temperature=0.0)
    with make(store, num_kv_blocks=10, max_num_seqs=3) as llm:
        first = stats_of(llm)
        assert (first.num_kv_blocks, first.num_free_kv_blocks) == ([10], [10])
        assert (first.num_cached_kv_blocks, first.max_num_seqs) == ([0], 3)
        assert (first.expert_layers, first.resident) == (list(range(NUM_LAYERS)), [])
        assert first.expert_uses == [[0] * NUM_EXPERTS] * NUM_LAYERS
        stream = llm.stream(prompt, SamplingParams(max_tokens=9, ignore_eos=True))
        next(stream)
        running = stats_of(llm)
        assert (running.num_free_kv_blocks, running.num_cached_kv_blocks) == ([7], [0])
        assert (running.num_running, running.num_prompt_tokens) == (1, 40)
        del stream
        gc.collect()
        aborted = stats_of(llm)
        assert (aborted.num_free_kv_blocks, aborted.num_cached_kv_blocks) == ([8], [2])
        assert aborted.num_finished["abort"] == 1
        assert (aborted.prefix_query_tokens, aborted.prefix_hit_tokens) == (39, 0)
        llm.generate([prompt], sampling, use_tqdm=False)
        after = stats_of(llm)
    assert (after.prefix_query_tokens, after.prefix_hit_tokens) == (78, 32)
    assert (after.num_prompt_tokens, after.num_generation_tokens) == (48, 2)
    assert (after.num_steps, after.step_tokens) == (2, 48)


def test_a_dense_model_has_no_experts_to_count(tmp_path: Path) -> None:
    tiny.save_checkpoint(tmp_path, "qwen3")
    with LLM(str(tmp_path), num_kv_blocks=8) as llm:
        llm.generate([[5, 6]], SamplingParams(max_tokens=2, ignore_eos=True), use_tqdm=False)
        stats = stats_of(llm)
    assert (stats.expert_layers, stats.expert_uses, stats.resident) == ([], [], [])
    assert (stats.num_steps, stats.step_tokens, stats.num_generation_tokens) == (2, 3, 2)


def test_they_travel_as_they_are(store: Path) -> None:
    with make(store, expert_cache_slots=HALF) as llm:
        generate(llm)
        stats = stats_of(llm)
    data = msgspec.msgpack.encode(stats)
    assert msgspec.msgpack.decode(data, type=EngineStats) == stats
    json.dumps(msgspec.to_builtins(stats))
