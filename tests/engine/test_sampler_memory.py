"""What a sampler on a device holds beside the logits, against what is planned for it."""

from __future__ import annotations

from typing import Any, TypeVar, cast

import pytest
import torch

from moe_serve.engine import sampler
from moe_serve.engine.sampler import Sampler, sampling_bytes
from moe_serve.engine.sequence import Sequence
from moe_serve.kernels import suite
from moe_serve.kernels.gpu.staging import Shuttle
from moe_serve.kernels.gpu.streams import HostStreams
from moe_serve.types import MAX_LOGPROBS, Request, SamplingParams
from tests.kernels.implementations import INTERPRETED
from tests.models.elsewhere import LiveBytes

T = TypeVar("T")

VOCAB_SIZE, NUM_ROWS, IN_CHUNK = 4096, 32, 8
EVERY_TOKEN = range(VOCAB_SIZE)
GREEDY = SamplingParams(temperature=0.0)
KINDS = {
    "logprobs": SamplingParams(temperature=0.0, logprobs=MAX_LOGPROBS),
    "filtered": SamplingParams(temperature=0.8, top_p=0.9, min_p=0.05, top_k=20),
    "allowed": SamplingParams(allowed_token_ids=list(EVERY_TOKEN)),
    "biased": SamplingParams(logit_bias=dict.fromkeys(EVERY_TOKEN, 1.0)),
    "penalised": SamplingParams(
        repetition_penalty=1.2, frequency_penalty=0.5, presence_penalty=0.3, logprobs=1
    ),
}


class Copying(Shuttle):
    """What it sends is a copy, as on a device."""

    def sent(self, value: T) -> T:
        return cast(T, _copied(value))


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if not isinstance(value, tuple):
        return value
    parts = [_copied(part) for part in value]
    return tuple(parts) if type(value) is tuple else type(value)(*parts)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Sampler:
    """A sampler of a GPU's kernels, none of which is run: what they leave is 0."""
    if not INTERPRETED:
        pytest.skip("needs Triton, and no GPU")
    from triton.runtime.interpreter import InterpretedFunction  # which a machine may not have

    kernels: Any = suite.load("triton").sampling
    monkeypatch.setattr(InterpretedFunction, "run", lambda *args, **kwargs: None)
    monkeypatch.setattr(torch, "empty", torch.zeros)
    all_finite = lambda logits: (  # noqa: E731
        torch.zeros(len(logits), dtype=torch.int64), torch.ones(len(logits), dtype=torch.bool)
    )  # fmt: skip
    monkeypatch.setattr(kernels, "greedy_checked", all_finite)
    monkeypatch.setattr(sampler, "CHUNK_ELEMENTS_DEVICE", IN_CHUNK * VOCAB_SIZE)
    monkeypatch.setattr(sampler, "CHUNK_ELEMENTS_CPU", IN_CHUNK * VOCAB_SIZE)
    return Sampler(VOCAB_SIZE, torch.device("cpu"), kernels)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("others", [0, 1, 29], ids=["all", "most", "few"])
def test_a_sampler_stays_within_its_bound(kind: str, others: int, made: Sampler) -> None:
    sequences = [
        Sequence(Request(request_id="x", prompt_ids=tuple(EVERY_TOKEN), sampling=params, seed=1))
        for params in [GREEDY] * others + [KINDS[kind]] * (NUM_ROWS - others)
    ]
    logits = torch.randn(NUM_ROWS, VOCAB_SIZE)
    plan = made.plan(sequences)
    made.shuttle = Copying(HostStreams(torch.device("cpu")))
    with torch.inference_mode(), LiveBytes(torch.device("cpu")) as live:
        launched = made.launch(logits, made.shuttle.sent(plan.columns), plan.edits)
    output = made.told(plan, logits, launched)
    assert len(output.token_ids) == NUM_ROWS
    assert not output.errors
    assert 0 < live.peak <= sampling_bytes(NUM_ROWS, VOCAB_SIZE)


def test_logprobs_of_prompts_stay_within_it(made: Sampler) -> None:
    logits, next_ids = torch.randn(NUM_ROWS, VOCAB_SIZE), torch.zeros(NUM_ROWS, dtype=torch.int64)
    with torch.inference_mode(), LiveBytes(torch.device("cpu")) as live:
        found = made.known_logprobs(logits, next_ids, MAX_LOGPROBS)
    assert sum(len(chunk.token_ids) for chunk in found) == NUM_ROWS
    assert live.peak <= sampling_bytes(NUM_ROWS, VOCAB_SIZE)
    assert live.peak > IN_CHUNK * VOCAB_SIZE * 24, "what ranks them was not seen"
