"""How much affinity there is between layers: hops that could stay on their rank, and why.

Hypothesis: at top-6 of 64 experts a placement for affinity keeps twice the hops of chance on their
rank, and more than half of what it wins over chance is load alone, which a shuffled trace has too.
Tokens go on from where they are (ExFlow's layout, simulated; this runtime's tokens return home).

    python -m benchmarks.affinity TRACE.npz [--other TRACE.npz] [--ranks 4,8] [--save]

A hop is from an expert of a layer to one of the next: of a token's heaviest experts (top-1), or any
of all pairs of its experts (all pairs; a token counts 1). stays: the share of hops within a rank,
mean over layers. Learned on the first seven tenths of the sequences, judged on the rest and on
another task. Beside it:

- contiguous, which knows nothing, and chance, 1 / ranks;
- by load: the same placement, judged where every layer's rows are put in another order: loads are
  as they were, what a token did before tells nothing, so that only what is hot on few ranks stays;
- shuffled: affinity learned from such a trace as well, the most that loads alone give; in
  sequences: rows in another order only within each sequence, so that its topic still tells. Medians
  of 3 orders;
- other hops: learned from all pairs where top-1 is judged, and the other way round;
- hindsight: affinity learned from what it is judged on; bound: no placement of as many experts on
  each rank keeps more (of each expert or of each successor the largest hops that fit on one rank).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np

from benchmarks.results import Row, recorded_command, write_results
from moe_serve.experts import routing_stats
from moe_serve.experts.placement import affinity
from moe_serve.experts.placement.base import Array, blocks
from moe_serve.experts.trace import Trace, read_trace
from moe_serve.study.balance import imbalance
from moe_serve.study.place import split

NUM_ORDERS = 3
RESTARTS = 4
KINDS = ("top-1", "all pairs")
ON_SHUFFLED = ("by load", "shuffled", "in sequences")  # of these the bound is another


def choices(trace: Trace, kind: str) -> Array:
    """Return the experts that hops are between, int [num_tokens, num_layers, 1 or top_k]."""
    if kind == "all pairs":
        return trace.ids
    heaviest = trace.weights.argmax(axis=2)  # not all traces have it first
    return np.take_along_axis(trace.ids, heaviest[:, :, None], axis=2)


def hops_of(ids: Array, num_experts: int) -> Array:
    """Return the share of hops between experts, [num_layers - 1, num_experts, num_experts]."""
    hops: Array = routing_stats.count(ids, num_experts).transitions / len(ids)
    return hops


def shuffled(trace: Trace, kind: str, seed: int, within: bool = False) -> Array:
    """Return `choices` with every layer's rows in an order of its own; within: each sequence."""
    ids = choices(trace, kind)
    rng = np.random.default_rng(seed)
    bounds = trace.seq_offsets.tolist() if within else [0, len(ids)]
    found = np.empty_like(ids)
    for layer in range(ids.shape[1]):
        orders = [first + rng.permutation(last - first) for first, last in pairwise(bounds)]
        found[:, layer] = ids[np.concatenate(orders), layer]
    return found


def most_stays(hops: Array, room: int) -> float:
    """Return a bound on `stays` for any placement with at most `room` experts on a rank."""
    from_each = np.sort(hops, axis=2)[:, :, -room:].sum(axis=(1, 2))
    to_each = np.sort(hops, axis=1)[:, -room:, :].sum(axis=(1, 2))
    return float(np.minimum(from_each, to_each).mean())


def learn(hops: Array, room: list[int]) -> Array:
    """Return the owners that affinity finds, int64 [num_layers, num_experts]."""
    return affinity.solve(hops, room, RESTARTS, 0)


def stays(hops: Array, owners: Array) -> float:
    """Return the share of hops within a rank."""
    return affinity.stays(hops, owners) / len(hops)


def rank_imbalance(trace: Trace, owners: Array, ranks: int) -> float:
    """Return (max - mean) / mean of the ranks' loads by all of top_k, mean over layers."""
    found = [
        imbalance(np.bincount(owners[layer][trace.ids[:, layer].ravel()], minlength=ranks))
        for layer in range(trace.num_layers)
    ]
    return float(np.mean(found))


