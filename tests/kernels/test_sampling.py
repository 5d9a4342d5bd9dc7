"""The sampling kernels against plain numpy in float64, and the noise against statistics."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_serve.kernels.sampling import reference

CPU = torch.device("cpu")
Floats = npt.NDArray[np.float64]
MAX_DEVIATIONS = 4.5  # standard deviations; seeds are fixed, so a pass is a pass for ever


def noise_uniform(seeds: list[int], positions: list[int], num_tokens: int) -> Floats:
    """The noise back on (0, 1): float64 [num_rows, num_tokens]."""
    keys = reference.row_keys(seeds, positions)
    gumbel = reference.gumbel_noise(keys, reference.token_hashes(num_tokens, CPU))
    uniform: Floats = np.exp(-np.exp(-gumbel.double().numpy()))
    return uniform


def deviations_of_counts(observed: npt.NDArray[np.int64], expected: Floats) -> float:
    """By how many standard deviations chi-square exceeds its mean (normal approximation)."""
    freedom = observed.size - 1
    chi_square = float(((observed - expected) ** 2 / expected).sum())
    return (chi_square - freedom) / float(np.sqrt(2 * freedom))


def deviations_from_uniform(uniform: Floats, num_bins: int = 256) -> float:
    counts = np.bincount((uniform.ravel() * num_bins).astype(int), minlength=num_bins)
    return deviations_of_counts(counts, np.full(num_bins, uniform.size / num_bins))


def seeds_and_positions(kind: str, count: int) -> tuple[list[int], list[int]]:
    steps = list(range(count))
    return {
        "positions": ([1] * count, steps),
        "seeds": (steps, [100] * count),
        "negative seeds": ([-step - 1 for step in steps], [100] * count),
        "high bits of the seed": ([step << 40 for step in steps], [100] * count),
        "seed and position together": (steps, steps),
        "seed against position": (steps, steps[::-1]),
    }[kind]


KINDS = [
    "positions",
    "seeds",
    "negative seeds",
    "high bits of the seed",
    "seed and position together",
    "seed against position",
]


@pytest.mark.parametrize("kind", KINDS)
def test_noise_is_uniform_and_uncorrelated(kind: str) -> None:
    uniform = noise_uniform(*seeds_and_positions(kind, 512), num_tokens=2048)
    assert abs(deviations_from_uniform(uniform)) < MAX_DEVIATIONS
    assert abs(deviations_from_uniform(uniform[:, 7:8], 16)) < MAX_DEVIATIONS
    assert abs(deviations_from_uniform(uniform[7:8], 16)) < MAX_DEVIATIONS
    centred = (uniform - 0.5) * np.sqrt(12)  # variance 1
    for step in (1, 2, 64, 256):
        for first, second in (
            (centred[step:], centred[:-step]),  # neighbouring rows
            (centred[:, step:], centred[:, :-step]),  # neighbouring tokens
            (centred[step:, step:], centred[:-step, :-step]),
        ):
            assert abs((first * second).mean()) * np.sqrt(first.size) < MAX_DEVIATIONS


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_of_neighbouring_rows_fill_the_square(kind: str) -> None:
    uniform = noise_uniform(*seeds_and_positions(kind, 512), num_tokens=512)
    for first, second in (
        (uniform[1:], uniform[:-1]),
        (uniform[:, 1:], uniform[:, :-1]),
    ):
        cells = (first * 16).astype(int) * 16 + (second * 16).astype(int)
        counts = np.bincount(cells.ravel(), minlength=256)
        assert abs(deviations_of_counts(counts, np.full(256, cells.size / 256))) < MAX_DEVIATIONS


def test_winners_among_equal_tokens_are_uniform_in_every_order() -> None:
    num_rows, num_tokens = 65_536, 64
    keys = reference.row_keys([5] * num_rows, list(range(num_rows)))
    logits = torch.zeros(num_rows, num_tokens)
    winners = reference.choose(logits, keys, reference.token_hashes(num_tokens, CPU)).numpy()
    counts = np.bincount(winners, minlength=num_tokens)
    expected = np.full(num_tokens, num_rows / num_tokens)
    assert abs(deviations_of_counts(counts, expected)) < MAX_DEVIATIONS
    pairs = np.bincount(winners[1:] * num_tokens + winners[:-1], minlength=num_tokens**2)
    expected = np.full(num_tokens**2, (num_rows - 1) / num_tokens**2)
    assert abs(deviations_of_counts(pairs, expected)) < MAX_DEVIATIONS


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_frequencies_follow_the_softmax(temperature: float) -> None:
    num_rows, num_tokens = 100_000, 40
    logits = torch.linspace(-4, 2, num_tokens).expand(num_rows, -1)
    scaled = reference.scaled_logits(
        logits, torch.full((num_rows, 1), temperature), torch.zeros(num_rows, 1)
    )
    keys = reference.row_keys(list(range(num_rows)), [17] * num_rows)
    chosen = reference.choose(scaled, keys, reference.token_hashes(num_tokens, CPU))
    expected = (logits[0].double() / temperature).softmax(-1).numpy() * num_rows
    is_frequent = expected > 20  # chi-square wants cells that are not nearly empty
    counts = np.bincount(chosen.numpy(), minlength=num_tokens)
    assert abs(deviations_of_counts(counts[is_frequent], expected[is_frequent])) < MAX_DEVIATIONS
    rare = expected[~is_frequent].sum()
    assert abs(counts[~is_frequent].sum() - rare) < MAX_DEVIATIONS * np.sqrt(rare + 1)


def test_noise_is_the_documented_function() -> None:
    """Written out with Python's integers: the arithmetic wraps as it should, everywhere."""

    def mixed_64(word: int) -> int:
        word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
        return word ^ word >> 31

    def mixed_32(word: int) -> int:
        word = (word ^ word >> 16) * 0x21F0AAAD % 2**32
        word = (word ^ word >> 15) * 0xD35A2D97 % 2**32
        return word ^ word >> 15

    golden = 0x9E3779B97F4A7C15
    seeds = [0, 1, -1, 2**63 - 1, -(2**63), 2**63]
    positions = [0, 5, 2**31, 7, 100_000, 3]
    keys = reference.row_keys(seeds, positions)
    noise = reference.gumbel_noise(keys, reference.token_hashes(300, CPU))
    for row, (seed, position) in enumerate(zip(seeds, positions, strict=True)):
        seed_hash = mixed_64((seed + golden) % 2**64)
        key = mixed_64((seed_hash + (position + 1) * golden) % 2**64)
        for token_id in range(300):
            word = mixed_32((mixed_32(token_id + 1) * (key % 2**32 | 1) + (key >> 32)) % 2**32)
            uniform = (np.float32(word % 2**31) + np.float32(0.5)) * np.float32(
                reference.NOISE_SCALE
            )
            expected = -np.log(-np.log1p(-float(uniform)))
            assert noise[row, token_id].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_noise_is_finite_at_both_ends() -> None:
    """The hash is a bijection, so some token reaches every word; here the words are given."""
    words = torch.tensor([0, 1, 2**31 - 1, -(2**31), -1], dtype=torch.int32)
    all_words = reference.token_hashes(2**16, CPU)
    assert len(set(all_words.tolist())) == 2**16
    key = torch.tensor([[1, 0]], dtype=torch.int32)
    assert reference.gumbel_noise(key, words).isfinite().all()
    # the preimages of the smallest and the largest uniform number
    for word, expected in ((0, 22.18), (2**31 - 1, -2.811)):
        noise = reference.gumbel_noise(key, torch.tensor([unmixed_32(word)], dtype=torch.int32))
        assert noise.item() == pytest.approx(expected, abs=0.01)


