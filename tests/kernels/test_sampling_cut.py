"""Where top-k and top-p cut a row, found by the GPU's kernels, against numpy in float64."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_serve.kernels.sampling import reference

if not importlib.util.find_spec("triton"):
    pytest.skip("Triton is not installed", allow_module_level=True)

from moe_serve.kernels.sampling.cut import triton as cut
from moe_serve.kernels.sampling.pieces.triton import Work, largest_of_piece

# How near a cut float32 sums may decide otherwise than float64
MASS_TOLERANCE = 2e-6
FILTERS = [
    (1, 1.0), (7, 1.0), (900, 1.0), (10**9, 0.9), (10**9, 0.3), (10**9, 1e-6), (10**9, 0.9999),
    (50, 0.83), (600, 0.9707), (3, 0.999), (10**9, 1.0),
    (7, 1 - 1e-9), (50, 1 - 1e-9), (333, 1 - 1e-9), (700, 1 - 1e-9),
]  # fmt: skip


def cuts(
    logits: Tensor, temperature: Tensor, min_p: Tensor | None, top_k: Tensor, top_p: Tensor
) -> tuple[list[int], list[int]]:
    work = Work(logits)
    largest = work.of_pieces(torch.float32)
    largest_of_piece[work.pieces](work.logits, largest, work.num_rows, work.row_stride, **work.cut)
    keys, tokens = cut.cut_of_rows(work, temperature, min_p, top_k, top_p, largest)
    return keys.tolist(), tokens.tolist()


def survivors(scaled: Tensor, top_k: int, top_p: float) -> tuple[list[int], float]:
    """Return the tokens that the filters leave, and how near the cut was to another one."""
    values = scaled.double().numpy()
    order = np.argsort(-values, kind="stable")[:top_k]
    order = order[values[order] > -np.inf]
    if top_p >= 1:
        return sorted(order.tolist()), 1.0
    probabilities = np.exp(values[order])
    before = np.concatenate([[0.0], (probabilities / probabilities.sum()).cumsum()[:-1]])
    return sorted(order[before < top_p].tolist()), float(np.abs(before - top_p).min())


def tokens_before(scaled: Tensor, key: int, token: int) -> list[int]:
    """Return the tokens of finite logits up to the last survivor."""
    bits = (scaled + 0.0).view(torch.int32)
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
    is_before = (keys > key) | ((keys == key) & (torch.arange(len(keys)) <= token))
    found: list[int] = (is_before & (scaled > -torch.inf)).nonzero().squeeze(1).tolist()
    return found


@pytest.mark.parametrize("spread", [0.0, 0.1, 30.0])
@pytest.mark.parametrize("vocab_size", [1, 17, 1000, 8193, 20_000])
@pytest.mark.usefixtures("poisoned_empty")
def test_the_survivors_are_those_of_float64(vocab_size: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(len(FILTERS), vocab_size, generator=generator) * spread
    logits[::2] = logits[::2].to(torch.bfloat16).float()  # with ties
    logits[1::3, 1::2] = -torch.inf
    temperature = torch.linspace(0.3, 2.0, len(FILTERS))
    min_p = torch.where(torch.arange(len(FILTERS)) % 4 == 3, 0.01, 0.0)
    top_k = torch.tensor([k for k, _ in FILTERS])
    top_p = torch.tensor([p for _, p in FILTERS], dtype=torch.float64)
    keys, tokens = cuts(logits, temperature, min_p, top_k, top_p)
    scaled = reference.scaled_logits(logits, temperature[:, None], min_p[:, None])
    for row, (k, p) in enumerate(FILTERS):
        expected, margin = survivors(scaled[row], k, p)
        if margin >= MASS_TOLERANCE:
            assert tokens_before(scaled[row], keys[row], tokens[row]) == expected, (k, p)
        if k >= vocab_size and p >= 1:
            assert (keys[row], tokens[row]) == (-(2**31), 2**31 - 1)


def test_a_cut_does_not_depend_on_other_rows_or_on_where_they_lie() -> None:
    torch.manual_seed(0)
    memory = torch.randn(4, 9001) * 2
    logits = memory[:, 3:9000]
    temperature, min_p = torch.ones(4), torch.zeros(4)
    top_k, top_p = (
        torch.tensor([40, 10**9, 10**9, 3]),
        torch.tensor([0.9, 0.5, 0.999, 1.0]).double(),
    )
    whole = cuts(logits, temperature, min_p, top_k, top_p)
    for row in range(4):
        part = slice(row, row + 1)
        alone = cuts(logits[part].clone(), temperature[part], None, top_k[part], top_p[part])
        assert alone == ([whole[0][row]], [whole[1][row]])
