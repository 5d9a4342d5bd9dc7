"""How near a prompt whose experts come over a link gets to the link's own time, on a clock."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_serve.experts.cache import ExpertCache
from moe_serve.experts.device_transfer import DeviceTransfers
from moe_serve.experts.offload import OffloadedExperts
from moe_serve.experts.policies import lru
from moe_serve.experts.policies.base import CacheShape
from moe_serve.experts.read_ahead import ReadAhead
from moe_serve.experts.slots import DeviceSlots
from moe_serve.kernels.forward.base import Stopped
from moe_serve.kernels.moe.base import ExpertTable
from tests.experts.offload_steps import batch_of
from tests.kernels.gpu.timed_streams import TimedStreams, Times

LAYERS, EXPERTS, TOP_K, TOKENS = 8, 128, 8, 8192
RECORD = 64  # bytes here; its time on the link is given
US = 1e-6


def run_nothing(*_: object) -> Tensor:
    raise AssertionError("the parts of a layer are run by who serves it here")


class Prompts:
    """Prompts of a model of 8 layers, each of which uses all 128 experts; times in microseconds.

    record: an expert over the link; attention: a layer without its experts; part: the host, for
    each part of a layer's experts that runs; an expert's products take 11.
    """

    def __init__(
        self, slots: int, places: int, record: float, attention: float, part: float
    ) -> None:
        self._attention, self._part, self._record_s = attention * US, part * US, record * US
        self._slots = slots
        byte_s = record * US / RECORD
        self._streams = TimedStreams(Times(byte_s, byte_s / 40, ask_s=6 * US, wake_s=15 * US))
        records = self._streams.pinned(LAYERS * EXPERTS * RECORD).view(-1, RECORD)
        total = slots * LAYERS
        shape = CacheShape(
            num_layers=LAYERS, num_experts=EXPERTS, slots_per_layer=slots, total_slots=total
        )
        cache = ExpertCache(shape, lru.build(shape, None), TOP_K)
        memory = DeviceSlots(total, RECORD, torch.device("cpu"))

        def record_of(layer: int, expert: int) -> Tensor:
            return records[layer * EXPERTS + expert]

        ahead = None
        if places:
            ring = torch.zeros(places, RECORD, dtype=torch.uint8)
            ahead = ReadAhead(self._streams, ring, record_of, LAYERS)
        queue = DeviceTransfers(self._streams, memory.records, record_of, ahead=ahead)
        resident = torch.from_numpy(cache.slot_of_expert)
        uses = torch.zeros(EXPERTS, dtype=torch.int64)
        tables = {
            layer: ExpertTable(memory.records, resident[layer], uses, 8, 8, torch.float32)
            for layer in range(LAYERS)
        }
        self._experts = OffloadedExperts(
            run_nothing, tables, cache, queue, memory, clock=lambda: self._streams.now_s,
            ahead=ahead,
        )  # fmt: skip
        self._chance = np.random.default_rng(0)
        self._popular = self._chance.dirichlet(np.full(EXPERTS, 2.0), size=LAYERS)

    def share_of_link(self) -> float:
        """Run a prompt; return the time of the link for what cannot be there, over what it took."""
        start_s = self._streams.now_s
        with self._experts.step(batch_of(TOKENS)):
            for layer in range(LAYERS):
                self._run(layer)
        self._streams.kernels.record().wait()
        least_s = LAYERS * (EXPERTS - self._slots) * self._record_s
        return least_s / (self._streams.now_s - start_s)

    def _run(self, layer: int) -> None:
        kernels = self._streams.kernels
        kernels.work(self._attention)
        kernels.record().wait()  # for what the router chose
        counts = np.maximum(1, self._chance.multinomial(TOKENS * TOP_K, self._popular[layer]))
        stopped = Stopped(
            layer=layer, expert_ids=np.zeros((1, TOP_K), np.int64),
            weights=np.zeros((1, TOP_K), np.float32), counts=counts, residual=torch.zeros(1, 8),
        )  # fmt: skip
        for run in self._experts.serve(stopped, can_wait=False):
            assert run.only is not None
            self._streams.now_s += self._part
            kernels.work(11 * US * int(run.only.sum()))


def second_prompt(*shape: float, places: int, slots: int) -> float:
    prompts = Prompts(slots, places, *shape)
    prompts.share_of_link()  # fills the cache
    return prompts.share_of_link()


# of Qwen3-30B-A3B: 9.4 MB at 50 GB/s; attention of 8,192 tokens
LARGE = partial(second_prompt, 190, 1000, 120)
SMALL = partial(second_prompt, 63, 500, 120)  # of 3 MB


@pytest.mark.parametrize("slots", [13, 32, 64])
def test_reading_ahead_keeps_the_link_busy(slots: int) -> None:
    within_layers = LARGE(places=0, slots=slots)
    ahead = LARGE(places=32, slots=slots)
    assert ahead > 0.96, ahead
    assert within_layers < 0.94, within_layers


@pytest.mark.parametrize("slots", [32, 64])
def test_small_experts_are_run_many_at_a_time(slots: int) -> None:
    found = SMALL(places=32, slots=slots)
    assert found > 0.9, found
