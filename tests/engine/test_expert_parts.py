"""Experts are made as they were planned; what an option cannot do here is said."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_serve.config import EngineConfig
from moe_serve.engine import expert_parts
from moe_serve.engine.build import build_engine
from moe_serve.engine.engine import Engine
from moe_serve.engine.expert_parts import ExpertParts, default_store_folder
from moe_serve.engine.residency import Residency
from moe_serve.errors import ConfigError, StoreError, TraceError
from moe_serve.experts.device_transfer import DeviceTransfers
from moe_serve.experts.executor import ResidentExperts
from moe_serve.experts.host_experts import HostExperts
from moe_serve.experts.offload import OffloadedExperts
from moe_serve.experts.predictor_state import write_state
from moe_serve.experts.profile import UsageProfile, read_profile, write_profile
from moe_serve.experts.staged_transfer import StagedTransfers
from moe_serve.kernels import suite
from moe_serve.models.checkpoint_folder import model_hash
from moe_serve.models.hf_config import HFConfig
from moe_serve.models.registry import read_spec
from moe_serve.types import Request, SamplingParams
from tests.kernels.implementations import TRITON, kernels
from tests.models.bad_checkpoints import write_checkpoint

NUM_LAYERS, NUM_EXPERTS = 2, 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def build(folder: Path, tmp_path: Path) -> Iterator[Any]:
    """Build engines, which are closed at the end."""
    made: list[Engine] = []

    def one(**options: Any) -> Engine:
        given = {"num_kv_blocks": 8, "expert_store": str(tmp_path / "store"), "prefetch": "off"}
        engine = build_engine(EngineConfig.from_options({**given, **options}), folder)
        made.append(engine)
        return engine

    yield one
    for engine in made:
        engine.close()


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a GPU's kernel on experts, interpreted where there is none, and plain ones beside it."""
    if not TRITON:
        pytest.skip("there is no Triton here")
    chosen = kernels("triton-exact")
    if chosen.device.type == "cpu":
        chosen = replace(kernels("reference"), name="triton", moe=chosen.moe)
    monkeypatch.setattr(suite, "load", lambda *_, **__: chosen)


def offloaded(engine: Engine) -> OffloadedExperts:
    experts = engine.runner.model.experts
    assert isinstance(experts, OffloadedExperts)
    return experts


def run(engine: Engine) -> list[int]:
    sampling = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
    engine.add(Request(request_id="a", prompt_ids=(3, 1, 4, 1, 5), sampling=sampling))
    tokens: list[int] = []
    while engine.has_unfinished:
        for output in engine.step():
            assert output.error is None
            tokens += output.token_ids
    return tokens


def test_three_ways_to_hold_them_give_the_same_tokens(build: Any, tmp_path: Path) -> None:
    whole = build()
    assert isinstance(whole.runner.model.experts, ResidentExperts)
    assert not (tmp_path / "store").exists(), "nothing is packed that is not needed"
    on_disk, behind_link = (
        build(expert_cache_slots=2),
        build(expert_cache_slots=2, emulate_link=1.0),
    )
    assert offloaded(on_disk).cache.shape.total_slots == 4
    (packed,) = (tmp_path / "store").iterdir()
    assert packed.name.startswith("model-")
    assert packed.suffix == ".experts"
    assert run(on_disk) == run(behind_link) == run(whole)
    assert on_disk.stats().model_bytes < whole.stats().model_bytes < behind_link.stats().model_bytes


def test_tables_are_the_cache_s_own(build: Any) -> None:
    for options in ({}, {"emulate_link": 1.0, "miss": "copy"}):
        engine = build(expert_cache_slots=3, **options)
        experts = offloaded(engine)
        run(engine)
        for index, layer in enumerate(sorted(experts.layers)):
            table = experts.layers[layer]
            assert table.slot_of_expert.tolist() == experts.cache.slot_of_expert[index].tolist()
            assert int(table.uses.sum()) == (5 + 4) * 2


