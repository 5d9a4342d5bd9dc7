"""The embedded model with experts that are not all held, for tests from end to end."""

from __future__ import annotations

import contextlib
import os
import random
import threading
from pathlib import Path
from typing import Any

from moe_serve.llm import LLM
from moe_serve.types import RequestOutput, SamplingParams

NUM_LAYERS, NUM_EXPERTS, TOP_K = 6, 32, 4  # of the embedded model
HALF, QUARTER, LEAST = 16, 8, 4
RECORD_BYTES = 3 * 256 * 64 * 2  # at least

TEXTS = (
    "Once upon a time, there was a little girl named Lily.",
    "def add(a, b):\n    return",
    "The capital of France",
    "To be or not to be, that is",
)
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, logprobs=2, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=12, temperature=0.9, seed=5, logprobs=2, ignore_eos=True)


def prompts(count: int) -> list[Any]:
    """Return the texts, and after them prompts of token ids, of one to thirty tokens."""
    chance = random.Random(1)
    ids = [
        [chance.randrange(2, 6000) for _ in range(chance.randint(1, 30))]
        for _ in range(count - len(TEXTS))
    ]
    return [*TEXTS, *ids][:count]


def make(store: Path, **options: Any) -> LLM:
    """Return the embedded model, its experts packed in `store`, with a small KV cache."""
    given = {"num_kv_blocks": 256, "max_model_len": 128, "threads": 1, "prefetch": "off"}
    return LLM(**{**given, "expert_store": str(store), **options})


def generate(llm: LLM, count: int = 4) -> list[Any]:
    """Return what must be the same bits: tokens, logprobs and reasons of every prompt."""
    params = [SAMPLED if index % 4 == 3 else GREEDY for index in range(count)]
    return comparable(llm.generate(prompts(count), params, use_tqdm=False))


def comparable(outputs: list[RequestOutput]) -> list[Any]:
    return [
        (part.token_ids, part.logprobs, part.finish_reason, part.error)
        for output in outputs
        for part in output.outputs
    ]


def report(llm: LLM) -> dict[str, Any]:
    """Return what the engine says of its experts."""
    return dict(llm.engine.stats().experts)


def transfer_threads() -> list[str]:
    """Return the threads that bring experts in: Python's by name, native ones by number."""
    found = [t.name for t in threading.enumerate() if t.name.startswith("expert-transfer")]
    for task in sorted(Path("/proc/self/task").iterdir()):
        with contextlib.suppress(FileNotFoundError):  # it has just ended
            if (task / "comm").read_text().strip() == "expert-transfer":
                found.append(task.name)
    return found


def num_open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def resident_bytes() -> int:
    """Return how much memory stands behind this process' addresses."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) * 1024
