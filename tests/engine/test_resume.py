"""A request that goes on in another engine, with the tokens it has, ends as if nothing had been."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moe_serve.config import EngineConfig
from moe_serve.engine.build import build_engine
from moe_serve.engine.engine import Engine
from moe_serve.hub import embedded_model
from moe_serve.text.request_output import RequestState
from moe_serve.types import Request, SamplingParams, StepOutput

PROMPTS = ((101, 7, 9, 2000, 13, 5), tuple(range(300, 340)), (5, 6, 7))


def engine(**options: Any) -> Engine:
    options = {"threads": 1, "num_kv_blocks": 256, "max_num_seqs": 8, **options}
    return build_engine(EngineConfig.from_options(options), Path(embedded_model()))


def requests(**sampling: Any) -> list[Request]:
    options = {"max_tokens": 24, "temperature": 0.8, "n": 2, "logprobs": 2, **sampling}
    return [
        Request(
            request_id=f"r{index}",
            prompt_ids=prompt,
            sampling=SamplingParams(**options),
            seed=100 * index,
        )
        for index, prompt in enumerate(PROMPTS)
    ]


def run(
    given: list[Request], num_steps: int | None = None, **options: Any
) -> dict[tuple[str, int], list[StepOutput]]:
    """Return what each output was given, step by step, in the first so many steps."""
    runs = engine(**options)
    for request in given:
        runs.add(request)
    found: dict[tuple[str, int], list[StepOutput]] = {}
    while runs.has_unfinished and num_steps != 0:
        for output in runs.step():
            found.setdefault((output.request_id, output.index), []).append(output)
        num_steps = None if num_steps is None else num_steps - 1
    runs.close()
    return found


def tokens_of(outputs: list[StepOutput]) -> tuple[int, ...]:
    return tuple(token for output in outputs for token in output.token_ids)


def resumed(request: Request, found: dict[tuple[str, int], list[StepOutput]]) -> Request | None:
    """Return the rest of a request; None: it has ended."""
    left: list[tuple[int, ...] | None] = []
    for index in range(request.sampling.n):
        outputs = found.get((request.request_id, index), [])
        has_ended = bool(outputs) and outputs[-1].finish_reason is not None
        left.append(None if has_ended else tokens_of(outputs))
    if all(tokens is None for tokens in left):
        return None
    return replace(request, output_ids=tuple(left))


@pytest.mark.parametrize("num_steps", [0, 1, 2, 9, 23])
@pytest.mark.parametrize("options", [{}, {"num_kv_blocks": 8, "max_prefill_chunk": 7}])
def test_tokens_and_logprobs_are_those_of_an_undisturbed_run(
    num_steps: int, options: dict[str, Any]
) -> None:
    given = [*requests(), *(replace(r, request_id=f"p{r.request_id}") for r in requests(n=1))]
    whole = run(given)
    first = run(given, num_steps)
    rest = [part for request in given if (part := resumed(request, first)) is not None]
    second = run(rest, **options)
    assert set(first) | set(second) == set(whole)
    for key, outputs in whole.items():
        parts = [*first.get(key, []), *second.get(key, [])]
        assert tokens_of(parts) == tokens_of(outputs), key
        logprobs = [entry for output in parts for entry in output.logprobs]
        assert logprobs == [entry for output in outputs for entry in output.logprobs], key
        assert parts[-1].finish_reason == outputs[-1].finish_reason


def test_an_output_that_has_ended_does_not_come_back() -> None:
    request = requests(max_tokens=4)[0]
    whole = run([request])
    tokens = tokens_of(whole["r0", 1])
    rest = run([replace(request, output_ids=(None, tokens[:2]))])
    assert set(rest) == {("r0", 1)}
    assert tokens_of(rest["r0", 1]) == tokens[2:]


@pytest.mark.parametrize("num_steps", [1, 6])
def test_a_grammar_goes_on_where_it_was(num_steps: int) -> None:
    forms = {"structured_outputs": {"regex": "[a-z]{4} [0-9]{6,9} [A-Z]{5}"}, "n": 2}
    given = requests(**forms)
    whole = run(given)
    first = {key: outputs[:num_steps] for key, outputs in whole.items()}
    rest = [part for request in given if (part := resumed(request, first)) is not None]
    assert rest
    second = run(rest)
    for key, outputs in whole.items():
        parts = [*first.get(key, []), *second.get(key, [])]
        assert tokens_of(parts) == tokens_of(outputs), key


def test_prompt_logprobs_are_not_told_again() -> None:
    request = requests(prompt_logprobs=1, n=1)[1]
    whole = run([request])["r1", 0]
    assert whole[0].prompt_logprobs is not None
    rest = run([replace(request, output_ids=(tokens_of(whole)[:3],))])["r1", 0]
    assert all(output.prompt_logprobs is None for output in rest)
    assert tokens_of(rest) == tokens_of(whole)[3:]


def test_penalties_and_least_lengths_count_the_tokens_of_before() -> None:
    options = {"presence_penalty": 1.5, "repetition_penalty": 1.3, "min_tokens": 12, "n": 1}
    given = requests(**options)
    whole = run(given)
    first = run(given, 7)
    second = run([part for r in given if (part := resumed(r, first)) is not None])
    for key, outputs in whole.items():
        assert tokens_of([*first[key], *second.get(key, [])]) == tokens_of(outputs)


def test_experts_are_told_of_all_tokens_anew() -> None:
    options = {"return_routed_experts": True, "n": 2}
    given, enabled = requests(**options), {"enable_return_routed_experts": True}
    whole = run(given, **enabled)
    first = run(given, 7, **enabled)
    rest = [part for request in given if (part := resumed(request, first)) is not None]
    second = run(rest, num_kv_blocks=8, max_prefill_chunk=7, **enabled)
    states = {request.request_id: RequestState(request) for request in given}
    wanted = {request.request_id: RequestState(request) for request in given}
    for key, outputs in whole.items():
        told = [o.routed_experts for o in second[key] if o.routed_experts is not None]
        assert told[0].first == 0
        for output in (*first[key], *second[key]):
            states[key[0]].update(output, 1.0)
        for output in outputs:
            wanted[key[0]].update(output, 1.0)
    for request in given:
        found, want = states[request.request_id].output(), wanted[request.request_id].output()
        for one, undisturbed in zip(found.outputs, want.outputs, strict=True):
            assert one.routed_experts is not None
            assert one.routed_experts.shape[0] == len(request.prompt_ids) + 23
            assert one.routed_experts == undisturbed.routed_experts
