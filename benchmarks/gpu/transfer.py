"""Bringing experts in: the engine's own transfers beside the pinned rate, and beside kernels.

Prediction: records of 9 MB are long enough for the link's full rate; a step whose misses are
brought in while other experts run shows copies and kernels at once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

from benchmarks.gpu import timeline
from benchmarks.gpu.engines import Decoding, num_blocks, offloaded, running
from benchmarks.gpu.figures import Failure, Figure, attempted, plain, rate
from benchmarks.gpu.limits import Limits
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.shapes import QWEN3_30B, TINY, with_layers
from benchmarks.peers.shape import Shape
from moe_serve.engine.engine import Engine
from moe_serve.experts.offload import OffloadedExperts

GOAL_OF_LINK = 0.9
_CONTEXT, _DRY_CONTEXT = 256, 5
_STEPS = 12


def run(setting: Setting) -> Iterator[Figure | Failure]:
    """Measure the transfers alone, then under a decode that misses."""
    shape = setting.pick(with_layers(QWEN3_30B, 8), TINY)
    if setting.wants("transfers alone"):
        yield from attempted("transfers alone", partial(_alone, setting, shape))
    for prefetch in ("off", "on"):
        told = f"decode, prefetch {prefetch}"
        if not setting.wants(told):
            continue
        yield from attempted(told, partial(_beside, setting, shape, prefetch, told))


def _options(shape: Shape, num_tokens: int) -> dict[str, object]:
    return {
        "expert_cache_slots": max(shape.top_k, shape.num_experts // 4),
        "num_kv_blocks": num_blocks(1, num_tokens),
        "max_num_seqs": 1,
        "max_model_len": num_tokens,
    }


def _alone(setting: Setting, shape: Shape) -> Iterator[Figure]:
    limit = Limits(setting).link_gb_s
    with running(setting, shape, prefetch="off", **_options(shape, 64)) as engine:
        experts = offloaded(engine)
        num_slots = experts.cache.shape.total_slots
        per_layer = num_slots // experts.cache.shape.num_layers
        for count in sorted({1, per_layer, num_slots}):
            seconds = [
                demand_s(experts, count, number * count) for number in range(setting.repeats + 1)
            ][1:]
            num_bytes = count * experts.slot_bytes
            name = f"host to device, {count} experts at once, {num_bytes / 1e6:.0f} MB"
            goal = GOAL_OF_LINK if count == num_slots else None
            yield rate(name, seconds, num_bytes / 1e9, "GB/s", limit, goal)


def demand_s(experts: OffloadedExperts, count: int, first: int) -> float:
    """Return the seconds until `count` experts are in slots, whatever was there.

    first: of all experts, layer by layer, those from this one on. The cache's books do not know of
    it: no step may follow.
    """
    shape = experts.cache.shape
    every = shape.num_layers * shape.num_experts
    loads: dict[int, list[tuple[int, int]]] = {}
    for slot in range(count):
        layer, expert = divmod((first + slot) % every, shape.num_experts)
        loads.setdefault(layer, []).append((expert, slot))
    start_s = time.perf_counter()
    for layer, of_layer in loads.items():
        experts.queue.demand(layer, of_layer)
    num_ended = 0
    while num_ended < count:
        ended = experts.queue.ended(wait=True)
        for transfer in ended:
            if transfer.error is not None:
                raise transfer.error
        num_ended += len(ended)
    return time.perf_counter() - start_s


def _beside(setting: Setting, shape: Shape, prefetch: str, told: str) -> Iterator[Figure]:
    context, steps = setting.pick((_CONTEXT, _STEPS), (_DRY_CONTEXT, 1))
    options = _options(shape, context + 3 * steps + 8)
    with running(setting, shape, prefetch=prefetch, **options) as engine:
        decoding = Decoding(engine, shape, 1, context, 2 * steps)
        for _ in range(steps):
            decoding.advance()
        before = engine_bytes(engine)
        spans = timeline.recorded(setting.device, partial(_several, decoding, steps))
        fetched = engine_bytes(engine) - before
        decoding.end()
    print(f"-- {told}", *timeline.drawn(spans), sep="\n", flush=True)
    kernels = timeline.covered(span for span in spans if span.kind == "kernel")
    copies = timeline.covered(span for span in spans if span.kind == "copy in")
    both_s = timeline.overlap_s(kernels, copies)
    kernels_s, copies_s = timeline.length_s(kernels), timeline.length_s(copies)
    yield plain(f"{told}: brought in", [fetched / 1e6 / steps], "MB/step")
    yield plain(f"{told}: kernels", [1e3 * kernels_s / steps], "ms/step")
    yield plain(f"{told}: copies in", [1e3 * copies_s / steps], "ms/step")
    yield plain(f"{told}: both at once", [1e3 * both_s / steps], "ms/step")
    if copies_s and fetched:
        yield plain(f"{told}: rate while copying", [fetched / copies_s / 1e9], "GB/s")


def _several(decoding: Decoding, count: int) -> None:
    for _ in range(count):
        decoding.advance()


def engine_bytes(engine: Engine) -> int:
    """Return what has come over the link since the start, for nothing too."""
    return int(offloaded(engine).report()["total"]["link_bytes"])
