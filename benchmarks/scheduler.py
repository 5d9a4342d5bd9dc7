"""Time per step of the scheduler alone: schedule + finish of steady decode, with a fake model.

Hypothesis: a step costs at most 50 us with 1 running request, 1 ms with 256 and 5 ms with 4,096,
and grows linearly: the scheduler is never what a batch waits for. Block size 16, prefix cache on;
each sample is the mean over 64 steps, so that every sequence takes four new blocks in it.

    python -m benchmarks.scheduler [--save]

With --save the figures are also kept in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import sys
import time

from benchmarks.results import Row, recorded_command, write_results
from moe_serve import plugin
from moe_serve.engine.kv_cache import KVCacheManager
from moe_serve.engine.scheduler import Scheduler
from moe_serve.engine.sequence import SamplerOutput
from moe_serve.types import CacheGroup, Request, SamplingParams

GOALS_US = {1: 50.0, 256: 1_000.0, 4_096: 5_000.0}
BLOCK_SIZE = 16
STEPS = 64
SAMPLES = 9
MAX_MODEL_LEN = 1_024


def decoding(num_seqs: int) -> Scheduler:
    """Return a scheduler with `num_seqs` running decodes at all offsets in their blocks."""
    blocks = num_seqs * (MAX_MODEL_LEN // BLOCK_SIZE)
    groups = (CacheGroup("full", (0,), 1),)
    scheduler = Scheduler(
        max_num_seqs=num_seqs,
        max_num_batched_tokens=max(8_192, num_seqs),
        max_prefill_chunk=None,
        policy=plugin.load("moe_serve.engine.policies", "fcfs").build(),
        kv=KVCacheManager(groups, (blocks,), BLOCK_SIZE, num_seqs, MAX_MODEL_LEN, True),
        max_model_len=MAX_MODEL_LEN,
        clock=time.perf_counter,
    )
    for index in range(num_seqs):
        prompt = (index, *range(31 + index % BLOCK_SIZE))
        sampling = SamplingParams(max_tokens=MAX_MODEL_LEN - len(prompt), ignore_eos=True)
        scheduler.add(Request(request_id=f"request-{index}", prompt_ids=prompt, sampling=sampling))
    while scheduler.num_waiting:
        run_step(scheduler)
    for _ in range(4):  # the last prompts' chunks
        run_step(scheduler)
    return scheduler


def run_step(scheduler: Scheduler) -> float:
    """Run one step with a model that takes no time; return the seconds of schedule and finish."""
    start = time.perf_counter()
    step = scheduler.schedule()
    scheduled = time.perf_counter()
    assert step is not None
    output = SamplerOutput([7] * len(step.sampled))
    sampled = time.perf_counter()
    scheduler.finish(step, output)
    return scheduled - start + time.perf_counter() - sampled


def measure(num_seqs: int) -> list[float]:
    """Return samples of microseconds per step at `num_seqs` running requests."""
    scheduler = decoding(num_seqs)
    assert scheduler.num_running == num_seqs
    return [sum(run_step(scheduler) for _ in range(STEPS)) / STEPS * 1e6 for _ in range(SAMPLES)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--save", action="store_true", help="keep the figures in results/")
    arguments = parser.parse_args()
    rows = []
    print(f"{'running':>8} {'median us':>10} {'min':>9} {'max':>9} {'goal':>8} {'us/request':>11}")
    for num_seqs, goal_us in GOALS_US.items():
        samples = measure(num_seqs)
        median = sorted(samples)[len(samples) // 2]
        row = Row.of(
            f"scheduler step with {num_seqs} running, over the goal of {goal_us:g} us",
            samples,
            "us",
            ratio=median / goal_us,
        )
        rows.append(row)
        print(
            f"{num_seqs:>8} {row.median:>10.1f} {row.min:>9.1f} {row.max:>9.1f} {goal_us:>8.0f} "
            f"{row.median / num_seqs:>11.2f}"
        )
    if arguments.save:
        command = recorded_command("benchmarks.scheduler", sys.argv[1:])
        print(write_results("scheduler", rows, command=command))


if __name__ == "__main__":
    main()
