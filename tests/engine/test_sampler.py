"""The sampler as a whole, against numpy in float64, and its promise of bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_serve.engine.grammar import Matcher
from moe_serve.engine.grammar_compiler import GrammarError
from moe_serve.engine.sampler import Sampler, told_logprobs
from moe_serve.engine.sequence import SamplerOutput, Sequence
from moe_serve.kernels.sampling import reference
from moe_serve.types import Request, SamplingParams, TokenLogprobs
from tests.kernels.implementations import EXACT, is_interpreted, kernels

CPU = torch.device("cpu")
Floats = npt.NDArray[np.float64]


def make_sequence(
    prompt: list[int] | None = None,
    output: list[int] | None = None,
    *,
    seed: int = 0,
    index: int = 0,
    eos: frozenset[int] = frozenset(),
    bad_words: tuple[tuple[int, ...], ...] = (),
    **params: Any,
) -> Sequence:
    params.setdefault("max_tokens", None)
    request = Request(
        request_id="r",
        prompt_ids=tuple(prompt or [1, 2, 3]),
        sampling=SamplingParams(**params),
        seed=seed,
        eos_token_ids=eos,
        bad_words_ids=bad_words,
    )
    sequence = Sequence(request, index)
    sequence.token_ids += output or []
    return sequence


MakeSampler = Callable[[int], Sampler]


@pytest.fixture(scope="module", params=EXACT)
def make_sampler(request: pytest.FixtureRequest) -> MakeSampler:
    """Make a sampler for a vocabulary's size, with one implementation after the other."""
    return lambda vocab_size: Sampler(vocab_size, CPU, kernels(request.param).sampling)


def sample_one(
    make_sampler: MakeSampler, logits: list[float] | Tensor, sequence: Sequence
) -> SamplerOutput:
    row = torch.as_tensor(logits, dtype=torch.float32)
    return make_sampler(len(row)).sample(row[None], [sequence])


def edited_logits(logits: Floats, sequence: Sequence) -> Floats:
    """Masks, bias and penalties, one token at a time."""
    request, params, output = sequence.request, sequence.request.sampling, sequence.output_ids
    allowed = params.allowed_token_ids
    values = [
        float(x) if allowed is None or i in allowed else -np.inf for i, x in enumerate(logits)
    ]
    forbidden = [
        word[-1]
        for word in request.bad_words_ids
        if len(word) == 1 or tuple(output[-(len(word) - 1) :]) == word[:-1]
    ]
    if len(output) < params.min_tokens:
        forbidden += [*request.eos_token_ids, *params.stop_token_ids]
    for token_id in range(len(values)):
        value = -np.inf if token_id in forbidden else values[token_id]
        value += (params.logit_bias or {}).get(token_id, 0.0)
        if token_id in sequence.token_ids:
            penalty = params.repetition_penalty
            value = value / penalty if value > 0 else value * penalty
        value -= params.frequency_penalty * output.count(token_id)
        value -= params.presence_penalty * (token_id in output)
        values[token_id] = value
    return np.array(values)


def expected_token(logits: Floats, sequence: Sequence) -> tuple[int | None, float]:
    """The token, and how near any of the decisions was to going the other way."""
    params = sequence.request.sampling
    values = edited_logits(logits, sequence)
    if np.isneginf(values).all():
        return None, np.inf
    if params.temperature == 0:
        return int(values.argmax()), gap(values)
    values = (values - values.max()) / params.temperature
    margins = []
    if params.min_p > 0:
        margins.append(np.abs(values - np.log(params.min_p)).min())
        values[values < np.log(params.min_p)] = -np.inf
    order = np.argsort(-values, kind="stable")
    if params.top_k > 0:
        if params.top_k < len(order):
            best, rest = values[order[params.top_k - 1]], values[order[params.top_k]]
            margins.append(best - rest if best > -np.inf else np.inf)
        order = order[: params.top_k]
    probabilities = np.exp(values[order])
    before = np.concatenate([[0.0], (probabilities / probabilities.sum()).cumsum()[:-1]])
    if params.top_p < 1:
        margins.append(np.abs(before - params.top_p).min())
        order = order[before < params.top_p]
    keys = reference.row_keys([sequence.seed], [len(sequence.token_ids)])
    noise = reference.gumbel_noise(keys, reference.token_hashes(len(values), CPU))[0].double()
    scores = np.full(len(values), -np.inf)
    scores[order] = values[order] + noise.numpy()[order]
    return int(scores.argmax()), float(min([gap(scores), *margins]))


