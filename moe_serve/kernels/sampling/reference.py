"""The tensor part of sampling, in plain torch: noise, penalties, filters, choice, logprobs.

It knows tensors only: no requests, no state. Every result of a row is a function of that row's
inputs, to the bit, whatever the other rows and the number of threads. Hence two things are avoided:
`sum` and `logsumexp` over a float row (torch splits the row between threads when it is alone), and
reductions over a width that depends on other rows; `softmax`, `log_softmax` and `cumsum` are safe.
Ties always go to the lower token id.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# how many of the best tokens top-p looks at first; 16 times as many each time after
FIRST_WIDTH = 256
NUM_NOISE_BITS = 31
# Maps 0 .. 2^31 - 1, which float32 rounds up to 2^31, into (0, 1): the largest gives 1 - 2^-24.
NOISE_SCALE = (1 - 2.0**-24) / 2.0**NUM_NOISE_BITS

# Logits that are worked on at once: what device memory can spare, or what a core's cache holds.
MAX_ELEMENTS_DEVICE = 2**26
MAX_ELEMENTS_CPU = 2**19

_LOW_32 = 0xFFFFFFFF
_MAX_ID = 0x7FFFFFFF


# Noise: a counter-based hash of (seed, position, token id)


def row_keys(seeds: Sequence[int], positions: Sequence[int]) -> Tensor:
    """Hash each row's seed and position to the key of its noise.

    seeds: any integers, taken modulo 2^64. positions: the index that the new token will have.
    Returns int32 [num_rows, 2], on the CPU: an odd multiplier and an addend.
    """
    seed = np.array([seed % 2**64 for seed in seeds], dtype=np.uint64)
    position = np.array(positions, dtype=np.uint64)
    golden = np.uint64(0x9E3779B97F4A7C15)
    key = _mixed_64(_mixed_64(seed + golden) + (position + np.uint64(1)) * golden)
    halves = np.stack([(key & np.uint64(_LOW_32)) | np.uint64(1), key >> np.uint64(32)], axis=1)
    return torch.from_numpy(halves.astype(np.uint32).view(np.int32))


def _mixed_64(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Apply splitmix64's finaliser, a bijection of 64-bit words."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def token_hashes(num_tokens: int, device: torch.device) -> Tensor:
    """Hash the token ids 0 .. num_tokens - 1: int32 [num_tokens], no two alike.

    An id's hash does not depend on `num_tokens`, so a padded vocabulary changes nothing.
    """
    return _mix_32_(torch.arange(1, num_tokens + 1, dtype=torch.int32, device=device))


def _mix_32_(words: Tensor) -> Tensor:
    """Mix int32 words in place by two rounds of multiply and shift; a bijection.

    Products wrap around; `>>` keeps the sign, so the mask makes it the unsigned shift.
    """
    words ^= (words >> 16) & 0x0000FFFF
    words *= 0x21F0AAAD
    words ^= (words >> 15) & 0x0001FFFF
    words *= 0xD35A2D97 - 2**32
    words ^= (words >> 15) & 0x0001FFFF
    return words


def gumbel_noise(keys: Tensor, hashes: Tensor) -> Tensor:
    """Draw the standard Gumbel noise of each token.

    keys: int32 [num_rows, 2] from `row_keys`. hashes: int32 [num_tokens] or [num_rows, num_tokens],
    from `token_hashes`. Returns float32 [num_rows, num_tokens], from -2.9 to 22.2.
    """
    words = _mix_32_(hashes * keys[:, :1] + keys[:, 1:]) & 0x7FFFFFFF  # [num_rows, num_tokens]
    uniform = words.float().add_(0.5).mul_(NOISE_SCALE)
    # -log(-log(1 - u)): the winners come from small u, where float32 is fine-grained
    return uniform.neg_().log1p_().neg_().log_().neg_()


# Checks and edits of logits


def is_finite(logits: Tensor) -> Tensor:
    """Tell which rows hold neither NaN nor an infinity: bool [num_rows]. Syncs the host."""
    # A sum is finite only if all its terms are; as it may overflow, rows that fail are looked at.
    finite = logits.sum(-1).isfinite()
    if not finite.all():
        rows = (~finite).nonzero().squeeze(1)
        finite[rows] = logits[rows].isfinite().all(-1)
    return finite


def keep_only_(logits: Tensor, limited_rows: Tensor, rows: Tensor, ids: Tensor) -> None:
    """Forbid in place, in the limited rows, all tokens but those of the pairs (rows[i], ids[i])."""
    kept = logits[rows, ids]
    logits[limited_rows] = -torch.inf
    logits[rows, ids] = kept


def forbid_(logits: Tensor, rows: Tensor, ids: Tensor) -> None:
    """Set the logits at the pairs (rows[i], ids[i]) to -inf, in place."""
    logits[rows, ids] = -torch.inf


def add_bias_(logits: Tensor, rows: Tensor, ids: Tensor, bias: Tensor) -> None:
    """Add bias[i] to the logit at (rows[i], ids[i]), in place; no pair may repeat."""
    logits[rows, ids] = logits[rows, ids] + bias


def penalise_(
    logits: Tensor,
    rows: Tensor,
    ids: Tensor,
    output_counts: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
) -> None:
    """Apply the three penalties to the logits at (rows[i], ids[i]), in place; no pair may repeat.

    All arguments after logits have one entry per pair: the tokens that occur in a row's prompt or
    output. In this order: positive logits are divided by `repetition` and others multiplied by it;
    `frequency` times the count in the output is subtracted; so is `presence` where that is not 0.
    """
    values = logits[rows, ids]
    values = torch.where(values > 0, values / repetition, values * repetition)
    values = values - frequency * output_counts
    logits[rows, ids] = torch.where(output_counts > 0, values - presence, values)


# Filters and choice


def greedy(logits: Tensor) -> Tensor:
    """Return the most likely token of each row: int64 [num_rows]."""
    return logits.argmax(-1)  # torch gives the first of equals


def greedy_checked(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `greedy` and `is_finite` do, each [num_rows]; all that a greedy step needs.

    Where a NaN is among a row's logits its token means nothing. May sync the host.
    """
    return greedy(logits), is_finite(logits)


