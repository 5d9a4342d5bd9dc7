"""Expert MLPs over rows sorted by expert, in plain torch.

Rounding points: gate and up, to the model's dtype; their product silu(gate) * up, computed in
float32, to the same; the down projection, to the same. The rows come out unweighted, so that what
is later summed is what could have travelled between ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_serve.kernels.linear.reference import multiplier, padded_counts
from moe_serve.kernels.moe.base import HEADER_BYTES, ExpertTable, plain_weights

RECORD_LAYOUT = 0  # of a record's header: plain rows
# rows of float32 that are worked on at once, so that they stay in a core's cache
_CACHED_ROWS = 256


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up for rows that hold both side by side, [num_rows, 2 * size]."""
    size = gate_up.shape[1] // 2
    out = gate_up.new_empty(gate_up.shape[0], size)
    for start in range(0, gate_up.shape[0], _CACHED_ROWS):
        wide = gate_up[start : start + _CACHED_ROWS].float()
        gate, up = wide[:, :size], wide[:, size:]
        # F.silu's vector body and scalar tail differ in the last bit: a row's place would show
        denominator = torch.exp(-gate).add_(1.0)
        out[start : start + _CACHED_ROWS] = torch.div(gate, denominator, out=denominator).mul_(up)
    return out


def record_bytes(hidden_size: int, intermediate_size: int, dtype: torch.dtype) -> int:
    """Return the size of one expert's record, its header included."""
    return HEADER_BYTES + 3 * hidden_size * intermediate_size * dtype.itemsize


def pack_records_(
    records: Tensor, hidden_size: int, intermediate_size: int, dtype: torch.dtype
) -> None:
    """Bring plain records, uint8 [num_slots, record_bytes], into the form of `moe`: as they are.

    Asks the library about the weights' shapes, so that the first request need not wait for it.
    """
    gate_up, down = plain_weights(records, hidden_size, intermediate_size, dtype)
    padded_counts(gate_up[0], down[0])


def moe(
    hidden: Tensor,
    row_of_pair: Tensor,
    counts: Tensor,
    experts: ExpertTable,
    only: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Run each expert on its rows, or those of them that are in `only`.

    hidden: [num_rows, hidden_size]. row_of_pair: int64 [num_pairs], the row of each (token, expert)
    pair, pairs sorted by expert; counts: int64 [num_experts], pairs of each expert; those that have
    any must be resident. only: uint8 [num_experts], 1 for the experts to run now: the pairs of the
    others are left as they are in `out`, which is written where it is given. Returns
    [num_pairs, hidden_size], in the order of the pairs.
    """
    if only is not None:
        return _run_some(hidden, row_of_pair, counts, experts, only, out)
    experts.uses.add_(counts)
    gate_up, down = plain_weights(
        experts.records, experts.hidden_size, experts.intermediate_size, experts.dtype
    )
    slots = experts.slot_of_expert.tolist()
    rows = _run(
        hidden,
        row_of_pair,
        [(slots[expert], count) for expert, count in enumerate(counts.tolist()) if count],
        gate_up,
        down,
    )
    return rows if out is None else out.copy_(rows)


def _run_some(
    hidden: Tensor,
    row_of_pair: Tensor,
    counts: Tensor,
    experts: ExpertTable,
    only: Tensor,
    out: Tensor | None,
) -> Tensor:
    """Run the experts in `only`, uint8 [num_experts], and put their pairs in their places."""
    if out is None:
        out = hidden.new_empty(row_of_pair.shape[0], hidden.shape[1])
    chosen = only.bool()
    is_computed = chosen.repeat_interleave(counts)  # [num_pairs]
    out[is_computed] = moe(hidden, row_of_pair[is_computed], counts * chosen, experts)
    return out


def _run(
    hidden: Tensor,
    row_of_pair: Tensor,
    active: list[tuple[int, int]],
    gate_up: Tensor,
    down: Tensor,
) -> Tensor:
    """Run the experts in some slots; active: (slot, pairs), in the order of the pairs."""
    table = padded_counts(gate_up[0], down[0])
    sizes = [table[count] if count < len(table) else count for _, count in active]
    is_padded = any(size != count for size, (_, count) in zip(sizes, active, strict=True))
    place = _places(active, sizes, row_of_pair.device) if is_padded else None
    total = sum(sizes)
    if place is None:
        rows = hidden[row_of_pair]
    else:
        padded = row_of_pair.new_zeros(total)
        padded[place] = row_of_pair
        rows = hidden[padded]
    both = rows.new_empty(total, gate_up.shape[1])
    multiply = multiplier(gate_up[0])
    start = 0
    for (slot, _), size in zip(active, sizes, strict=True):
        part = slice(start, start + size)
        multiply(rows[part], gate_up[slot], both[part])
        start += size
    inner = silu_and_mul(both)  # [total, intermediate_size]
    out = rows  # not needed any more: the same size
    multiply = multiplier(down[0])
    start = 0
    for (slot, _), size in zip(active, sizes, strict=True):
        part = slice(start, start + size)
        multiply(inner[part], down[slot], out[part])
        start += size
    return out if place is None else out[place]


def _places(active: list[tuple[int, int]], sizes: list[int], device: torch.device) -> Tensor:
    """Return where each pair stands once every expert's rows are padded, int64 [num_pairs]."""
    places: list[int] = []
    start = 0
    for (_, count), size in zip(active, sizes, strict=True):
        places.extend(range(start, start + count))
        start += size
    return torch.tensor(places, device=device)
