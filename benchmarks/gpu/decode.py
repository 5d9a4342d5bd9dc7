"""Decoding and prompts with all experts on the card, beside its bandwidth and its matrix rate.

Prediction: a step of one request reads 6.2 GB, 1.6 ms at 4 TB/s; as 48 layers are some 700
kernels, graphs decide whether it is bound by that or by launches. At batch 256 all experts are
read, 60 GB, and keys and values, 26 GB: 22 ms. A prompt of 8,192 tokens is 71 TFLOP: 92 ms at
770 TFLOP/s.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from benchmarks.gpu import timeline
from benchmarks.gpu.engines import Decoding, StepCost, num_blocks, prompt_seconds, running
from benchmarks.gpu.figures import Failure, Figure, against, attempted, compared, plain
from benchmarks.gpu.limits import Limits
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.shapes import QWEN3_30B, TINY, prompt_flop
from benchmarks.peers.shape import Shape
from moe_serve.engine.engine import Engine

# of the limit, by the number of requests; and of a prompt
GOALS = {1: 0.6, 32: 0.5, 256: 0.5}
GOAL_OF_PROMPT = 0.5
MOST_SLOWER = 1.3
_NUM_PROFILED = 3
_NUM_LONGEST = 8


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is run: `steps` are timed after `warm`; batches, of `context`; a prompt of so many."""

    shape: Shape
    batches: tuple[int, ...]
    context: int
    prompt: int
    warm: int
    steps: int

    @property
    def most_steps(self) -> int:
        return self.warm + self.steps + _NUM_PROFILED + 1


REAL = Sizes(QWEN3_30B, tuple(GOALS), 1024, 8192, warm=8, steps=15)
DRY = Sizes(TINY, (2,), 9, 9, warm=0, steps=1)


def run(setting: Setting) -> Iterator[Figure | Failure]:
    """Measure fast and exact kernels, each with graphs and without."""
    limits, sizes = Limits(setting), setting.pick(REAL, DRY)
    taken: dict[str, dict[str, list[float]]] = {}
    for numerics in ("fast", "exact"):
        for is_fused in (True, False):
            name = f"{numerics}, {'graphs' if is_fused else 'eager'}"
            taken[name] = {}
            if not setting.wants(name):
                continue
            options: dict[str, object] = {"numerics": numerics, "fused": is_fused}
            one = partial(_engine, setting, limits, sizes, name, options, taken[name])
            yield from attempted(name, one)
    yield from _comparisons(taken)


def _engine(
    setting: Setting,
    limits: Limits,
    sizes: Sizes,
    name: str,
    options: dict[str, object],
    taken: dict[str, list[float]],
) -> Iterator[Figure | Failure]:
    """Measure one engine; `taken` is given the seconds of each figure."""
    most = max(sizes.batches)
    length = sizes.context + sizes.most_steps + most + 2
    blocks = max(num_blocks(most, length), num_blocks(1, sizes.prompt + 1))
    with running(
        setting,
        sizes.shape,
        num_kv_blocks=blocks,
        max_num_seqs=most,
        max_num_batched_tokens=max(sizes.prompt, most),
        max_model_len=max(length, sizes.prompt + 1),
        **options,
    ) as engine:
        print(f"-- {name}: {engine.numerics_id}", flush=True)
        for batch in sizes.batches:
            one = partial(_decode, setting, limits, sizes, engine, name, batch, taken)
            yield from attempted(f"{name}, batch {batch}", one)
        if options["fused"]:  # prompts are not captured
            one = partial(_prompt, setting, limits, sizes, engine, name, taken)
            yield from attempted(f"{name}, prompt", one)


def least_s(cost: StepCost, limits: Limits) -> float:
    """Return the least that a step can take on this card."""
    return max(cost.num_bytes / limits.read_gb_s / 1e9, cost.flop / limits.matrix_tflop_s / 1e12)


def _decode(
    setting: Setting,
    limits: Limits,
    sizes: Sizes,
    engine: Engine,
    name: str,
    batch: int,
    taken: dict[str, list[float]],
) -> Iterator[Figure]:
    told = f"{name}, batch {batch}, context {sizes.context}"
    decoding = Decoding(engine, sizes.shape, batch, sizes.context, sizes.most_steps)
    try:
        for _ in range(sizes.warm):
            decoding.step()
        costs = [decoding.step() for _ in range(sizes.steps)]
        profiled = setting.pick(_NUM_PROFILED, 1)
        spans = timeline.recorded(setting.device, partial(_several, decoding, profiled))
    finally:
        decoding.end()
    seconds = [cost.seconds for cost in costs]
    taken[f"batch {batch}"] = seconds
    limit_s = statistics.median(least_s(cost, limits) for cost in costs)
    goal = GOALS.get(batch) if name == "fast, graphs" else None
    yield against(f"{told}: step", seconds, limit_s, goal)
    yield plain(f"{told}: speed", [batch / one for one in seconds], "tokens/s")
    busy_s = timeline.length_s(timeline.covered(spans)) / profiled
    yield plain(f"{told}: device busy, of a profiled step", [1e3 * busy_s], "ms")
    waiting = [1e3 * max(0.0, one - busy_s) for one in seconds]
    yield plain(f"{told}: device idle, of a step", waiting, "ms")
    for kernel, kernel_s, calls in timeline.longest(spans, _NUM_LONGEST):
        share = f"{told}: {kernel[:40]}, {calls / profiled:g} times"
        yield plain(share, [1e6 * kernel_s / profiled], "us/step")


def _several(decoding: Decoding, count: int) -> None:
    for _ in range(count):
        decoding.advance()


def _prompt(
    setting: Setting,
    limits: Limits,
    sizes: Sizes,
    engine: Engine,
    name: str,
    taken: dict[str, list[float]],
) -> Iterator[Figure]:
    # the first one compiles
    seconds = [
        prompt_seconds(engine, sizes.shape, sizes.prompt, number)
        for number in range(setting.pick(setting.repeats + 1, 1))
    ][-setting.repeats :]
    taken["prompt"] = seconds
    limit_s = prompt_flop(sizes.shape, sizes.prompt) / limits.matrix_tflop_s / 1e12
    goal = GOAL_OF_PROMPT if name == "fast, graphs" else None
    yield against(f"{name}, prompt of {sizes.prompt}", seconds, limit_s, goal)
    yield plain(f"{name}, prompt: speed", [sizes.prompt / one for one in seconds], "tokens/s")


def _comparisons(taken: dict[str, dict[str, list[float]]]) -> Iterator[Figure]:
    """Yield exact beside fast, and graphs beside no graphs."""
    for ours, theirs, goal in (
        ("exact, graphs", "fast, graphs", MOST_SLOWER),
        ("fast, graphs", "fast, eager", None),
        ("exact, graphs", "exact, eager", None),
    ):
        for work in taken[ours]:
            if work in taken[theirs]:
                name = f"{work}: {ours}, against {theirs}"
                yield compared(name, taken[ours][work], taken[theirs][work], goal, is_most=True)
