"""Mixtral (8x7B, 8x22B): Mistral's attention, two of eight experts, weights renormalised."""

from __future__ import annotations

from moe_serve.models import base
from moe_serve.models.hf_config import HFConfig
from moe_serve.models.spec import ModelSpec, MoeSpec

_NAMES = base.MoeNames(
    router="block_sparse_moe.gate.weight",
    experts="block_sparse_moe.experts",
    gate="w1",
    up="w3",
    down="w2",
)


def build(config: HFConfig) -> ModelSpec:
    """Return the spec of a config.json of this type."""
    moe = MoeSpec(
        router=base.recipe(config, renormalise=True),
        intermediate_size=config.integer("intermediate_size", low=1, high=2**24),
    )
    attention = base.attention(config, default_theta=1e6, default_kv_heads=8)
    layers = base.sparse_layers(config, base.windows_everywhere(config, None), moe)
    return base.decoder(config, "mixtral", attention, layers, _NAMES, default_norm_eps=1e-5)
