"""Few ranks a token and even loads at once: swaps under a cap, from several starts.

The one-shot form of MoETuner's two steps (arXiv 2502.06643). Starts are the packed placement, the
blocks and random ones; of each layer the result with the best objective is kept, counted on whole
tokens where there are any: ranks a token, and squared imbalance.
"""

from __future__ import annotations

import numpy as np

from moe_serve.experts.placement._pack import pack
from moe_serve.experts.placement._swaps import improve
from moe_serve.experts.placement.base import (
    Array,
    Mesh,
    Placement,
    PlacementOptions,
    RoutingStats,
    blocks,
    from_owners,
    without_replicas,
)

_MOST_TOKENS = 20_000  # that a result is counted on
_LARGE = 400_000  # experts ** 2 * layers, from which on there is one random start: a second in all


def place(
    stats: RoutingStats,
    mesh: Mesh,
    slots_per_rank: int | None,
    options: PlacementOptions,
    current: Placement | None = None,
) -> Placement:
    """See `base`."""
    room = without_replicas(mesh, stats.num_experts, slots_per_rank)
    source = np.random.default_rng(options.seed)
    is_large = stats.num_layers * stats.num_experts**2 > _LARGE
    restarts = min(1, options.restarts) if is_large else options.restarts
    owners = np.empty((stats.num_layers, stats.num_experts), np.int64)
    for layer in range(stats.num_layers):
        load, together = stats.load[layer], stats.coactivation[layer]
        ids = None if stats.ids is None else stats.ids[:_MOST_TOKENS, layer]
        found = []
        for start in _starts(load, room, restarts, source):
            better = improve(
                start, load, together, mesh.num_ranks, options.balance, options.most_imbalance
            )
            found.append((_objective(better, load, together, ids, mesh, options), better))
        owners[layer] = min(found, key=lambda pair: pair[0])[1]
    return from_owners(mesh, owners, "joint")


def _starts(
    load: Array, room: list[int], restarts: int, source: np.random.Generator
) -> list[Array]:
    packed = pack(load, room)
    of_blocks = blocks(room, len(load))
    return [packed, *(of_blocks[source.permutation(len(load))] for _ in range(restarts))]


def _objective(
    owners: Array, load: Array, together: Array, ids: Array | None, mesh: Mesh,
    options: PlacementOptions,
) -> float:  # fmt: skip
    loads = np.bincount(owners, weights=load, minlength=mesh.num_ranks)
    mean = max(float(loads.mean()), 1e-12)
    uneven = float((((loads - mean) / mean) ** 2).sum())
    over = max(0.0, float(loads.max()) / mean - 1 - options.most_imbalance)
    if ids is None:
        traffic = -float(together[owners[:, None] == owners[None, :]].sum()) / max(
            float(together.sum()), 1e-12
        )
    else:
        visited = np.sort(owners[ids], axis=1)
        ranks = 1 + (visited[:, 1:] != visited[:, :-1]).sum(axis=1)
        traffic = float(ranks.mean()) / ids.shape[1]
    return traffic + options.balance * uneven + 100 * over
