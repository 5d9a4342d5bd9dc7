"""Cases of sampling: a row of logits is read once at least."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.kernels.limits import Limits
from benchmarks.kernels.timing import Case, Work, num_sets
from benchmarks.kernels.workload import Workload
from moe_serve.kernels.suite import Kernels

TEMPERATURE, TOP_K, TOP_P = 0.8, 50, 0.95
# of logits: about what trained models have
_DEVIATION = 3.0


def sampling(kernels: Kernels, workload: Workload, limits: Limits) -> Iterator[Case]:
    """Yield greedy choice, and sampling with temperature, top-k and top-p."""
    vocab_size = workload.shape.vocab_size
    hashes = kernels.sampling.token_hashes(vocab_size, torch.device("cpu"))
    one = torch.randn(max(workload.sampled_rows), vocab_size) * _DEVIATION
    logits = one.expand(num_sets(one.nbytes, workload.cold_bytes), *one.shape).clone()
    for num_rows in workload.sampled_rows:
        count = logits.numel() // (num_rows * vocab_size)
        sets = list(logits.view(-1, vocab_size)[: count * num_rows].view(count, num_rows, -1))
        yield _greedy(kernels, limits, sets)
        yield _filtered(kernels, limits, sets, hashes)


def _greedy(kernels: Kernels, limits: Limits, sets: list[Tensor]) -> Case:
    num_bytes = sets[0].nbytes
    return Case(
        table="sampling",
        name=f"greedy, {len(sets[0])} rows",
        num_rows=len(sets[0]),
        work=Work(lambda turn: kernels.sampling.greedy_checked(sets[turn % len(sets)]), num_bytes),
        unit="GB/s",
        limit=limits.read,
        limit_name="read",
        torch=Work(lambda turn: sets[turn % len(sets)].argmax(-1), num_bytes),
    )


def _filtered(kernels: Kernels, limits: Limits, sets: list[Tensor], hashes: Tensor) -> Case:
    num_rows = len(sets[0])
    ones = torch.ones(num_rows)
    filters = (
        ones * TEMPERATURE,
        ones * 0,  # min_p
        torch.full((num_rows,), TOP_K),
        ones.double() * TOP_P,
        kernels.sampling.row_keys(range(num_rows), range(num_rows)),
        hashes,
    )
    return Case(
        table="sampling",
        name=f"top-k {TOP_K} and top-p {TOP_P}, {num_rows} rows",
        num_rows=num_rows,
        work=Work(
            lambda turn: kernels.sampling.sample(sets[turn % len(sets)], *filters), sets[0].nbytes
        ),
        unit="GB/s",
        limit=limits.read,
        limit_name="read",
    )
