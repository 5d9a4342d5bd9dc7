"""The engine whole, on tiny models: batching, forks, windows, failures change nobody's tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe_serve.config import EngineConfig
from moe_serve.engine.build import build_engine
from moe_serve.engine.engine import Engine
from moe_serve.engine.sequence import SamplerOutput, ScheduledStep
from moe_serve.errors import CapacityError, ConfigError, RequestError
from moe_serve.types import Request, SamplingParams, StepOutput, TokenLogprobs
from tests.models import tiny

SLIDING = pytest.mark.parametrize("model_type", ["qwen3_moe", "qwen2", "mistral", "qwen2_moe"])


def _engine(folder: Path, **options: object) -> Engine:
    return build_engine(EngineConfig.from_options({"max_num_seqs": 8, **options}), folder)


def _requests(num: int, max_tokens: int = 12, **sampling: object) -> list[Request]:
    generator = torch.Generator().manual_seed(0)
    shared = torch.randint(0, tiny.VOCAB_SIZE, (40,), generator=generator).tolist()
    requests = []
    for number in range(num):
        length = int(torch.randint(1, 60, (), generator=generator))
        own = torch.randint(0, tiny.VOCAB_SIZE, (length,), generator=generator).tolist()
        params = SamplingParams.from_mapping(
            {"temperature": 0.8 * (number % 2), "max_tokens": max_tokens, "logprobs": 2, **sampling}
        )
        requests.append(
            Request(
                request_id=f"r{number}",
                prompt_ids=tuple(shared + own if number % 3 else own),
                sampling=params,
                seed=number,
            )
        )
    return requests


def test_a_priority_that_nobody_reads_is_refused(tmp_path: Path) -> None:
    tiny.save_checkpoint(tmp_path, "qwen3_moe")
    urgent = replace(_requests(1)[0], priority=-1)
    with pytest.raises(RequestError, match=r"priority is -1.*--scheduling-policy priority"):
        _engine(tmp_path).add(urgent)
    _engine(tmp_path, scheduling_policy="priority").add(urgent)


Outputs = dict[tuple[str, int], tuple[tuple[int, ...], tuple[TokenLogprobs, ...], str | None]]


def _drain(engine: Engine) -> Outputs:
    parts: dict[tuple[str, int], list[StepOutput]] = {}
    steps = 0
    while engine.has_unfinished:
        for output in engine.step():
            parts.setdefault((output.request_id, output.index), []).append(output)
        steps += 1
        assert steps < 5000, "the engine does not come to an end"
    return {
        key: (
            tuple(token for part in found for token in part.token_ids),
            tuple(logprob for part in found for logprob in part.logprobs),
            found[-1].finish_reason,
        )
        for key, found in parts.items()
    }


def _run(engine: Engine, requests: list[Request]) -> Outputs:
    for request in requests:
        engine.add(request)
    return _drain(engine)


def _alone(engine: Engine, requests: list[Request]) -> Outputs:
    outputs: Outputs = {}
    for request in requests:
        outputs |= _run(engine, [request])
    return outputs


@SLIDING
def test_a_batch_gives_what_each_request_gives_alone(model_type: str, tmp_path: Path) -> None:
    tiny.save_checkpoint(tmp_path, model_type)
    requests = _requests(9, max_tokens=40)
    want = _alone(_engine(tmp_path, enable_prefix_caching=False), requests)
    assert _run(_engine(tmp_path, enable_prefix_caching=False), requests) == want
    for options in (
        {"block_size": 5, "max_num_batched_tokens": 23},
        {"block_size": 1, "max_prefill_chunk": 7},
        {"block_size": 8, "num_kv_blocks": 20},
    ):
        engine = _engine(tmp_path, **options)
        assert _run(engine, requests) == want, options
        # Mistral gives back what leaves its window, and never runs out here
        if "num_kv_blocks" in options and model_type != "mistral":
            assert engine.stats().num_preemptions > 0
        assert _run(engine, requests) == want, "again, with whatever the first run left cached"
        assert engine.stats().prefix_hit_tokens > 0


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mistral"])
def test_forks_write_to_copies_of_their_own(model_type: str, tmp_path: Path) -> None:
    tiny.save_checkpoint(tmp_path, model_type)
    forked = [replace(r, sampling=replace(r.sampling, n=3)) for r in _requests(4, temperature=1.0)]
    got = _run(_engine(tmp_path), forked)
    for request in forked:
        for index in range(3):
            single = replace(
                request,
                request_id=f"{request.request_id}-{index}",
                sampling=replace(request.sampling, n=1),
                seed=request.seed + index,
            )
            want = _run(_engine(tmp_path, enable_prefix_caching=False), [single])
            assert got[request.request_id, index] == want[single.request_id, 0]


def test_a_nan_ends_its_request_and_no_other(tmp_path: Path) -> None:
    tiny.save_checkpoint(tmp_path, "qwen3_moe")
    engine = _engine(tmp_path, block_size=4, num_kv_blocks=80)
    bad_token = 7
    # an embedding that is not finite, as an overflow in a deep layer would make the hidden state
    embedding = engine.runner.model.embedding
    assert embedding is not None, "not tied"
    embedding[bad_token] = float("nan")
    requests = [
        replace(r, prompt_ids=tuple(t if t != bad_token else 8 for t in r.prompt_ids))
        for r in _requests(6, max_tokens=20, temperature=0.0, bad_words=())
    ]
    requests = [
        replace(r, sampling=replace(r.sampling, logit_bias={bad_token: -100.0})) for r in requests
    ]
    want = _run(engine, requests)
    poisoned = replace(requests[2], request_id="poisoned", prompt_ids=(3, bad_token, 5, 6, 9))
    for round_number in range(3):  # later rounds reuse the blocks that NaN was written to
        renamed = [replace(r, request_id=f"{round_number}-{r.request_id}") for r in requests]
        got = _run(
            engine, [*renamed[:3], replace(poisoned, request_id=f"p{round_number}"), *renamed[3:]]
        )
        tokens, _, reason = got.pop((f"p{round_number}", 0))
        assert (tokens, reason) == ((), "error")
        assert {(rid.partition("-")[2], i): out for (rid, i), out in got.items()} == want


def test_prompt_logprobs_are_transformers(tmp_path: Path) -> None:
    theirs = tiny.save_checkpoint(tmp_path, "olmoe")
    request = _requests(1, max_tokens=2, prompt_logprobs=3)[0]
    with torch.no_grad():
        logits = theirs(torch.tensor([request.prompt_ids])).logits[0]
    want = torch.log_softmax(logits, -1)
    for chunk in (1, 7, None):
        engine = _engine(tmp_path, max_prefill_chunk=chunk)
        engine.add(request)
        found = [o for _ in range(200) for o in engine.step() if o.prompt_logprobs is not None]
        (output,) = found
        assert output.prompt_logprobs is not None
        first, *rest = output.prompt_logprobs
        assert first is None
        assert len(rest) == len(request.prompt_ids) - 1
        for position, entry in enumerate(rest):
            assert entry is not None
            assert entry.token_id == request.prompt_ids[position + 1]
            assert abs(entry.logprob - float(want[position, entry.token_id])) < 1e-4
            assert [i for i, _ in entry.top] == want[position].topk(3).indices.tolist()


def test_what_can_never_run_is_refused_with_the_numbers(tmp_path: Path) -> None:
    tiny.save_checkpoint(tmp_path, "qwen3_moe")
    engine = _engine(tmp_path, block_size=16, num_kv_blocks=4)
    params = SamplingParams(max_tokens=10)
    for prompt, error, says in (
        ((), RequestError, "empty"),
        ((tiny.VOCAB_SIZE,), RequestError, f"ids 0 to {tiny.VOCAB_SIZE - 1}"),
        ((-1,), RequestError, "-1"),
        ((1,) * tiny.CONTEXT, RequestError, str(tiny.CONTEXT)),
        ((1,) * 60, CapacityError, "4"),
    ):
        with pytest.raises(error) as caught:
            engine.add(Request(request_id="x", prompt_ids=prompt, sampling=params))
        assert says in str(caught.value)
    assert not engine.has_unfinished
    with pytest.raises(ConfigError, match="max_model_len is 500"):
        _engine(tmp_path, max_model_len=500)


def test_an_abort_gives_everything_back(tmp_path: Path) -> None:
    tiny.save_checkpoint(tmp_path, "qwen2")
    engine = _engine(tmp_path, block_size=4)
    requests = _requests(6)
    want = _run(_engine(tmp_path, enable_prefix_caching=False), requests[3:])
    for request in requests:
        engine.add(request)
    first = [output for _ in range(3) for output in engine.step()]
    assert first
    assert all(engine.abort(request.request_id) for request in requests[:3])
    assert not engine.abort("r0")
    before = {key: [o for o in first if (o.request_id, o.index) == key] for key in want}
    got = _drain(engine)
    for key, (tokens, logprobs, reason) in want.items():
        early = tuple(token for output in before[key] for token in output.token_ids)
        assert (early + got[key][0], got[key][2]) == (tokens, reason)
        assert logprobs[len(early) :] == got[key][1]
    assert set(got) == set(want)
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting) == (0, 0)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "qwen2"])
def test_a_nan_in_a_chunk_that_samples_nothing_is_not_found_by_others(
    model_type: str, tmp_path: Path
) -> None:
    # a head of its own: tied to the embedding, it would give every request a NaN
    tiny.save_checkpoint(tmp_path, model_type, {"tie_word_embeddings": False})
    engine = _engine(tmp_path, block_size=16, max_prefill_chunk=64)
    bad_token = 7
    embedding = engine.runner.model.embedding
    assert embedding is not None, "not tied"
    embedding[bad_token] = float("nan")
    shared = tuple(range(20, 52))
    params = SamplingParams(temperature=0.0, max_tokens=6, logit_bias={bad_token: -100.0})
    clean = Request(request_id="clean", prompt_ids=(*shared, 3, 4), sampling=params)
    want = _run(_engine(tmp_path, enable_prefix_caching=False), [clean])
    prompt = (*shared, *range(60, 68), bad_token, *range(70, 130))
    poisoned = Request(
        request_id="poisoned", prompt_ids=prompt, sampling=replace(params, n=3, prompt_logprobs=1)
    )
    ended = _run(engine, [poisoned])
    assert {key: out[2] for key, out in ended.items()} == {
        ("poisoned", index): "error" for index in range(3)
    }
    assert _run(engine, [clean]) == want


def _failing(engine: Engine, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Make the first and the fourth step of an engine fail."""
    run = engine.runner.run
    calls = 0

    def run_or_fail(step: ScheduledStep) -> SamplerOutput:
        nonlocal calls
        calls += 1
        if calls in (1, 4):
            raise error
        return run(step)

    monkeypatch.setattr(engine.runner, "run", run_or_fail)


