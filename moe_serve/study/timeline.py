"""A run on a virtual clock: the runtime's own offloading, with a link and layers that take as long
as they are told.

What decides is the code that serves: cache, policy, predictor, prefetcher, transfer order. Only
time is made up: a layer takes `layer_s`, the link carries `link_bytes_s`. So a guess is useful,
late or wasted as it would be there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_serve.experts.cache import ExpertCache
from moe_serve.experts.calibration import Calibration
from moe_serve.experts.offload import OffloadedExperts
from moe_serve.experts.policies.base import CacheShape, EvictionPolicy
from moe_serve.experts.prefetch import MAX_DISTANCE, LinkTimes, Prefetcher
from moe_serve.experts.slots import FixedSlots
from moe_serve.experts.trace import Trace
from moe_serve.experts.transfer import CHUNK_BYTES, Transfer
from moe_serve.kernels.forward.base import Stopped
from moe_serve.kernels.moe.base import ExpertTable
from moe_serve.predictors.base import Predictor
from moe_serve.types import ForwardBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What a run is timed by. layer_s: one layer of one step, with all experts there."""

    layer_s: float
    link_bytes_s: float
    record_bytes: int

    @property
    def load_s(self) -> float:
        return self.record_bytes / self.link_bytes_s

    @property
    def chunk_s(self) -> float:
        return min(CHUNK_BYTES, self.record_bytes) / self.link_bytes_s


@dataclass(frozen=True, kw_only=True, slots=True)
class TimelineResult:
    """seconds: of the whole run on the virtual clock; stall_s: of them, waiting for experts.

    counters: as the runtime's in total. predictor_us: real time of predicting, per event.
    """

    num_tokens: int
    num_steps: int
    seconds: float
    stall_s: float
    counters: dict[str, int]
    issued: int
    predictor_us: float
    is_on: bool

    @property
    def precision(self) -> float | None:
        """Of the guesses whose end is known, those that were used; None without any."""
        used = self.counters["useful"] + self.counters["late"]
        known = used + self.counters["wasted"]
        return used / known if known else None


