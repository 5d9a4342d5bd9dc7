"""Which replica a token takes: each rank chooses for its own tokens, and tells nobody."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_serve.kernels.exchange.base import Replicas

Array = np.ndarray[Any, Any]

CHOICES = ("nearest", "round_robin", "water_filling")


def candidates(
    holders: Sequence[Sequence[int]], rank: int, ranks_per_node: int, choice: str
) -> Replicas:
    """Return the ranks among which this rank's tokens take turns, for each expert.

    nearest: this rank, else those of its node, else all; otherwise always all.
    """
    chosen = []
    for ranks in holders:
        near = list(ranks)
        if choice == "nearest":
            same = [other for other in ranks if other // ranks_per_node == rank // ranks_per_node]
            near = [rank] if rank in ranks else same or near
        chosen.append(near)
    most = max(map(len, chosen))
    return Replicas(
        torch.tensor([ranks + ranks[:1] * (most - len(ranks)) for ranks in chosen]),
        torch.tensor([len(ranks) for ranks in chosen]),
    )


def filled(replicas: Replicas, expert_ids: Tensor, num_ranks: int) -> Replicas:
    """Return which of `replicas` each token takes, so that its batch is spread like water.

    First go the tokens of experts that have one. Then, the one with most tokens first, each fills
    those of its ranks that have least, to one level. (Per batch, as DeepSeek's LPLB does with a
    linear program.) expert_ids: int64 [num_tokens, top_k], this rank's.
    """
    ids = expert_ids.numpy()
    num_tokens = len(ids)
    ranks, counts = replicas.ranks.numpy(), replicas.counts.numpy()
    uses = np.bincount(ids.ravel(), minlength=len(counts))
    several = np.flatnonzero((counts > 1) & (uses > 0))
    if not len(several):
        return replicas
    loads = np.bincount(ranks[:, 0], np.where(counts == 1, uses, 0), num_ranks)
    table = np.repeat(ranks[:, :1], num_tokens, axis=1)
    for expert in several[np.argsort(-uses[several], kind="stable")]:
        own = ranks[expert, : counts[expert]]
        tokens = (ids == expert).any(1).nonzero()[0]
        shares = _shares(loads[own], len(tokens))
        table[expert, tokens] = np.repeat(own, shares)
        loads[own] += shares
    return Replicas(torch.from_numpy(table), torch.from_numpy(np.where(counts > 1, num_tokens, 1)))


def _shares(loads: Array, num_tokens: int) -> Array:
    """Return how many tokens each rank gets so that the highest load is lowest, ties: the first."""
    order = np.argsort(loads, kind="stable")
    lowest = loads[order]
    levels = (num_tokens + lowest.cumsum()) / np.arange(1, len(loads) + 1)
    reached = np.flatnonzero(levels >= lowest)[-1] + 1  # so many ranks are under water
    shares = np.zeros(len(loads), np.int64)
    under = order[:reached]
    shares[under] = np.floor(levels[reached - 1] - loads[under]).astype(np.int64)
    left = num_tokens - int(shares.sum())
    shares[under[:left]] += 1
    return shares