def gap(values: Floats) -> float:
    best = np.sort(values)[-2:]
    return float(best[-1] - best[0]) if len(best) == 2 else np.inf


@st.composite
def sequences(draw: st.DrawFn, vocab_size: int) -> Sequence:
    def maybe(values: st.SearchStrategy[Any], default: object) -> Any:
        return draw(st.one_of(st.just(default), values))

    token = st.integers(0, vocab_size - 1)
    output = draw(st.lists(token, max_size=12))
    words = draw(st.lists(st.lists(token, min_size=1, max_size=2), max_size=3))
    words += maybe(st.sampled_from([[[*output[-1:], 0]], [[*output[-2:], 1]]]), [])
    return make_sequence(
        draw(st.lists(token, min_size=1, max_size=12)),
        output,
        seed=draw(st.integers(-(2**63), 2**63 - 1)),
        index=draw(st.integers(0, 3)),
        eos=draw(st.frozensets(token, max_size=2)),
        bad_words=tuple(tuple(word) for word in words),
        temperature=maybe(st.floats(0.1, 3.0), 0.0),
        top_k=maybe(st.integers(-1, vocab_size + 2), 0),
        top_p=maybe(st.floats(0.05, 1.0), 1.0),
        min_p=maybe(st.floats(0.0, 0.5), 0.0),
        repetition_penalty=maybe(st.floats(0.5, 2.0), 1.0),
        presence_penalty=maybe(st.floats(-2.0, 2.0), 0.0),
        frequency_penalty=maybe(st.floats(-2.0, 2.0), 0.0),
        logit_bias=maybe(st.dictionaries(token, st.floats(-10.0, 10.0), max_size=3), None),
        allowed_token_ids=maybe(st.lists(token, min_size=1, max_size=30), None),
        min_tokens=maybe(st.integers(0, 15), 0),
        stop_token_ids=draw(st.lists(token, max_size=2)),
    )


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data(), seed=st.integers(0, 2**31))
def test_tokens_are_the_reference_tokens(
    make_sampler: MakeSampler, data: st.DataObject, seed: int
) -> None:
    vocab_size = 40
    rows = data.draw(st.lists(sequences(vocab_size), min_size=1, max_size=5))
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(rows), vocab_size, generator=generator) * 4
    before = logits.clone()
    output = make_sampler(vocab_size).sample(logits, rows)
    assert torch.equal(logits, before)
    for row, sequence in enumerate(rows):
        expected, margin = expected_token(logits[row].double().numpy(), sequence)
        assume(margin > 1e-4)
        assert (row in output.errors) == (expected is None)
        if expected is not None:
            assert output.token_ids[row] == expected


