"""Sees, while the engine runs, whether experts would be better placed otherwise.

A placement is computed in the background from half of what the latest tokens used, and judged on
the other half; it is taken over only where it is clearly better there, so that noise moves nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moe_serve import plugin
from moe_serve.config import RanksConfig
from moe_serve.experts.placement.base import Array, Placement, PlacementOptions
from moe_serve.experts.routing_stats import count

logger = logging.getLogger(__name__)

# what is not better by this much is not worth moving
LEAST_GAIN = 0.05
# below, counts say little; above, the oldest are forgotten
LEAST_TOKENS, MOST_TOKENS = 512, 16_384


@dataclass(frozen=True, slots=True)
class Proposal:
    """A placement, and what it and the present one cost on tokens that neither was made from."""

    placement: Placement
    cost: float
    present_cost: float

    @property
    def is_better(self) -> bool:
        return self.cost < (1 - LEAST_GAIN) * self.present_cost


def cost_of(placement: Placement, ids: Array) -> float:
    """Return ranks a token visits times the busiest rank's load over the mean, mean of the layers.

    The first stands for what travels, the second for what is waited for. Replicas share a load
    evenly. ids: [num_tokens, num_layers, top_k].
    """
    holds = placement.holds()
    costs = []
    for layer in range(ids.shape[1]):
        shares = holds[layer] / holds[layer].sum(axis=1, keepdims=True)  # [experts, ranks]
        picked = shares[ids[:, layer]]  # [tokens, top_k, ranks]
        visited = (1 - np.prod(1 - picked, axis=1)).sum(axis=1).mean()
        loads = picked.sum(axis=(0, 1))
        costs.append(visited * loads.max() / loads.mean())
    return float(np.mean(costs))


def propose(options: RanksConfig, present: Placement, ids: Array) -> Proposal:
    """Place by the first half of the tokens in each of 32 turns, and judge on the second.

    Raises what the strategy refuses.
    """
    turn = max(1, len(ids) // 32)
    is_learned = np.arange(len(ids)) // turn % 2 == 0
    place = plugin.load("moe_serve.experts.placement", options.rebalance_strategy).place
    stats = count(ids[is_learned], present.num_experts)
    placement: Placement = place(
        stats, present.mesh, options.rebalance_slots, PlacementOptions(), present
    )
    judged = ids[~is_learned]
    placement = replace(placement, model_id=present.model_id)
    return Proposal(placement, cost_of(placement, judged), cost_of(present, judged))


class Rebalancer:
    """Proposes placements every so many steps, from a thread of its own."""

    def __init__(self, options: RanksConfig, present: Placement) -> None:
        assert options.rebalance is not None
        self._options = options
        self._every = options.rebalance
        self.present = present
        self._steps = 0
        self._base = present
        self._ids: list[Array] = []
        self._thread = ThreadPoolExecutor(1, "rebalance")
        self._pending: Future[Proposal] | None = None
        self._begun_s = time.monotonic()
        self._last_s: float | None = None
        self._num_considered = self._num_adopted = 0
        self._error: str | None = None
        self._costs: tuple[float, float] | None = None

    def is_due(self) -> bool:
        """Count a step; return whether the latest routing is wanted now."""
        self._steps += 1
        return self._pending is None and self._steps % self._every == 0

    def learn(self, ids: Sequence[Array]) -> None:
        """Take note of what tokens used. ids: of each rank, [num_tokens, layers, top_k]."""
        self._ids += [one for one in ids if len(one)]
        num_tokens = sum(len(one) for one in self._ids)
        while self._ids and num_tokens - len(self._ids[0]) >= MOST_TOKENS:
            num_tokens -= len(self._ids.pop(0))

    def consider(self) -> None:
        """Begin to look for a better placement, if enough was learned and none is looked for."""
        if self._pending is not None or sum(map(len, self._ids)) < LEAST_TOKENS:
            return
        together = np.concatenate(self._ids)
        self._base = self.present
        self._pending = self._thread.submit(propose, self._options, self.present, together)

    def refused(self, error: Exception) -> None:
        """Take note that what was found cannot be had."""
        self._error = f"{type(error).__name__}: {error}"
        logger.warning("rebalancing: %s", self._error)

    def found(self) -> Placement | None:
        """Return a placement that is to be taken over, if there is one now."""
        if self._pending is None or not self._pending.done():
            return None
        pending, self._pending = self._pending, None
        self._last_s = time.monotonic()
        self._num_considered += 1
        try:
            proposal = pending.result()
        except Exception as error:  # it must not end the service, nor end in silence
            self.refused(error)
            return None
        self._costs = (proposal.present_cost, proposal.cost)
        if not proposal.is_better or self._base is not self.present:
            return None
        self._num_adopted += 1
        return proposal.placement

    def report(self) -> dict[str, Any]:
        """Return what was considered and taken over, and when last (seconds ago, or None)."""
        last = None if self._last_s is None else time.monotonic() - self._last_s
        return {
            "considered": self._num_considered,
            "adopted": self._num_adopted,
            "is_considering": self._pending is not None,
            "last_s": last,
            "costs": self._costs,
            "error": self._error,
        }

    def close(self) -> None:
        """Let go of the thread; what it is computing ends by itself."""
        self._thread.shutdown(wait=False, cancel_futures=True)
