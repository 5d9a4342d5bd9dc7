"""Runs experts of which some are elsewhere: brings in what a step misses, or runs it where it lies.

The same object serves a fused forward pass, which stops and asks, and one that goes layer by layer.
Nothing here changes which experts a token uses, or a bit of what they give.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_serve.blas import one_blas_thread
from moe_serve.comm.base import Inbox
from moe_serve.errors import CapacityError, MoeServeError, StoreError
from moe_serve.experts.cache import Event, ExpertCache, Wave, check_capacity
from moe_serve.experts.executor import Replay, ResidentExperts
from moe_serve.experts.host_experts import HostExperts
from moe_serve.experts.policies.base import CacheShape
from moe_serve.experts.prefetch import Prefetcher
from moe_serve.experts.profile import ProfileKeeper
from moe_serve.experts.read_ahead import ReadAhead
from moe_serve.experts.recorder import RoutingRecorder, StepNotes
from moe_serve.experts.slots import DeviceSlots, SlotMemory
from moe_serve.experts.split import MissPlanner
from moe_serve.experts.transfer import Transfer, Transfers
from moe_serve.kernels.forward.base import Pairs, Run, Stopped, Stops
from moe_serve.kernels.moe.base import ExpertTable
from moe_serve.types import ForwardBatch, Routing

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]


@dataclass(slots=True)
class OffloadStats:
    """Since the start. stall_s: seconds in which steps waited for experts, by MoE layer.

    num_streamed: events whose union was larger than the slots; union_over_capacity: the sum over
    events of their union over their layer's slots.
    """

    stall_s: list[float] = field(default_factory=list)
    num_events: int = 0
    num_streamed: int = 0
    union_over_capacity: float = 0.0


@dataclass(frozen=True, slots=True)
class HostTier:
    """Records in memory where the kernels can run them, behind the cache's slots in the arena.

    first_slot: where they begin; expert e of MoE layer l is slot first_slot + l * num_experts + e.
    """

    first_slot: int
    num_experts: int
    planner: MissPlanner

    def slot(self, layer: int, expert: int) -> int:
        return self.first_slot + layer * self.num_experts + expert


class OffloadedExperts:
    """Experts of all MoE layers, in the slots of a cache; what is missing comes by a queue.

    layers: a table for each layer that has experts, by the model's number, whose slot_of_expert is
    the cache's: a kernel sees what is resident as soon as it has arrived.
    """

    def __init__(
        self,
        moe: Callable[..., Tensor],
        layers: dict[int, ExpertTable],
        cache: ExpertCache,
        queue: Transfers,
        memory: SlotMemory,
        host: HostTier | HostExperts | None = None,
        prefetcher: Prefetcher | None = None,
        recorder: RoutingRecorder | None = None,
        keeper: ProfileKeeper | None = None,
        clock: Callable[[], float] = time.perf_counter,
        ahead: ReadAhead | None = None,
    ) -> None:
        """ahead: the queue's own, if it has one."""
        self._moe = moe
        self.layers = layers
        self.cache = cache
        self.queue = queue
        self.prefetcher = prefetcher
        self.recorder = recorder
        self._keeper = keeper
        self._clock = clock
        self.replay: Replay | None = None
        self._memory = memory
        self._host = host
        self._ahead = ahead
        self._model_layers = sorted(layers)
        self._index = {layer: index for index, layer in enumerate(self._model_layers)}
        self.stats = OffloadStats([0.0] * len(layers))
        self._step = 0
        self._notes: StepNotes | None = None
        self._is_broken = False
        self._next_layer = 0  # of this step: the first one whose event the cache was not told

    @property
    def slot_bytes(self) -> int:
        return int(self._memory.records.shape[1])

    # -- a step ------------------------------------------------------------------------------------

    @contextmanager
    def step(self, batch: ForwardBatch, is_noted: bool = False) -> Iterator[OffloadedExperts]:
        """Enclose a forward pass; at its end the cache was told the event of every layer."""
        num_layers = self._model_layers[-1] + 1
        self._notes = StepNotes(num_layers, batch.num_tokens, self.cache.top_k)
        if self.replay is not None:
            self.replay(batch, self._notes)
        self._next_layer = 0
        try:
            with one_blas_thread():
                if self._is_broken:
                    self._begin_anew()
                self._collect(self.queue.ended())
                self._forget_lost()
                if self.prefetcher is not None:
                    self.prefetcher.start_step(self._step, batch)
                yield self
                self._tell_hits(len(self._model_layers))
                if self.recorder is not None and batch.num_seqs:
                    self.recorder.add(self._step, batch, self._notes)
        except (MoeServeError, torch.OutOfMemoryError):  # of a kernel's: the books agree
            raise
        except BaseException:  # an interrupt, anywhere: the books may not agree
            self._is_broken = True
            raise
        finally:
            self.cache.abandon()
            self._step += 1
            self._notes = None

    @property
    def stops(self) -> Stops:
        """Where a fused pass asks: at every layer if there are guesses to make."""
        is_guessing = self.prefetcher is not None and self.prefetcher.is_on
        return Stops.ALWAYS if is_guessing and not self.cache.is_full else Stops.MISSING

    @property
    def is_forced(self) -> bool:
        return self.replay is not None

    @property
    def ids(self) -> Tensor | None:
        return None if self._notes is None else self._notes.ids

    @property
    def weights(self) -> Tensor | None:
        return None if self._notes is None else self._notes.weights

    def serve(self, stopped: Stopped, can_wait: bool = True) -> Iterator[Run]:
        """See `kernels.forward.base.Watcher`. Raises StoreError for what cannot be brought in."""
        layer = self._index[stopped.layer]
        self._tell_hits(layer)
        self._next_layer = layer + 1
        self._collect(self.queue.ended())
        experts = np.flatnonzero(stopped.counts)
        event = self._begin(layer, experts, stopped.counts[experts])
        if event.misses or event.arriving:
            counts = dict(zip(event.expert_ids, stopped.counts[experts].tolist(), strict=True))
            yield from self._bring_in(event, counts, stopped, can_wait)
        else:
            if self._ahead is not None:
                self._ahead.follow(event, self.cache)
            if self.prefetcher is not None:
                self.prefetcher.look_ahead(layer, stopped)
            self.cache.end(event)
            yield Run(None, is_last=True)

    def run(self, layer: int, inbox: Inbox, routing: Routing, residual: Tensor) -> Tensor:
        """See `executor.Experts`. Raises StoreError for what cannot be brought in."""
        assert self._notes is not None, "outside of a step"
        self._notes.note(layer, routing)
        table = self.layers[layer]
        self._next_layer = self._index[layer]  # no layer before this one is left to be told
        out = inbox.rows.new_empty(inbox.row_of_pair.shape[0], table.hidden_size)
        stopped = Stopped(
            layer=layer,  # by the model's number
            expert_ids=routing.expert_ids.cpu().numpy(),
            weights=routing.weights.cpu().numpy(),
            counts=inbox.counts.cpu().numpy(),
            residual=residual,
            pairs=Pairs(rows=inbox.rows, row_of_pair=inbox.row_of_pair, out=out),
        )
        try:
            for part in self.serve(stopped, can_wait=False):
                self._launch(inbox, table, part.only, out)
        except BaseException:
            self.cache.abandon()  # where there are ranks, the step goes on with the next layer
            raise
        return out

    def _launch(self, inbox: Inbox, table: ExpertTable, only: Tensor | None, out: Tensor) -> None:
        """Run the kernel; a device's is given copies of what the host goes on to change."""
        if isinstance(self._memory, DeviceSlots):
            device = self._memory.records.device
            if only is not None:
                if not bool(only.any()):
                    return
                only = only.to(device, non_blocking=True)
            # of memory that is not pinned, CUDA has a copy when the call returns
            slots = table.slot_of_expert.to(device, non_blocking=True, copy=True)
            table = replace(table, slot_of_expert=slots)
        self._moe(inbox.rows, inbox.row_of_pair, inbox.counts, table, only, out)

    def resize(self, shape: CacheShape) -> None:
        """Take another number of slots, between steps; what is least worth keeping leaves.

        Raises CapacityError for less than top_k slots a layer, more than there are experts, or more
        memory than there is; then nothing has changed.
        """
        check_capacity(shape, self.cache.least_slots)
        if shape.total_slots > self._memory.most_slots:
            raise CapacityError(
                f"{shape.total_slots} expert slots, but there is room for "
                f"{self._memory.most_slots}; give at most that"
            )
        if self._is_broken:
            self._begin_anew()
        if self.prefetcher is not None:
            for layer in range(shape.num_layers):
                self.prefetcher.give_up(layer)
        self._forget_lost()
        self.finish_loading()
        old = self.cache.shape.total_slots
        if shape.total_slots > old:
            self._memory.resize(shape.total_slots)
        for layer, expert, origin, target in self.cache.resize(shape):
            self._memory.records[target] = self._memory.records[origin]
            self.cache.moved(layer, expert)
        if shape.total_slots < old:
            self._memory.resize(shape.total_slots)

    def preload(self, experts: Iterable[tuple[int, int]]) -> None:
        """Start to bring (layer, expert) in, in this order, while there are free slots.

        What a step needs meanwhile comes first.
        """
        for layer, expert, slot in self.cache.preload(experts):
            self.queue.guess(layer, expert, slot)

    def finish_loading(self) -> None:
        """Wait until all that is on its way is resident, between steps."""
        while self.cache.num_loading:
            ended = self.queue.ended(wait=True)
            assert ended, "experts are loading that nobody brings"
            self._collect(ended)

    def resident(self) -> list[list[int]]:
        """See `executor.Experts`."""
        told: list[list[int]] = (self.cache.slot_of_expert >= 0).astype(np.int8).tolist()
        return told

    def rehearsal(self) -> ResidentExperts:
        """See `executor.Experts`."""
        return ResidentExperts(self._run_resident, self.layers, self.cache.top_k)

    def _run_resident(
        self, rows: Tensor, row_of_pair: Tensor, counts: Tensor, table: ExpertTable
    ) -> Tensor:
        """Run the experts that are here, as a step would; what the others give is 0."""
        inbox = Inbox(rows, row_of_pair, counts)
        out = rows.new_zeros(row_of_pair.shape[0], table.hidden_size)
        if isinstance(self._memory, DeviceSlots):
            # in a step some or all: each is a kernel of its own, and passes over what is missing
            everything = torch.ones(table.num_experts, dtype=torch.uint8)
            self._launch(inbox, table, everything, out)
            self._launch(inbox, table, None, out)
        else:
            self._launch(inbox, table, (table.slot_of_expert >= 0).to(torch.uint8), out)
        return out

    def _tiers(self) -> dict[str, Array]:
        """Return the bytes that came from each tier, int64 [num_layers], by the counter's name.

        What the cache brought in came from disk, or over the link from host memory, as did what
        was read ahead for nothing. host_bytes: of the experts that were run in host memory, where
        they lie.
        """
        counters = self.cache.counters
        none = np.zeros_like(counters.bytes)
        if self._host is None:
            return {"disk_bytes": counters.bytes, "link_bytes": none, "host_bytes": none}
        in_place = counters.computed_on_cpu * self.slot_bytes
        link_bytes = counters.bytes
        if self._ahead is not None:
            link_bytes = link_bytes + self._ahead.unused * self.slot_bytes
        return {"disk_bytes": none, "link_bytes": link_bytes, "host_bytes": in_place}

    def report(self) -> dict[str, Any]:
        """Return counters per layer and in total, and the times of waiting, since the start."""
        shape, stats, counters = self.cache.shape, self.stats, self.cache.counters
        tiers = self._tiers()
        lists = {name: tier.tolist() for name, tier in tiers.items()}
        sums = {name: int(tier.sum()) for name, tier in tiers.items()}
        report: dict[str, Any] = {
            "slots": shape.total_slots,
            "slots_per_layer": shape.slots_per_layer,
            "num_experts": shape.num_experts,
            "resident": self.cache.num_resident(),
            "per_layer": {**counters.per_layer(), **lists, "stall_s": list(stats.stall_s)},
            "total": {**counters.total(), **sums, "stall_s": sum(stats.stall_s)},
            "events": stats.num_events,
            "streamed_events": stats.num_streamed,
            "union_over_capacity": stats.union_over_capacity / max(1, stats.num_events),
        }
        if self.prefetcher is not None:
            report["prefetch"] = self.prefetcher.report()
        if self._ahead is not None:
            report["read_ahead"] = self._ahead.report()
        return report

    def close(self) -> None:
        """Stop the transfers, and write the trace and the profile, if they were asked for."""
        self.abandon()
        try:
            if self.recorder is not None:
                self.recorder.close()
        finally:
            if self._keeper is not None:
                self._keeper.write(self.layers, self.cache.policy.state())

    def abandon(self) -> None:
        """Stop the transfers, and write nothing."""
        self.queue.close()

    # -- an event ----------------------------------------------------------------------------------

    def _begin(self, layer: int, experts: Array, counts: Array) -> Event:
        event = self.cache.begin(self._step, layer, experts.tolist(), counts.tolist())
        stats, shape = self.stats, self.cache.shape
        stats.num_events += 1
        stats.num_streamed += event.is_streamed
        capacity = shape.slots_per_layer or shape.total_slots / shape.num_layers
        stats.union_over_capacity += len(event.expert_ids) / capacity
        return event

    def _tell_hits(self, until: int) -> None:
        """Tell the cache the events of the layers before that a fused pass did not stop at."""
        assert self._notes is not None
        for layer in range(self._next_layer, until):
            ids = self._notes.ids[self._model_layers[layer]].numpy()
            counts = np.bincount(ids.ravel(), minlength=self.cache.shape.num_experts)
            experts = np.flatnonzero(counts)
            self.cache.end(self._begin(layer, experts, counts[experts]))
        self._next_layer = until

    def _bring_in(
        self, event: Event, counts: Mapping[int, int], stopped: Stopped, can_wait: bool
    ) -> Iterator[Run]:
        layer = event.layer
        for expert in event.arriving:
            self.queue.hurry(layer, expert)
        if self.prefetcher is not None:
            self.prefetcher.give_up(layer)
        work: Callable[[], None] | None = None
        shown: list[int] = []
        try:
            in_place = self._choose_in_place(event, counts, stopped.pairs)
            left = len(event.expert_ids)
            if isinstance(self._host, HostExperts):
                if in_place and stopped.pairs is not None:
                    uses = self.layers[stopped.layer].uses
                    work = self._host.begin(layer, in_place, stopped.counts, stopped.pairs, uses)
            else:
                shown = in_place
            for expert in shown:
                self.cache.slot_of_expert[layer, expert] = self._host_slot(layer, expert)
            is_beside = work is not None  # the last part then comes after it
            for number, wave in enumerate(self._waves(event, shown)):
                run = wave.run
                if wave.loads:
                    self.queue.demand(layer, wave.loads)
                if self._ahead is not None:
                    self._ahead.follow(event, self.cache)
                if self.prefetcher is not None and number == 0:  # while the loads are under way
                    self.prefetcher.look_ahead(layer, stopped)
                if not run and not wave.loads:
                    self._wait(event)
                if work is not None:
                    there = self._there(layer, run)
                    if there:
                        yield Run(self._only(there), is_last=False)
                    work()
                    work, run = None, [expert for expert in run if expert not in there]
                left -= len(run)
                yield from self._as_they_arrive(event, run, not left and not is_beside, can_wait)
            if work is not None:
                work()
            if is_beside:
                yield Run(self._only(()), is_last=True)
            self.cache.end(event)
        finally:
            for expert in shown:
                self.cache.slot_of_expert[layer, expert] = -1

    def _waves(self, event: Event, in_place: list[int]) -> Iterator[Wave]:
        """Yield the cache's waves; the first runs, with the hits, what runs where it lies."""
        first = in_place
        for wave in self.cache.waves(event):
            yield Wave(wave.loads, wave.run + first) if first else wave
            first = []
        if first:
            yield Wave([], first)

    def _as_they_arrive(
        self, event: Event, run: Sequence[int], is_last: bool, can_wait: bool
    ) -> Iterator[Run]:
        """Yield what of `run` is there, until all was. is_last: with them the layer is done."""
        layer = event.layer
        waiting = set(run)
        while waiting:
            ready = self._there(layer, waiting)
            waiting.difference_update(ready)
            awaited = self.queue.arrivals(layer, sorted(waiting)) if waiting and can_wait else None
            if awaited is not None:
                yield Run(self._only(ready), is_last, awaited)
                self.stats.stall_s[layer] += awaited.stall_s
                waiting = set(awaited.left())
                self._collect(self.queue.ended(), event)
            elif ready:
                yield Run(self._only(ready), is_last and not waiting)
            else:
                self._wait(event)

    def _there(self, layer: int, experts: Iterable[int]) -> list[int]:
        slots = self.cache.slot_of_expert[layer]
        return sorted(expert for expert in experts if slots[expert] >= 0)

    def _wait(self, event: Event) -> None:
        start_s = self._clock()
        ended = self.queue.ended(wait=True)
        self.stats.stall_s[event.layer] += self._clock() - start_s
        assert ended, f"MoE layer {event.layer} waits for experts that nobody brings"
        self._collect(ended, event)

    def _collect(self, ended: Sequence[Transfer], event: Event | None = None) -> None:
        """Make resident what has arrived. Raises StoreError where one of the event's has not."""
        needed = () if event is None else event.expert_ids
        error: Exception | None = None
        for transfer in ended:
            layer, expert = transfer.layer, transfer.expert
            if transfer.is_whole:
                self.cache.loaded(layer, expert)
                continue
            is_needed = event is not None and layer == event.layer and expert in needed
            if is_needed and transfer.error is None:  # given up just before it was needed
                self.queue.demand(layer, [(expert, transfer.slot)])
                continue
            self.cache.failed(layer, expert, transfer.at)
            if transfer.error is not None:
                logger.warning(
                    "expert %d of MoE layer %d: %s", transfer.expert, transfer.layer, transfer.error
                )
            if is_needed:
                error = transfer.error
        if isinstance(error, (OSError, RuntimeError, MemoryError)):
            raise StoreError(f"an expert could not be brought in: {error}") from error
        if error is not None:
            raise error

    def _begin_anew(self) -> None:
        """Empty all slots: it costs misses, and nothing else."""
        self.queue.forget()
        self.cache.clear()
        self._is_broken = False

    def _forget_lost(self) -> None:
        """Free slots whose transfers an interrupt took away between their end and `_collect`."""
        if self.cache.num_loading:
            for layer, expert in self.cache.under_way():
                if not self.queue.is_known(layer, expert):
                    self.cache.failed(layer, expert)

    def _host_slot(self, layer: int, expert: int) -> int:
        assert isinstance(self._host, HostTier)
        return self._host.slot(layer, expert)

    def _choose_in_place(
        self, event: Event, counts: Mapping[int, int], pairs: Pairs | None
    ) -> list[int]:
        """Choose misses that run in host memory, and take them off the event."""
        if self._host is None or not event.misses:
            return []
        if isinstance(self._host, HostExperts) and pairs is None:
            return []  # who stopped runs all of them itself
        if self._host.planner is None:
            return []
        ahead = () if self._ahead is None else self._ahead.held(event.layer)
        chosen = self._host.planner.in_place(
            {expert: counts[expert] for expert in event.misses if expert not in ahead},
            [counts[expert] for expert in event.hits],
        )
        self.cache.computed(event, chosen)
        return chosen

    def _only(self, experts: Sequence[int]) -> Tensor:
        only = np.zeros(self.cache.shape.num_experts, np.uint8)
        only[list(experts)] = 1
        return torch.from_numpy(only)
