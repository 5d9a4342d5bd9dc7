"""Prompts with few of the experts on the card: bound by the link, over which all others come.

Prediction: a prompt of 8,192 tokens uses every expert of every layer. Of 8 layers at a quarter
resident 7.2 GB must come: 0.14 s at 50 GB/s, more than the 0.02 s that the products take. Within a
layer alone the link is idle while the next one's attention runs, 1 of 19 ms; what is read ahead
fills that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from benchmarks.gpu import timeline
from benchmarks.gpu.engines import num_blocks, offloaded, prompt_seconds, running
from benchmarks.gpu.figures import Failure, Figure, against, attempted, plain
from benchmarks.gpu.limits import Limits
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.shapes import QWEN3_30B, TINY, prompt_flop, with_layers
from benchmarks.gpu.transfer import engine_bytes
from benchmarks.peers.shape import Shape
from benchmarks.results import Row

GOAL_OF_LINK = 0.9
# a whole prompt in one step; one in steps, of which each needs all experts again
_PROMPTS = (8192, 2048)
_DRY_PROMPTS = (9,)
_PERCENTS, _DRY_PERCENTS = (25, 50), (50,)


def run(setting: Setting) -> Iterator[Figure | Failure]:
    """Measure prompts of several lengths, with several shares of the experts on the card."""
    limits = Limits(setting)
    shape = setting.pick(with_layers(QWEN3_30B, 8), TINY)
    for percent in setting.pick(_PERCENTS, _DRY_PERCENTS):
        for read_ahead in (True, False):
            told = f"{percent} % resident" + ("" if read_ahead else ", nothing read ahead")
            if not setting.wants(told):
                continue
            share = partial(_share, setting, limits, shape, percent, told, read_ahead)
            yield from attempted(told, share)


def _share(
    setting: Setting, limits: Limits, shape: Shape, percent: int, told: str, read_ahead: bool
) -> Iterator[Figure]:
    prompts = setting.pick(_PROMPTS, _DRY_PROMPTS)
    longest = max(prompts)
    slots = max(shape.top_k, shape.num_experts * percent // 100)
    with running(
        setting,
        shape,
        numerics="fast",
        prefetch="off",
        expert_cache_slots=slots,
        expert_stream_slots=_stream_slots(setting) if read_ahead else 0,
        num_kv_blocks=num_blocks(1, longest + 1),
        max_num_seqs=1,
        max_num_batched_tokens=longest,
        max_model_len=longest + 1,
    ) as engine:
        record_bytes = offloaded(engine).slot_bytes
        least_bytes = shape.num_layers * (shape.num_experts - slots) * record_bytes
        for length in prompts:
            seconds, fetched = [], []
            for number in range(setting.pick(setting.repeats + 1, 1)):
                before = engine_bytes(engine)
                seconds.append(prompt_seconds(engine, shape, length, number))
                fetched.append((engine_bytes(engine) - before) / 1e9)
            link_s = least_bytes / limits.link_gb_s / 1e9
            flop_s = prompt_flop(shape, length) / limits.matrix_tflop_s / 1e12
            name = f"{told}, prompt of {length}"
            # the first one compiles
            last = seconds[-setting.repeats :]
            yield against(name, last, max(link_s, flop_s), GOAL_OF_LINK if read_ahead else None)
            row = Row.of(
                f"{name}: brought in", fetched[-setting.repeats :], "GB", limit=least_bytes / 1e9
            )
            yield Figure(row=row)
            one_more = partial(prompt_seconds, engine, shape, length, setting.repeats + 1)
            yield from _idle(setting, name, one_more)
        if read_ahead and setting.has_triton:
            told_of = offloaded(engine).report()["read_ahead"]
            yield plain(f"{told}: read ahead", [told_of["used"]], "experts used")
            yield plain(f"{told}: read ahead", [told_of["unused"]], "experts for nothing")


def _stream_slots(setting: Setting) -> int | None:
    """Return as many as there are by default, or two where so small a cache has none."""
    return setting.pick(None, 2 if setting.has_triton else None)


def _idle(setting: Setting, name: str, prompt: Callable[[], object]) -> Iterator[Figure]:
    """Say how much of a prompt's time the link, and the kernels, had something to do."""
    spans = timeline.recorded(setting.device, prompt)
    print(f"-- {name}", *timeline.drawn(spans), sep="\n", flush=True)
    if not spans:
        return
    every_s = max(span.end_s for span in spans) - spans[0].begin_s
    for kind, told in (("copy in", "copies in"), ("kernel", "kernels")):
        busy_s = timeline.length_s(timeline.covered(span for span in spans if span.kind == kind))
        yield plain(f"{name}: {told}", [100 * busy_s / every_s], "% of the time")