class VirtualLink:
    """A link on a virtual clock, with the order and the chunks of `TransferQueue`."""

    def __init__(self, machine: Machine) -> None:
        self.now_s = 0.0
        self._machine = machine
        self._urgent: deque[Transfer] = deque()
        self._guesses: deque[Transfer] = deque()
        self._of_expert: dict[tuple[int, int], Transfer] = {}
        self._ended: list[Transfer] = []
        self._busy_until_s = 0.0
        self._running: Transfer | None = None

    def demand(self, layer: int, loads: Sequence[tuple[int, int]]) -> None:
        for expert, slot in loads:
            self._add(Transfer(layer, expert, slot, is_urgent=True), self._urgent)

    def guess(self, layer: int, expert: int, slot: int) -> None:
        self._add(Transfer(layer, expert, slot, is_urgent=False), self._guesses)

    def hurry(self, layer: int, expert: int) -> None:
        transfer = self._of_expert.get((layer, expert))
        if transfer is None:
            return
        transfer.is_urgent = True
        transfer.is_given_up = False
        if transfer in self._guesses:
            self._guesses.remove(transfer)
            self._urgent.append(transfer)

    def give_up(self, layer: int, expert: int) -> bool:
        transfer = self._of_expert.get((layer, expert))
        if transfer is None or transfer.is_urgent:
            return False
        transfer.is_given_up = True
        if transfer in self._guesses:
            self._guesses.remove(transfer)
            self._end(transfer)
        return True

    def ended(self, wait: bool = False) -> list[Transfer]:
        while wait and not self._ended and self._of_expert:
            self._start_next()
            self.advance(max(0.0, self._busy_until_s - self.now_s))
        ended, self._ended = self._ended, []
        return ended

    def is_known(self, layer: int, expert: int) -> bool:
        return (layer, expert) in self._of_expert or any(
            (transfer.layer, transfer.expert) == (layer, expert) for transfer in self._ended
        )

    def arrivals(self, layer: int, experts: Sequence[int]) -> None:
        """Nothing waits beside the clock."""

    @property
    def is_busy(self) -> bool:
        return bool(self._of_expert)

    @property
    def num_guesses(self) -> int:
        return sum(not transfer.is_urgent for transfer in self._of_expert.values())

    def forget(self) -> None:
        while self.is_busy:
            self.ended(wait=True)
        self.ended()

    def close(self) -> None:
        """Nothing runs."""

    def clock(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        """Let time pass, in which the link goes on."""
        until_s = self.now_s + seconds
        while True:
            self._start_next()
            if self._running is None or self._busy_until_s > until_s:
                break
            self.now_s = max(self.now_s, self._busy_until_s)
            self._finish_chunk()
        self.now_s = max(self.now_s, until_s)

    def _add(self, transfer: Transfer, queue: deque[Transfer]) -> None:
        self._of_expert[transfer.layer, transfer.expert] = transfer
        queue.append(transfer)

    def _end(self, transfer: Transfer) -> None:
        del self._of_expert[transfer.layer, transfer.expert]
        self._ended.append(transfer)

    def _start_next(self) -> None:
        if self._running is not None or not (self._urgent or self._guesses):
            return
        self._running = transfer = (self._urgent or self._guesses).popleft()
        left = self._machine.record_bytes - transfer.at
        size = left if transfer.is_urgent else min(left, CHUNK_BYTES)
        transfer.at += size
        start_s = max(self.now_s, self._busy_until_s)
        self._busy_until_s = start_s + size / self._machine.link_bytes_s

    def _finish_chunk(self) -> None:
        transfer, self._running = self._running, None
        assert transfer is not None
        transfer.is_whole = transfer.at >= self._machine.record_bytes
        if transfer.is_given_up or transfer.is_whole:
            self._end(transfer)
        elif transfer.is_urgent:
            self._urgent.appendleft(transfer)
        else:
            self._guesses.appendleft(transfer)


def run_timeline(
    trace: Trace,
    step_of_token: np.ndarray[Any, Any],
    shape: CacheShape,
    policy: EvictionPolicy,
    machine: Machine,
    predictor: Predictor | None = None,
    guaranteed: int | None = None,
    kind: str = "on",
) -> TimelineResult:
    """Run a trace, decode steps as given, on the virtual clock; with a predictor it guesses.

    step_of_token: int64 [num_tokens]. guaranteed: slots that other layers cannot take, where they
    share; default: top_k. kind: of the prefetcher, "on" or "auto".
    """
    link = VirtualLink(machine)
    cache = ExpertCache(shape, policy, trace.top_k, guaranteed, machine.record_bytes)
    prefetcher = None
    if predictor is not None:
        times = LinkTimes(load_s=machine.load_s, chunk_s=machine.chunk_s)
        prefetcher = Prefetcher(predictor, cache, link, Calibration(MAX_DISTANCE), times, kind)
    experts = OffloadedExperts(
        _no_kernel, _tables(cache), cache, link, _NO_MEMORY, None, prefetcher, clock=link.clock
    )
    num_steps = 0
    sequence_of_token = np.repeat(np.arange(trace.num_seqs), np.diff(trace.seq_offsets))
    order = np.argsort(step_of_token, kind="stable")
    bounds = np.flatnonzero(np.diff(step_of_token[order], prepend=-1, append=-1))
    for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        tokens = order[begin:end]
        batch = _batch(trace, tokens, sequence_of_token[tokens])
        with experts.step(batch):
            for stopped in _events(trace, tokens):
                union = int(np.count_nonzero(stopped.counts))
                for run in experts.serve(stopped):
                    share = 1.0 if run.only is None else int(run.only.sum()) / union
                    link.advance(machine.layer_s * share)
        num_steps += 1
    stats = None if prefetcher is None else prefetcher.stats
    return TimelineResult(
        num_tokens=trace.num_tokens,
        num_steps=num_steps,
        seconds=link.now_s,
        stall_s=sum(experts.stats.stall_s),
        counters=cache.counters.total(),
        issued=0 if stats is None else stats.issued,
        predictor_us=0.0 if stats is None else 1e6 * stats.predictor_s / max(1, stats.num_layers),
        is_on=prefetcher is not None and prefetcher.is_on,
    )


_NO_MEMORY = FixedSlots(torch.empty(0, 0, dtype=torch.uint8), 0)


def _no_kernel(*arguments: object) -> Tensor:
    raise AssertionError("nothing is computed on a virtual clock")


def _tables(cache: ExpertCache) -> dict[int, ExpertTable]:
    """Return tables without records, by which the layers are known."""
    slots = torch.from_numpy(cache.slot_of_expert)
    none = torch.empty(0, 0, dtype=torch.uint8)
    return {
        layer: ExpertTable(none, slots[layer], torch.zeros(0), 0, 0, torch.bfloat16)
        for layer in range(cache.shape.num_layers)
    }


def _events(trace: Trace, tokens: np.ndarray[Any, Any]) -> Iterator[Stopped]:
    ids = trace.ids[tokens].astype(np.int64)  # [num_tokens, num_layers, top_k]
    weights = trace.weights[tokens].astype(np.float32)
    residual = torch.empty(0)
    for layer in range(trace.num_layers):
        chosen = ids[:, layer]
        yield Stopped(
            layer=layer,
            expert_ids=chosen,
            weights=weights[:, layer],
            counts=np.bincount(chosen.ravel(), minlength=trace.num_experts),
            residual=residual,
        )


def _batch(
    trace: Trace, tokens: np.ndarray[Any, Any], sequences: np.ndarray[Any, Any]
) -> ForwardBatch:
    count = len(tokens)
    lens = np.unique(sequences, return_counts=True)[1]  # sequences are sorted, as tokens are
    known = trace.token_ids
    none = torch.zeros(count, dtype=torch.int64)
    return ForwardBatch(
        token_ids=none if known is None else torch.from_numpy(known[tokens].astype(np.int64)),
        positions=none,
        sequence_ids=torch.from_numpy(sequences.astype(np.int64)),
        query_lens=tuple(lens.tolist()),
        context_lens=tuple(lens.tolist()),
        prompt_lens=(0,) * len(lens),
        slot_mapping=(),
        block_tables=(),
        block_size=1,
        sample_rows=none,
    )
