"""Swapping experts between ranks as long as it pays: traffic against balance, layer by layer.

The objective of a layer, both parts relative to the start's traffic and the mean load:

    (traffic - start) / start + balance * sum over ranks of ((load - mean) / mean) ** 2

where traffic is the expected number of ranks that a token's experts are on. It is counted through
pairs: two experts that a token uses, on one rank, save a visit. That is exact for pairs and a
bound for more, so swaps are proposed by it; what is reported is counted on whole tokens.
"""

from __future__ import annotations

import numpy as np

from moe_serve.experts.placement.base import Array


def improve(
    owners: Array, load: Array, together: Array, num_ranks: int, balance: float, most: float
) -> Array:
    """Return better owners of one layer's experts, int64 [num_experts]; the given ones are kept.

    together: float64 [num_experts, num_experts], symmetric, zero diagonal. most: no swap may leave
    a rank above (1 + most) times the mean load, unless the heavier of both gets lighter by it.
    Deterministic: of equal gains the lowest pair.
    """
    owners = owners.copy()
    num_experts = len(owners)
    member = np.zeros((num_experts, num_ranks))
    member[np.arange(num_experts), owners] = 1.0
    affinity = together @ member  # [num_experts, num_ranks]
    loads = load @ member
    mean = max(float(loads.mean()), 1e-12)
    pairs = max(float(together.sum()) / 2, 1e-12)
    limit = (1 + most) * mean
    own = np.arange(num_experts)
    for _ in range(40 * num_experts):
        # gain in pairs of swapping e and f: what each finds at the other's, less what it leaves
        to = affinity[:, owners]  # [e, f]: e's affinity to f's rank
        stay = affinity[own, owners]
        gain = to + to.T - stay[:, None] - stay[None, :] - 2 * together
        more = load[None, :] - load[:, None]  # what e's rank gets heavier by
        before = loads[owners]
        after = before[:, None] + more
        worse = (
            (after - mean) ** 2 + (before[None, :] - more - mean) ** 2
            - (before[:, None] - mean) ** 2 - (before[None, :] - mean) ** 2
        ) / mean**2  # fmt: skip
        value = gain / pairs - balance * worse
        highest = np.maximum(after, before[None, :] - more)
        is_allowed = (highest <= limit) | (
            highest < np.maximum(before[:, None], before[None, :]) - 1e-9 * mean
        )
        value[~is_allowed | (owners[:, None] == owners[None, :])] = -np.inf
        has_swapped = False
        while True:  # swaps between ranks that no swap has touched do not change each other
            best = int(value.argmax())
            e, f = divmod(best, num_experts)
            if not value[e, f] > 1e-9:
                break
            has_swapped = True
            g, h = int(owners[e]), int(owners[f])
            change = together[:, f] - together[:, e]
            affinity[:, g] += change
            affinity[:, h] -= change
            loads[g] += load[f] - load[e]
            loads[h] -= load[f] - load[e]
            touched = (owners == g) | (owners == h)
            value[touched] = -np.inf
            value[:, touched] = -np.inf
            owners[e], owners[f] = h, g
        if not has_swapped:
            break
    return owners
