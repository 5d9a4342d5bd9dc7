"""Experts that are not held: the same bits, decided as the simulator does, in the memory given."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_serve import plugin
from moe_serve.engine.engine import Engine
from moe_serve.errors import CapacityError, ConfigError, TraceError
from moe_serve.experts.cache import ExpertCache
from moe_serve.experts.calibration import Calibration
from moe_serve.experts.policies import lfru
from moe_serve.experts.policies.base import CacheShape
from moe_serve.experts.profile import read_profile
from moe_serve.experts.trace import read_trace
from moe_serve.study.replay import recorded_steps, replay_steps
from tests.kernels.implementations import NATIVE, kernels
from tests.offloaded import (
    GREEDY,
    HALF,
    LEAST,
    NUM_EXPERTS,
    NUM_LAYERS,
    QUARTER,
    RECORD_BYTES,
    TEXTS,
    TOP_K,
    comparable,
    generate,
    make,
    num_open_files,
    prompts,
    report,
    resident_bytes,
    transfer_threads,
)

# what serves has no future to look into
POLICIES = [name for name in plugin.names("moe_serve.experts.policies") if name != "belady"]
PREDICTORS = [name for name in plugin.names("moe_serve.predictors") if name != "oracle"]
BATCH = 16
NUM_RECORDED = 10
HOLDERS: tuple[dict[str, Any], ...] = ({}, {"expert_cache_slots": LEAST}, {"fused": False})


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@functools.cache
def expected(kernels: str = "auto", isa: str = "auto", count: int = 4) -> list[Any]:
    """Return what all experts in memory give."""
    with make(Path("unused"), kernels=kernels, isa=isa) as llm:
        outputs = generate(llm, count)
        assert report(llm) == {}
    assert all(reason == "length" for _, _, reason, _ in outputs)
    return outputs


def check(store: Path, count: int = 4, **options: Any) -> dict[str, Any]:
    """Run with these options, compare all bits, and return what the engine says of its experts."""
    with make(store, **options) as llm:
        outputs = generate(llm, count)
        told = report(llm)
    named = {name: options[name] for name in ("kernels", "isa") if name in options}
    assert outputs == expected(**named, count=count), options
    total = told["total"]
    assert total["misses"] > 0
    assert total["misses"] <= total["fetched"] + total["computed_on_cpu"]
    assert max(told["resident"]) <= NUM_EXPERTS
    assert sum(told["resident"]) <= told["slots"]
    return told


@pytest.mark.parametrize(
    ("name", "fused"),
    [(name, fused) for name in NATIVE for fused in (True, False)] + [("reference", True)],
)
@pytest.mark.parametrize("slots", [HALF, QUARTER, LEAST])
def test_any_number_of_slots_gives_the_same_bits(
    store: Path, name: str, slots: int, fused: bool
) -> None:
    chosen = kernels(name)
    named: dict[str, Any] = {"kernels": chosen.name, "isa": chosen.isa or "auto"}
    told = check(store, expert_cache_slots=slots, fused=fused, **named)
    assert told["slots"] == slots * NUM_LAYERS
    assert (told["streamed_events"] > 0) or slots == HALF


@pytest.mark.parametrize("eviction", POLICIES)
def test_any_eviction_policy_gives_the_same_bits(store: Path, eviction: str) -> None:
    check(store, expert_cache_slots=QUARTER, eviction=eviction)


@pytest.fixture
def bold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let prefetching guess from the start, and at what is far from sure."""
    monkeypatch.setattr(Calibration, "threshold", lambda *_: 0.02)


@pytest.mark.usefixtures("bold")
@pytest.mark.parametrize("predictor", PREDICTORS)
def test_any_predictor_gives_the_same_bits(store: Path, predictor: str) -> None:
    told = check(store, expert_cache_slots=HALF, prefetch="on", predictor=predictor)
    assert told["prefetch"]["issued"] > 0
    assert told["total"]["useful"] + told["total"]["late"] + told["total"]["wasted"] > 0


@pytest.mark.usefixtures("bold")
@pytest.mark.parametrize("slots", [LEAST, 24])
@pytest.mark.parametrize("options", [{}, {"fused": False}, {"emulate_link": 2.0}], ids=str)
def test_guesses_change_no_bit(store: Path, slots: int, options: dict[str, Any]) -> None:
    given: dict[str, Any] = {
        "expert_cache_slots": slots, "prefetch": "on", "predictor": "previous_token",
    }  # fmt: skip
    assert check(store, **given, **options)["prefetch"]["issued"] > 0


