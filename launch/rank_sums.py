"""What ranks have counted, as if one engine had."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moe_serve.engine.engine import EngineStats
from moe_serve.launch.messages import RankStats

# what is added up as it is
_NUMBERS = (
    "step_tokens",
    "num_prompt_tokens",
    "num_generation_tokens",
    "num_preemptions",
    "prefix_query_tokens",
    "prefix_hit_tokens",
    "num_waiting",
    "num_running",
    "max_num_seqs",
    "model_bytes",
    "kv_bytes",
)


def together(
    found: Sequence[RankStats],
    num_steps: int,
    imbalance: float | None,
    rebalance: Mapping[str, Any] | None = None,
) -> EngineStats:
    """Return the counts of all ranks in one, and each rank's own.

    num_steps: of all ranks together, in lockstep. rebalance: what came of looking for better
    placements, if that is done.
    """
    stats = [one.stats for one in found]
    ranks = [{"rank": rank, **one.to_json()} for rank, one in enumerate(found)]
    if rebalance is not None:
        ranks[0]["rebalance"] = rebalance
    numbers: dict[str, Any] = {name: sum(getattr(one, name) for one in stats) for name in _NUMBERS}
    return EngineStats(
        num_steps=num_steps,
        num_finished={
            reason: sum(one.num_finished[reason] for one in stats)
            for reason in stats[0].num_finished
        },
        num_kv_blocks=_added(one.num_kv_blocks for one in stats),
        num_free_kv_blocks=_added(one.num_free_kv_blocks for one in stats),
        num_cached_kv_blocks=_added(one.num_cached_kv_blocks for one in stats),
        expert_layers=stats[0].expert_layers,
        expert_uses=[
            _added(layers) for layers in zip(*(one.expert_uses for one in stats), strict=True)
        ],
        resident=[
            [max(flags) for flags in zip(*layers, strict=True)]
            for layers in zip(*(one.resident for one in stats), strict=True)
        ],
        experts=_experts_of([one.experts for one in stats]),
        ranks=ranks,
        rank_imbalance=imbalance,
        **numbers,
    )


def _added(parts: Iterable[Sequence[Any]]) -> list[Any]:
    """Return the sums of what stands at the same place."""
    return [sum(values) for values in zip(*parts, strict=True)]


def _experts_of(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what is said of all ranks' experts in one: counts added up, by layer and in all."""
    if not all(reports):
        return {}
    first = reports[0]
    return {
        "slots": sum(report["slots"] for report in reports),
        "num_experts": first["num_experts"],
        "resident": _added(report["resident"] for report in reports),
        "per_layer": {
            name: _added(report["per_layer"][name] for report in reports)
            for name in first["per_layer"]
        },
        "total": {
            name: sum(report["total"][name] for report in reports) for name in first["total"]
        },
        **_guesses([report["prefetch"] for report in reports if "prefetch" in report]),
    }


def _guesses(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what is said of all ranks' guesses: whether any still makes some, and their counts."""
    if not reports:
        return {}
    counts = {
        name: sum(report[name] for report in reports) for name in ("issued", "given_up", "paused")
    }
    return {"prefetch": {"is_on": any(report["is_on"] for report in reports), **counts}}