def mixed_sequences(count: int, vocab_size: int) -> list[Sequence]:
    """Every option, alone and together."""
    options: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.0, "logprobs": 5},
        {"temperature": 0.8},
        {"temperature": 0.8, "logprobs": 0},
        {"temperature": 1.0, "top_k": 50},
        {"temperature": 1.0, "top_k": 2000, "top_p": 0.7, "logprobs": 3},
        {"temperature": 1.3, "top_p": 0.95},
        {"temperature": 0.7, "top_p": 0.4, "logprobs": 20},
        {"temperature": 1.0, "min_p": 0.05},
        {"temperature": 1.0, "min_p": 0.01, "top_p": 0.9, "presence_penalty": 1.0},
        {"temperature": 0.0, "repetition_penalty": 1.3, "logprobs": 1},
        {"temperature": 0.9, "repetition_penalty": 0.9, "frequency_penalty": 0.7, "top_k": 9},
        {"temperature": 1.0, "logit_bias": {5: 3.3, 7: -100.0}, "logprobs": 2},
        {"temperature": 1.0, "allowed_token_ids": [4, 7, 9, vocab_size - 1]},
        {"temperature": 5.0, "bad_words": ((4,), (9, 3)), "min_tokens": 9},
    ]
    random = np.random.default_rng(0)
    found = []
    for row in range(count):
        tokens = random.integers(0, vocab_size, 20).tolist()
        keywords = dict(options[row % len(options)])
        found.append(
            make_sequence(
                tokens[: 5 + row % 7],
                tokens[5 + row % 7 :],
                seed=row - 30,
                eos=frozenset({2}),
                bad_words=keywords.pop("bad_words", ()),
                **keywords,
            )
        )
    return found


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def bits(entry: TokenLogprobs | None) -> tuple[int, ...] | None:
    if entry is None:
        return None
    values = np.array([entry.logprob, *(value for _, value in entry.top)], np.float32)
    ids = [token_id for token_id, _ in entry.top]
    return (entry.token_id, entry.rank, *ids, *values.view(np.int32).tolist())


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("vocab_size", [3001, 151_936])
def test_bits_do_not_depend_on_the_batch_or_the_threads(
    make_sampler: MakeSampler, vocab_size: int
) -> None:
    torch.manual_seed(4)
    num_rows = 64 if vocab_size < 10_000 else 20
    sampler = make_sampler(vocab_size)
    if is_interpreted(sampler.kernels):
        if vocab_size > 10_000:
            pytest.skip("too slow to be interpreted")
        num_rows = 20
    logits = (torch.randn(num_rows, vocab_size) * 3).to(torch.bfloat16).float()
    rows = mixed_sequences(num_rows, vocab_size)
    whole = sampler.sample(logits, rows)
    assert not whole.errors
    assert whole.logprobs is not None
    assert sum(entry is not None for entry in whole.logprobs) > num_rows // 3
    order = np.random.default_rng(1).permutation(num_rows).tolist()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        shuffled = sampler.sample(logits[order], [rows[row] for row in order])
        assert shuffled.logprobs is not None
        for place, row in enumerate(order):
            assert shuffled.token_ids[place] == whole.token_ids[row]
            assert bits(shuffled.logprobs[place]) == bits(whole.logprobs[row])
        for row in range(0, num_rows, 1 if vocab_size < 10_000 else 4):
            alone = sampler.sample(logits[row : row + 1].clone(), [rows[row]])
            assert alone.token_ids == [whole.token_ids[row]]
            logprobs = alone.logprobs[0] if alone.logprobs else None
            assert bits(logprobs) == bits(whole.logprobs[row])


def test_a_row_that_is_not_finite_fails_alone(make_sampler: MakeSampler) -> None:
    torch.manual_seed(5)
    sampler = make_sampler(500)
    logits, rows = torch.randn(45, 500), mixed_sequences(45, 500)
    whole = sampler.sample(logits, rows)
    for row, value in ((0, torch.nan), (7, torch.inf), (20, -torch.inf), (31, torch.nan)):
        logits[row, 3 + row] = value
    output = sampler.sample(logits, rows)
    assert sorted(output.errors) == [0, 7, 20, 31]
    assert "1 of 500 logits" in output.errors[7]
    assert "token id 10" in output.errors[7]
    assert whole.logprobs is not None
    assert output.logprobs is not None
    for row in set(range(45)) - set(output.errors):
        assert output.token_ids[row] == whole.token_ids[row]
        assert output.logprobs[row] == whole.logprobs[row]
    assert output.logprobs[7] is None


def test_no_rows_and_all_rows_wrong(make_sampler: MakeSampler) -> None:
    sampler = make_sampler(10)
    assert sampler.sample(torch.zeros(0, 10), []) == SamplerOutput([])
    sequences = [make_sequence(logprobs=1), make_sequence(temperature=0.0)]
    output = sampler.sample(torch.full((2, 10), torch.nan), sequences)
    assert sorted(output.errors) == [0, 1]
    assert output.logprobs == [None, None]


def test_a_row_with_every_token_forbidden_fails_alone(make_sampler: MakeSampler) -> None:
    sampler = make_sampler(4)
    rows = [
        make_sequence(allowed_token_ids=[2], bad_words=((2,),)),
        make_sequence(temperature=0.0, logit_bias={1: 50.0}),
        make_sequence(allowed_token_ids=[9, 10], logprobs=1),
        make_sequence(repetition_penalty=1e-3),
    ]
    logits = torch.ones(4, 4)
    logits[3, 1] = 3e38
    output = sampler.sample(logits, rows)
    assert sorted(output.errors) == [0, 2, 3]
    assert "allowed_token_ids" in output.errors[0]
    assert "repetition_penalty" in output.errors[3]
    assert output.token_ids[1] == 1
    assert output.logprobs == [None] * 4