@pytest.mark.parametrize("chunk", [None, 7])
def test_a_step_that_fails_takes_only_its_own_requests_with_it(
    chunk: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.save_checkpoint(tmp_path, "mistral")
    engine = _engine(tmp_path, max_num_seqs=3, block_size=4, max_prefill_chunk=chunk)
    requests = [replace(r, sampling=replace(r.sampling, n=2)) for r in _requests(12)]
    want = _run(_engine(tmp_path, enable_prefix_caching=False), requests)
    free = [pool.num_available for pool in engine.scheduler._kv.pools]
    _failing(engine, monkeypatch, RuntimeError("no memory"))
    got = _run(engine, requests)
    assert set(got) == set(want), "every output ends"
    reasons = {out[2] for out in got.values()}
    assert reasons == {"length", "error"}
    assert all(got[key] == want[key] for key, out in got.items() if out[2] == "length")
    assert [pool.num_available for pool in engine.scheduler._kv.pools] == free


@pytest.mark.parametrize("error", [KeyboardInterrupt(), AssertionError("ours")], ids=repr)
@pytest.mark.parametrize("chunk", [None, 7])
def test_an_interrupt_loses_nothing(
    error: BaseException, chunk: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.save_checkpoint(tmp_path, "qwen2")
    engine = _engine(tmp_path, max_num_seqs=3, block_size=4, max_prefill_chunk=chunk)
    requests = [
        replace(r, sampling=replace(r.sampling, n=2, prompt_logprobs=0)) for r in _requests(5)
    ]
    want = _run(_engine(tmp_path, enable_prefix_caching=False), requests)
    _failing(engine, monkeypatch, error)
    for request in requests:
        engine.add(request)
    parts: dict[tuple[str, int], list[StepOutput]] = {}
    for _ in range(2):
        with pytest.raises(type(error)):
            _drain_into(engine, parts)
    # what came between the interrupts is in `parts`; the rest follows
    rest = _drain(engine)
    tokens = {key: sum((o.token_ids for o in found), ()) for key, found in parts.items()}
    for key, (all_tokens, _, reason) in want.items():
        if key in rest:
            assert tokens.get(key, ()) + rest[key][0] == all_tokens
            assert rest[key][2] == reason
        else:
            assert tokens[key] == all_tokens


def _drain_into(engine: Engine, parts: dict[tuple[str, int], list[StepOutput]]) -> None:
    while engine.has_unfinished:
        for output in engine.step():
            parts.setdefault((output.request_id, output.index), []).append(output)
