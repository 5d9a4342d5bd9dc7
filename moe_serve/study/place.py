"""Placements of a trace's experts: made from one part of it, judged on the others.

Splits are by sequence: the first seven tenths train, the rest is held out; another trace is another
task. Baselines (contiguous, eplb packing) stand beside whatever is asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from moe_serve import plugin
from moe_serve.errors import ConfigError
from moe_serve.experts import routing_stats
from moe_serve.experts.placement.base import Mesh, Placement, PlacementOptions, RoutingStats
from moe_serve.experts.trace import Trace
from moe_serve.study.judge import Judged, Topology, judge_placement, least_ranks

STRATEGIES = "moe_serve.experts.placement"
BASELINES = ("contiguous", "eplb")
DEFINITIONS = 1
_TRAINING_SHARE = 0.7
_PARETO = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # of `balance`


@dataclass(frozen=True, kw_only=True, slots=True)
class PlaceOptions:
    """What to place and how to judge it.

    strategies: files of experts/placement. other: a trace of another task, or None. slots_per_rank:
    of a layer; None: no replicas. given: a placement to judge beside them.
    """

    mesh: Mesh
    strategies: tuple[str, ...] = ("joint",)
    slots_per_rank: int | None = None
    other: Trace | None = None
    given: Placement | None = None
    hidden_size: int = 2048
    topology: Topology = field(default_factory=Topology)
    placement: PlacementOptions = field(default_factory=PlacementOptions)


@dataclass(frozen=True, slots=True)
class Placed:
    """A strategy's placement, what it took, and how it is judged: by name of the part."""

    placement: Placement
    seconds: float
    judged: dict[str, Judged]


def place(
    trace: Trace, options: PlaceOptions, progress: Callable[[str], None] | None = None
) -> dict[str, Placed]:
    """Return what each strategy makes of the trace, the baselines first.

    Raises ConfigError for traces or placements of other shapes, or a name that is no strategy;
    CapacityError.
    """
    training, held_out = split(trace)
    other = options.other
    if other is not None and (other.num_layers, other.num_experts, other.top_k) != (
        trace.num_layers, trace.num_experts, trace.top_k,
    ):  # fmt: skip
        raise ConfigError(
            f"{other.name} has {other.num_layers} layers of {other.num_experts} experts, top-"
            f"{other.top_k}, and {trace.name} {trace.num_layers} of {trace.num_experts}, top-"
            f"{trace.top_k}: they are of two models"
        )
    if other is not None:
        _check_tokens(other)
    given = options.given
    if given is not None and (given.mesh, given.num_layers, given.num_experts) != (
        options.mesh, trace.num_layers, trace.num_experts,
    ):  # fmt: skip
        raise ConfigError(
            f"the given placement is of {given.num_layers} layers of {given.num_experts} experts "
            f"on {given.mesh.num_ranks} ranks of {given.mesh.num_nodes} nodes, and this is "
            f"{trace.num_layers} of {trace.num_experts} on {options.mesh.num_ranks} of "
            f"{options.mesh.num_nodes}"
        )
    stats = routing_stats.count(training.ids, trace.num_experts)
    parts = {"training": training, "held out": held_out}
    if other is not None:
        parts["another task"] = other
    names = [*BASELINES, *(name for name in options.strategies if name not in BASELINES)]
    made: dict[str, tuple[Placement, float]] = {}
    for name in names:
        if progress is not None:
            progress(f"{name} ...")
        placement, seconds = run_strategy(name, stats, options)
        source = {"trace": trace.name, "tokens": training.num_tokens}
        made[name] = replace(placement, trained_on=source, model_id=trace.model_id), seconds
    if given is not None:
        made["given"] = given, 0.0
    placed = {}
    for name, (placement, seconds) in made.items():
        judged = {
            part: judge_placement(placement, tokens, options.hidden_size, topology=options.topology)
            for part, tokens in parts.items()
        }
        placed[name] = Placed(placement, seconds, judged)
    return placed


def run_strategy(name: str, stats: RoutingStats, options: PlaceOptions) -> tuple[Placement, float]:
    """Return a strategy's placement and the seconds that it took."""
    strategy = plugin.load(STRATEGIES, name)
    start_s = time.perf_counter()
    found: Placement = strategy.place(
        stats, options.mesh, options.slots_per_rank, options.placement
    )
    return found, time.perf_counter() - start_s


def split(trace: Trace) -> tuple[Trace, Trace]:
    """Return the first seven tenths of the sequences, and the rest."""
    if trace.num_seqs < 2:
        raise ConfigError(
            f"{trace.name} has {trace.num_seqs} sequence, but one part of a trace is learned from "
            "and another judged; record more sequences"
        )
    cut = min(trace.num_seqs - 1, max(1, round(_TRAINING_SHARE * trace.num_seqs)))
    parts = trace.sequences(0, cut), trace.sequences(cut, trace.num_seqs)
    for part in parts:
        _check_tokens(part)
    return parts