def test_min_tokens_holds_back_eos_and_stop_ids_until_reached(make_sampler: MakeSampler) -> None:
    logits = [0.0, 9.0, 8.0, 7.0]
    ends: dict[str, Any] = {"eos": frozenset({1}), "stop_token_ids": [2, 99], "temperature": 0.0}
    for ignore_eos in (False, True):
        ends["ignore_eos"] = ignore_eos
        first = make_sequence([0], [3], min_tokens=2, **ends)
        assert sample_one(make_sampler, logits, first).token_ids == [3]
        reached = make_sequence([0], [3, 3], min_tokens=2, **ends)
        assert sample_one(make_sampler, logits, reached).token_ids == [1]
        biased = make_sequence([0], [3, 3], min_tokens=2, logit_bias={0: 1.0}, **ends)
        assert sample_one(make_sampler, logits, biased).token_ids == [1]


@pytest.mark.parametrize(
    ("words", "output", "expected"),
    [
        (((3,),), [], 2),
        (((1, 3),), [], 3),  # the prompt's last token is 1, but only the output counts
        (((1, 3),), [1], 2),
        (((1, 3),), [1, 0], 3),
        (((0, 1, 3),), [0, 1], 2),
        (((0, 1, 3),), [1], 3),
        (((3,), (2,)), [], 1),
        (((77,), ()), [], 3),  # outside the vocabulary, and an empty one: nothing to forbid
    ],
)
def test_bad_words(
    make_sampler: MakeSampler, words: tuple[tuple[int, ...], ...], output: list[int], expected: int
) -> None:
    sequence = make_sequence([0, 1], output, bad_words=words, temperature=0.0)
    assert sample_one(make_sampler, [0.0, 1.0, 2.0, 3.0], sequence).token_ids == [expected]


def test_repetition_counts_the_prompt_but_presence_and_frequency_do_not(
    make_sampler: MakeSampler,
) -> None:
    logits = [3.0, 2.5, 2.0]
    prompt = [0, 0, 0]
    cases: list[tuple[dict[str, Any], int]] = [
        ({"repetition_penalty": 1.5}, 1),
        ({"presence_penalty": 2.0}, 0),
        ({"frequency_penalty": 2.0}, 0),
    ]
    for params, expected in cases:
        sequence = make_sequence(prompt, temperature=0.0, **params)
        assert sample_one(make_sampler, logits, sequence).token_ids == [expected]
    output = [1, 0, 0]
    cases = [
        ({"presence_penalty": 0.4}, 0),
        ({"frequency_penalty": 0.4}, 0),
        ({"frequency_penalty": 0.6}, 2),
    ]
    for params, expected in cases:
        sequence = make_sequence([2], output, temperature=0.0, **params)
        assert sample_one(make_sampler, [3.2, 2.5, 2.1], sequence).token_ids == [expected]


def test_ids_outside_the_vocabulary_are_passed_over(make_sampler: MakeSampler) -> None:
    sequence = make_sequence(
        [1, 900],
        [2, 901],
        temperature=0.0,
        repetition_penalty=1.1,
        frequency_penalty=0.1,
        logit_bias={3: 5.0, 950: 100.0},
        allowed_token_ids=[3, 4, 951],
    )
    assert sample_one(make_sampler, [9.0] * 5, sequence).token_ids == [3]


def test_temperature_near_zero_and_top_k_1_are_greedy(make_sampler: MakeSampler) -> None:
    torch.manual_seed(6)
    logits = torch.randn(30, 300).to(torch.bfloat16).float()
    logits[:, 200] = logits.amax(-1)  # ties: the lower id wins
    greedy = logits.argmax(-1).tolist()
    sampler = make_sampler(300)
    options: list[dict[str, Any]] = [{"temperature": 1e-6}, {"top_k": 1}, {"top_p": 1e-9}]
    for params in options:
        rows = [make_sequence(seed=row, **params) for row in range(30)]
        assert sampler.sample(logits, rows).token_ids == greedy


@pytest.mark.parametrize("params", [{"top_k": -1}, {"top_k": 300}, {"top_k": 9999}, {"top_p": 1.0}])
def test_filters_that_keep_all_change_nothing(
    make_sampler: MakeSampler, params: dict[str, Any]
) -> None:
    torch.manual_seed(7)
    logits = torch.randn(50, 300)
    sampler = make_sampler(300)
    plain = sampler.sample(logits, [make_sequence(seed=row) for row in range(50)])
    same = sampler.sample(logits, [make_sequence(seed=row, **params) for row in range(50)])
    assert same == plain


