"""Synthetic routing for tests: tokens whose experts depend on a topic and on the token before."""

from __future__ import annotations

import numpy as np

from moe_serve.experts.trace import Trace


def synthetic_trace(
    num_seqs: int = 6,
    seq_len: int = 30,
    num_layers: int = 3,
    num_experts: int = 16,
    top_k: int = 2,
    seed: int = 0,
) -> Trace:
    """Return a trace in which a sequence's topic prefers some experts, and tokens repeat."""
    rng = np.random.default_rng(seed)
    num_tokens = num_seqs * seq_len
    ids = np.zeros((num_tokens, num_layers, top_k), np.uint8)
    for sequence in range(num_seqs):
        taste = rng.normal(size=(num_layers, num_experts)) * 1.5
        for token in range(seq_len):
            row = sequence * seq_len + token
            noise = rng.gumbel(size=(num_layers, num_experts))
            ids[row] = np.argsort(-(taste + noise), axis=1)[:, :top_k]
            if token and rng.random() < 0.4:
                ids[row] = ids[row - 1]
    return Trace(
        name="synthetic",
        ids=ids,
        weights=np.full(ids.shape, 1.0 / top_k, np.float16),
        seq_offsets=np.arange(0, num_tokens + 1, seq_len, dtype=np.int64),
        layer_ids=np.arange(num_layers),
        num_experts=num_experts,
        top_k=top_k,
    )