def unmixed_32(word: int) -> int:
    """Invert the kernel's 32-bit mixer; as int32."""
    for multiplier, shift in ((None, 15), (0xD35A2D97, 15), (0x21F0AAAD, 16)):
        if multiplier is not None:
            word = word * pow(multiplier, -1, 2**32) % 2**32
        word ^= word >> shift ^ word >> 2 * shift  # shifts of 15 and 16 leave at most two terms
    return word - 2**32 if word >= 2**31 else word


def test_noise_does_not_depend_on_other_rows_tokens_or_padding() -> None:
    keys = reference.row_keys([3, -4, 5], [10, 11, 12])
    whole = reference.gumbel_noise(keys, reference.token_hashes(1000, CPU))
    padded = reference.gumbel_noise(keys, reference.token_hashes(1024, CPU))
    assert torch.equal(padded[:, :1000], whole)
    assert torch.equal(
        reference.gumbel_noise(keys[1:2], reference.token_hashes(1000, CPU))[0], whole[1]
    )
    ids = torch.tensor([[999, 0, 17], [5, 5, 6], [1, 2, 3]])
    picked = reference.gumbel_noise(keys, reference.token_hashes(1000, CPU)[ids])
    assert torch.equal(picked, whole.gather(1, ids))


def test_is_finite_finds_each_kind_of_wrong_row() -> None:
    logits = torch.randn(6, 1000)
    logits[0, 999] = torch.nan
    logits[1, 0] = torch.inf
    logits[2, 500] = -torch.inf
    logits[3, :2] = torch.tensor([torch.inf, -torch.inf])
    logits[4] = 3e38  # finite, though the sum is not
    assert reference.is_finite(logits).tolist() == [False, False, False, False, True, True]


