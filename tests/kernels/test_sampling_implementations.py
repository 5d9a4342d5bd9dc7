"""Every implementation of sampling against numpy in float64, and its promise of bits."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_serve.kernels.sampling import reference
from moe_serve.kernels.sampling.base import Sampling
from tests.kernels.host_sync import no_host_sync
from tests.kernels.implementations import EXACT, TRITON, is_interpreted, kernels
from tests.kernels.row_independence import same_bits

CPU = torch.device("cpu")
Floats = npt.NDArray[np.float64]
MAX_DEVIATIONS = 4.5  # standard deviations; seeds are fixed, so a pass is a pass for ever
# How near a cut or a tie float32 sums, exp and log may decide otherwise than float64
MASS_TOLERANCE = 1e-6
SCORE_TOLERANCE = 1e-5
VOCAB_SIZES = [1, 2, 15, 17, 1000, 32_000]


@pytest.fixture(scope="module", params=EXACT)
def sampling(request: pytest.FixtureRequest) -> Sampling:
    found: Sampling = kernels(request.param).sampling
    return found


@pytest.fixture(scope="module", params=[name for name in EXACT if name != "reference"])
def native(request: pytest.FixtureRequest) -> Sampling:
    found: Sampling = kernels(request.param).sampling
    return found


@pytest.fixture
def any_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def column(values: object, dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=dtype)


class Options:
    """What each row asks for: (temperature, min_p, top_k, top_p)."""

    def __init__(self, rows: list[tuple[float, float, int, float]], *, position: int = 9) -> None:
        self.rows = rows
        self.keys = reference.row_keys(list(range(len(rows))), [position] * len(rows))

    def sampled(self, sampling: Sampling, logits: Tensor, index: Tensor | None = None) -> Tensor:
        """Sample from the logits, or from those rows of them that `index` names."""
        if index is None:
            index = torch.arange(len(self.rows))
        temperature, min_p, top_k, top_p = zip(*self.rows, strict=True)
        return sampling.sample(
            logits[index],
            column(temperature, torch.float32)[index],
            column(min_p, torch.float32)[index],
            column(top_k, torch.int64)[index],
            column(top_p, torch.float64)[index],
            self.keys[index],
            sampling.token_hashes(logits.shape[1], CPU),
        )


def exact_noise(key: Tensor, num_tokens: int) -> Floats:
    """The noise of one row: uniform numbers as documented, logs in float64."""
    hashes = reference.token_hashes(num_tokens, CPU).numpy().view(np.uint32)
    multiplier, addend = key.numpy().view(np.uint32)
    words = hashes * multiplier + addend
    words ^= words >> np.uint32(16)
    words *= np.uint32(0x21F0AAAD)
    words ^= words >> np.uint32(15)
    words *= np.uint32(0xD35A2D97)
    words ^= words >> np.uint32(15)
    words &= np.uint32(0x7FFFFFFF)
    uniform = (words.astype(np.float32) + np.float32(0.5)) * np.float32(reference.NOISE_SCALE)
    return np.asarray(-np.log(-np.log1p(-uniform.astype(np.float64))))


def acceptable_tokens(
    logits: Tensor, key: Tensor, temperature: float, min_p: float, top_k: int, top_p: float
) -> set[int]:
    """The tokens that may be chosen from one row: several where rounding decides."""
    one = torch.ones(1, 1)
    scaled = reference.scaled_logits(logits[None], one * temperature, one * min_p)[0]
    values = scaled.double().numpy()
    order = np.argsort(-values, kind="stable")[:top_k]
    order = order[values[order] > -np.inf]
    probabilities = np.exp(values[order])
    before = np.concatenate([[0.0], (probabilities / probabilities.sum()).cumsum()[:-1]])
    limit = top_p if top_p < 1 else np.inf
    scores = values[order] + exact_noise(key, len(values))[order]
    best = scores[before < limit - MASS_TOLERANCE].max(initial=-np.inf)
    is_near = (scores >= best - SCORE_TOLERANCE) & (before < limit + MASS_TOLERANCE)
    return set(order[is_near].tolist())


def rough_logits(num_rows: int, vocab_size: int, seed: int, spread: float) -> Tensor:
    """Logits with many ties, some of them forbidden; of the last row all but one token is."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, vocab_size, generator=generator) * spread
    logits[::2] = logits[::2].to(torch.bfloat16).float()
    if vocab_size > 2:
        logits[1::3, 1::2] = -torch.inf
    logits[-1] = -torch.inf
    logits[-1, seed % vocab_size] = -5.0
    return logits


