"""What strategies are given, counted from the routing of tokens."""

from __future__ import annotations

import numpy as np

from moe_serve.experts.placement.base import Array, RoutingStats

_PART = 8192  # tokens at once


def count(ids: Array, num_experts: int) -> RoutingStats:
    """Count integer [num_tokens, num_layers, top_k]; see `RoutingStats`."""
    num_tokens, num_layers, top_k = ids.shape
    load = np.zeros((num_layers, num_experts))
    together = np.zeros((num_layers, num_experts, num_experts))
    hops = np.zeros((max(0, num_layers - 1), num_experts, num_experts))
    for first in range(0, num_tokens, _PART):
        part = ids[first : first + _PART]
        rows = np.arange(len(part))[:, None]
        before = None
        for layer in range(num_layers):
            used = np.zeros((len(part), num_experts), np.float32)
            used[rows, part[:, layer]] = 1.0
            load[layer] += used.sum(axis=0, dtype=np.float64)
            together[layer] += used.T @ used
            if before is not None:
                hops[layer - 1] += before.T @ used
            before = used
    together[:, np.arange(num_experts), np.arange(num_experts)] = 0.0
    hops /= top_k * top_k
    return RoutingStats(
        num_tokens=num_tokens,
        top_k=top_k,
        load=load,
        coactivation=together,
        transitions=hops,
        ids=ids,
    )
