"""Steps that do not fit into memory run in parts: the same tokens, nobody fails."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_serve.config import EngineConfig
from moe_serve.engine.build import build_engine
from moe_serve.engine.engine import Engine
from moe_serve.engine.model_runner import ModelRunner
from moe_serve.engine.sequence import SamplerOutput, ScheduledStep
from moe_serve.types import ForwardBatch, Request, SamplingParams, StepOutput
from tests.models import tiny

OPTIONS = {"max_num_seqs": 8, "enable_return_routed_experts": True, "block_size": 4}


def _requests() -> list[Request]:
    generator = torch.Generator().manual_seed(3)
    requests = []
    for number, length in enumerate((1, 37, 12, 60, 3, 25)):
        params = SamplingParams(
            n=1 + number % 3,
            temperature=0.8 * (number % 2),
            max_tokens=9,
            logprobs=2 if number % 2 else None,
            prompt_logprobs=1 if number in (1, 3) else None,
            return_routed_experts=number in (2, 3),
        )
        prompt = torch.randint(0, tiny.VOCAB_SIZE, (length,), generator=generator).tolist()
        requests.append(
            Request(request_id=f"r{number}", prompt_ids=tuple(prompt), sampling=params, seed=number)
        )
    return requests


def _told(output: StepOutput) -> tuple[Any, ...]:
    routed = output.routed_experts
    return (
        output.token_ids, output.logprobs, output.finish_reason, output.prompt_logprobs,
        output.error, routed,
    )  # fmt: skip


def _run(engine: Engine) -> dict[tuple[str, int], list[tuple[Any, ...]]]:
    for request in _requests():
        engine.add(request)
    found: dict[tuple[str, int], list[tuple[Any, ...]]] = {}
    for _ in range(500):
        for output in engine.step():
            found.setdefault((output.request_id, output.index), []).append(_told(output))
        if not engine.has_unfinished:
            return found
    raise AssertionError("the engine does not come to an end")


class _Memory:
    """Lets no part of a step have more than so many tokens."""

    def __init__(self, most: int, patch: pytest.MonkeyPatch) -> None:
        self.num_refused = 0
        self.largest = 0
        run = ModelRunner._run

        def limited(runner: ModelRunner, step: ScheduledStep) -> SamplerOutput:
            if step.num_tokens > most:
                self.num_refused += 1
                raise torch.OutOfMemoryError(f"no room for {step.num_tokens}\nand so on")
            self.largest = max(self.largest, step.num_tokens)
            return run(runner, step)

        patch.setattr(ModelRunner, "_run", limited)


@pytest.mark.parametrize("slots", [None, 5], ids=["resident", "cache"])
@pytest.mark.parametrize("most", [33, 7, 1])
def test_what_does_not_fit_runs_in_parts(
    most: int,
    slots: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tiny.save_checkpoint(tmp_path / "model", "qwen3_moe")
    config = EngineConfig.from_options(
        {**OPTIONS, "expert_cache_slots": slots, "expert_store": str(tmp_path)}
    )
    engine = build_engine(config, tmp_path / "model")
    want = _run(engine)
    engine.close()
    memory = _Memory(most, monkeypatch)
    engine = build_engine(config, tmp_path / "model")
    with caplog.at_level(logging.WARNING):
        assert _run(engine) == want
    engine.close()
    assert memory.largest <= most
    # it is not tried again and again: each time by half, and then it is known
    assert 1 <= memory.num_refused <= 8
    told = [record for record in caplog.records if record.name.endswith("model_runner")]
    assert len(told) == memory.num_refused
    assert "lower max_num_batched_tokens" in caplog.text
    assert "and so on" not in caplog.text


def test_one_token_that_does_not_fit_is_an_error_of_its_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.save_checkpoint(tmp_path, "qwen3_moe")
    engine = build_engine(EngineConfig.from_options(OPTIONS), tmp_path)
    with monkeypatch.context() as patch:
        _Memory(0, patch)
        ends = [outputs[-1] for outputs in _run(engine).values()]
    assert ends
    assert all("OutOfMemoryError: no room for 1" in end[4] for end in ends)
    want = _run(build_engine(EngineConfig.from_options(OPTIONS), tmp_path))
    assert _run(engine) == want, "the engine goes on"


def test_an_engine_starts_whose_largest_step_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On ranks nobody plans for what others send; a step that is too large has its own ways out."""
    tried: list[int] = []

    def limited(runner: ModelRunner, batch: ForwardBatch, dispatcher: object) -> None:
        tried.append(batch.num_tokens)
        if batch.num_tokens > 16:
            raise torch.OutOfMemoryError(f"no room for {batch.num_tokens}\nand so on")

    monkeypatch.setattr(ModelRunner, "_rehearse", limited)
    tiny.save_checkpoint(tmp_path, "qwen3_moe")
    engine = build_engine(EngineConfig.from_options(OPTIONS), tmp_path)
    with caplog.at_level(logging.WARNING):
        engine.runner.warm_up(200)
    assert tried == [1, 4, 16, 24]
    assert "no memory for a step of 24 tokens (no room for 24); lower" in caplog.text
