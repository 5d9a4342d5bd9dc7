"""The shapes that are measured, and what a step of them must read and compute at least."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.peers.shape import Shape

QWEN3_30B = Shape(
    hidden_size=2048,
    num_layers=48,
    num_heads=32,
    num_kv_heads=4,
    head_dim=128,
    num_experts=128,
    top_k=8,
    moe_intermediate_size=768,
    vocab_size=151_936,
    max_position_embeddings=40_960,
)
# its layers that have experts, of their sizes; attention is that of Qwen3, not latent
DEEPSEEK_V2_LITE_LIKE = Shape(
    hidden_size=2048,
    num_layers=26,
    num_heads=16,
    num_kv_heads=16,
    head_dim=128,
    num_experts=64,
    top_k=6,
    moe_intermediate_size=1408,
    vocab_size=102_400,
    max_position_embeddings=32_768,
)
TINY = Shape(
    hidden_size=64,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    num_experts=4,
    top_k=2,
    moe_intermediate_size=32,
    vocab_size=64,
    max_position_embeddings=512,
)
REAL = {"qwen3-30b": QWEN3_30B, "deepseek-v2-lite-like": DEEPSEEK_V2_LITE_LIKE}


def with_layers(shape: Shape, num_layers: int) -> Shape:
    """Return a shape of so many layers."""
    return replace(shape, num_layers=num_layers)


def flop(shape: Shape, num_tokens: int, num_sampled: int, num_pairs: float) -> float:
    """Return the operations of a step.

    num_sampled: rows that the head is computed for; num_pairs: of a query and a key that it sees.
    """
    head = shape.hidden_size * shape.vocab_size
    of_token = shape.dense_elements - head
    of_token += shape.num_layers * shape.top_k * shape.expert_elements
    attention = 2.0 * shape.num_heads * shape.head_dim * shape.num_layers * num_pairs
    return 2.0 * (num_tokens * of_token + num_sampled * head + attention)


def prompt_flop(shape: Shape, num_tokens: int) -> float:
    """Return the operations of a prompt that is computed whole, and of which one row is sampled."""
    return flop(shape, num_tokens, 1, num_tokens * (num_tokens + 1) / 2)
