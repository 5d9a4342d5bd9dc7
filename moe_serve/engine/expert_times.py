"""How long it takes to bring an expert in, and to run one, with the real kernels and links."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from moe_serve.experts.device_transfer import CHUNK_BYTES, MOST_CHUNKS
from moe_serve.experts.prefetch import LinkTimes
from moe_serve.experts.split import MissCosts
from moe_serve.experts.transfer import Transfers
from moe_serve.kernels.gpu.streams import Streams
from moe_serve.kernels.moe import reference
from moe_serve.kernels.moe.base import ExpertTable
from moe_serve.kernels.suite import Kernels

_NUM_SAMPLES = 5
_MANY_ROWS = 16


def least_s(work: Callable[[int], object]) -> float:
    """Return the least time of some calls after a first one: what others do only adds to it."""
    times_s = []
    for index in range(_NUM_SAMPLES + 1):
        start_s = time.perf_counter()
        work(index)
        times_s.append(time.perf_counter() - start_s)
    return min(times_s[1:])


def expert_s(
    moe: Callable[..., Tensor], table: ExpertTable, wait: Callable[[], None] | None = None
) -> tuple[float, float]:
    """Measure the seconds that an expert takes, and those more that each row takes.

    wait: until what was launched is done.
    """
    device = table.records.device

    def run(expert: int, num_rows: int) -> None:
        counts = torch.zeros(table.num_experts, dtype=torch.int64)
        counts[expert % table.num_experts] = num_rows
        rows = torch.zeros(num_rows, table.hidden_size, dtype=table.dtype, device=device)
        moe(rows, torch.arange(num_rows, device=device), counts.to(device), table)
        if wait is not None:
            wait()

    one_s = least_s(lambda expert: run(expert, 1))
    many_s = least_s(lambda expert: run(expert, _MANY_ROWS))
    row_s = max(0.0, (many_s - one_s) / (_MANY_ROWS - 1))
    return one_s - row_s, row_s


def device_times(queue: Transfers, num_experts: int, record_bytes: int) -> LinkTimes:
    """Measure how long a device's slot takes to fill, before anything else is under way.

    What is needed may wait for as many chunks of guesses as are asked for at once.
    """
    load_s = least_s(lambda index: _bring(queue, index % num_experts))
    share = min(1.0, MOST_CHUNKS * CHUNK_BYTES / record_bytes)
    return LinkTimes(load_s=load_s, chunk_s=load_s * share)


def split_costs(
    kernels: Kernels, host: ExpertTable, slots: Tensor, queue: Transfers, streams: Streams
) -> MissCosts:
    """Measure a copy to a device, and an expert there and in host memory.

    host: a layer's experts in host memory; slots: uint8 [num_slots, record_bytes], on the device.
    """
    device = slots.device
    there = replace(
        host,
        records=slots,
        slot_of_expert=torch.zeros_like(host.slot_of_expert, device=device),
        uses=torch.zeros_like(host.uses, device=device),
    )
    copy_s = least_s(lambda index: _bring(queue, index % host.num_experts))
    host_s, host_row_s = expert_s(reference.moe, host)
    stream = streams.current()
    device_s, device_row_s = expert_s(kernels.moe, there, lambda: stream.record().wait())
    return MissCosts(
        copy_s=copy_s,
        host_s=host_s,
        host_row_s=host_row_s,
        device_s=device_s,
        device_row_s=device_row_s,
        is_one_processor=False,
    )


def _bring(queue: Transfers, expert: int) -> None:
    """Bring an expert into the first slot, which nobody uses yet, whatever is wrong with it."""
    queue.demand(0, [(expert, 0)])
    while not queue.ended(wait=True):
        pass