def test_greedy_takes_the_first_of_equals() -> None:
    logits = torch.zeros(3, 40_000)
    logits[1, [7, 8, 39_999]] = 2.0
    logits[2] = -0.0
    logits[2, 100] = 0.0
    assert reference.greedy(logits).tolist() == [0, 7, 0]


@pytest.mark.parametrize("count", [0, 1, 20, 999, 1000])
def test_ranked_orders_by_value_then_id(count: int) -> None:
    torch.manual_seed(0)
    logits = torch.randint(-9, 9, (5, 1000)) / 4.0  # many ties, zeros among them
    logits[1, ::3] = -torch.inf
    logits[2][logits[2] == 0] *= -1.0  # -0.0
    logits[2, ::2].abs_()
    logits[3] *= 1e-44  # subnormal
    expected = np.argsort(-logits.numpy(), axis=-1, kind="stable")[:, :count]
    assert reference.ranked(logits, count).tolist() == expected.tolist()


def kept_ids(logits: Floats, top_k: int, top_p: float) -> tuple[list[int], float]:
    """What top-k and top-p leave of one row, best first, and how near the cut was to a tie."""
    order = np.argsort(-logits, kind="stable")[:top_k]
    order = order[logits[order] > -np.inf]
    probabilities = np.exp(logits[order] - logits[order].max())
    probabilities /= probabilities.sum()
    before = np.concatenate([[0.0], probabilities.cumsum()[:-1]])
    if top_p >= 1:
        return order.tolist(), 1.0
    return order[before < top_p].tolist(), float(np.abs(before - top_p).min())


def survivor_sets(scaled: Tensor, top_k: list[int], top_p: list[float]) -> list[list[int]]:
    found: dict[int, list[int]] = {}
    ks, ps = torch.tensor(top_k), torch.tensor(top_p, dtype=torch.float64)
    for rows, ids, num_kept in reference.survivors(scaled, ks, ps):
        for row, row_ids, kept in zip(rows.tolist(), ids.tolist(), num_kept.tolist(), strict=True):
            assert row not in found
            found[row] = row_ids[:kept]
    return [found[row] for row in range(len(scaled))]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    vocab_size=st.sampled_from([1, 2, 37, 255, 257, 1000, 5000]),
    spread=st.sampled_from([0.0, 0.1, 1.0, 4.0, 30.0]),
    is_coarse=st.booleans(),
    filters=st.lists(
        st.tuples(
            st.sampled_from([1, 2, 50, 256, 257, 4096, 10**9]),
            st.one_of(st.floats(1e-6, 1.0), st.sampled_from([0.5, 0.95, 0.9999, 1.0])),
        ),
        min_size=1,
        max_size=6,
    ),
)
def test_survivors_are_the_reference_set(
    seed: int,
    vocab_size: int,
    spread: float,
    is_coarse: bool,
    filters: list[tuple[int, float]],
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(filters), vocab_size, generator=generator) * spread
    if is_coarse:
        logits = logits.to(torch.bfloat16).float()
    if vocab_size > 2:
        logits[0, 1::2] = -torch.inf
    ones, zeros = torch.ones(len(filters), 1), torch.zeros(len(filters), 1)
    scaled = reference.scaled_logits(logits, ones, zeros)
    top_k, top_p = [k for k, _ in filters], [p for _, p in filters]
    found = survivor_sets(scaled, top_k, top_p)
    for row, (k, p) in enumerate(filters):
        expected, margin = kept_ids(scaled[row].double().numpy(), k, p)
        assume(margin > 1e-6)  # nearer than float32 probabilities can tell
        assert found[row] == expected


def test_top_p_keeps_at_least_one_and_breaks_ties_by_id() -> None:
    logits = torch.zeros(4, 1000)
    ones, zeros = torch.ones(4, 1), torch.zeros(4, 1)
    scaled = reference.scaled_logits(logits, ones, zeros)
    found = survivor_sets(scaled, [1000, 1000, 3, 2], [1e-9, 0.0105, 1.0, 0.5])
    assert found == [[0], list(range(11)), [0, 1, 2], [0]]


def test_top_p_of_1_keeps_tokens_whose_probability_underflows() -> None:
    scaled = torch.tensor([[0.0, -200.0, -300.0, -torch.inf]] * 3)
    assert survivor_sets(scaled, [2, 4, 4], [1.0, 1.0, 0.9]) == [[0, 1], [0, 1, 2], [0]]