class Filters(NamedTuple):
    """What bounds each row's choice: as in `sample`, but there is a column of each."""

    min_p: Tensor
    top_k: Tensor
    top_p: Tensor


def filters_of(
    logits: Tensor, min_p: Tensor | None, top_k: Tensor | None, top_p: Tensor | None
) -> Filters:
    """Return the filters of `sample`, with columns that leave all tokens where one is None."""

    def column(given: Tensor | None, value: float, dtype: torch.dtype) -> Tensor:
        if given is not None:
            return given
        return torch.full(logits.shape[:1], value, dtype=dtype, device=logits.device)

    return Filters(
        column(min_p, 0.0, torch.float32),
        column(top_k, logits.shape[1], torch.int64),
        column(top_p, 1.0, torch.float64),
    )


def sample(
    logits: Tensor,
    temperature: Tensor,
    min_p: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    keys: Tensor,
    hashes: Tensor,
) -> Tensor:
    """Sample a token of each row from the softmax that the filters leave: int64 [num_rows].

    In this order: the temperature, min_p (see `scaled_logits`), top_k and top_p (see `survivors`);
    then the largest logit plus Gumbel noise.

    logits: float32 [num_rows, vocab_size]; a row whose largest is not finite, or that has a NaN,
    gets some token of the vocabulary. temperature (above 0) and min_p (0 to 1): float32; top_k (at
    least 1; vocab_size or more for all): int64; top_p (above 0; 1 for all): float64, all
    [num_rows]. A filter is None where no row asks for it, which the caller knows; a device would
    have to be asked. keys: int32 [num_rows, 2], from `row_keys`. hashes: int32 [vocab_size], from
    `token_hashes`. Syncs the host.
    """
    num_rows, vocab_size = logits.shape
    min_p, top_k, top_p = filters_of(logits, min_p, top_k, top_p)
    most = MAX_ELEMENTS_CPU if logits.device.type == "cpu" else MAX_ELEMENTS_DEVICE
    rows_at_once = max(1, most // vocab_size)
    chosen = torch.empty_like(top_k)
    for start in range(0, num_rows, rows_at_once):
        part = slice(start, start + rows_at_once)
        scaled = scaled_logits(logits[part], temperature[part, None], min_p[part, None])
        _choose_into(chosen[part], scaled, top_k[part], top_p[part], keys[part], hashes)
    return chosen


def _choose_into(
    chosen: Tensor, scaled: Tensor, top_k: Tensor, top_p: Tensor, keys: Tensor, hashes: Tensor
) -> None:
    """Choose what `sample` returns into `chosen`; `scaled`, from `scaled_logits`, is used up."""
    is_filtered = (top_k < scaled.shape[-1]) | (top_p < 1)
    if not is_filtered.any():
        chosen[:] = choose(scaled, keys, hashes)
        return
    plain, filtered = (mask.nonzero().squeeze(1) for mask in (~is_filtered, is_filtered))
    if plain.numel():
        chosen[plain] = choose(scaled[plain], keys[plain], hashes)
        scaled, keys = scaled[filtered], keys[filtered]
    for rows, ids, num_kept in survivors(scaled, top_k[filtered], top_p[filtered]):
        chosen[filtered[rows]] = choose_among(scaled[rows], ids, num_kept, keys[rows], hashes)


def scaled_logits(logits: Tensor, temperature: Tensor, min_p: Tensor) -> Tensor:
    """Divide by the temperature, and forbid what is less likely than min_p times the best token.

    logits: float32 [num_rows, vocab_size], at least one finite in each row. temperature (above 0)
    and min_p (0 to 1): float32 [num_rows, 1]. Returns a new tensor whose rows have the maximum 0.
    """
    # Less the maximum first: a tiny temperature then cannot give inf, and so NaN.
    scaled = (logits - logits.amax(-1, keepdim=True)).div_(temperature)
    if (min_p > 0).any():
        scaled.masked_fill_(scaled < min_p.log(), -torch.inf)
    return scaled


def ranked(logits: Tensor, count: int) -> Tensor:
    """Return the `count` most likely tokens of each row, best first: int64 [num_rows, count].

    logits: float32 [num_rows, vocab_size], no NaN.
    """
    bits = (logits + 0.0).view(torch.int32)  # + 0.0: -0.0 becomes 0.0, as the two are a tie
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    # One key for value and id: no two are equal, so every algorithm gives the same order.
    ids = torch.arange(logits.shape[-1], device=logits.device)
    keys = (ordered.long() << 32) | (_MAX_ID - ids)
    if count < keys.shape[-1]:
        best = keys.topk(count, dim=-1).values
    else:
        best = keys.sort(dim=-1, descending=True).values
    return _MAX_ID - (best & _LOW_32)


def survivors(
    scaled: Tensor, top_k: Tensor, top_p: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield, for groups of rows, the tokens that top-k and then top-p leave.

    Top-k keeps exactly the k best. Top-p keeps, of those and with their probabilities made to sum
    to 1, the fewest best ones that reach top_p: each token that less than top_p comes before.
    The best token always stays; what is -inf never does.

    scaled: float32 [num_rows, vocab_size], from `scaled_logits`. top_k: int64 [num_rows], at least
    1; vocab_size or more for all. top_p: float64 [num_rows], above 0; 1 for all.
    Yields (rows [n], ids int64 [n, width], num_kept int64 [n]): the first num_kept ids of a row,
    best first, are its survivors, whatever the width. Syncs the host.
    """
    vocab_size = scaled.shape[-1]
    probabilities = scaled.softmax(-1)
    rows = torch.arange(scaled.shape[0], device=scaled.device)
    limit = torch.where(top_p < 1, top_p, torch.inf)
    width = min(FIRST_WIDTH, vocab_size, int(top_k.max()))
    while rows.numel():
        ids = ranked(scaled[rows], width)
        mass = probabilities[rows].gather(1, ids).cumsum(-1, dtype=torch.float64)
        num_allowed = top_k[rows, None]
        last = num_allowed.clamp(max=width) - 1
        total = torch.where(num_allowed < vocab_size, mass.gather(1, last), 1.0)
        before = mass.roll(1, -1).index_fill_(1, torch.zeros_like(rows[:1]), 0.0)
        is_kept = before < limit[rows, None] * total
        is_kept &= torch.arange(width, device=scaled.device) < num_allowed
        is_kept &= scaled[rows].gather(1, ids) > -torch.inf
        num_kept = is_kept.sum(-1)
        is_known = (top_k[rows] <= width) | (width == vocab_size)
        is_known |= (top_k[rows] >= vocab_size) & (num_kept < width)
        if is_known.any():
            yield rows[is_known], ids[is_known], num_kept[is_known]
        rows = rows[~is_known]
        width = min(16 * width, vocab_size)


def choose(scaled: Tensor, keys: Tensor, hashes: Tensor) -> Tensor:
    """Sample from the softmax of each row, by the largest logit plus Gumbel noise.

    scaled: float32 [num_rows, vocab_size], used up: it is written to. keys: int32 [num_rows, 2];
    hashes: int32 [vocab_size]. Returns int64 [num_rows].
    """
    return scaled.add_(gumbel_noise(keys, hashes)).argmax(-1)


def choose_among(
    scaled: Tensor, ids: Tensor, num_kept: Tensor, keys: Tensor, hashes: Tensor
) -> Tensor:
    """Sample as `choose` does, with the same noise, among the first num_kept of each row's ids.

    ids: int64 [num_rows, width] and num_kept: int64 [num_rows], from `survivors`.
    Returns int64 [num_rows].
    """
    scores = scaled.gather(1, ids) + gumbel_noise(keys, hashes[ids])
    is_left_out = torch.arange(ids.shape[1], device=ids.device) >= num_kept[:, None]
    best = scores.masked_fill_(is_left_out, -torch.inf).argmax(-1, keepdim=True)
    return ids.gather(1, best).squeeze(1)


# Logprobs


def chosen_logprobs(
    logits: Tensor, token_ids: Tensor, top: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Look up what the model itself gave the chosen tokens, and which it found most likely.

    logits: float32 [num_rows, vocab_size]; token_ids: int64 [num_rows].
    Returns logprobs float32 [num_rows], ranks int64 [num_rows] (1 is the best), top_ids int64
    [num_rows, top] best first, and top_logprobs float32 [num_rows, top].
    """
    logprobs = logits.log_softmax(-1)
    chosen = token_ids[:, None]
    value = logits.gather(1, chosen)
    is_lower_id = torch.arange(logits.shape[-1], device=logits.device) < chosen
    is_before = (logits > value) | ((logits == value) & is_lower_id)
    top_ids = ranked(logits, top)
    return (
        logprobs.gather(1, chosen).squeeze(1),
        is_before.count_nonzero(dim=-1) + 1,
        top_ids,
        logprobs.gather(1, top_ids),
    )