def test_a_profile_fills_the_slots_hottest_first(build: Any, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "profile"
    uses = np.array([[0.0, 9.0, 3.0, 5.0], [2.0, 0.0, 0.0, 0.0]])
    write_profile(path, UsageProfile(model_hash(folder, counts_time=False)[:16], uses))
    experts = offloaded(build(expert_cache_slots=2, usage_profile=str(path)))
    while experts.cache.num_loading:
        experts._collect(experts.queue.ended(wait=True))
    assert [experts.cache.residents(layer) for layer in range(NUM_LAYERS)] == [[1, 3], [0]]
    experts.close()
    after = read_profile(path, model_hash(folder, counts_time=False)[:16], NUM_LAYERS, NUM_EXPERTS)
    np.testing.assert_array_equal(after.uses, uses / 2)
    assert after.policy == "adaptive"


def test_a_policy_starts_from_its_own_state_only(build: Any, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "profile"
    engine = build(expert_cache_slots=2, usage_profile=str(path), eviction="static")
    run(engine)
    engine.close()
    state = read_profile(
        path, model_hash(folder, counts_time=False)[:16], NUM_LAYERS, NUM_EXPERTS
    ).policy_state
    assert state
    warm = offloaded(build(expert_cache_slots=2, usage_profile=str(path), eviction="static"))
    cold = offloaded(build(expert_cache_slots=2, eviction="static"))
    every = list(range(NUM_EXPERTS))
    assert warm.cache.policy.scores(0, every) != cold.cache.policy.scores(0, every)
    other = offloaded(build(expert_cache_slots=2, usage_profile=str(path), eviction="lfu"))
    plain = offloaded(build(expert_cache_slots=2, eviction="lfu"))
    assert list(other.cache.policy.scores(0, every)) == list(plain.cache.policy.scores(0, every))


def test_a_split_of_what_is_on_disk_says_that_it_is_none(
    build: Any, caplog: pytest.LogCaptureFixture
) -> None:
    build(expert_cache_slots=2, miss="copy")
    build(expert_cache_slots=2, miss="auto")
    assert caplog.messages == []
    build(expert_cache_slots=2, miss="split")
    (message,) = caplog.messages
    assert "miss='split' has no effect" in message


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"eviction": "lruu"}, ConfigError, "did you mean 'lru'"),
        ({"eviction": "belady"}, ConfigError, "for `simulate` only"),
        ({"predictor": "nobody", "prefetch": "on"}, ConfigError, "there is no 'nobody'"),
        ({"predictor_state": "/proc/nowhere", "prefetch": "on"}, TraceError, "/proc/nowhere"),
        ({"record_trace": "/proc/nowhere/a.npz"}, TraceError, "its folder is not there"),
        ({"expert_store": "/proc/nowhere"}, StoreError, "/proc/nowhere"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
@pytest.mark.parametrize("link", [None, 1.0])
def test_what_cannot_be_is_refused_and_leaves_no_thread(
    build: Any, options: dict[str, Any], error: type[Exception], says: str, link: float | None
) -> None:
    if "expert_store" in options and link is not None:
        assert run(build(expert_cache_slots=2, emulate_link=link, **options)), "it packs nothing"
        return
    before = threading.active_count()
    with pytest.raises(error, match=says):
        build(expert_cache_slots=2, emulate_link=link, **options)
    assert threading.active_count() == before


def test_another_predictor_s_file_is_refused(build: Any, tmp_path: Path) -> None:
    path = tmp_path / "state"
    write_state(path, "transition", {"x": np.zeros(3)})
    options = {"expert_cache_slots": 2, "prefetch": "on", "predictor_state": str(path)}
    with pytest.raises(TraceError, match="holds what transition learned"):
        build(predictor="popularity", **options)
    with pytest.raises(TraceError, match="predictor's file"):
        build(predictor="transition", **options)


def test_stores_are_in_the_user_s_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/a/b")
    assert default_store_folder() == Path("/a/b/moe_serve/experts")
    for given in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        monkeypatch.setenv("HOME", "/c")
        assert default_store_folder() == Path("/c/.cache/moe_serve/experts")

    def homeless() -> Path:
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(ConfigError, match="give expert_store"):
        default_store_folder()


@pytest.mark.usefixtures("on_gpu")
def test_a_gpu_has_slots_before_host_memory_or_before_a_store(
    build: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = build()
    in_memory = build(expert_store=None, expert_cache_slots=2)
    assert not (tmp_path / "store").exists(), "nothing is packed that is not needed"
    on_disk = build(expert_cache_slots=2)
    assert len(list((tmp_path / "store").iterdir())) == 1
    assert isinstance(offloaded(in_memory).queue, DeviceTransfers)
    assert isinstance(offloaded(on_disk).queue, StagedTransfers)
    tokens = run(whole)
    for engine, tier in ((in_memory, "link_bytes"), (on_disk, "disk_bytes")):
        assert run(engine) == tokens
        total = offloaded(engine).report()["total"]
        assert total["misses"] == total["fetched"] > 0
        assert total["bytes"] == total[tier]
    assert "not exact" not in caplog.text


def test_records_that_host_memory_does_not_hold_stay_on_disk(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig.from_options({"expert_store": None})
    spec = read_spec(HFConfig.read(folder))
    residency = Residency(None, 4096, 0, 2)

    def is_held_by_host(share: Any = None) -> bool:
        parts = ExpertParts(
            config, spec, torch.float32, kernels("reference"), residency, folder, "", share=share
        )
        return parts._is_held_by_host()

    assert is_held_by_host()
    assert not is_held_by_host(share=object()), "a rank's placement changes"
    needed = NUM_LAYERS * NUM_EXPERTS * 4096
    monkeypatch.setattr(expert_parts, "available_bytes", lambda: needed)
    assert not is_held_by_host(), "there must be room for more than these"


@pytest.mark.usefixtures("on_gpu")
def test_a_gpu_begins_with_what_was_used_before(build: Any, tmp_path: Path) -> None:
    profile = str(tmp_path / "uses.npz")
    options = {"expert_store": None, "expert_cache_slots": 2, "usage_profile": profile}
    first = build(**options)
    assert offloaded(first).cache.num_resident() == [0] * NUM_LAYERS
    run(first)
    first.close()
    assert offloaded(build(**options)).cache.num_resident() == [2] * NUM_LAYERS


@pytest.mark.usefixtures("on_gpu")
def test_a_split_on_a_gpu_is_said_not_to_be_exact(
    build: Any, caplog: pytest.LogCaptureFixture
) -> None:
    split = build(expert_store=None, miss="split", prefetch="on", expert_cache_slots=2)
    assert "miss='split' on a GPU is not exact" in caplog.text
    experts = offloaded(split)
    assert isinstance(experts._host, HostExperts)
    assert experts._host.planner is not None
    assert not experts._host.planner.costs.is_one_processor
    assert len(run(split)) == 5
    caplog.clear()
    build(miss="split", expert_cache_slots=2)
    assert "miss='split' has no effect: the experts that are missing are on disk" in caplog.text
    with pytest.raises(ConfigError, match="emulate_link stands for a GPU's link"):
        build(emulate_link=1.0, expert_cache_slots=2)