def measure(
    parts: dict[str, Trace], ranks: int, kind: str
) -> Iterator[tuple[str, str, list[float]]]:
    """Yield (part, placement, shares of hops that stay).

    parts: "training", which is learned from, and those that are judged.
    """
    training = parts["training"]
    num_experts = training.num_experts
    room = np.bincount(np.arange(num_experts) % ranks).tolist()
    first = np.tile(blocks(room, num_experts), (training.num_layers, 1))
    other_kind = KINDS[1 - KINDS.index(kind)]
    own = learn(hops_of(choices(training, kind), num_experts), room)
    others = learn(hops_of(choices(training, other_kind), num_experts), room)
    controls = {
        within: [
            learn(hops_of(shuffled(training, kind, seed, within), num_experts), room)
            for seed in range(NUM_ORDERS)
        ]
        for within in (False, True)
    }
    for part, trace in parts.items():
        if trace is training:
            continue
        hops = hops_of(choices(trace, kind), num_experts)
        orders = {
            within: [
                hops_of(shuffled(trace, kind, NUM_ORDERS + seed, within), num_experts)
                for seed in range(NUM_ORDERS)
            ]
            for within in (False, True)
        }
        yield part, "contiguous", [stays(hops, first)]
        yield part, "affinity", [stays(hops, own)]
        yield part, "by load", [stays(order, own) for order in orders[False]]
        yield part, "other hops", [stays(hops, others)]
        for name, within in (("shuffled", False), ("in sequences", True)):
            pairs = zip(orders[within], controls[within], strict=True)
            yield part, name, [stays(order, owners) for order, owners in pairs]
        yield part, "hindsight", [stays(hops, learn(hops, room))]
        yield part, "bound", [most_stays(hops, max(room))]
        yield part, "imbalance", [rank_imbalance(trace, own, ranks)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("trace", type=Path)
    parser.add_argument("--other", type=Path, help="a trace of another task, to judge on as well")
    parser.add_argument("--ranks", default="4,8")
    parser.add_argument("--save", action="store_true", help="keep the figures in results/")
    arguments = parser.parse_args()
    trace = read_trace(arguments.trace)
    training, held_out = split(trace)
    parts = {"training": training, "held out": held_out}
    if arguments.other is not None:
        parts["another task"] = read_trace(arguments.other)
    names = (
        "contiguous", "affinity", "by load", "other hops", "shuffled", "in sequences", "hindsight",
        "bound", "imbalance",
    )  # fmt: skip
    rows: list[Row] = []
    print(f"{trace.name}: {trace.num_layers} layers, {trace.num_experts} experts, "
          f"top-{trace.top_k}; share of hops that stay; imbalance is affinity's")  # fmt: skip
    print(" | ".join(("ranks", "hops", "part", "chance", *names)))
    for ranks in map(int, arguments.ranks.split(",")):
        for kind in KINDS:
            found: dict[str, dict[str, list[float]]] = {}
            for part, name, values in measure(parts, ranks, kind):
                found.setdefault(part, {})[name] = values
            for part, of_part in found.items():
                shown = [f"{np.median(of_part[name]):.3f}" for name in names]
                print(" | ".join((str(ranks), kind, part, f"{1 / ranks:.3f}", *shown)), flush=True)
                base, bound = of_part["contiguous"][0], of_part["bound"][0]
                case = f"{trace.name}, {ranks} ranks, {kind}, {part}"
                rows += [
                    Row.of(
                        f"{case}: hops that stay, {name}, over contiguous",
                        values,
                        "ratio",
                        limit=None if name in ON_SHUFFLED else bound,
                        ratio=float(np.median(values)) / base,
                    )
                    for name, values in of_part.items()
                    if name not in ("bound", "imbalance")
                ]
                rows.append(Row.of(f"{case}: imbalance of affinity", of_part["imbalance"], "ratio"))
    if arguments.save:
        command = recorded_command("benchmarks.affinity", sys.argv[1:])
        slug = "".join(sign if sign.isalnum() else "-" for sign in trace.name.lower()).strip("-")
        print(write_results(f"affinity-{slug}", rows, command=command))


if __name__ == "__main__":
    main()
