"""How fast a model runs here: one batch's latency, or the throughput of many requests.

Prompts are random token ids, and outputs have a fixed length: the text does not matter. They are
new in every round, so that no round is served from the prefix cache of another.
"""

from __future__ import annotations

import platform
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from moe_serve.errors import RequestError
from moe_serve.figures import Row
from moe_serve.llm import LLM
from moe_serve.types import RequestOutput, SamplingParams


def bench_latency(
    llm: LLM, *, input_len: int, output_len: int, batch_size: int, num_iters: int
) -> list[Row]:
    """Serve the same shape of batch again and again; one more round before is not counted."""
    rounds = _rounds(llm, input_len, output_len, batch_size, num_iters)
    shape = f"{batch_size}x{input_len}/{output_len}"
    return [
        Row.of(f"latency {shape}", [wall_s for wall_s, _ in rounds], "s"),
        Row.of(f"ttft {shape}", [_median_ttft_s(outputs) for _, outputs in rounds], "s"),
        Row.of(
            f"output {shape}",
            [batch_size * output_len / wall_s for wall_s, _ in rounds],
            "tokens/s",
        ),
    ]


def bench_throughput(
    llm: LLM, *, input_len: int, output_len: int, num_prompts: int, num_iters: int
) -> list[Row]:
    """Give all prompts at once and count what is done a second; one round before is not counted."""
    rounds = _rounds(llm, input_len, output_len, num_prompts, num_iters)
    shape = f"{num_prompts}x{input_len}/{output_len}"
    num_output = num_prompts * output_len
    num_total = num_prompts * (input_len + output_len)
    walls = [wall_s for wall_s, _ in rounds]
    return [
        Row.of(f"requests {shape}", [num_prompts / wall_s for wall_s in walls], "requests/s"),
        Row.of(f"output {shape}", [num_output / wall_s for wall_s in walls], "tokens/s"),
        Row.of(f"total {shape}", [num_total / wall_s for wall_s in walls], "tokens/s"),
    ]


def bench_report(llm: LLM, command: str, rows: Sequence[Row]) -> dict[str, Any]:
    """Return the figures in the form of benchmarks/results; a package has no commit to name."""
    return {
        "schema": 1,
        "command": command,
        "commit": None,
        "dirty": None,
        "machine": f"{platform.system().lower()}-{platform.machine()}",
        "numerics_id": llm.engine.numerics_id,
        "rows": [asdict(row) for row in rows],
    }


def _rounds(
    llm: LLM, input_len: int, output_len: int, num_prompts: int, num_iters: int
) -> list[tuple[float, list[RequestOutput]]]:
    """Return the seconds and the outputs of each round but the first."""
    limits = (
        ("input_len", input_len),
        ("output_len", output_len),
        ("number of prompts", num_prompts),
        ("num_iters", num_iters),
    )
    for name, value in limits:
        if value < 1:
            raise RequestError(f"{name} is {value}; it must be at least 1")
    if input_len + output_len > llm.engine.max_model_len:
        raise RequestError(
            f"input_len {input_len} and output_len {output_len} are "
            f"{input_len + output_len} tokens; the context holds {llm.engine.max_model_len}"
        )
    noise = random.Random(llm.engine.config.runtime.seed)
    sampling = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)
    rounds = []
    for _ in range(num_iters + 1):
        prompts = [
            [noise.randrange(llm.engine.spec.vocab_size) for _ in range(input_len)]
            for _ in range(num_prompts)
        ]
        start_s = time.perf_counter()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        rounds.append((time.perf_counter() - start_s, outputs))
    return rounds[1:]


def _median_ttft_s(outputs: Sequence[RequestOutput]) -> float:
    return statistics.median(o.metrics.ttft_s for o in outputs if o.metrics.ttft_s is not None)
