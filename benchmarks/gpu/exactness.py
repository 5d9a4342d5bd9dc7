"""Whether tokens and their logprobs are the same bits whatever else runs, in exact numerics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from benchmarks.gpu.engines import num_blocks, request, running
from benchmarks.gpu.figures import Failure, Figure, attempted
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.shapes import QWEN3_30B, TINY, with_layers
from benchmarks.peers.shape import Shape
from benchmarks.results import Row
from moe_serve.types import SamplingParams

Told = dict[str, list[tuple[Any, ...]]]


@dataclass(frozen=True, slots=True)
class Sizes:
    """A shape; how many requests, of up to so many prompt tokens, and how long each runs."""

    shape: Shape
    num_requests: int
    longest: int
    num_output: int
    batch: int


REAL = Sizes(with_layers(QWEN3_30B, 8), 40, 700, 24, 32)
DRY = Sizes(TINY, 2, 7, 2, 2)


@dataclass(frozen=True, slots=True)
class Way:
    """A way to run the same requests. options: of the engine, beside the first way's."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)


def ways(shape: Shape) -> list[Way]:
    """Return the ways; all must tell what the first does."""
    quarter = max(shape.top_k, shape.num_experts // 4)
    return [
        Way("batched, all resident, graphs"),
        Way("one request at a time", {"max_num_seqs": 1}),
        Way("eager", {"fused": False}),
        Way("chunks of 64", {"max_prefill_chunk": 64}),
        Way("a quarter of the experts", {"expert_cache_slots": quarter, "prefetch": "off"}),
        Way("a quarter, prefetched", {"expert_cache_slots": quarter, "prefetch": "on"}),
        Way("a quarter, eager", {"expert_cache_slots": quarter, "fused": False}),
    ]


def run(setting: Setting) -> Iterator[Figure | Failure]:
    """Compare every way with the first."""
    sizes = setting.pick(REAL, DRY)
    base, *others = ways(sizes.shape)
    want = told(setting, sizes, base)
    for way in others:
        if not setting.wants(way.name):
            continue
        yield from attempted(way.name, partial(_compared, setting, sizes, way, want))


def _compared(setting: Setting, sizes: Sizes, way: Way, want: Told) -> Iterator[Figure]:
    share = agreement(told(setting, sizes, way), want)
    row = Row.of(
        f"{way.name}: tokens and logprobs as batched", [share], "share", limit=1.0, ratio=share
    )
    yield Figure(row=row, goal=1.0)


def agreement(found: Told, want: Told) -> float:
    """Return the share of the steps of all requests that tell the same, bit for bit."""
    assert found.keys() == want.keys(), (sorted(found), sorted(want))
    same = sum(
        one == other for name in want for one, other in zip(found[name], want[name], strict=True)
    )
    return same / sum(map(len, want.values()))


def told(setting: Setting, sizes: Sizes, way: Way) -> Told:
    """Return the tokens and logprobs of each request, step by step."""
    length = sizes.longest + sizes.num_output
    found: Told = {}
    options = {
        "numerics": "exact",
        "num_kv_blocks": num_blocks(sizes.batch, length),
        "max_num_seqs": sizes.batch,
        "max_model_len": length,
        **way.options,
    }
    with running(setting, sizes.shape, **options) as engine:
        print(f"-- {way.name}: {engine.numerics_id}", flush=True)
        for number in range(sizes.num_requests):
            one = request(sizes.shape, number, 1 + number * 37 % sizes.longest, sizes.num_output)
            sampling = SamplingParams(
                temperature=float(number % 2),
                seed=number,
                logprobs=2,
                max_tokens=sizes.num_output,
                ignore_eos=True,
            )
            engine.add(replace(one, sampling=sampling))
            found[one.request_id] = []
        while engine.has_unfinished:
            for output in engine.step():
                if output.error is not None:
                    raise RuntimeError(output.error)
                found[output.request_id].append((output.token_ids, repr(output.logprobs)))
    return found
