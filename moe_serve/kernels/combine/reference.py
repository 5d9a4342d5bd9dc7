"""Weigh and add up each token's expert rows, in plain torch.

Order and rounding points: float32 from zero over the top_k experts in routing order, then the
shared expert, times its weight where it has one, and one rounding to the model's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

# tokens whose float32 sums are worked on at once, so that they stay in a core's cache
_CACHED_ROWS = 256


def combine(
    rows: Tensor,
    pair_of_choice: Tensor,
    weights: Tensor,
    shared: Tensor | None = None,
    shared_weights: Tensor | None = None,
) -> Tensor:
    """Return each token's weighted sum, [num_tokens, hidden_size], in the dtype of `rows`.

    rows: [num_pairs, hidden_size]; pair_of_choice: int64 [num_tokens, top_k], which row holds a
    token's k-th choice; weights: float32 [num_tokens, top_k]; shared: the shared expert's rows,
    like the result; shared_weights: float32 [num_tokens], what they are weighed by, or None.
    """
    num_tokens, top_k = weights.shape
    out = rows.new_empty(num_tokens, rows.shape[1])
    for start in range(0, num_tokens, _CACHED_ROWS):
        part = slice(start, start + _CACHED_ROWS)
        pairs, factors = pair_of_choice[part], weights[part]
        total = torch.zeros(pairs.shape[0], rows.shape[1], dtype=torch.float32, device=rows.device)
        for choice in range(top_k):
            total += rows[pairs[:, choice]].float().mul_(factors[:, choice : choice + 1])
        if shared is not None:
            extra = shared[part].float()
            if shared_weights is not None:
                extra = extra * shared_weights[part, None]
            total += extra
        out[part] = total
    return out
