"""Qwen2-MoE (Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B): a shared expert weighed by a sigmoid gate."""

from __future__ import annotations

from moe_serve.models import base
from moe_serve.models.hf_config import HFConfig
from moe_serve.models.spec import ModelSpec, MoeSpec


def build(config: HFConfig) -> ModelSpec:
    """Return the spec of a config.json of this type."""
    attention = base.attention(
        config, has_qkv_bias=config.boolean("qkv_bias", default=True), default_kv_heads=16
    )
    moe = MoeSpec(
        router=base.recipe(config, renormalise=config.boolean("norm_topk_prob", default=False)),
        intermediate_size=config.integer("moe_intermediate_size", low=1, high=2**24),
        shared_intermediate_size=config.integer(
            "shared_expert_intermediate_size", low=1, high=2**24
        ),
        has_shared_gate=True,
    )
    windows: tuple[int | None, ...] = (None,) * base.num_layers(config)
    if config.boolean("use_sliding_window", default=False):
        border = config.integer("max_window_layers", low=0, default=28)
        windows = base.windows(config, lambda layer: layer % 2 == 0 and layer < border)
    layers = base.sparse_layers(config, windows, moe)
    return base.decoder(config, "qwen2_moe", attention, layers, base.MoeNames())