@pytest.mark.parametrize("prefetch", ["auto", "on"])
def test_prefetch_as_it_is_gives_the_same_bits(store: Path, prefetch: str) -> None:
    check(store, expert_cache_slots=HALF, prefetch=prefetch)


@pytest.mark.parametrize(
    ("miss", "fused", "gb_per_s"),
    [
        ("copy", True, 0.5), ("copy", False, 4.0), ("split", True, 0.02), ("split", False, 0.02),
        ("auto", True, 4.0), ("auto", True, 0.1),
    ],
)  # fmt: skip
def test_a_split_gives_the_same_bits(store: Path, miss: str, fused: bool, gb_per_s: float) -> None:
    told = check(store, expert_cache_slots=QUARTER, emulate_link=gb_per_s, miss=miss, fused=fused)
    if miss == "copy":
        assert told["total"]["computed_on_cpu"] == 0
    elif gb_per_s < 1:
        assert told["total"]["computed_on_cpu"] > 0


@pytest.mark.parametrize("scope", ["shared", "global"])
@pytest.mark.parametrize("slots", [HALF, LEAST])
def test_any_scope_gives_the_same_bits(store: Path, scope: str, slots: int) -> None:
    told = check(store, expert_cache_slots=slots, expert_cache_scope=scope)
    assert told["slots_per_layer"] is None


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_seqs": 1, "count": 4},
        {"max_num_seqs": BATCH},
        {"max_num_seqs": BATCH, "expert_cache_slots": LEAST},
        {"max_num_seqs": BATCH, "emulate_link": 1.0},
        {"max_prefill_chunk": 5},
        {"threads": 3},
        {"expert_cache_gb": 0.005, "expert_cache_slots": None},
        # both tables, and eviction, with next to no KV
        {"num_kv_blocks": 9, "max_num_seqs": 3},
    ],
    ids=str,
)
def test_any_batch_gives_the_same_bits(store: Path, options: dict[str, Any]) -> None:
    check(store, **{"expert_cache_slots": QUARTER, "count": BATCH, **options})


def test_a_resize_in_mid_run_changes_no_bit(store: Path) -> None:
    sizes = [LEAST, 31, 5, NUM_EXPERTS, QUARTER, LEAST, HALF]
    with make(store, expert_cache_slots=QUARTER) as llm:
        assert isinstance(llm.engine, Engine)
        streams = [llm.stream(text, GREEDY) for text in TEXTS[:3]]
        last = [next(stream) for stream in streams]
        for slots in sizes:
            llm.engine.resize_expert_cache(slots)
            told = report(llm)
            assert told["slots"] == slots * NUM_LAYERS
            assert max(told["resident"]) <= slots
            for index, stream in enumerate(streams):
                last[index] = next(stream)
        for index, stream in enumerate(streams):
            for output in stream:
                last[index] = output
        assert comparable(last) == expected()[:3]


@pytest.mark.usefixtures("bold")
@pytest.mark.parametrize(
    "options",
    [{"expert_cache_scope": "shared"}, {"emulate_link": 0.05}, {"prefetch": "on"}],
    ids=str,
)
def test_a_resize_while_things_are_under_way(store: Path, options: dict[str, Any]) -> None:
    with make(store, expert_cache_slots=12, **options) as llm:
        assert isinstance(llm.engine, Engine)
        stream = llm.stream(TEXTS[0], GREEDY)
        for slots in (5, 12, 4, 9):
            next(stream)
            llm.engine.resize_expert_cache(slots)
            assert report(llm)["slots"] == slots * NUM_LAYERS
        assert comparable([list(stream)[-1]]) == expected()[:1]


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="this system does not tell resident memory"
)
def test_a_smaller_cache_gives_memory_back(store: Path) -> None:
    with make(store, expert_cache_slots=31) as llm:
        assert isinstance(llm.engine, Engine)
        for _ in range(3):
            generate(llm, BATCH)
        full = resident_bytes()
        held = sum(report(llm)["resident"])
        llm.engine.resize_expert_cache(LEAST)
        freed = held - sum(report(llm)["resident"])
        assert freed > 4 * LEAST * NUM_LAYERS
        assert full - resident_bytes() >= 0.7 * freed * RECORD_BYTES
        assert generate(llm) == expected()


