"""What every implementation of sampling has: reference.py's functions say what each means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Sampling(Protocol):
    """A module or object with these functions, all rows of which are independent of each other.

    Logits are float32 [num_rows, vocab_size].
    """

    def row_keys(self, seeds: Sequence[int], positions: Sequence[int]) -> Tensor: ...

    def token_hashes(self, num_tokens: int, device: torch.device) -> Tensor: ...

    def greedy_checked(self, logits: Tensor) -> tuple[Tensor, Tensor]: ...

    def sample(
        self,
        logits: Tensor,
        temperature: Tensor,
        min_p: Tensor | None,
        top_k: Tensor | None,
        top_p: Tensor | None,
        keys: Tensor,
        hashes: Tensor,
    ) -> Tensor: ...

    def keep_only_(
        self, logits: Tensor, limited_rows: Tensor, rows: Tensor, ids: Tensor
    ) -> None: ...

    def forbid_(self, logits: Tensor, rows: Tensor, ids: Tensor) -> None: ...

    def add_bias_(self, logits: Tensor, rows: Tensor, ids: Tensor, bias: Tensor) -> None: ...

    def penalise_(
        self,
        logits: Tensor,
        rows: Tensor,
        ids: Tensor,
        output_counts: Tensor,
        repetition: Tensor,
        frequency: Tensor,
        presence: Tensor,
    ) -> None: ...

    def chosen_logprobs(
        self, logits: Tensor, token_ids: Tensor, top: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
