"""What a config.json leaves out means what transformers takes it to mean, field by field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moe_serve.errors import CheckpointError
from moe_serve.models.hf_config import HFConfig
from moe_serve.models.registry import model_types, read_spec
from moe_serve.models.spec import ModelSpec
from tests.models import tiny

MODEL_TYPES = pytest.mark.parametrize("model_type", model_types())
# without these there is no model: they are asked for by name, not guessed
REQUIRED = {
    "model_type", "hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads",
    "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size",
    "max_position_embeddings", "num_experts", "num_local_experts", "num_experts_per_tok",
}  # fmt: skip


class Recorded(dict[str, Any]):
    """A config.json that remembers which of its fields were looked at."""

    def __init__(self, fields: dict[str, Any]) -> None:
        super().__init__(fields)
        self.seen: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.seen.add(key)
        return super().get(key, default)


def _fields(model_type: str, **changes: Any) -> dict[str, Any]:
    """Return a whole config.json, nothing left to a default; heads that any default divides."""
    config = AutoConfig.for_model(
        model_type,
        **{**tiny.CONFIGS[model_type], "hidden_size": 128, "num_attention_heads": 32, **changes},
    )
    fields: dict[str, Any] = config.to_dict()
    if "num_local_experts" in fields and "num_experts" in fields:
        del fields["num_local_experts"]  # either name serves, so one must be missing
    return fields


def _of_spec(spec: ModelSpec) -> dict[str, Any]:
    moe = [layer.moe for layer in spec.layers if layer.moe is not None]
    return {
        "elements": sum(weight.num_elements for weight in spec.weights),
        "context": spec.max_position_embeddings,
        "eps": spec.norm_eps,
        "theta": spec.attention.rope.theta,
        "head_dim": spec.attention.head_dim,
        "heads": (spec.attention.num_heads, spec.attention.num_kv_heads),
        "clip": spec.attention.qkv_clip,
        "windows": [layer.window for layer in spec.layers],
        "tied": spec.is_embedding_tied,
        "sparse": [layer.moe is not None for layer in spec.layers],
        "router": [(m.router.num_experts, m.router.top_k, m.router.renormalise) for m in moe],
    }


def _of_transformers(fields: dict[str, Any]) -> dict[str, Any]:
    """Read the same from the model that transformers builds, without memory for its weights."""
    options = {name: value for name, value in fields.items() if name != "model_type"}
    config = AutoConfig.for_model(fields["model_type"], **options)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    layers = model.model.layers
    window = getattr(config, "sliding_window", None) or None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * len(layers)
    heads = config.num_attention_heads
    sparse = [hasattr(layer.mlp, "experts") for layer in layers]
    router = None
    if any(sparse):
        renormalise = getattr(config, "norm_topk_prob", True)  # Mixtral's always does
        router = (config.num_experts, config.num_experts_per_tok, renormalise)
    return {
        "elements": sum(parameter.numel() for parameter in model.parameters()),
        "context": config.max_position_embeddings,
        "eps": model.model.norm.variance_epsilon,
        "theta": config.rope_parameters["rope_theta"],
        "head_dim": layers[0].self_attn.head_dim,
        "heads": (heads, heads // layers[0].self_attn.num_key_value_groups),
        "clip": getattr(config, "clip_qkv", None),
        "windows": [window if kind == "sliding_attention" else None for kind in kinds],
        "tied": config.tie_word_embeddings,
        "sparse": sparse,
        "router": [router] * sum(sparse),
    }


def _spec(fields: dict[str, Any]) -> ModelSpec:
    return read_spec(HFConfig(fields, Path("config.json")))


@MODEL_TYPES
def test_every_field_that_is_read_has_transformers_default(model_type: str) -> None:
    whole = Recorded(_fields(model_type))
    assert _of_spec(_spec(whole)) == _of_transformers(dict(whole))
    present = whole.seen & set(whole)
    assert {"rms_norm_eps", "num_key_value_heads", "rope_parameters"} <= present
    for name in sorted(present - REQUIRED):
        fields = {key: value for key, value in whole.items() if key != name}
        assert _of_spec(_spec(fields)) == _of_transformers(fields), f"without {name}"
    for name in sorted(present & REQUIRED):
        fields = {key: value for key, value in whole.items() if key != name}
        with pytest.raises(CheckpointError, match=name):
            _spec(fields)


@MODEL_TYPES
def test_null_key_value_heads_are_as_many_as_query_heads(model_type: str) -> None:
    spec = _spec({**_fields(model_type), "num_key_value_heads": None})
    assert spec.attention.num_kv_heads == 32


def test_mistral_s_window_is_4096_where_absent_and_none_where_null() -> None:
    fields = _fields("mistral")
    absent = {name: value for name, value in fields.items() if name != "sliding_window"}
    null = {**fields, "sliding_window": None}
    for changed, window in ((absent, 4096), (null, None)):
        assert _of_transformers(changed)["windows"] == [window] * 3
        assert [layer.window for layer in _spec(changed).layers] == [window] * 3


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "qwen2_moe", "qwen3_moe"])
def test_a_window_that_is_switched_on_must_be_given(model_type: str) -> None:
    fields = _fields(model_type, use_sliding_window=True, max_window_layers=1, sliding_window=20)
    assert 20 in {layer.window for layer in _spec(fields).layers}
    with pytest.raises(CheckpointError, match="sliding_window is not set"):
        _spec({**fields, "sliding_window": None})
    del fields["sliding_window"]
    spec = _spec(fields)
    assert 4096 in {layer.window for layer in spec.layers}
    assert _of_spec(spec) == _of_transformers(fields)