@pytest.mark.parametrize(
    ("params", "is_left_out"),
    [
        ({}, [True, True, True]),
        ({"min_p": 0.1}, [False, True, True]),
        ({"top_k": 7}, [True, False, True]),
        ({"top_p": 0.9}, [True, True, False]),
        ({"top_k": 300, "top_p": 1.0}, [True, True, True]),
    ],
)
def test_filters_that_no_row_asks_for_are_left_out(
    monkeypatch: pytest.MonkeyPatch, params: dict[str, Any], is_left_out: list[bool]
) -> None:
    sample, seen = reference.sample, []

    def watched(*columns: Any) -> Tensor:
        seen.append([column is None for column in columns[2:5]])
        return sample(*columns)

    monkeypatch.setattr(reference, "sample", watched)
    sampler = Sampler(300, CPU, reference)
    sampler.sample(torch.randn(2, 300), [make_sequence(seed=0), make_sequence(seed=1, **params)])
    assert seen == [is_left_out]


def test_seed_index_and_position_make_the_noise(make_sampler: MakeSampler) -> None:
    torch.manual_seed(8)
    sampler = make_sampler(1000)
    num_rows = 100 if is_interpreted(sampler.kernels) else 400
    logits = torch.randn(1, 1000).expand(num_rows, -1)

    def tokens(**options: Any) -> list[int]:
        rows = [make_sequence([1], [1] * row, **options) for row in range(num_rows)]
        return sampler.sample(logits, rows).token_ids

    base = tokens(seed=10)
    assert tokens(seed=10) == base
    assert tokens(seed=9, index=1) == base
    split = [make_sequence([1] * (row + 1), seed=10) for row in range(num_rows)]
    assert sampler.sample(logits, split).token_ids == base  # preempted or not, prompt or output
    for other in (
        tokens(seed=11),
        tokens(seed=-10),
        tokens(seed=10 + 2**32),
        tokens(seed=10 - 2**63),
    ):
        assert sum(a == b for a, b in zip(base, other, strict=True)) < 10
    assert len(set(base)) > num_rows // 2
    assert len(tokens(seed=2**63 - 1, index=5)) == num_rows


def test_frequencies_follow_the_filtered_softmax(make_sampler: MakeSampler) -> None:
    """30,000 draws of a top-k 20, top-p 0.9 choice."""
    count, vocab_size = 30_000, 64
    sampler = make_sampler(vocab_size)
    if is_interpreted(sampler.kernels):
        pytest.skip("too slow to be interpreted")
    torch.manual_seed(9)
    row = torch.randn(vocab_size) * 2
    sequence_rows = [
        make_sequence(seed=seed, temperature=1.5, top_k=20, top_p=0.9) for seed in range(count)
    ]
    tokens = sampler.sample(row.expand(count, -1), sequence_rows).token_ids
    order = np.argsort(-row.numpy(), kind="stable")[:20]
    probabilities = np.exp(row.double().numpy()[order] / 1.5)
    probabilities /= probabilities.sum()
    is_kept = np.concatenate([[0.0], probabilities.cumsum()[:-1]]) < 0.9
    expected = probabilities[is_kept] / probabilities[is_kept].sum() * count
    counts = np.bincount(tokens, minlength=vocab_size)
    assert counts[order[is_kept]].sum() == count
    chi_square = ((counts[order[is_kept]] - expected) ** 2 / expected).sum()
    freedom = is_kept.sum() - 1
    assert freedom > 5
    assert abs(chi_square - freedom) < 4.5 * np.sqrt(2 * freedom)


def test_logprobs_are_the_models_own(make_sampler: MakeSampler) -> None:
    """Before penalties, bias and temperature; each row has as many as it asked for."""
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0]]).expand(3, -1)
    rows = [
        make_sequence(temperature=0.0, logprobs=2, logit_bias={0: 50.0}),
        make_sequence(temperature=0.0),
        make_sequence(temperature=0.0, logprobs=20, allowed_token_ids=[2]),
    ]
    output = make_sampler(4).sample(logits, rows)
    expected = logits[0].double().log_softmax(-1).tolist()
    assert output.token_ids == [0, 1, 2]
    assert output.logprobs is not None
    first, none, last = output.logprobs
    assert none is None
    assert first is not None
    assert last is not None
    assert (first.token_id, first.rank, [i for i, _ in first.top]) == (0, 3, [1, 2])
    assert (last.token_id, last.rank, [i for i, _ in last.top]) == (2, 2, [1, 2, 0, 3])
    assert first.logprob == pytest.approx(expected[0], abs=1e-6)
    assert [value for _, value in last.top] == pytest.approx(
        [expected[i] for i in (1, 2, 0, 3)], abs=1e-6
    )
    assert sample_one(make_sampler, [1.0, 2.0], make_sequence()).logprobs is None


