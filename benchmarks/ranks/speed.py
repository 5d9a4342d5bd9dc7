"""What do ranks cost on one machine, and what do experts that move cost a step?

Hypothesis: on a machine whose cores one process already fills, ranks cannot be faster: the limit is
one process with the same cores, and what is above it is collectives and Python. Experts that move
while requests run add a tenth to a step at most.

    python -m benchmarks.ranks.speed [--save]     # the embedded model, 1, 2 and 4 ranks

All worlds are there at once and take turns, so that figures of one round are comparable; those that
are not asked sleep.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from contextlib import ExitStack
from typing import Any

from benchmarks.ranks.cases import random_placement
from benchmarks.results import Row, recorded_command, write_results
from moe_serve.experts.placement.base import Mesh
from moe_serve.launch.lasting import LastingEngine
from moe_serve.llm import LLM
from moe_serve.types import Request, SamplingParams

NUM_LAYERS, NUM_EXPERTS = 6, 32
OUTPUT_LEN = 32
# placements that are taken over in a round, and steps without any beside them
STEPS = 40


def make(size: int, **options: Any) -> LLM:
    ranks = {} if size == 1 else {"ep_size": size}
    common = {"num_kv_blocks": 600, "max_model_len": 128, "enable_prefix_caching": False}
    return LLM(**{**common, **ranks, **options})


def prompts(count: int, seed: int) -> list[list[int]]:
    chance = random.Random(seed)
    return [[chance.randrange(2, 6000) for _ in range(16)] for _ in range(count)]


def run_s(llm: LLM, count: int, seed: int) -> float:
    """Return the seconds that `count` prompts take together."""
    sampling = SamplingParams(max_tokens=OUTPUT_LEN, temperature=0.0, ignore_eos=True)
    begun_s = time.perf_counter()
    llm.generate(prompts(count, seed), sampling, use_tqdm=False)
    return time.perf_counter() - begun_s


def worlds(sizes: list[int], rounds: int, dispatcher: str) -> list[Row]:
    """Time 1, 8 and 32 prompts on each world in turns."""
    rows = []
    with ExitStack() as stack:
        llms = {"one process": stack.enter_context(make(1))}
        llms["one process, layer by layer"] = stack.enter_context(make(1, fused=False))
        for size in sizes:
            llm = stack.enter_context(make(size, dispatcher=dispatcher))
            llms[f"{size} ranks"] = llm
        for count in (1, 8, 32):
            times: dict[str, list[float]] = {name: [] for name in llms}
            for llm in llms.values():
                run_s(llm, count, 0)
            for number in range(rounds):
                for name, llm in llms.items():
                    times[name].append(run_s(llm, count, number))
            best = statistics.median(times["one process"])
            for name, seconds in times.items():
                rates = [count * OUTPUT_LEN / one for one in seconds]
                steps = [1e3 * one / OUTPUT_LEN for one in seconds]
                limit = count * OUTPUT_LEN / best
                label = f"{name}, {count} prompts"
                rate = Row.of(
                    f"{label}: output", rates, "tokens/s",
                    limit=limit, ratio=statistics.median(rates) / limit,
                )  # fmt: skip
                step = Row.of(f"{label}: step", steps, "ms", limit=1e3 * best / OUTPUT_LEN)
                print(
                    f"{label:44s} {rate.value:8.0f} tokens/s of {limit:8.0f}"
                    f" ({rate.ratio:.2f})  {step.value:6.2f} ms a step",
                    flush=True,
                )
                rows += [rate, step]
    return rows


def moves(size: int, rounds: int) -> list[Row]:
    """Time steps with and without experts that move, in turns."""
    chance = random.Random(3)
    mesh = Mesh(num_ranks=size, ranks_per_node=size)
    means: dict[str, list[float]] = {"still": [], "moving": []}
    moved: list[float] = []
    with make(size) as llm:
        engine = llm.engine
        assert isinstance(engine, LastingEngine)
        sampling = SamplingParams(max_tokens=110, temperature=0.0, ignore_eos=True)
        number = 0

        def steps(count: int | None) -> list[float]:
            """Run so many steps, or until all has arrived; return the seconds of each."""
            nonlocal number
            seconds: list[float] = []
            while engine.is_moving if count is None else len(seconds) < count:
                if not engine.has_unfinished:
                    for ids in prompts(8, number):
                        number += 1
                        engine.add(Request(
                            request_id=str(number), prompt_ids=tuple(ids), sampling=sampling
                        ))  # fmt: skip
                    engine.step()  # prompts are no decodes: not timed
                    continue
                begun_s = time.perf_counter()
                engine.step()
                seconds.append(time.perf_counter() - begun_s)
            return seconds

        steps(STEPS)
        for _ in range(rounds):
            before = engine.stats().ranks[0]["experts_moved"]
            still = steps(STEPS)
            engine.place(random_placement(chance, mesh, NUM_LAYERS, NUM_EXPERTS))
            moving = steps(None)
            still += steps(STEPS)
            means["still"].append(1e3 * statistics.mean(still))
            means["moving"].append(1e3 * statistics.mean(moving))
            moved.append(engine.stats().ranks[0]["experts_moved"] - before)
            print(
                f"{size} ranks: {means['still'][-1]:.2f} ms a step, {means['moving'][-1]:.2f} "
                f"while {moved[-1]:.0f} experts move, in {len(moving)} steps",
                flush=True,
            )
    ratios = [a / b for a, b in zip(means["moving"], means["still"], strict=True)]
    ratio = statistics.median(ratios)
    print(f"{size} ranks: a step while experts move takes {ratio:.3f} of one without (limit 1.10)")
    return [
        Row.of(f"{size} ranks: step", means["still"], "ms"),
        Row.of(f"{size} ranks: step while experts move", means["moving"], "ms", ratio=ratio),
        Row.of(f"{size} ranks: moving over still", ratios, "ratio", limit=1.10),
        Row.of(f"{size} ranks: experts moved", moved, "count"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sizes", default="2,4")
    parser.add_argument("--dispatcher", default="auto")
    parser.add_argument("--save", action="store_true", help="keep the figures in results/")
    args = parser.parse_args()
    sizes = [int(size) for size in args.sizes.split(",")]
    rows = worlds(sizes, args.rounds, args.dispatcher)
    for size in sizes:
        rows += moves(size, args.rounds)
    if args.save:
        with make(1) as llm:
            numerics_id = llm.engine.numerics_id
        command = recorded_command("benchmarks.ranks.speed", sys.argv[1:])
        print(write_results("ranks-speed", rows, command=command, numerics_id=numerics_id))


if __name__ == "__main__":
    main()