def test_a_resize_that_cannot_be_changes_nothing(store: Path) -> None:
    with make(store, expert_cache_slots=QUARTER) as llm:
        assert isinstance(llm.engine, Engine)
        generate(llm, 1)
        before = report(llm)
        for slots, says in ((NUM_EXPERTS + 1, "there is room for 192"), (TOP_K - 1, "uses 4 exp")):
            with pytest.raises(CapacityError, match=says):
                llm.engine.resize_expert_cache(slots)
            assert report(llm) == before
        assert generate(llm) == expected()
    with make(store, expert_cache_slots=QUARTER, emulate_link=4.0) as llm:
        assert isinstance(llm.engine, Engine)
        with pytest.raises(CapacityError, match="there is room for 48"):
            llm.engine.resize_expert_cache(QUARTER + 1)
        llm.engine.resize_expert_cache(LEAST)
        assert generate(llm) == expected()
    with make(store) as llm:
        assert isinstance(llm.engine, Engine)
        with pytest.raises(ConfigError, match="no cache to resize; build the engine with"):
            llm.engine.resize_expert_cache(QUARTER)


# -- decided alike -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "scope", "fused"),
    [
        (1, "layer", True), (8, "layer", True), (1, "layer", False), (8, "layer", False),
        (1, "shared", True), (8, "global", True),
    ],
)  # fmt: skip
def test_runtime_and_replay_miss_alike(
    store: Path, tmp_path: Path, batch: int, scope: str, fused: bool
) -> None:
    path = tmp_path / "a.npz"
    slots = 10
    with make(
        store, expert_cache_slots=slots, expert_cache_scope=scope, eviction="lfru",
        record_trace=str(path), max_num_seqs=batch, fused=fused, max_prefill_chunk=9,
    ) as llm:  # fmt: skip
        outputs = generate(llm, NUM_RECORDED)
        told = report(llm)
    assert outputs == expected(count=NUM_RECORDED)
    trace = read_trace(path)
    shape = CacheShape(
        num_layers=NUM_LAYERS,
        num_experts=NUM_EXPERTS,
        slots_per_layer=slots if scope == "layer" else None,
        total_slots=slots * NUM_LAYERS,
    )
    guaranteed = 0 if scope == "global" else None
    cache = ExpertCache(shape, lfru.build(shape, None), TOP_K, guaranteed)
    misses = [0] * NUM_LAYERS
    num_tokens = 0
    for step in replay_steps(trace, recorded_steps(trace)):
        num_tokens += step.num_tokens
        for layer, (union, counts) in enumerate(zip(step.unions, step.counts, strict=True)):
            misses[layer] += cache.serve(step.number, layer, union, counts)
    assert misses == told["per_layer"]["misses"]
    assert cache.counters.per_layer()["hits"] == told["per_layer"]["hits"]
    assert cache.counters.per_layer()["fetched"] == told["per_layer"]["fetched"]
    assert min(misses) > 0
    assert num_tokens == sum(len(ids) for ids, _, _, _ in outputs) - NUM_RECORDED + _prompt_tokens(
        llm
    )


def _prompt_tokens(llm: Any) -> int:
    return sum(
        len(prompt if isinstance(prompt, list) else llm.tokenizer.encode(prompt))
        for prompt in prompts(NUM_RECORDED)
    )


def test_a_trace_is_the_same_with_and_without_a_cache(store: Path, tmp_path: Path) -> None:
    traces = []
    for index, options in enumerate(HOLDERS):
        path = tmp_path / f"{index}.npz"
        with make(store, record_trace=str(path), **options) as llm:
            assert generate(llm) == expected()
        traces.append(read_trace(path))
    for trace in traces[1:]:
        for name in ("ids", "weights", "seq_offsets", "step", "phase", "token_ids"):
            np.testing.assert_array_equal(getattr(trace, name), getattr(traces[0], name))
        assert trace.model_id == traces[0].model_id


# -- profiles, ends ----------------------------------------------------------------------------


def test_a_usage_profile_warms_the_next_start(store: Path, tmp_path: Path) -> None:
    path = tmp_path / "profile"
    misses = []
    for _ in range(2):
        with make(store, expert_cache_slots=HALF, eviction="lfu", usage_profile=str(path)) as llm:
            assert generate(llm) == expected()
            misses.append(report(llm)["total"]["misses"])
        assert path.exists()
    assert misses[1] < 0.8 * misses[0]


