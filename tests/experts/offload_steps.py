"""Steps of a model of two MoE layers, for tests of experts that are elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_serve.comm.base import Inbox
from moe_serve.experts.split import MissCosts
from moe_serve.types import ForwardBatch

LAYERS = (1, 3)  # of the model's four
NUM_EXPERTS, TOP_K, HIDDEN, SIZE = 8, 2, 32, 16


def costs_of(in_place: bool) -> MissCosts:
    """Return costs by which all that is missing runs in place, or is copied."""
    return MissCosts(
        copy_s=10.0 if in_place else 1e-9, host_s=1e-3, host_row_s=0.0, device_s=1e-6,
        device_row_s=0.0, is_one_processor=True,
    )  # fmt: skip


def inbox_of(hidden: Tensor, ids: Tensor) -> Inbox:
    flat = ids.flatten()
    order = torch.sort(flat, stable=True).indices
    return Inbox(hidden, order // TOP_K, flat.bincount(minlength=NUM_EXPERTS))


def batch_of(num_tokens: int) -> ForwardBatch:
    rows = torch.arange(num_tokens)
    return ForwardBatch(
        token_ids=rows, positions=rows, sequence_ids=rows * 0, query_lens=(num_tokens,),
        context_lens=(num_tokens,), prompt_lens=(num_tokens,), slot_mapping=(), block_tables=(),
        block_size=16, sample_rows=rows[-1:],
    )  # fmt: skip


def ids_of(*experts: int) -> Tensor:
    """Return routing of one token for each two experts."""
    return torch.tensor(experts).view(-1, TOP_K)
