"""Weigh and add up each token's expert rows, in plain torch.

Order and rounding points: float32 from zero over the top_k experts in routing order, then the
shared expert (already times its gate), and one rounding to the model's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor


def combine(
    rows: Tensor, pair_of_choice: Tensor, weights: Tensor, shared: Tensor | None = None
) -> Tensor:
    """Return each token's weighted sum, [num_tokens, hidden_size], in the dtype of `rows`.

    rows: [num_pairs, hidden_size]; pair_of_choice: int64 [num_tokens, top_k], which row holds a
    token's k-th choice; weights: float32 [num_tokens, top_k]; shared: float32, like the result.
    """
    total = torch.zeros(weights.shape[0], rows.shape[1], device=rows.device)
    for choice in range(weights.shape[1]):
        total += weights[:, choice : choice + 1] * rows[pair_of_choice[:, choice]].float()
    if shared is not None:
        total += shared
    return total.to(rows.dtype)