def test_keys_and_hashes_are_the_reference_ones(sampling: Sampling) -> None:
    seeds = [0, 1, -1, 2**63 - 1, -(2**63), 2**63 + 5, -(2**64) - 1]
    positions = [0, 5, 2**31, 7, 100_000, 3, 2**40]
    assert torch.equal(sampling.row_keys(seeds, positions), reference.row_keys(seeds, positions))
    assert sampling.row_keys([], []).shape == (0, 2)
    assert torch.equal(sampling.token_hashes(100, CPU), reference.token_hashes(100, CPU))


@pytest.mark.parametrize("vocab_size", [*VOCAB_SIZES, 16_384, 16_385, 40_001])
def test_greedy_takes_the_first_of_equals(sampling: Sampling, vocab_size: int) -> None:
    logits = rough_logits(20, vocab_size, vocab_size, 2.0)
    logits[4:7] = 1.0  # all equal
    logits[5, vocab_size // 2 :] = 2.0
    logits[6] = torch.where(torch.arange(vocab_size) < vocab_size - 1, -0.0, 0.0)
    logits[7] = -torch.inf
    logits[8, vocab_size - 1] = torch.inf
    ids, is_finite = sampling.greedy_checked(logits)
    assert ids.dtype == torch.int64
    assert ids.tolist() == logits.numpy().argmax(-1).tolist()
    assert is_finite.tolist() == logits.isfinite().all(-1).tolist()


@pytest.mark.parametrize("vocab_size", [1, 17, 1000, 40_001])
def test_greedy_finds_each_kind_of_wrong_row(sampling: Sampling, vocab_size: int) -> None:
    wrong = [torch.nan, torch.inf, -torch.inf]
    places = sorted({0, vocab_size // 2, vocab_size - 1})
    logits = torch.randn(1 + len(wrong) * len(places), vocab_size)
    logits[0] = 3e38  # finite, though the sum is not
    expected = [True] + [False] * (len(logits) - 1)
    for row, (value, place) in enumerate((v, p) for v in wrong for p in places):
        logits[1 + row, place] = value
    ids, is_finite = sampling.greedy_checked(logits)
    assert is_finite.tolist() == expected
    assert ((ids >= 0) & (ids < vocab_size)).all()
    ids, is_finite = sampling.greedy_checked(torch.full((2, vocab_size), torch.nan))
    assert is_finite.tolist() == [False, False]
    assert ((ids >= 0) & (ids < vocab_size)).all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    vocab_size=st.sampled_from([*VOCAB_SIZES[:-1], 37, 513, 5000]),
    spread=st.sampled_from([0.0, 0.1, 1.0, 4.0, 30.0]),
    rows=st.lists(
        st.tuples(
            st.sampled_from([1e-5, 0.3, 0.8, 1.0, 5.0]),
            st.sampled_from([0.0, 0.0, 0.02, 0.5, 1.0]),
            st.sampled_from([1, 2, 50, 256, 512, 513, 4096, 10**9, 10**9]),
            st.one_of(st.floats(1e-6, 1.0), st.sampled_from([0.5, 0.95, 0.9999, 1.0, 1.0])),
        ),
        min_size=1,
        max_size=8,
    ),
)
def test_tokens_are_those_of_float64(
    sampling: Sampling,
    seed: int,
    vocab_size: int,
    spread: float,
    rows: list[tuple[float, float, int, float]],
) -> None:
    logits = rough_logits(len(rows), vocab_size, seed, spread)
    before = logits.clone()
    options = Options(rows, position=seed % 1000)
    chosen = options.sampled(sampling, logits)
    assert chosen.dtype == torch.int64
    assert torch.equal(logits, before)
    for row, token in enumerate(chosen.tolist()):
        assert token in acceptable_tokens(logits[row], options.keys[row], *rows[row])


@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0, 10.0])
def test_tokens_of_a_wide_vocabulary_are_those_of_float64(native: Sampling, spread: float) -> None:
    kinds = [
        (0.8, 0.0, 10**9, 1.0),
        (0.8, 0.0, 10**9, 0.9),
        (0.8, 0.0, 50, 0.9),
        (1.0, 0.001, 10**9, 0.3),
        (5.0, 0.0, 20_000, 0.01),
    ]
    options = Options(kinds * (1 if is_interpreted(native) else 8))
    logits = rough_logits(len(options.rows), 32_000, 1, spread)
    chosen = options.sampled(native, logits).tolist()
    for row, token in enumerate(chosen):
        assert token in acceptable_tokens(logits[row], options.keys[row], *options.rows[row])


