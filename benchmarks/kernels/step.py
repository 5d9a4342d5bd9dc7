"""Decode steps of the whole engine: seconds, the bytes that a step must read, and who spent them.

The model has the baseline's shape and random weights. Time inside the native library is added up
by wrapping every function that the engine takes from it; the rest of a step is Python, torch and
the way into the library.
"""

from __future__ import annotations

import ctypes
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.kernels.limits import Limits
from benchmarks.kernels.timing import ROUNDS, interleaved, median_ratio
from benchmarks.kernels.workload import Workload
from benchmarks.peers.shape import Shape
from moe_serve.config import EngineConfig
from moe_serve.engine.build import build_engine
from moe_serve.engine.engine import Engine
from moe_serve.kernels.native import loader
from moe_serve.types import Request, SamplingParams

_BLOCK_SIZE = 16
_WARM_STEPS = 3
# prompts are read in so many steps at most, in which the first of them decode already
_PROMPT_STEPS = 64
_BF16, _FP32 = 2, 4  # bytes


def active_bytes(shape: Shape, num_experts: int, num_kv_tokens: int) -> int:
    """Return what a step must read at least.

    num_experts: those that some token used, of all layers together; num_kv_tokens: the contexts
    of all sequences together. Attention, head, experts, keys and values in bfloat16, routers in
    float32; norms, a row of the embedding and activations count as nothing.
    """
    routers = shape.num_layers * shape.hidden_size * shape.num_experts
    weights = shape.dense_elements - routers + num_experts * shape.expert_elements
    kv_elements = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim
    return _BF16 * (weights + num_kv_tokens * kv_elements) + _FP32 * routers


class _TimedNative(loader.Native):
    """Native kernels that add up the seconds spent in each function."""

    def __init__(self, loaded: ctypes.CDLL, isa: str) -> None:
        super().__init__(loaded, isa)
        self.spent: dict[str, float] = {}

    def function(self, name: str, codes: str, result: str = "") -> Callable[..., Any]:
        function, spent = super().function(name, codes, result), self.spent

        def timed(*arguments: object) -> Any:
            start = time.perf_counter()
            answer = function(*arguments)
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - start
            return answer

        return timed


@dataclass(frozen=True, kw_only=True, slots=True)
class StepFigure:
    """One number of requests; a sample is the mean of a round's steps.

    limit_seconds: a round's active bytes over its read bandwidth. native_seconds: of a step, by
    function, the median of the rounds; outside: the share of each round's time that was in none of
    them; both empty where the engine does not run on native kernels.
    """

    num_requests: int
    seconds: list[float]
    limit_seconds: list[float]
    native_seconds: dict[str, float]
    outside: list[float]

    @property
    def ratio(self) -> float:
        """The share of the limit that was reached."""
        return median_ratio(self.limit_seconds, self.seconds)


class StepBench:
    """An engine with dummy weights whose steps are timed."""

    def __init__(self, workload: Workload, options: dict[str, object]) -> None:
        """options: of the engine's configuration, such as kernels, isa and threads."""
        self._workload = workload
        self._max_tokens = workload.max_steps + _WARM_STEPS + _PROMPT_STEPS
        self._num_kv_tokens = 0
        self._spent: dict[str, float] = {}
        self.engine = self._build(options)

    def _build(self, options: dict[str, object]) -> Engine:
        workload = self._workload
        length = workload.step_prompt + self._max_tokens
        blocks = max(workload.step_requests) * (math.ceil(length / _BLOCK_SIZE) + 1)
        load = loader.load

        def load_timed(isa: str = "auto") -> loader.Native:
            native = _TimedNative(loader.open_library(), load(isa).isa)
            self._spent = native.spent
            return native

        with tempfile.TemporaryDirectory() as name, mock.patch.object(loader, "load", load_timed):
            folder = Path(name)
            (folder / "config.json").write_text(json.dumps(workload.shape.config()))
            given = {
                "load_format": "dummy",
                "block_size": _BLOCK_SIZE,
                "num_kv_blocks": blocks,
                **options,
            }
            return build_engine(EngineConfig.from_options(given), folder)

    def measure(
        self, num_requests: int, limits: Limits, seconds: float, rounds: int = ROUNDS
    ) -> StepFigure:
        """Time steps in which `num_requests` decode, in turn with reading memory.

        About `seconds` in all, but at most the workload's max_steps steps.
        """
        self._start(num_requests)
        sample_s = seconds / 2 / rounds
        warm = [self._step(num_requests)[0] for _ in range(_WARM_STEPS)]
        most = self._workload.max_steps // rounds
        steps = max(1, min(most, math.ceil(sample_s / statistics.median(warm))))
        figure = StepFigure(
            num_requests=num_requests, seconds=[], limit_seconds=[], native_seconds={}, outside=[]
        )
        spent_of_rounds: list[dict[str, float]] = []
        for _ in range(rounds):
            self._spent.clear()
            parts = [self._step(num_requests) for _ in range(steps)]
            spent = {name: total_s / steps for name, total_s in self._spent.items()}
            [[read_s]] = interleaved([limits.read.run], sample_s, rounds=1)
            step_s = statistics.mean(part[0] for part in parts)
            step_bytes = statistics.mean(part[1] for part in parts)
            figure.seconds.append(step_s)
            figure.limit_seconds.append(step_bytes * read_s / limits.read.num_bytes)
            if spent:
                figure.outside.append(1 - sum(spent.values()) / step_s)
            spent_of_rounds.append(spent)
        for name in spent_of_rounds[0]:
            of_rounds = [spent[name] for spent in spent_of_rounds]
            figure.native_seconds[name] = statistics.median(of_rounds)
        for index in range(num_requests):
            self.engine.abort(f"request-{index}")
        return figure

    def _start(self, num_requests: int) -> None:
        """Add requests of random prompts and run until all decode."""
        workload = self._workload
        shape = (num_requests, workload.step_prompt)
        prompts = torch.randint(workload.shape.vocab_size, shape).tolist()
        sampling = SamplingParams(temperature=0, max_tokens=self._max_tokens, ignore_eos=True)
        for index, prompt in enumerate(prompts):
            self.engine.add(
                Request(request_id=f"request-{index}", prompt_ids=tuple(prompt), sampling=sampling)
            )
        self._num_kv_tokens = num_requests * workload.step_prompt
        num_tokens = 0
        while num_tokens < num_requests:
            num_tokens = len(self.engine.step())
            self._num_kv_tokens += num_tokens

    def _step(self, num_requests: int) -> tuple[float, int]:
        """Run one step; return its seconds and its active bytes."""
        layers = self.engine.runner.model.experts.layers.values()
        for table in layers:
            table.uses.zero_()
        start = time.perf_counter()
        outputs = self.engine.step()
        seconds = time.perf_counter() - start
        assert len(outputs) == num_requests, (len(outputs), num_requests)
        assert all(output.finish_reason is None for output in outputs), outputs
        num_experts = sum(int(table.uses.count_nonzero()) for table in layers)
        step_bytes = active_bytes(self._workload.shape, num_experts, self._num_kv_tokens)
        self._num_kv_tokens += num_requests
        return seconds, step_bytes
