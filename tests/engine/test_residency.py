"""How many experts are held follows from options or memory, and is refused with what is enough."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_serve.config import EngineConfig
from moe_serve.engine.residency import Residency, plan_residency
from moe_serve.errors import CapacityError, ConfigError
from moe_serve.kernels import suite
from moe_serve.models.checkpoint import weights_bytes
from moe_serve.models.expert_weights import names_without_experts
from moe_serve.models.hf_config import HFConfig
from moe_serve.models.registry import read_spec
from moe_serve.models.spec import ModelSpec
from tests.models.bad_checkpoints import CONFIG

GIB = 2**30
SLOT_BYTES = 4096  # CONFIG's experts are small: one block of the disk each
NUM_LAYERS, NUM_EXPERTS, TOP_K = 2, 4, 2


@pytest.fixture
def spec() -> ModelSpec:
    return read_spec(HFConfig(dict(CONFIG), Path("config.json")))


def plan(
    spec: ModelSpec, available: int = GIB, *, on_gpu: bool = False, **options: Any
) -> Residency:
    config = EngineConfig.from_options({"num_kv_blocks": 4, **options})
    kernels = suite.load("reference")
    if on_gpu:
        kernels = dataclasses.replace(kernels, name="triton")
    return plan_residency(config, spec, torch.float32, kernels, 64, available)


def others_bytes(spec: ModelSpec) -> int:
    return weights_bytes(spec, torch.float32, names_without_experts(spec))


@pytest.mark.parametrize(
    ("options", "per_layer", "total"),
    [
        ({"expert_cache_slots": 3}, 3, 6),
        ({"expert_cache_slots": 2}, 2, 4),
        ({"expert_cache_gb": 7.5 * SLOT_BYTES / GIB}, 3, 6),
        ({"expert_cache_gb": 7.5 * SLOT_BYTES / GIB, "expert_cache_scope": "shared"}, None, 7),
        ({"expert_cache_gb": 7.5 * SLOT_BYTES / GIB, "expert_cache_scope": "global"}, None, 7),
        ({"expert_cache_slots": 3, "expert_cache_scope": "global"}, None, 6),
    ],
    ids=str,
)
def test_options_say_how_many_slots_there_are(
    spec: ModelSpec, options: dict[str, Any], per_layer: int | None, total: int
) -> None:
    found = plan(spec, **options)
    assert found.shape is not None
    assert (found.shape.slots_per_layer, found.shape.total_slots) == (per_layer, total)
    assert (found.shape.num_layers, found.shape.num_experts) == (NUM_LAYERS, NUM_EXPERTS)
    assert (found.slot_bytes, found.top_k) == (SLOT_BYTES, TOP_K)
    assert found.model_bytes == others_bytes(spec) + total * SLOT_BYTES


def test_slots_to_stream_through_are_counted_and_only_where_they_are(
    spec: ModelSpec, caplog: pytest.LogCaptureFixture
) -> None:
    plain = plan(spec, expert_cache_slots=2, on_gpu=True)
    assert plain.stream_slots == 0, "so few slots have none"
    found = plan(spec, expert_cache_slots=2, expert_stream_slots=3, on_gpu=True)
    assert found.stream_slots == 3
    assert found.model_bytes == plain.model_bytes + 3 * SLOT_BYTES
    assert "expert_stream_slots" not in caplog.text
    assert plan(spec, expert_cache_slots=2, expert_stream_slots=3).stream_slots == 0
    assert "expert_stream_slots has no effect" in caplog.text
    most = 2 * (NUM_EXPERTS - 2)
    found = plan(spec, expert_cache_slots=2, expert_stream_slots=10**9, on_gpu=True)
    assert found.stream_slots == most
    assert "as many slots are made" in caplog.text
    room = others_bytes(spec) + 8 * SLOT_BYTES
    few = {"num_kv_blocks": 1, "max_num_seqs": 1, "max_num_batched_tokens": 16}
    asked = {"expert_cache_slots": 2, "expert_stream_slots": most}
    assert plan(spec, room, on_gpu=True, **few, **asked).stream_slots == most
    says = "and 4 stream slots 16384 bytes.*give expert_stream_slots 0, or"
    with pytest.raises(CapacityError, match=says):
        plan(spec, room - 1, on_gpu=True, **few, **asked)


def test_behind_a_link_the_host_s_records_count_too(spec: ModelSpec) -> None:
    found = plan(spec, expert_cache_slots=3, emulate_link=4.0)
    held = NUM_LAYERS * NUM_EXPERTS + 6
    assert found.model_bytes == others_bytes(spec) + held * SLOT_BYTES
    # a link is emulated also where all would fit
    assert plan(spec, expert_cache_slots=9, emulate_link=4.0).shape is not None
    with pytest.raises(ConfigError, match="emulate_link needs expert_cache_slots or"):
        plan(spec, emulate_link=4.0)


@pytest.mark.parametrize("options", [{}, {"expert_cache_slots": 4}, {"expert_cache_gb": 1.0}])
def test_where_all_fit_there_is_no_cache(
    spec: ModelSpec, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    found = plan(spec, **options)
    assert found.shape is None
    assert found.model_bytes == others_bytes(spec) + NUM_LAYERS * NUM_EXPERTS * SLOT_BYTES
    assert ("all 4 experts of each layer are held" in caplog.text) == bool(options)


def least_for_all(spec: ModelSpec) -> int:
    """Return the least memory in which `auto` holds all."""
    low, high = 0, GIB
    while low < high:
        middle = (low + high) // 2
        try:
            fits = plan(spec, middle).shape is None
        except CapacityError:
            fits = False
        low, high = (low, middle) if fits else (middle + 1, high)
    return low


def test_auto_holds_what_memory_leaves_room_for(spec: ModelSpec) -> None:
    enough = least_for_all(spec)
    assert enough >= others_bytes(spec) + NUM_LAYERS * NUM_EXPERTS * SLOT_BYTES
    found = plan(spec, enough - 1)
    assert found.shape is not None
    assert found.shape.slots_per_layer == 3
    assert found.model_bytes < enough
    refused = enough - 5 * SLOT_BYTES
    with pytest.raises(CapacityError, match=rf"{refused} bytes \(.*available"):
        plan(spec, refused)
    # room for keys and values is left free first
    with pytest.raises(CapacityError, match="40 KV blocks"):
        plan(spec, enough, num_kv_blocks=40)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"expert_cache_slots": 1}, r"1 expert slots a layer, but a token uses 2 .*_slots 2"),
        ({"expert_cache_gb": 1e-7}, r"0 expert slots a layer"),
        (
            {"expert_cache_gb": 3.5 * SLOT_BYTES / GIB, "expert_cache_scope": "global"},
            r"3 expert slots for 2 layers, .*at least 4 in all: expert_cache_gb 1.53e-05",
        ),
    ],
    ids=["slots", "gib", "global"],
)
def test_less_than_a_token_uses_is_refused(
    spec: ModelSpec, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(CapacityError, match=says) as caught:
        plan(spec, **options)
    assert "memory are available" not in str(caught.value), "that is not what was too little"


def test_layers_of_several_shapes_take_slots_of_the_largest(spec: ModelSpec) -> None:
    moe = spec.layers[1].moe
    assert moe is not None
    wide = dataclasses.replace(moe, intermediate_size=100)
    both = dataclasses.replace(
        spec, layers=(spec.layers[0], dataclasses.replace(spec.layers[1], moe=wide))
    )
    found = plan(both, expert_cache_slots=3)
    assert found.slot_bytes == 5 * 4096  # 64 + 3 * 16 * 100 * 4 bytes


def test_layers_that_differ_in_how_many_are_used_are_refused(spec: ModelSpec) -> None:
    moe = spec.layers[1].moe
    assert moe is not None
    other = dataclasses.replace(moe, router=dataclasses.replace(moe.router, top_k=3))
    both = dataclasses.replace(
        spec, layers=(spec.layers[0], dataclasses.replace(spec.layers[1], moe=other))
    )
    with pytest.raises(ConfigError, match="only where all are alike"):
        plan(both, expert_cache_slots=3)


def test_a_dense_model_has_nothing_to_hold(
    spec: ModelSpec, caplog: pytest.LogCaptureFixture
) -> None:
    config = {**CONFIG, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
    dense = read_spec(HFConfig(config, Path("config.json")))
    found = plan(dense)
    assert (found.shape, found.model_bytes) == (None, weights_bytes(dense, torch.float32))
    assert not caplog.records
    plan(dense, expert_cache_slots=1, eviction="lru", usage_profile="x")
    (message,) = caplog.messages
    assert "there is nothing to cache or to record" in message
    assert message.endswith("no effect: expert_cache_slots, eviction, usage_profile")
