"""How even ranks are with replicas: our eplb on synthetic loads, beside published figures.

Hypothesis: with 256 experts in 288 slots on 32 ranks the imbalance of held-out batches is at most
.06; small batches and drift, not the packing, set the limit. Popularity is lognormal with sigma
1.1, which gives the imbalance that was published before balancing, 1.56 to 1.68 (TensorRT-LLM,
DeepSeek-R1 on 32 ranks, tech blog 4). A placement is made from the counts of 100 iterations of
4,096 tokens, top-8, and judged on others, drawn after the popularity drifted where it says so.
Each of 5 seeds draws 58 layers and of each layer 8 batches; imbalance is (max - mean) / mean of
ranks' loads in a batch, mean over layers and batches, median over seeds.

    python -m benchmarks.placement [--save]

Ways to share an expert's rows among its replicas: evenly, and by filling up the lowest ranks of the
batch, once or in 10 rounds (moe_serve/study/balance.py). References are of another simulation with
the same recipe, in which replicas share evenly; published is TensorRT-LLM's, of live traffic. The
limit is that of even sharing: the heaviest single replica on a rank with nothing else. No GPU, no
model: no figure here is a time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import dataclass

import numpy as np

from benchmarks.results import Row, recorded_command, write_results
from moe_serve.experts.placement import contiguous, eplb
from moe_serve.experts.placement.base import (
    Array,
    Mesh,
    Placement,
    PlacementOptions,
    RoutingStats,
)
from moe_serve.study.balance import fill_up, imbalance, split_evenly

NUM_EXPERTS, TOP_K = 256, 8
SIGMA = 1.1  # of log popularity
NUM_LAYERS, NUM_BATCHES, NUM_SEEDS = 58, 8, 5
TRAINING_TOKENS = 100 * 4096
ROUNDS = 10
GOAL = 0.06


@dataclass(frozen=True, slots=True)
class Case:
    """What is placed and on what it is judged. reference: (before, after), None where unknown."""

    ranks: int
    slots: int
    tokens: int = 4096
    drift: float = 0.0  # sigma of the change of log popularity
    reference: tuple[float | None, float] = (None, 0.0)

    def __str__(self) -> str:
        drift = f", drift {self.drift:g}" if self.drift else ""
        return f"{self.ranks} ranks, {self.slots} slots, {self.tokens} tokens{drift}"


HEADLINE = Case(32, 288, reference=(1.68, 0.058))
PUBLISHED = {(32, 288): (1.564, 0.109), (36, 288): (None, 0.115)}
CASES = (
    Case(32, 256, reference=(1.66, 0.77)),
    HEADLINE,
    Case(36, 288, reference=(1.53, 0.063)),
    Case(64, 320, reference=(2.13, 0.090)),
    Case(32, 288, drift=0.1, reference=(None, 0.10)),
    Case(32, 288, drift=0.3, reference=(None, 0.25)),
    Case(32, 288, drift=0.6, reference=(None, 0.84)),
    Case(32, 288, tokens=1024, reference=(None, 0.12)),
    Case(32, 288, tokens=256, reference=(None, 0.24)),
    Case(32, 288, tokens=64, reference=(None, 0.50)),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one seed, means over layers and batches: imbalances, and mean over highest load."""

    before: float
    even: float
    filled: float
    refilled: float
    limit: float
    balancedness_before: float
    balancedness: float
    balancedness_filled: float
    balancedness_refilled: float


def simulate(case: Case, seed: int, num_layers: int = NUM_LAYERS) -> Outcome:
    """Place by what was counted, and judge on batches of what comes after."""
    rng = np.random.default_rng(seed)
    popularity = np.exp(SIGMA * rng.normal(size=(num_layers, NUM_EXPERTS)))
    later = popularity * np.exp(case.drift * rng.normal(size=popularity.shape))
    counted = rng.multinomial(TRAINING_TOKENS * TOP_K, _shares(popularity))
    before, after = place(case, counted.astype(np.float64))
    batches = rng.multinomial(
        case.tokens * TOP_K, _shares(later)[:, None], size=(num_layers, NUM_BATCHES)
    )  # [num_layers, NUM_BATCHES, NUM_EXPERTS]
    figures = [
        _judge(before_layer, after_layer, counts.astype(np.float64))
        for before_layer, after_layer, of_layer in zip(
            before.holds(), after.holds(), batches, strict=True
        )
        for counts in of_layer
    ]
    return Outcome(*(statistics.fmean(column) for column in zip(*figures, strict=True)))


