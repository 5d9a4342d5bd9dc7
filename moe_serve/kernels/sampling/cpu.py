"""Sampling by the native library: reference.py's choices, with exp and log of its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from moe_serve.kernels.native.loader import Native
from moe_serve.kernels.native.pointers import empty
from moe_serve.kernels.sampling import reference

_LOW_64 = 2**64 - 1


class SamplingKernels:
    """The functions of `Sampling`; edits are index operations, which torch does as well."""

    token_hashes = staticmethod(reference.token_hashes)
    keep_only_ = staticmethod(reference.keep_only_)
    forbid_ = staticmethod(reference.forbid_)
    add_bias_ = staticmethod(reference.add_bias_)
    penalise_ = staticmethod(reference.penalise_)

    def __init__(self, native: Native) -> None:
        self._row_keys = native.function("row_keys", "pplp")
        self._greedy = native.function("greedy", "iplllpp")
        self._sample = native.function("sample", "iplllppppppp")
        self._chosen_logprobs = native.function("chosen_logprobs", "iplllplpppp")

    def row_keys(self, seeds: Sequence[int], positions: Sequence[int]) -> Tensor:
        words = np.array([seed & _LOW_64 for seed in seeds], dtype=np.uint64)
        places = np.array(positions, dtype=np.int64)
        keys = empty(len(words), 2, dtype=torch.int32)
        self._row_keys(words.ctypes.data, places.ctypes.data, len(words), keys.data_ptr())
        return keys

    def greedy_checked(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        num_rows, vocab_size = logits.shape
        logits = _with_whole_rows(logits)
        ids = empty(num_rows, dtype=torch.int64)
        is_finite = empty(num_rows, dtype=torch.bool)
        self._greedy(
            torch.get_num_threads(),
            logits.data_ptr(),
            num_rows,
            logits.stride(0),
            vocab_size,
            ids.data_ptr(),
            is_finite.data_ptr(),
        )
        return ids, is_finite

    def sample(
        self,
        logits: Tensor,
        temperature: Tensor,
        min_p: Tensor | None,
        top_k: Tensor | None,
        top_p: Tensor | None,
        keys: Tensor,
        hashes: Tensor,
    ) -> Tensor:
        num_rows, vocab_size = logits.shape
        assert hashes.shape == (vocab_size,), (hashes.shape, vocab_size)
        logits = _with_whole_rows(logits)
        filters = reference.filters_of(logits, min_p, top_k, top_p)
        columns = (
            _column(temperature, torch.float32, num_rows),
            _column(filters.min_p, torch.float32, num_rows),
            _column(filters.top_k, torch.int64, num_rows),
            _column(filters.top_p, torch.float64, num_rows),
            _column(keys, torch.int32, 2 * num_rows),
            _column(hashes, torch.int32, vocab_size),
        )
        ids = empty(num_rows, dtype=torch.int64)
        self._sample(
            torch.get_num_threads(),
            logits.data_ptr(),
            num_rows,
            logits.stride(0),
            vocab_size,
            *(column.data_ptr() for column in columns),
            ids.data_ptr(),
        )
        return ids

    def chosen_logprobs(
        self, logits: Tensor, token_ids: Tensor, top: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        num_rows, vocab_size = logits.shape
        assert top <= vocab_size, (top, vocab_size)
        logits = _with_whole_rows(logits)
        chosen = _column(token_ids, torch.int64, num_rows)
        logprobs = empty(num_rows, dtype=torch.float32)
        ranks = empty(num_rows, dtype=torch.int64)
        top_ids = empty(num_rows, top, dtype=torch.int64)
        top_logprobs = empty(num_rows, top, dtype=torch.float32)
        self._chosen_logprobs(
            torch.get_num_threads(),
            logits.data_ptr(),
            num_rows,
            logits.stride(0),
            vocab_size,
            chosen.data_ptr(),
            top,
            logprobs.data_ptr(),
            ranks.data_ptr(),
            top_ids.data_ptr(),
            top_logprobs.data_ptr(),
        )
        return logprobs, ranks, top_ids, top_logprobs


def _with_whole_rows(logits: Tensor) -> Tensor:
    """Return logits whose rows may lie apart (or on each other), but are contiguous in themselves.

    logits: float32 [num_rows, vocab_size].
    """
    assert logits.dtype == torch.float32, logits.dtype
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _column(values: Tensor, dtype: torch.dtype, count: int) -> Tensor:
    assert values.dtype == dtype, (values.dtype, dtype)
    assert values.numel() == count, (values.shape, count)
    return values.contiguous()