def _check_tokens(part: Trace) -> None:
    if not part.num_tokens or not part.num_layers:
        raise ConfigError(
            f"{part.name} has {part.num_tokens} tokens of {part.num_layers} layers: there is "
            "nothing to learn from, or to judge on"
        )


def pareto(trace: Trace, options: PlaceOptions) -> list[dict[str, float]]:
    """Return traffic against balance on what is held out, for weights of balance from none on."""
    training, held_out = split(trace)
    stats = routing_stats.count(training.ids, trace.num_experts)
    points = []
    for balance in _PARETO:
        weighed = replace(
            options.placement, balance=balance, most_imbalance=float("inf"), restarts=1
        )
        placement, _ = run_strategy("joint", stats, replace(options, placement=weighed))
        judged = judge_placement(placement, held_out, options.hidden_size)
        points.append(
            {
                "balance": balance,
                "ranks_per_token": judged.ranks_per_token,
                "imbalance": judged.imbalance,
            }
        )
    return points


def as_json(trace: Trace, options: PlaceOptions, placed: dict[str, Placed]) -> dict[str, Any]:
    """Return all figures, as `--json` prints them."""
    mesh = options.mesh
    return {
        "definitions": DEFINITIONS,
        "trace": trace.name,
        "other": None if options.other is None else options.other.name,
        "ranks": mesh.num_ranks,
        "nodes": mesh.num_nodes,
        "slots_per_rank": options.slots_per_rank,
        "least_ranks_per_token": least_ranks_per_token(trace, options),
        "rows": [
            {"strategy": name, "part": part, "seconds": one.seconds, **judged.as_json()}
            for name, one in placed.items()
            for part, judged in one.judged.items()
        ],
    }


def least_ranks_per_token(trace: Trace, options: PlaceOptions) -> float:
    """Return a bound on what is held out, for placements without replicas; see `least_ranks`."""
    room = options.slots_per_rank or -(-trace.num_experts // options.mesh.num_ranks)
    return least_ranks(split(trace)[1], room)


def notes(placed: Sequence[str]) -> list[str]:
    """Return what a reader of the table must know."""
    found = []
    if "affinity" in placed:
        found.append(
            "affinity gains nothing by its hops where tokens return home after every layer "
            "(two_exchange, which is what runs): look at joint there; it is for coherent, which is "
            "simulated"
        )
    found.append(
        "local: choices on the token's own rank; imbalance: (max - mean) / mean of the ranks' "
        "loads; of batches: of 1,024 tokens at a time; balancedness: vLLM's, utilisation: "
        "SGLang's; kB/token dedup: sent once to a rank, a row for each expert back; two_exchange: "
        "tokens return home after every layer; coherent: they go on from where they are"
    )
    found.append(
        "times (us, 1,024 tokens) are modelled, not measured: from --topology, or rank_gb_per_s "
        "400, node_gb_per_s 40, latency_us 20, expert_us 0.5"
    )
    return found


def table_rows(placed: dict[str, Placed]) -> list[tuple[str, ...]]:
    """Return the cells of the table, a row for each strategy and part."""
    base = placed["contiguous"].judged
    rows: list[tuple[str, ...]] = []
    for name, one in placed.items():
        for part, judged in one.judged.items():
            change = judged.ranks_per_token / base[part].ranks_per_token - 1
            rows.append(
                (
                    name, part, f"{judged.ranks_per_token:.3f}", f"{100 * change:+.1f}",
                    f"{judged.local_share:.3f}", f"{judged.remote_nodes:.3f}",
                    f"{judged.imbalance:.3f}", f"{judged.imbalance_of_batches:.3f}",
                    f"{judged.balancedness:.3f}",
                    f"{judged.utilisation:.3f}", f"{judged.bytes_two_exchange['dedup'] / 1e3:.2f}",
                    f"{judged.us_two_exchange:.0f}", f"{judged.hop_cross:.3f}",
                    f"{judged.hop_cross_node:.3f}", f"{judged.us_coherent:.0f}",
                    f"{one.seconds:.2f}",
                )
            )  # fmt: skip
    return rows


HEAD = (
    "strategy", "part", "ranks/token", "vs contiguous %", "local", "remote nodes", "imbalance",
    "of batches", "balancedness", "utilisation", "kB/token dedup", "us two_exchange", "hops cross",
    "hops cross node", "us coherent", "solver s",
)  # fmt: skip
