"""How even ranks are in one batch, when experts with replicas share their load out.

Two ways to share: evenly, which needs no counts of the batch; and by filling up, which does, and
which every rank can work out alone from the same counts.
"""

from __future__ import annotations

import numpy as np

from moe_serve.experts.placement.base import Array


def split_evenly(holds: Array, counts: Array) -> Array:
    """Return each rank's load where an expert's replicas get as much each, float64 [num_ranks].

    holds: bool [num_experts, num_ranks]; counts: [num_experts], the batch's rows of each expert.
    """
    loads: Array = (counts / holds.sum(axis=1)) @ holds
    return loads


def fill_up(holds: Array, counts: Array, rounds: int = 1) -> Array:
    """Return each rank's load where replicas are filled like water, float64 [num_ranks].

    First go the experts with one replica. Then, the one with most rows first, each raises those of
    its ranks that are lowest to one level, as far as its rows last. That is best for one expert but
    not for all together, a linear program (DeepSeek's LPLB, github.com/deepseek-ai/LPLB). Each more
    of `rounds` takes every expert out once and fills it in again; the sum of squared loads falls
    each time, and where it is least so is the highest load (Fujishige 1980), so that no solver is
    needed. Rows are taken as divisible. holds: bool [num_experts, num_ranks]; counts:
    [num_experts].
    """
    num_replicas = holds.sum(axis=1)
    loads: Array = counts[num_replicas == 1] @ holds[num_replicas == 1].astype(np.float64)
    several = np.flatnonzero(num_replicas > 1)
    order = several[np.argsort(-counts[several], kind="stable")].tolist()
    ranks_of = {expert: np.flatnonzero(holds[expert]) for expert in order}
    given = {expert: np.zeros(len(ranks_of[expert])) for expert in order}
    for _ in range(rounds):
        for expert in order:
            ranks = ranks_of[expert]
            others = loads[ranks] - given[expert]
            lowest = np.sort(others)
            # the level with the first k ranks under water, for each k: the highest that covers them
            levels = (counts[expert] + lowest.cumsum()) / np.arange(1, len(ranks) + 1)
            level = levels[np.flatnonzero(levels >= lowest)[-1]]
            given[expert] = np.maximum(0.0, level - others)
            loads[ranks] = others + given[expert]
    return loads


def imbalance(loads: Array) -> float:
    """Return (max - mean) / mean of the ranks' loads, as TensorRT-LLM does; 0 without any load."""
    mean = float(loads.mean())
    return float(loads.max()) / mean - 1 if mean else 0.0
