"""The same model, of random weights, in transformers on the same card, then in our engine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.engines import Decoding, num_blocks, prompt_seconds, release, running
from benchmarks.gpu.figures import Failure, Figure, attempted, plain
from benchmarks.gpu.setting import Setting, installed
from benchmarks.gpu.shapes import QWEN3_30B, TINY
from benchmarks.peers.shape import Shape

# batch and context of decodes; tokens of a prompt
_BATCHES, _DRY_BATCHES = ((1, 1024), (32, 1024)), ((2, 9),)
_PROMPT, _DRY_PROMPT = 8192, 9
_WARM, _STEPS = 4, 15

Taken = dict[str, list[float]]


def run(setting: Setting) -> Iterator[Figure | Failure]:
    """Measure theirs, then ours; where transformers is not installed, say so."""
    if not installed("transformers"):
        print("-- transformers is not installed here: nothing to compare with", flush=True)
        return
    shape = setting.pick(QWEN3_30B, TINY)
    theirs: Taken = {}
    yield from attempted("transformers", partial(_theirs, setting, shape, theirs))
    release()
    yield from attempted("moe_serve", partial(_ours, setting, shape, theirs))


def _sizes(setting: Setting) -> tuple[tuple[tuple[int, int], ...], int, int, int]:
    """Return batches, a prompt's length, and steps to warm up and to time."""
    return setting.pick((_BATCHES, _PROMPT, _WARM, _STEPS), (_DRY_BATCHES, _DRY_PROMPT, 0, 1))


def _theirs(setting: Setting, shape: Shape, taken: Taken) -> Iterator[Figure]:
    import transformers

    batches, prompt, warm, steps = _sizes(setting)
    model = _their_model(setting, shape)
    how = getattr(model.config, "_experts_implementation", None)
    name = f"transformers {transformers.__version__}, experts {how}"
    with torch.inference_mode():
        for batch, context in batches:
            seconds = _their_decode(setting, model, shape, batch, context, warm + steps)[warm:]
            taken[f"batch {batch}, context {context}"] = seconds
            yield plain(f"{name}: batch {batch}, context {context}: step", _ms(seconds), "ms")
        seconds = [
            _their_prompt(setting, model, shape, prompt) for _ in range(setting.repeats + 1)
        ][1:]
        taken[f"prompt of {prompt}"] = seconds
        yield plain(f"{name}: prompt of {prompt}", _ms(seconds), "ms")


def _their_model(setting: Setting, shape: Shape) -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    given = {name: value for name, value in shape.config().items() if name != "torch_dtype"}
    config: Any = Qwen3MoeConfig(**given)
    with setting.device:
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            model: Any = Qwen3MoeForCausalLM(config)
        finally:
            torch.set_default_dtype(default)
    return model.eval()


def _ids(setting: Setting, shape: Shape, batch: int, length: int) -> torch.Tensor:
    return torch.randint(shape.vocab_size, (batch, length), device=setting.device)


def _their_decode(
    setting: Setting, model: Any, shape: Shape, batch: int, context: int, steps: int
) -> list[float]:
    """Return the seconds of each step, which ends when its tokens are on the host."""
    given = _ids(setting, shape, batch, context)
    past, seconds = None, []
    for _ in range(steps + 1):
        start_s = time.perf_counter()
        out = model(given, past_key_values=past, use_cache=True, logits_to_keep=1)
        past, given = out.past_key_values, out.logits[:, -1:].argmax(-1)
        given.tolist()
        seconds.append(time.perf_counter() - start_s)
    return seconds[1:]  # the first was the prompts


def _their_prompt(setting: Setting, model: Any, shape: Shape, length: int) -> float:
    given = _ids(setting, shape, 1, length)
    setting.clock.wait()
    start_s = time.perf_counter()
    model(given, use_cache=True, logits_to_keep=1).logits.argmax(-1).tolist()
    return time.perf_counter() - start_s


def _ours(setting: Setting, shape: Shape, theirs: Taken) -> Iterator[Figure]:
    batches, prompt, warm, steps = _sizes(setting)
    most = max(batch for batch, _ in batches)
    length = max(context for _, context in batches) + warm + steps + most + 4
    with running(
        setting,
        shape,
        numerics="fast",
        num_kv_blocks=max(num_blocks(most, length), num_blocks(1, prompt + 1)),
        max_num_seqs=most,
        max_num_batched_tokens=max(prompt, most),
        max_model_len=max(length, prompt + 1),
    ) as engine:
        for batch, context in batches:
            decoding = Decoding(engine, shape, batch, context, warm + steps)
            seconds = [decoding.step().seconds for _ in range(warm + steps)][warm:]
            decoding.end()
            yield _beside(f"batch {batch}, context {context}", seconds, theirs)
        seconds = [
            prompt_seconds(engine, shape, prompt, number) for number in range(setting.repeats + 1)
        ][1:]
        yield _beside(f"prompt of {prompt}", seconds, theirs)


def _beside(work: str, seconds: list[float], theirs: Taken) -> Figure:
    """Return our time; the ratio is theirs to ours: above 1 we are the faster one."""
    figure = plain(f"moe_serve: {work} (ratio: theirs to ours)", _ms(seconds), "ms")
    if work not in theirs:
        return figure
    ratio = statistics.median(theirs[work]) / statistics.median(seconds)
    return Figure(row=replace(figure.row, ratio=ratio))


def _ms(seconds: list[float]) -> list[float]:
    return [1e3 * one for one in seconds]