def place(case: Case, load: Array) -> tuple[Placement, Placement]:
    """Return the placements without and with balancing; load: [num_layers, num_experts]."""
    nothing = np.zeros((len(load), 0, 0))
    stats = RoutingStats(
        num_tokens=TRAINING_TOKENS,
        top_k=TOP_K,
        load=load,
        coactivation=nothing,
        transitions=nothing,
    )
    mesh = Mesh(num_ranks=case.ranks, ranks_per_node=case.ranks)
    options = PlacementOptions()
    return (
        contiguous.place(stats, mesh, None, options),
        eplb.place(stats, mesh, case.slots // case.ranks, options),
    )


def _judge(before: Array, after: Array, counts: Array) -> tuple[float, ...]:
    """Return the figures of one batch, in the order of `Outcome`."""
    alone = float((counts / after.sum(axis=1)).max()) * after.shape[1] / float(counts.sum())
    found = [
        imbalance(loads)
        for loads in (
            split_evenly(before, counts),
            split_evenly(after, counts),
            fill_up(after, counts),
            fill_up(after, counts, ROUNDS),
        )
    ]
    return (*found, max(0.0, alone - 1), *(1 / (1 + value) for value in found))


def _shares(popularity: Array) -> Array:
    shares: Array = popularity / popularity.sum(axis=1, keepdims=True)
    return shares


def _published(case: Case) -> tuple[float | None, float | None]:
    """Return the imbalance before and after that was published, None where it was not."""
    if case.tokens != 4096 or case.drift:
        return None, None
    return PUBLISHED.get((case.ranks, case.slots), (None, None))


def rows_of(case: Case, outcomes: list[Outcome]) -> list[Row]:
    """Return the rows of a case, over what they are compared with."""
    reference_before, reference = case.reference
    compared = [("reference", reference)]
    if case is HEADLINE:
        compared.append(("goal", GOAL))
    published_before, published = _published(case)
    if published is not None:
        compared.append(("published (live)", published))
    even = [one.even for one in outcomes]
    limit = statistics.median(one.limit for one in outcomes)
    rows = [
        Row.of(
            f"{case}: imbalance, even split, over the {name} of {value:g}",
            even,
            "ratio",
            limit=limit,
            ratio=statistics.median(even) / value,
        )
        for name, value in compared
    ]
    rows += [
        Row.of(
            f"{case}: imbalance, {name}, over even split",
            values,
            "ratio",
            ratio=statistics.median(values) / statistics.median(even),
        )
        for name, values in (
            ("filled up once", [one.filled for one in outcomes]),
            (f"filled up in {ROUNDS} rounds", [one.refilled for one in outcomes]),
        )
    ]
    before = [one.before for one in outcomes]
    for name, given in (("reference", reference_before), ("published (live)", published_before)):
        if given is not None:
            rows.append(
                Row.of(
                    f"{case}: imbalance before, contiguous, over the {name} of {given:g}",
                    before,
                    "ratio",
                    ratio=statistics.median(before) / given,
                )
            )
    for name, values in (
        ("contiguous", [one.balancedness_before for one in outcomes]),
        ("even split", [one.balancedness for one in outcomes]),
        ("filled up once", [one.balancedness_filled for one in outcomes]),
        (f"filled up in {ROUNDS} rounds", [one.balancedness_refilled for one in outcomes]),
    ):
        rows.append(Row.of(f"{case}: balancedness, {name}", values, "ratio", limit=1.0))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--save", action="store_true", help="keep the figures in results/")
    arguments = parser.parse_args()
    rows: list[Row] = []
    print(f"{NUM_EXPERTS} experts, top-{TOP_K}, {NUM_LAYERS} layers, {NUM_SEEDS} seeds; imbalance")
    print(
        f"{'case':44} {'before':>7} {'even':>6} {'least':>6} {'reference':>9} {'published':>9} "
        f"{'once':>6} {'rounds':>6}  balancedness: before, even, once, rounds"
    )
    for case in CASES:
        outcomes = [simulate(case, seed) for seed in range(NUM_SEEDS)]
        rows += rows_of(case, outcomes)
        median = {
            name: statistics.median(getattr(one, name) for one in outcomes)
            for name in Outcome.__dataclass_fields__
        }
        balancedness = [median[name] for name in median if name.startswith("balancedness")]
        published = _published(case)[1]
        print(
            f"{case!s:44} {median['before']:>7.2f} {median['even']:>6.3f} {median['limit']:>6.3f} "
            f"{case.reference[1]:>9.3f} {f'{published:.3f}' if published else '-':>9} "
            f"{median['filled']:>6.3f} {median['refilled']:>6.3f}  "
            + " ".join(f"{value:.3f}" for value in balancedness)
        )
    if arguments.save:
        command = recorded_command("benchmarks.placement", sys.argv[1:])
        print(write_results("placement", rows, command=command))


if __name__ == "__main__":
    main()