def prompt_logprobs(
    sampler: Sampler, logits: Tensor, token_ids: Tensor, top: int
) -> list[TokenLogprobs]:
    found = sampler.known_logprobs(logits, token_ids, top)
    return [
        entry for chunk in found for entry in told_logprobs(chunk, [top] * len(chunk.token_ids))
    ]


def test_prompt_logprobs_equal_those_of_sampling_to_the_bit(make_sampler: MakeSampler) -> None:
    torch.manual_seed(10)
    vocab_size = 200_000  # more than one chunk
    sampler = make_sampler(vocab_size)
    logits = torch.randn(7, vocab_size) * 3
    rows = [make_sequence(temperature=0.0, logprobs=4) for _ in range(7)]
    sampled = sampler.sample(logits, rows)
    assert sampled.logprobs is not None
    next_ids = torch.tensor(sampled.token_ids)
    prompt = prompt_logprobs(sampler, logits, next_ids, top=4)
    assert [bits(entry) for entry in prompt] == [bits(entry) for entry in sampled.logprobs]
    assert [entry.rank for entry in prompt] == [1] * 7
    without_top = prompt_logprobs(sampler, logits[3:4], next_ids[3:4], top=0)
    assert without_top == [TokenLogprobs(prompt[3].token_id, prompt[3].logprob, 1)]
    assert prompt_logprobs(sampler, logits[:0], next_ids[:0], top=3) == []


class Allowing:
    """A grammar that allows some ids of eight, or fails."""

    def __init__(self, *ids: int, error: str | None = None) -> None:
        self.ids = list(ids)
        self.error = error

    def allowed(self, token_ids: list[int]) -> npt.NDArray[np.bool_]:
        if self.error is not None:
            raise GrammarError(self.error)
        mask = np.zeros(8, np.bool_)
        mask[self.ids] = True
        return mask


def test_a_grammar_is_a_mask_before_all_else(make_sampler: MakeSampler) -> None:
    sampler = make_sampler(8)
    logits = torch.arange(8.0).repeat(7, 1)
    logits[5, 3] = torch.nan
    cases: list[tuple[dict[str, Any], Allowing | None, int | None]] = [
        ({"temperature": 0.0}, Allowing(1, 4), 4),
        ({"temperature": 0.0}, None, 7),
        ({"temperature": 0.0, "logit_bias": {1: 5.0, 7: 50.0}, "logprobs": 1}, Allowing(1, 4), 1),
        ({"temperature": 1.0, "top_k": 1, "allowed_token_ids": [2, 7]}, Allowing(1, 2, 6), 2),
        ({"temperature": 0.0, "allowed_token_ids": [2, 7]}, Allowing(1, 4), None),
        ({"temperature": 0.0}, Allowing(1), None),
        ({"temperature": 0.0}, Allowing(error="too many states"), None),
    ]
    rows = []
    for options, matcher, _ in cases:
        form = None if matcher is None else {"regex": "a"}
        rows.append(make_sequence(**options, structured_outputs=form))
        rows[-1].matcher = cast("Matcher | None", matcher)
    before = logits.clone()
    output = sampler.sample(logits, rows)
    assert torch.equal(logits.nan_to_num(), before.nan_to_num())
    for row, (_, _, expected) in enumerate(cases):
        assert (row in output.errors) == (expected is None)
        if expected is not None:
            assert output.token_ids[row] == expected
    assert output.refused == {4, 6}, "a NaN is nobody's wish"
    assert output.errors[6] == "structured_outputs: too many states"
    assert output.logprobs is not None
    assert output.logprobs[2] is not None
    assert output.logprobs[2].top[0][0] == 7, "the model's own distribution"
    random = [make_sequence(seed=seed, structured_outputs={"regex": "a"}) for seed in range(40)]
    for sequence in random:
        sequence.matcher = cast(Matcher, Allowing(3, 5))
    assert set(sampler.sample(torch.zeros(40, 8), random).token_ids) == {3, 5}
