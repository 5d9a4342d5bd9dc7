"""Engines of dummy weights at a real shape, and requests that keep them decoding."""

from __future__ import annotations

import gc
import json
import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.setting import Setting
from benchmarks.gpu.shapes import flop
from benchmarks.kernels.step import active_bytes
from benchmarks.peers.shape import Shape
from moe_serve.config import EngineConfig
from moe_serve.engine.build import build_engine
from moe_serve.engine.engine import Engine
from moe_serve.experts.offload import OffloadedExperts
from moe_serve.types import Request, SamplingParams

BLOCK_SIZE = 16
_DRY_LINK_GB_S = 4.0


@contextmanager
def running(setting: Setting, shape: Shape, **options: Any) -> Iterator[Engine]:
    """Build an engine, and close it at the end; its memory goes with the last who names it."""
    engine = built(setting, shape, **options)
    try:
        yield engine
    finally:
        engine.close()


def built(setting: Setting, shape: Shape, **options: Any) -> Engine:
    """Return an engine of dummy weights; options: of `EngineConfig`.

    What an engine before it had is given back first: two may not find room.
    """
    release()
    given = {
        "load_format": "dummy",
        "kernels": setting.kernels,
        "block_size": BLOCK_SIZE,
        "enable_prefix_caching": False,
        **options,
    }
    if "expert_cache_slots" in given:
        given |= beside_cache(setting)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(shape.config()))
        return build_engine(EngineConfig.from_options(given), folder)


def beside_cache(setting: Setting) -> dict[str, Any]:
    """Return the options that put experts that have no slot into host memory.

    That is where those of Triton's kernels are; other slots are there too, behind an emulated link.
    """
    return {} if setting.has_triton else {"emulate_link": _DRY_LINK_GB_S}


def release() -> None:
    """Give back to the device what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def num_blocks(num_seqs: int, num_tokens: int) -> int:
    """Return the KV blocks of so many sequences of so many tokens."""
    return num_seqs * (math.ceil(num_tokens / BLOCK_SIZE) + 1)


def offloaded(engine: Engine) -> OffloadedExperts:
    """Return the experts of an engine that does not hold all of them."""
    experts = engine.runner.model.experts
    assert isinstance(experts, OffloadedExperts), type(experts)
    return experts


def request(shape: Shape, number: int, num_prompt: int, num_output: int) -> Request:
    """Return a request of a random prompt, which runs to its full length."""
    generator = torch.Generator().manual_seed(number)
    prompt = torch.randint(shape.vocab_size, (num_prompt,), generator=generator).tolist()
    sampling = SamplingParams(temperature=0, max_tokens=num_output, ignore_eos=True)
    return Request(request_id=f"request-{number}", prompt_ids=tuple(prompt), sampling=sampling)


@dataclass(frozen=True, slots=True)
class StepCost:
    """What one step took, and what it had to read and to compute."""

    seconds: float
    num_bytes: float
    flop: float


class Decoding:
    """Requests of one engine that all decode."""

    def __init__(
        self, engine: Engine, shape: Shape, num_requests: int, context: int, num_steps: int
    ) -> None:
        """Add requests of `context` tokens and run until all have their first token.

        num_steps: how many more they can run.
        """
        self._engine = engine
        self._shape = shape
        self._num_requests = num_requests
        # the first may have decoded in as many steps as there are prompts to compute
        num_output = num_steps + num_requests + 2
        for number in range(num_requests):
            engine.add(request(shape, number, context, num_output))
        self._num_kv_tokens = num_requests * context
        num_tokens = 0
        while num_tokens < num_requests:
            num_tokens = len(self._checked())
            self._num_kv_tokens += num_tokens

    def step(self) -> StepCost:
        """Run one step, and look which experts it used, off the clock."""
        tables = list(self._engine.runner.model.experts.layers.values())
        for table in tables:
            table.uses.zero_()
        num_kv_tokens = self._num_kv_tokens
        start_s = time.perf_counter()
        self.advance()
        seconds = time.perf_counter() - start_s
        uses = torch.stack([table.uses for table in tables])
        num_bytes = active_bytes(self._shape, int(uses.count_nonzero()), num_kv_tokens)
        needed = flop(self._shape, self._num_requests, self._num_requests, num_kv_tokens)
        return StepCost(seconds, num_bytes, needed)

    def advance(self) -> None:
        """Run one step, and nothing else."""
        outputs = self._checked()
        assert len(outputs) == self._num_requests, (len(outputs), self._num_requests)
        self._num_kv_tokens += self._num_requests

    def _checked(self) -> list[Any]:
        outputs = self._engine.step()
        errors = [output.error for output in outputs if output.error is not None]
        if errors:
            raise RuntimeError(errors[0])
        return outputs

    def end(self) -> None:
        """Drop the requests."""
        for number in range(self._num_requests):
            self._engine.abort(f"request-{number}")


def prompt_seconds(engine: Engine, shape: Shape, num_tokens: int, number: int) -> float:
    """Return the seconds from a prompt to its first token, in an engine that does nothing else."""
    engine.add(request(shape, number, num_tokens, 1))
    start_s = time.perf_counter()
    while engine.has_unfinished:
        for output in engine.step():
            if output.error is not None:
                raise RuntimeError(output.error)
    return time.perf_counter() - start_s