def test_a_profile_counts_what_ran_whoever_held_it(store: Path, tmp_path: Path) -> None:
    uses = []
    for index, options in enumerate(HOLDERS):
        path = tmp_path / str(index)
        with make(store, usage_profile=str(path), record_trace=f"{path}.npz", **options) as llm:
            generate(llm)
        trace = read_trace(path.with_suffix(".npz"))
        assert trace.model_id is not None
        uses.append(read_profile(path, trace.model_id, NUM_LAYERS, NUM_EXPERTS).uses)
        counted = [
            np.bincount(ids.ravel(), minlength=NUM_EXPERTS) for ids in trace.ids.swapaxes(0, 1)
        ]
        np.testing.assert_array_equal(uses[-1], counted)
    np.testing.assert_array_equal(uses[0], uses[1])


@pytest.fixture
def clean() -> Iterator[None]:
    """Nothing of this test may run on, or stay open, after it."""
    gc.collect()
    threads, files = transfer_threads(), num_open_files()
    yield
    gc.collect()
    assert transfer_threads() == threads
    assert num_open_files() <= files


def _with(make_one: Callable[[], Any]) -> None:
    with make_one() as llm:
        generate(llm, 1)


def _closed(make_one: Callable[[], Any]) -> None:
    llm = make_one()
    generate(llm, 1)
    llm.close()
    llm.close()


def _dropped(make_one: Callable[[], Any]) -> None:
    generate(make_one(), 1)
    gc.collect()


def _dropped_in_mid_stream(make_one: Callable[[], Any]) -> None:
    stream = make_one().stream(TEXTS[0], GREEDY)
    next(stream)
    del stream
    gc.collect()


def _closed_at_once(make_one: Callable[[], Any]) -> None:
    make_one().close()


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize(
    ("end", "options"),
    [(end, {}) for end in (_with, _closed, _dropped, _dropped_in_mid_stream, _closed_at_once)]
    + [(end, {"emulate_link": 4.0}) for end in (_with, _dropped_in_mid_stream)],
)
def test_the_end_stops_threads_and_writes_once(
    store: Path,
    tmp_path: Path,
    end: Callable[[Callable[[], Any]], None],
    options: dict[str, Any],
) -> None:
    trace, profile = tmp_path / "a.npz", tmp_path / "a.profile"
    threads = transfer_threads()
    end(
        lambda: make(
            store, expert_cache_slots=QUARTER, record_trace=str(trace), usage_profile=str(profile),
            prefetch="on", **options,
        )
    )  # fmt: skip
    assert transfer_threads() == threads
    if end is not _closed_at_once:
        assert read_trace(trace).num_tokens > 0
    num_tokens = read_trace(trace).num_tokens
    uses = read_profile(profile, str(read_trace(trace).model_id), NUM_LAYERS, NUM_EXPERTS).uses
    assert uses.sum() == num_tokens * NUM_LAYERS * TOP_K
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "a.profile"]


@pytest.mark.usefixtures("clean")
def test_many_models_made_and_dropped_leave_nothing(store: Path) -> None:
    for index in range(5):
        llm = make(store, expert_cache_slots=LEAST + index)
        next(llm.stream(TEXTS[0], GREEDY))
        del llm
    gc.collect()


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize("link", [None, 4.0])
@pytest.mark.parametrize(
    "options",
    [
        {"predictor": "nobody", "prefetch": "on"},
        {"predictor": "oracle", "prefetch": "on"},
        {"eviction": "belady"},
        {"record_trace": "/proc/nowhere/a.npz"},
        {"usage_profile": "/proc/version"},
    ],
    ids=str,
)
def test_a_start_that_fails_leaves_nothing(
    store: Path, options: dict[str, Any], link: float | None
) -> None:
    with pytest.raises((ConfigError, TraceError)):
        make(store, expert_cache_slots=QUARTER, emulate_link=link, **options)


def test_options_that_guide_nothing_are_named(
    store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with make(store, expert_cache_slots=HALF, prefetch="off", predictor="popularity"):
        pass
    assert "prefetch is off, so there is no effect of: predictor" in caplog.text
    with make(store, expert_cache_slots=HALF, eviction="static"):
        pass
    assert "usage_profile" in caplog.text