@pytest.mark.parametrize("filters", [(1.0, 0.0, 10**9, 1.0), (1.0, 0.0, 10**9, 0.999999)])
def test_noise_is_exact_where_it_decides(
    sampling: Sampling, filters: tuple[float, float, int, float]
) -> None:
    """The second best token is brought to within the tolerance of the best one, or past it."""
    num_rows, vocab_size = 10 if is_interpreted(sampling) else 200, 5000
    options = Options([filters] * num_rows)
    logits, expected = torch.zeros(num_rows, vocab_size), []
    for row in range(num_rows):
        noise = exact_noise(options.keys[row], vocab_size)
        second, best = np.argsort(noise)[-2:].tolist()
        is_past = row % 2 == 1
        logits[row, second] = noise[best] - noise[second] + SCORE_TOLERANCE * (2 * is_past - 1)
        expected.append(second if is_past else best)
    assert options.sampled(sampling, logits).tolist() == expected


@pytest.mark.parametrize("left_out", range(8))
def test_a_filter_that_no_row_asks_for_may_be_none(sampling: Sampling, left_out: int) -> None:
    num_rows, vocab_size = 4 if is_interpreted(sampling) else 12, 1000
    logits = rough_logits(num_rows, vocab_size, 3, 3.0)
    filters = (
        1.0,
        0.0 if left_out & 1 else 0.05,
        10**9 if left_out & 2 else 50,
        1.0 if left_out & 4 else 0.9,
    )
    options = Options([filters, (1.0, 0.0, 10**9, 1.0)] * (num_rows // 2))
    columns = [
        column([row[i] for row in options.rows], dtype)
        for i, dtype in enumerate((torch.float32, torch.float32, torch.int64, torch.float64))
    ]
    given = [None if left_out >> i & 1 else part for i, part in enumerate(columns[1:])]
    hashes = sampling.token_hashes(vocab_size, CPU)
    got = sampling.sample(logits, columns[0], given[0], given[1], given[2], options.keys, hashes)
    assert torch.equal(got, options.sampled(sampling, logits))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of interpreted kernels
@pytest.mark.parametrize("vocab_size", [17, 1000, 5000])
@pytest.mark.parametrize(
    "filters",
    [(1.0, 0.0, 10**9, 1.0), (0.7, 0.05, 10**9, 1.0), (0.7, 0.0, 12, 1.0), (0.7, 0.02, 40, 0.9)],
    ids=["none", "min_p", "top_k", "all"],
)
def test_a_wrong_row_gets_some_token_and_changes_no_other(
    sampling: Sampling, filters: tuple[float, float, int, float], vocab_size: int
) -> None:
    """The host learns that a row is wrong only when all of it has been sampled."""
    good = rough_logits(12, vocab_size, 5, 3.0)
    logits = good.clone()
    logits[1] = torch.nan
    logits[2] = -torch.nan
    logits[3] = -torch.inf
    logits[5] = torch.inf
    for row, value in ((6, torch.nan), (7, torch.inf), (8, -torch.nan)):
        logits[row, vocab_size // 2] = value
    logits[9, ::3], logits[9, 1::3], logits[9, 2::3] = torch.nan, torch.inf, -torch.inf
    options = Options([filters] * 12)
    chosen, expected = options.sampled(sampling, logits), options.sampled(sampling, good)
    best, _ = sampling.greedy_checked(logits)
    for ids in (chosen, best):
        assert ((ids >= 0) & (ids < vocab_size)).all()
    columns = sampling.chosen_logprobs(logits, chosen, 5)
    expected_columns = sampling.chosen_logprobs(good, expected, 5)
    for row in (0, 4, 10, 11):
        assert chosen[row] == expected[row]
        for one, other in zip(columns, expected_columns, strict=True):
            assert torch.equal(one[row], other[row])


@pytest.mark.parametrize("name", TRITON[:1])
@pytest.mark.parametrize("is_filtered", [False, True])
def test_never_waits_for_the_device(name: str, is_filtered: bool) -> None:
    found = kernels(name).sampling
    logits, ones = torch.randn(5, 300), torch.ones(5)
    filters = (ones / 10, torch.arange(1, 6), torch.full((5,), 0.9).double())
    min_p, top_k, top_p = filters if is_filtered else (None, None, None)
    keys, hashes = found.row_keys(range(5), range(5)), found.token_hashes(300, CPU)
    with no_host_sync():
        ids, _ = found.greedy_checked(logits)
        found.sample(logits, ones, min_p, top_k, top_p, keys, hashes)
        found.chosen_logprobs(logits, ids, 3)


def test_only_survivors_are_chosen_and_each_of_them_is(sampling: Sampling) -> None:
    """Many draws for each set of filters, of which every survivor has a good share."""
    torch.manual_seed(3)
    row = (torch.randn(17) * 2).to(torch.bfloat16).float()
    row[[3, 9, 12]] = row.amax()  # ties
    for filters in [
        (9.0, 0.0, 10**9, 0.8),
        (9.0, 0.0, 2, 1.0),
        (9.0, 0.0, 6, 0.61),
        (9.0, 0.75, 99, 1.0),
        (9.0, 0.0, 10**9, 1e-6),
    ]:
        count = 8 if is_interpreted(sampling) else 8192
        chosen = Options([filters] * count).sampled(sampling, row.expand(count, -1))
        expected = acceptable_survivors(row, *filters)
        assert set(chosen.tolist()) <= expected
        assert len(set(chosen.tolist())) == len(expected) or is_interpreted(sampling)


def acceptable_survivors(
    row: Tensor, temperature: float, min_p: float, top_k: int, top_p: float
) -> set[int]:
    values = ((row - row.amax()).double() / temperature).numpy()
    values[values < np.log(max(min_p, 1e-300))] = -np.inf
    order = np.argsort(-values, kind="stable")[:top_k]
    order = order[values[order] > -np.inf]
    probabilities = np.exp(values[order])
    before = np.concatenate([[0.0], (probabilities / probabilities.sum()).cumsum()[:-1]])
    assert top_p >= 1 or np.abs(before - top_p).min() > MASS_TOLERANCE / 10
    return set(order[(before < top_p) | (top_p >= 1)].tolist())


def test_min_p_is_a_share_of_the_best_in_the_whole_row(sampling: Sampling) -> None:
    """Far from the best token are some that would be kept beside the best one there."""
    row = torch.full((5000,), -30.0)
    row[4100:] = 6.6
    row[[17, 4500]] = torch.tensor([10.0, 9.5])
    options = Options([(1.0, 0.05, 10**9, 1.0)] * (10 if is_interpreted(sampling) else 40))
    chosen = options.sampled(sampling, row.expand(len(options.rows), -1)).tolist()
    for key, token in zip(options.keys, chosen, strict=True):
        assert {token} == acceptable_tokens(row, key, *options.rows[0])
    assert set(chosen) == {17, 4500}


def test_ties_at_the_cut_go_to_the_lower_ids(sampling: Sampling) -> None:
    count = 8 if is_interpreted(sampling) else 4096
    logits = torch.zeros(count, 1000)
    for top_k, top_p, expected in [
        (1000, 0.0105, range(11)),
        (3, 1.0, range(3)),
        (2, 0.5, range(1)),
        (600, 0.0105, range(7)),  # of the 600: 6.3
    ]:
        chosen = Options([(1.0, 0.0, top_k, top_p)] * count).sampled(sampling, logits)
        assert set(chosen.tolist()) <= set(expected)
        assert len(set(chosen.tolist())) == len(expected) or is_interpreted(sampling)


def test_frequencies_follow_the_filtered_softmax(sampling: Sampling) -> None:
    if is_interpreted(sampling):
        pytest.skip("too slow to be interpreted")
    count, vocab_size = 100_000, 40
    row = torch.linspace(-4, 2, vocab_size)[torch.randperm(vocab_size)]
    filters = (1.5, 0.02, 30, 0.95)
    chosen = Options([filters] * count, position=17).sampled(sampling, row.expand(count, -1))
    survivors = sorted(acceptable_survivors(row, *filters))
    assert 10 < len(survivors) < 30
    expected = (row[survivors].double() / 1.5).softmax(-1).numpy() * count
    counts = np.bincount(chosen.numpy(), minlength=vocab_size)[survivors]
    assert counts.sum() == count
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    freedom = len(survivors) - 1
    assert abs(chi_square - freedom) < MAX_DEVIATIONS * np.sqrt(2 * freedom)


def test_a_row_of_nothing_but_wrong_logits_gives_some_token(native: Sampling) -> None:
    """No caller asks for it; it must end, and within the vocabulary."""
    for value in (torch.nan, -torch.inf, torch.inf):
        for filters in [(1.0, 0.0, 10**9, 1.0), (1.0, 0.1, 5, 0.5)]:
            chosen = Options([filters] * 3).sampled(native, torch.full((3, 100), value))
            assert ((chosen >= 0) & (chosen < 100)).all()


def many_options(count: int) -> Options:
    kinds = [
        (0.8, 0.0, 10**9, 1.0),
        (0.8, 0.0, 10**9, 0.9),
        (1.0, 0.0, 50, 1.0),
        (1.0, 0.0, 2000, 0.7),
        (1.0, 0.05, 10**9, 1.0),
        (3.0, 0.01, 10**9, 0.99),
    ]
    return Options([kinds[row % len(kinds)] for row in range(count)])


@pytest.mark.usefixtures("any_threads")
@pytest.mark.parametrize("vocab_size", [17, 1000, 32_000])
def test_bits_do_not_depend_on_the_other_rows_or_the_threads(
    native: Sampling, vocab_size: int
) -> None:
    num_rows, num_turns = (12, 4) if is_interpreted(native) else (48, 60)
    logits = rough_logits(num_rows, vocab_size, 6, 3.0)
    options = many_options(num_rows)
    top = min(20, vocab_size)
    tokens = options.sampled(native, logits)
    ids, _ = native.greedy_checked(logits)
    logprobs, ranks, top_ids, top_logprobs = native.chosen_logprobs(logits, tokens, top)
    random = np.random.default_rng(7)
    for turn in range(num_turns):
        torch.set_num_threads((1, 2, 4)[turn % 3])
        size = int(random.integers(1, num_rows + 1 if turn % 4 == 0 else 5))
        rows = torch.from_numpy(random.permutation(num_rows)[:size])
        assert torch.equal(options.sampled(native, logits, rows), tokens[rows])
        assert torch.equal(native.greedy_checked(logits[rows])[0], ids[rows])
        again = native.chosen_logprobs(logits[rows], tokens[rows], top)
        assert same_bits(again[0], logprobs[rows])
        assert torch.equal(again[1], ranks[rows])
        assert torch.equal(again[2], top_ids[rows])
        assert same_bits(again[3], top_logprobs[rows])


def test_logits_may_be_any_view(sampling: Sampling) -> None:
    torch.manual_seed(8)
    wide = torch.randn(12, 300)
    options = many_options(6)
    for view in (wide[::2, 10:210], wide[:6, ::2], wide[:1, :200].expand(6, -1), wide.t()[:6]):
        copy = view.contiguous()
        assert torch.equal(options.sampled(sampling, view), options.sampled(sampling, copy))
        assert torch.equal(sampling.greedy_checked(view)[0], sampling.greedy_checked(copy)[0])
        ids = torch.arange(6)
        found, expected = (sampling.chosen_logprobs(x, ids, 3) for x in (view, copy))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_no_rows(sampling: Sampling) -> None:
    logits = torch.zeros(0, 10)
    ids, is_finite = sampling.greedy_checked(logits)
    assert ids.shape == is_finite.shape == (0,)
    chosen = sampling.sample(
        logits,
        torch.zeros(0),
        torch.zeros(0),
        torch.zeros(0, dtype=torch.int64),
        torch.zeros(0, dtype=torch.float64),
        sampling.row_keys([], []),
        sampling.token_hashes(10, CPU),
    )
    assert chosen.shape == (0,)
    columns = sampling.chosen_logprobs(logits, torch.zeros(0, dtype=torch.int64), 3)
    assert [column.shape for column in columns] == [(0,), (0,), (0, 3), (0, 3)]


@pytest.mark.parametrize("top", [0, 1, 20, 600, 1001])
@pytest.mark.parametrize("vocab_size", [1, 15, 17, 1001, 5003])
def test_logprobs_equal_float64(sampling: Sampling, vocab_size: int, top: int) -> None:
    torch.manual_seed(3)
    logits = (torch.randn(9, vocab_size) * 8).to(torch.bfloat16).float()  # with ties
    logits[1] *= 1e-44  # subnormal
    if vocab_size > 1:
        logits[2, 1::2] = -torch.inf
        logits[3, ::2] = -0.0
        logits[3, 1::2] = 0.0
    token_ids = torch.randint(0, vocab_size, (9,))
    token_ids[2] = vocab_size - 1
    top = min(top, vocab_size)
    logprobs, ranks, top_ids, top_logprobs = sampling.chosen_logprobs(logits, token_ids, top)
    expected = logits.double() - logits.double().logsumexp(-1, keepdim=True)
    chosen = expected.gather(1, token_ids[:, None])[:, 0]
    assert torch.allclose(logprobs.double(), chosen, rtol=1e-6, atol=1e-5)
    assert torch.allclose(top_logprobs.double(), expected.gather(1, top_ids), rtol=1e-6, atol=1e-5)
    order = np.argsort(-logits.numpy(), axis=-1, kind="stable")
    assert top_ids.tolist() == order[:, :top].tolist()
    position = [row.tolist().index(token) for row, token in zip(order, token_ids, strict=True)]
    assert ranks.tolist() == [place + 1 for place in position]


def test_logprobs_of_a_row_that_is_not_finite_are_nan(sampling: Sampling) -> None:
    logits = torch.randn(4, 700)
    clean = sampling.chosen_logprobs(logits, torch.tensor([5] * 4), 4)
    logits[1, 600] = torch.nan
    logits[2, 0] = torch.inf
    logprobs, _, top_ids, top_logprobs = sampling.chosen_logprobs(logits, torch.tensor([5] * 4), 4)
    assert logprobs.isnan().tolist() == [False, True, True, False]
    assert top_logprobs.isnan().all(-1).tolist() == [False, True, True, False]
    assert ((top_ids >= 0) & (top_ids < 700)).all()
    assert torch.equal(logprobs[3], clean[0][3])
