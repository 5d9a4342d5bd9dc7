"""How often the host waits for a device in a step: once, whatever is asked of its tokens."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_serve.engine.grammar import Matcher
from moe_serve.engine.model_runner import ModelRunner
from moe_serve.engine.sampler import Sampler
from moe_serve.engine.sequence import SamplerOutput, ScheduledStep, Sequence
from moe_serve.kernels.gpu.staging import Shuttle
from moe_serve.types import Request, SamplingParams
from tests.kernels.implementations import kernels

pytest.importorskip("triton")

VOCAB_SIZE, HIDDEN_SIZE = 300, 8
CPU = torch.device("cpu")

GREEDY: dict[str, Any] = {"temperature": 0.0}
PLAIN = {"temperature": 0.8}
FILTERED = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.01}
PENALISED = {**FILTERED, "repetition_penalty": 1.2, "presence_penalty": 0.3}
EDITED = {
    "temperature": 0.9,
    "frequency_penalty": 0.5,
    "logit_bias": {5: 3.0, 9: -2.0},
    "allowed_token_ids": [4, 5, 9, 11, 250],
    "min_tokens": 40,
    "stop_token_ids": [4],
}


class Odd:
    """A grammar that allows every other token."""

    def allowed(self, token_ids: list[int]) -> np.ndarray[Any, Any]:
        return np.tile([False, True], VOCAB_SIZE // 2)


def decodes(*params: dict[str, Any]) -> ScheduledStep:
    """Return a step of one token of each sequence."""
    sequences: list[Sequence] = []
    for number, options in enumerate(params):
        is_odd = options.get("structured_outputs") is not None
        request = Request(
            request_id=str(number),
            prompt_ids=(1, 2, 3 + number),
            sampling=SamplingParams(max_tokens=50, **options),
            seed=number,
        )
        sequence = Sequence(request)
        sequence.token_ids += [7, 8, 7]
        sequence.num_computed_tokens = 5
        sequence.row = number
        if is_odd:
            sequence.matcher = cast(Matcher, Odd())
        sequences.append(sequence)
    count = len(sequences)
    return ScheduledStep(0, sequences, [1] * count, list(range(count)), sequences, ())


def prompts(top: int | None, num_sampled: int) -> ScheduledStep:
    """Return a step of a decode and a prompt of 9 tokens; top: its prompt logprobs."""
    step = decodes(GREEDY)
    sampling = SamplingParams(temperature=0.0, prompt_logprobs=top)
    prompt = Sequence(
        Request(request_id="p", prompt_ids=tuple(range(9)), sampling=sampling, seed=0)
    )
    prompt.row = 1
    sequences = [*step.sequences, prompt]
    sources = list(range(num_sampled))
    return ScheduledStep(0, sequences, [1, 9], sources, sequences[:num_sampled], ())


GRAMMAR = {"structured_outputs": {"regex": "a"}}
STEPS: dict[str, Callable[[], ScheduledStep]] = {
    "greedy": lambda: decodes(*[GREEDY] * 3),
    "sampled": lambda: decodes(*[PLAIN] * 3),
    "sampled with all filters": lambda: decodes(*[FILTERED] * 3),
    "some greedy": lambda: decodes(GREEDY, FILTERED, GREEDY, PLAIN),
    "logprobs": lambda: decodes({**GREEDY, "logprobs": 3}, GREEDY, {**FILTERED, "logprobs": 0}),
    "penalties": lambda: decodes(PENALISED, PENALISED, {**GREEDY, "presence_penalty": 0.2}),
    "every edit": lambda: decodes(EDITED, {**EDITED, "temperature": 0.0}),
    "grammar": lambda: decodes({**GREEDY, **GRAMMAR}, GREEDY, {**FILTERED, **GRAMMAR}),
    "all at once": lambda: decodes(
        GREEDY, FILTERED, {**PENALISED, "logprobs": 2}, EDITED, {**PLAIN, **GRAMMAR, "logprobs": 1}
    ),
    "a prompt": lambda: prompts(None, 2),
    "a part of a prompt": lambda: prompts(None, 1),
    "a part of a prompt alone": lambda: prompts(None, 0),
    "prompt logprobs": lambda: prompts(2, 2),
}


def runner(
    device: torch.device,
    put: Callable[[Tensor], Tensor],
    wrong: tuple[int, ...] = (),
    **options: Any,
) -> ModelRunner:
    """Make a runner of a model that gives numbers of no meaning.

    put: brings tensors there. wrong: rows whose hidden states are not finite.
    """
    sampling = kernels("triton-exact").sampling
    generator = torch.Generator().manual_seed(3)
    numbers = torch.randn(10, HIDDEN_SIZE, generator=generator)
    numbers[list(wrong)] = torch.nan
    hidden = put(numbers)
    head = put(torch.randn(HIDDEN_SIZE, VOCAB_SIZE, generator=generator))
    model = SimpleNamespace(
        kernels=SimpleNamespace(device=device),
        experts=SimpleNamespace(layers={}, step=lambda batch, is_noted: nullcontext()),
        allocate_caches=lambda num_blocks, block_size: [],
        fused=lambda caches: lambda batch, watcher: hidden[: batch.num_tokens],
        logits=lambda rows: rows @ head,
        groups=(),
    )
    kv = SimpleNamespace(block_size=16, tables=())
    sampler = Sampler(VOCAB_SIZE, device, sampling, **options)
    return ModelRunner(cast(Any, model), cast(Any, kv), (), sampler)


def far_step(
    step: ScheduledStep, wrong: tuple[int, ...] = ()
) -> tuple[SamplerOutput, list[str], int]:
    """Run a step on a device that is far; return its waits and copies too."""
    from tests.kernels.gpu.far_device import FAR, FarStreams, far, far_device  # needs Triton

    with torch.inference_mode(), far_device() as waits:
        streams = FarStreams(waits)
        one = runner(FAR, far, wrong, shuttle=Shuttle(streams))
        for _ in range(5):  # more than copies may be under way at once
            streams.num_copies = 0
            waits.reasons.clear()
            output = one.run(step)
    return output, waits.reasons, streams.num_copies


@pytest.mark.parametrize("kind", STEPS)
def test_a_step_waits_once(kind: str) -> None:
    output, reasons, num_copies = far_step(STEPS[kind]())
    assert reasons == ["event"]
    assert num_copies <= 3, "the batch, the columns, the edits"
    assert not output.errors
    assert not output.sequence_errors


@pytest.mark.parametrize("kind", STEPS)
def test_what_it_gives_is_what_the_cpu_gives(kind: str) -> None:
    output, _, _ = far_step(STEPS[kind]())
    assert output == runner(CPU, lambda tensor: tensor).run(STEPS[kind]())
    assert len(output.token_ids) == len(STEPS[kind]().sampled)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of interpreted kernels
def test_only_rows_that_are_wrong_are_asked_about() -> None:
    whole, _, _ = far_step(STEPS["all at once"]())
    output, reasons, _ = far_step(STEPS["all at once"](), wrong=(1, 2))
    assert reasons[0] == "event"
    assert len(reasons) == 5, "which logits are wrong, and the list of them, for each row"
    assert list(output.errors) == list(output.sequence_errors) == [1, 2]
    assert "300 of 300 logits" in output.errors[1]
    assert output.refused == set()
    assert whole.logprobs is not None
    assert output.logprobs is not None
    for row in (0, 3, 4):
        assert output.token_ids[row] == whole.token_ids[row]
        assert output.logprobs[row] == whole.logprobs[row]
    assert output.logprobs[2] is None