def test_survivors_do_not_depend_on_the_first_width(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    scaled = reference.scaled_logits(torch.randn(8, 3000), torch.ones(8, 1), torch.zeros(8, 1))
    top_k, top_p = (
        [1, 5, 2999, 3000, 3000, 700, 40, 3000],
        [0.9, 1.0, 0.5, 0.01, 0.5, 0.9, 1e-3, 1.0],
    )
    expected = survivor_sets(scaled, top_k, top_p)
    for width in (1, 3, 3000):
        monkeypatch.setattr(reference, "FIRST_WIDTH", width)
        assert survivor_sets(scaled, top_k, top_p) == expected


def test_choose_among_uses_the_noise_of_choose() -> None:
    torch.manual_seed(2)
    scaled = reference.scaled_logits(torch.randn(64, 500), torch.ones(64, 1), torch.zeros(64, 1))
    keys, hashes = reference.row_keys(list(range(64)), [9] * 64), reference.token_hashes(500, CPU)
    ids = reference.ranked(scaled, 500)
    among = reference.choose_among(scaled, ids, torch.full((64,), 500), keys, hashes)
    assert torch.equal(among, reference.choose(scaled.clone(), keys, hashes))
    first = reference.choose_among(scaled, ids, torch.ones(64, dtype=torch.int64), keys, hashes)
    assert torch.equal(first, ids[:, 0])
    assert not torch.equal(first, among)


def test_min_p_keeps_what_reaches_its_share_of_the_best() -> None:
    probabilities = torch.tensor([[0.5, 0.26, 0.1499, 0.05, 0.04, 0.0001]])
    logits = (probabilities.log() + 3).expand(4, -1)
    min_p = torch.tensor([[0.0], [0.1 - 1e-4], [0.5], [1.0]])
    scaled = reference.scaled_logits(logits, torch.ones(4, 1), min_p)
    assert (scaled > -torch.inf).sum(-1).tolist() == [6, 4, 2, 1]
    assert torch.allclose(scaled[0], probabilities.log() - probabilities[0, 0].log(), atol=1e-6)


def test_a_tiny_temperature_gives_no_nan() -> None:
    logits = torch.tensor([[1e35, 2.0, -1e35]])
    scaled = reference.scaled_logits(logits, torch.tensor([[1e-5]]), torch.zeros(1, 1))
    assert scaled.tolist() == [[0.0, -torch.inf, -torch.inf]]


def test_penalties_change_only_the_pairs() -> None:
    logits = torch.tensor([[2.0, -2.0, 0.0, 4.0], [1.0, 1.0, 1.0, 1.0]])
    rows, ids = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 1, 2, 3])
    counts = torch.tensor([0, 2, 1, 3])
    repetition = torch.tensor([2.0, 2.0, 2.0, 1.0])
    frequency = torch.tensor([0.5, 0.5, 0.5, 0.25])
    presence = torch.tensor([0.125, 0.125, 0.125, -1.0])
    reference.penalise_(logits, rows, ids, counts, repetition, frequency, presence)
    assert logits.tolist() == [[1.0, -5.125, -0.625, 4.0], [1.0, 1.0, 1.0, 1.25]]


def test_masks_and_bias() -> None:
    logits = torch.arange(10.0).reshape(2, 5)
    reference.keep_only_(
        logits, torch.tensor([1]), torch.tensor([1, 1, 1]), torch.tensor([0, 3, 3])
    )
    reference.forbid_(logits, torch.tensor([0, 0]), torch.tensor([4, 4]))
    reference.add_bias_(
        logits, torch.tensor([0, 1]), torch.tensor([1, 2]), torch.tensor([9.0, 9.0])
    )
    low = -torch.inf
    assert logits.tolist() == [[0.0, 10.0, 2.0, 3.0, low], [5.0, low, low, 8.0, low]]


@pytest.mark.parametrize("vocab_size", [1, 37, 1001])
def test_logprobs_equal_float64(vocab_size: int) -> None:
    torch.manual_seed(3)
    logits = (torch.randn(9, vocab_size) * 8).to(torch.bfloat16).float()  # with ties
    token_ids = torch.randint(0, vocab_size, (9,))
    top = min(20, vocab_size)
    logprobs, ranks, top_ids, top_logprobs = reference.chosen_logprobs(logits, token_ids, top)
    expected = logits.double() - logits.double().logsumexp(-1, keepdim=True)
    assert torch.allclose(
        logprobs.double(), expected.gather(1, token_ids[:, None])[:, 0], atol=1e-5
    )
    assert torch.allclose(top_logprobs.double(), expected.gather(1, top_ids), atol=1e-5)
    order = np.argsort(-logits.numpy(), axis=-1, kind="stable")
    assert top_ids.tolist() == order[:, :top].tolist()
    position = [row.tolist().index(token) for row, token in zip(order, token_ids, strict=True)]
    assert ranks.tolist() == [place + 1 for place in position]
