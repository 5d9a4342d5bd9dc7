"""Which experts are resident, and who leaves when a slot is needed: for the runtime and for replay.

Event-atomic (Zhang, arXiv 2608.07911, section 2): an event is (step, layer) with the union of the
experts that the step's tokens use. Its hits and misses are settled against what is resident when it
begins; then misses are admitted, and no member of the event is evicted while it still has to be
served. Knows no bytes and no threads: whoever moves weights says when they have arrived.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_serve.errors import CapacityError
from moe_serve.experts.policies.base import CacheShape, EvictionPolicy

Array = np.ndarray[Any, Any]
ABSENT = -1
# slots through which what does not stay streams: half is loaded while the other half is read, and a
# half must hold enough that whoever waits for it is quick beside it (docs/log.md)
_LEAST_STREAM_SLOTS = 2
_STREAM_SHARE = 4
# with so many tokens an event is a prompt's: its counts say more of what comes than what was before
_MANY_TOKENS = 16


class Counters:
    """What happened in each layer, int64 [num_layers] each; hits + misses = sum of unions.

    misses: experts that an event used and that were not resident when it began. fetched: records
    that arrived, for events and for guesses; bytes: what they, and those given up half-way, took.
    computed_on_cpu: misses that were served where they lay, without being brought in. evictions:
    residents that left, for another one or because there are fewer slots. issued: guesses that were
    given a slot; of these, useful was resident before its event, late was on its way, wasted left
    without having been used.
    """

    FIELDS = (
        "hits",
        "misses",
        "fetched",
        "computed_on_cpu",
        "bytes",
        "evictions",
        "issued",
        "useful",
        "late",
        "wasted",
    )

    def __init__(self, num_layers: int) -> None:
        self.hits = np.zeros(num_layers, np.int64)
        self.misses = np.zeros(num_layers, np.int64)
        self.fetched = np.zeros(num_layers, np.int64)
        self.computed_on_cpu = np.zeros(num_layers, np.int64)
        self.bytes = np.zeros(num_layers, np.int64)
        self.evictions = np.zeros(num_layers, np.int64)
        self.issued = np.zeros(num_layers, np.int64)
        self.useful = np.zeros(num_layers, np.int64)
        self.late = np.zeros(num_layers, np.int64)
        self.wasted = np.zeros(num_layers, np.int64)

    def per_layer(self) -> dict[str, list[int]]:
        return {name: getattr(self, name).tolist() for name in self.FIELDS}

    def total(self) -> dict[str, int]:
        return {name: int(getattr(self, name).sum()) for name in self.FIELDS}


@dataclass(slots=True)
class Event:
    """One event that is being served.

    hits: resident when it began. arriving: on their way by a guess; whoever serves waits for them.
    misses: not yet admitted, nor computed elsewhere. All expert ids. pinned: members that must not
    be evicted yet. keep: members that stay after they were served, where the union is larger than
    the slots.
    """

    layer: int
    expert_ids: Sequence[int]
    hits: list[int]
    arriving: list[int]
    misses: list[int]
    pinned: set[int]
    keep: set[int]
    is_streamed: bool = False


@dataclass(frozen=True, slots=True)
class Wave:
    """A part of an event: first start `loads`, (expert, slot) each, then run the experts in `run`.

    `run` are resident, or loads of this or an earlier wave, or on their way by a guess: who serves
    waits for those. Where both are empty, every slot of the layer is loading a guess: wait until
    one has arrived, or give it up.
    """

    loads: list[tuple[int, int]]
    run: list[int]


class ExpertCache:
    """Slots for experts: free, loading, or resident; those an event still needs are pinned.

    Serve an event so: `begin`, maybe `computed`; for each of its `waves` bring in what the wave
    loads, saying `loaded` for each, and run what it runs; at last `end`. One event at a time, steps
    in order. Not thread-safe: one thread owns it.

    slot_of_expert: int32 [num_layers, num_experts], -1 where not resident; kernels read it.
    guaranteed: slots that other layers cannot take from a layer, where they share.
    is_held: bool [num_layers, num_experts], the experts that may come at all: a rank's own. What is
    no longer held stays until its slot is needed.
    """

    def __init__(
        self,
        shape: CacheShape,
        policy: EvictionPolicy,
        top_k: int,
        guaranteed: int | None = None,
        record_bytes: int = 0,
        is_held: Array | None = None,
    ) -> None:
        """Raises CapacityError for less than top_k slots a layer: a token could not be served."""
        if is_held is None:
            is_held = np.ones((shape.num_layers, shape.num_experts), bool)
        self.is_held = is_held
        self.least_slots = min(top_k, int(is_held.sum(axis=1).max()))
        check_capacity(shape, self.least_slots)
        self.shape = shape
        self.policy = policy
        self.top_k = top_k
        self._many_uses = _MANY_TOKENS * top_k
        self.counters = Counters(shape.num_layers)
        self.slot_of_expert = np.full((shape.num_layers, shape.num_experts), ABSENT, np.int32)
        self._guaranteed = self.least_slots if guaranteed is None else guaranteed
        self._record_bytes = record_bytes
        layers = range(shape.num_layers)
        # the same as slot_of_expert, but with what is loading, and in lists, which are faster
        self._slot = [[ABSENT] * shape.num_experts for _ in layers]
        self._residents: list[list[int]] = [[] for _ in layers]  # sorted
        self._num_held = [0] * shape.num_layers  # resident and loading
        self._free = list(range(shape.total_slots - 1, -1, -1))
        self._loading: dict[tuple[int, int], int] = {}
        self._guessed: set[tuple[int, int]] = set()
        self._event: Event | None = None
        # shared slots: each layer's lowest (score, expert), None where it must be looked up again
        self._lowest: list[tuple[float, int] | None] = [None] * shape.num_layers

    # -- one event ---------------------------------------------------------------------------------

    def begin(
        self,
        step: int,
        layer: int,
        expert_ids: Sequence[int],
        counts: Sequence[int] | None = None,
    ) -> Event:
        """Settle hits and misses of an event, pin its members, and tell the policy.

        expert_ids: the union over the step's tokens, in rising order, none twice; counts: how many
        tokens use each: those used most stay where the union is larger than the slots.
        """
        assert self._event is None, "an event is still being served"
        slots = self._slot[layer]
        hits, absent, arriving = [], [], []
        if self._loading:
            arriving = [expert for expert in expert_ids if (layer, expert) in self._loading]
        for expert in expert_ids:
            if slots[expert] == ABSENT:
                absent.append(expert)
            elif not arriving or expert not in arriving:
                hits.append(expert)
        counters = self.counters
        counters.hits[layer] += len(hits)
        counters.misses[layer] += len(absent) + len(arriving)
        if self._guessed:
            self._settle_guesses(layer, hits, arriving)
        self.policy.touch(step, layer, expert_ids)
        self._lowest[layer] = None
        pinned = set(expert_ids)
        event = Event(layer, expert_ids, hits, arriving, absent, pinned, pinned)
        if absent:
            self._plan_stream(event, counts)
        self._event = event
        return event

    def waves(self, event: Event) -> Iterator[Wave]:
        """Yield the event's parts, each once the part before it was run.

        What can be admitted at once is, which mostly is all: one wave. Where not all can stay, the
        rest streams through slots that hold nothing to keep: a wave is loaded while the one before
        it runs, and the experts that stay come last.
        """
        last, ready = event.hits, event.arriving
        done: set[int] = set()
        while last or ready or event.misses:
            limit = len(event.misses)
            if event.is_streamed:
                limit = min(limit, self._stream_width(event))
            loads = self._admit(event, limit) if limit else []
            ready = ready + [expert for expert, _ in loads]
            if not event.misses:
                yield Wave(loads, last + ready)
                return
            if not (loads or last or ready) and self._give_way(event, done):
                continue
            yield Wave(loads, last)
            done.update(last)
            if event.is_streamed:
                event.pinned.difference_update(set(last) - event.keep)
            last, ready = ready, []

    def _give_way(self, event: Event, done: set[int]) -> bool:
        """Let one of the members that were to stay leave: others have taken the room meanwhile.

        Returns whether there is one that has run.
        """
        layer = event.layer
        candidates = [one for one in self._residents[layer] if one in done and one in event.pinned]
        if not candidates:
            return False
        leaving = set(self.policy.victims(layer, candidates, 1))
        event.pinned = event.pinned - leaving
        event.keep = event.keep - leaving
        event.is_streamed = True
        return True

    def _admit(self, event: Event, limit: int) -> list[tuple[int, int]]:
        slots = self._make_room(event.layer, limit, event.pinned)
        wave = list(zip(event.misses, slots, strict=False))
        del event.misses[: len(wave)]
        for expert, slot in wave:
            self._start(event.layer, expert, slot)
        return wave

    def _most_at_once(self, layer: int) -> int:
        """Return how many experts of `layer` can be resident if no other layer gives way more."""
        quota = self.shape.slots_per_layer
        if quota is not None:
            return quota
        others = sum(
            min(held, self._guaranteed)
            for other, held in enumerate(self._num_held)
            if other != layer
        )
        return self.shape.total_slots - others

    def _plan_stream(self, event: Event, counts: Sequence[int] | None) -> None:
        """Choose who stays where not all can, and put the misses that do not in front.

        Of a union larger than the slots, those used most, and of equals what the policy would keep.
        A policy that is selective chooses among the residents as well. A quarter of the slots is
        left to the stream; misses that stay take them over at the end.
        """
        layer = event.layer
        num_slots = self._most_at_once(layer)
        everyone: Sequence[int] = event.expert_ids
        if self.policy.is_selective and self.shape.slots_per_layer is not None:
            everyone = sorted({*everyone, *self._residents[layer]})
        if len(everyone) <= num_slots:
            return
        scores = self.policy.scores(layer, everyone)
        uses: dict[int, int] = {}
        if counts is not None and (everyone is event.expert_ids or sum(counts) >= self._many_uses):
            uses = dict(zip(event.expert_ids, counts, strict=True))
        worth = {
            expert: (uses.get(expert, 0), score, -expert)
            for expert, score in zip(everyone, scores, strict=True)
        }
        order = sorted(everyone, key=worth.__getitem__)
        kept = order[len(order) - num_slots :]
        event.keep = set(kept)
        if event.keep.issuperset(event.expert_ids):
            event.keep = event.pinned
            return
        held = {*self._residents[layer], *event.arriving}
        kept_held = [expert for expert in kept if expert in held]
        for_stream = max(_LEAST_STREAM_SLOTS, num_slots // _STREAM_SHARE)
        surplus = max(0, len(kept_held) - max(0, num_slots - for_stream))
        event.keep.difference_update(kept_held[:surplus])
        event.pinned = event.pinned | event.keep
        rank = {expert: (expert in event.keep, place) for place, expert in enumerate(order)}
        event.misses.sort(key=rank.__getitem__)
        event.is_streamed = True

    def _stream_width(self, event: Event) -> int:
        """Return how many loads a wave of a stream has: all that find room, or half of the room."""
        layer = event.layer
        held = event.keep.intersection((*self._residents[layer], *event.arriving))
        room = self._most_at_once(layer) - len(held)
        return room if len(event.misses) <= room else max(1, room // 2)

    def computed(self, event: Event, experts: Iterable[int]) -> None:
        """Take misses off the event that are served where they lie, without a slot."""
        for expert in experts:
            event.misses.remove(expert)
            self.counters.computed_on_cpu[event.layer] += 1

    def end(self, event: Event) -> None:
        """End an event, also one that failed; what is loading goes on."""
        assert self._event is event
        self._event = None

    def abandon(self) -> None:
        """End whatever event is being served: its step was given up."""
        self._event = None

    def serve(
        self,
        step: int,
        layer: int,
        expert_ids: Sequence[int],
        counts: Sequence[int] | None = None,
    ) -> int:
        """Serve a whole event whose loads arrive at once; return its misses. This is replay."""
        event = self.begin(step, layer, expert_ids, counts)
        num_misses = len(event.misses) + len(event.arriving)
        if num_misses:
            for expert in event.arriving:
                self.loaded(layer, expert)
            for wave in self.waves(event):
                assert wave.loads or wave.run, "every slot is loading"
                for expert, _ in wave.loads:
                    self.loaded(layer, expert)
        self._event = None
        return num_misses

    # -- loads -------------------------------------------------------------------------------------

    def guess(self, layer: int, expert: int, keep: Container[int] = ()) -> int | None:
        """Reserve a slot for an expert that may be needed, and return it, or None.

        Takes a free slot, or that of an expert of `layer` which is neither in `keep` nor pinned.
        None as well where the expert is resident or on its way, and for the layer that is being
        served: there a guess comes too late.
        """
        is_served = self._event is not None and self._event.layer == layer
        if is_served or self._slot[layer][expert] != ABSENT:
            return None
        slots = self._make_room(layer, 1, keep, own_only=True)
        if not slots:
            return None
        self._start(layer, expert, slots[0])
        self._guessed.add((layer, expert))
        self.counters.issued[layer] += 1
        return slots[0]

    def loaded(self, layer: int, expert: int) -> None:
        """Say that an expert's weights are in its slot: it is resident."""
        slot = self._loading.pop((layer, expert))
        self.slot_of_expert[layer, expert] = slot
        insort(self._residents[layer], expert)
        self._lowest[layer] = None
        self.counters.fetched[layer] += 1
        self.counters.bytes[layer] += self._record_bytes

    def failed(self, layer: int, expert: int, num_bytes: int = 0) -> None:
        """Say that an expert could not be brought in, or was given up: its slot is free again.

        num_bytes: what had arrived of it.
        """
        self.counters.bytes[layer] += num_bytes
        slot = self._loading.pop((layer, expert))
        self._slot[layer][expert] = ABSENT
        self._num_held[layer] -= 1
        self._free.append(slot)
        self._guessed.discard((layer, expert))

    def preload(self, experts: Iterable[tuple[int, int]]) -> list[tuple[int, int, int]]:
        """Reserve slots for (layer, expert) in this order, while there are free ones for each.

        Returns (layer, expert, slot), loading: for a start from a profile, and for prompts.
        """
        started = []
        for layer, expert in experts:
            is_absent = self._slot[layer][expert] == ABSENT and self.is_held[layer, expert]
            if is_absent and self._may_take_free(layer) and self._free:
                slot = self._free.pop()
                self._start(layer, expert, slot)
                started.append((layer, expert, slot))
        return started

    def drop(self, layer: int, expert: int) -> None:
        """Evict a resident expert that no event needs now."""
        assert (
            self._event is None or self._event.layer != layer or (expert not in self._event.pinned)
        ), "pinned"
        self._evict(layer, expert)

    # -- size --------------------------------------------------------------------------------------

    def clear(self) -> None:
        """Empty all slots, and forget what was loading: nothing may write to a slot any more."""
        self._event = None
        self._loading.clear()
        self._guessed.clear()
        self.slot_of_expert.fill(ABSENT)
        for row in self._slot:
            row[:] = [ABSENT] * len(row)
        for residents in self._residents:
            residents.clear()
        self._num_held = [0] * self.shape.num_layers
        self._lowest = [None] * self.shape.num_layers
        self._free = list(range(self.shape.total_slots - 1, -1, -1))

    def resize(self, shape: CacheShape) -> list[tuple[int, int, int, int]]:
        """Take another number of slots, between events.

        Returns moves (layer, expert, from slot, to slot).

        The slots that stay are the first ones. Those least worth keeping are evicted; who survives
        in a slot that goes is moved: it is loading until the caller, having copied its record, says
        `moved`.
        Nothing may be loading. Raises CapacityError for less than top_k slots a layer.
        """
        check_capacity(shape, self.least_slots)
        assert self._event is None
        assert not self._loading, "wait for what is loading first"
        assert (shape.num_layers, shape.num_experts) == (
            self.shape.num_layers,
            self.shape.num_experts,
        )
        self.shape = shape
        self.policy.resize(shape)
        self._shrink(shape)
        stays = shape.total_slots
        used = {slot for row in self._slot for slot in row if slot != ABSENT}
        free = [slot for slot in range(stays - 1, -1, -1) if slot not in used]
        moves = []
        for layer, row in enumerate(self._slot):
            for expert in self._residents[layer]:
                if row[expert] >= stays:
                    moves.append((layer, expert, row[expert], free.pop()))
        for layer, expert, _, target in moves:
            self.slot_of_expert[layer, expert] = ABSENT
            self._residents[layer].remove(expert)
            self._slot[layer][expert] = target
            self._loading[layer, expert] = target
        self._free = free
        return moves

    def moved(self, layer: int, expert: int) -> None:
        """Say that an expert's record was copied to the slot that `resize` gave it."""
        slot = self._loading.pop((layer, expert))
        self.slot_of_expert[layer, expert] = slot
        insort(self._residents[layer], expert)

    def _shrink(self, shape: CacheShape) -> None:
        """Evict what the new shape has no room for."""
        if shape.slots_per_layer is not None:
            for layer, residents in enumerate(self._residents):
                surplus = len(residents) - shape.slots_per_layer
                if surplus > 0:
                    for expert in self.policy.victims(layer, list(residents), surplus):
                        self._evict(layer, expert)
        surplus = sum(self._num_held) - shape.total_slots
        for _ in range(surplus):
            layer, expert = self._lowest_of_all(ABSENT, ())
            self._evict(layer, expert)

    # -- what is there -----------------------------------------------------------------------------

    def is_resident(self, layer: int, expert: int) -> bool:
        return bool(self.slot_of_expert[layer, expert] != ABSENT)

    def is_absent(self, layer: int, expert: int) -> bool:
        """Return whether an expert is neither resident nor on its way."""
        return self._slot[layer][expert] == ABSENT

    def absent(self, layer: int) -> Array:
        """Return bool [num_experts]: neither resident nor on its way, but held."""
        is_absent: Array = (self.slot_of_expert[layer] == ABSENT) & self.is_held[layer]
        for other, expert in self._loading:
            if other == layer:
                is_absent[expert] = False
        return is_absent

    def under_way(self) -> list[tuple[int, int]]:
        """Return (layer, expert) of all that is loading."""
        return list(self._loading)

    def guesses(self, layer: int) -> list[int]:
        """Return the experts of a layer that are on their way by a guess."""
        keys = self._guessed.intersection(self._loading)
        return sorted(expert for other, expert in keys if other == layer)

    def residents(self, layer: int) -> list[int]:
        """Return the resident experts of a layer, sorted."""
        return list(self._residents[layer])

    def num_resident(self) -> list[int]:
        """Return how many experts of each layer are resident."""
        return [len(residents) for residents in self._residents]

    @property
    def is_full(self) -> bool:
        """Whether every expert that is held is resident."""
        return sum(map(len, self._residents)) == int(self.is_held.sum())

    @property
    def num_loading(self) -> int:
        return len(self._loading)

    # -- room --------------------------------------------------------------------------------------

    def _may_take_free(self, layer: int) -> bool:
        quota = self.shape.slots_per_layer
        return quota is None or self._num_held[layer] < quota

    def _make_room(
        self, layer: int, wanted: int, pinned: Container[int], own_only: bool = False
    ) -> list[int]:
        """Return up to `wanted` slots, free ones first and then those of victims."""
        quota = self.shape.slots_per_layer
        num_free = len(self._free)
        if quota is not None:
            num_free = min(num_free, quota - self._num_held[layer])
        slots = []
        for _ in range(min(wanted, num_free)):
            slots.append(self._free.pop())
        missing = wanted - len(slots)
        if missing <= 0:
            return slots
        if quota is None and not own_only:
            return slots + self._take_shared(layer, missing, pinned)
        candidates = [expert for expert in self._residents[layer] if expert not in pinned]
        if candidates:
            count = min(missing, len(candidates))
            for victim in self.policy.victims(layer, candidates, count):
                self._evict(layer, victim)
                slots.append(self._free.pop())
        return slots

    def _take_shared(self, layer: int, wanted: int, pinned: Container[int]) -> list[int]:
        """Evict the experts least worth keeping of all layers that may lose one."""
        slots = []
        for _ in range(wanted):
            victim = self._lowest_of_all(layer, pinned)
            if victim[0] == ABSENT:
                break
            self._evict(*victim)
            slots.append(self._free.pop())
        return slots

    def _lowest_of_all(self, own: int, pinned: Container[int]) -> tuple[int, int]:
        """Return (layer, expert) with the lowest score, or ABSENT twice.

        Of layer `own` any expert that is not pinned; of others only from those that have more than
        they are guaranteed. Scores of other layers are as of their last event.
        """
        best = (float("inf"), ABSENT, ABSENT)
        for layer, residents in enumerate(self._residents):
            if not residents:
                continue
            if layer == own:
                candidates = [expert for expert in residents if expert not in pinned]
                if not candidates:
                    continue
                found = self._lowest_of(layer, candidates)
            elif self._num_held[layer] <= self._guaranteed:
                continue
            else:
                kept = self._lowest[layer]
                if kept is None:
                    kept = self._lowest[layer] = self._lowest_of(layer, residents)
                found = kept
            if (found[0], layer, found[1]) < best:
                best = (found[0], layer, found[1])
        return best[1], best[2]

    def _lowest_of(self, layer: int, experts: Sequence[int]) -> tuple[float, int]:
        scores = self.policy.scores(layer, experts)
        return min(zip(scores, experts, strict=True))

    def _start(self, layer: int, expert: int, slot: int) -> None:
        self._slot[layer][expert] = slot
        self._num_held[layer] += 1
        self._loading[layer, expert] = slot

    def _evict(self, layer: int, expert: int) -> None:
        slot = self._slot[layer][expert]
        self._slot[layer][expert] = ABSENT
        self.slot_of_expert[layer, expert] = ABSENT
        self._residents[layer].remove(expert)
        self._num_held[layer] -= 1
        self.counters.evictions[layer] += 1
        self._lowest[layer] = None
        self._free.append(slot)
        if self._guessed and (layer, expert) in self._guessed:
            self._guessed.remove((layer, expert))
            self.counters.wasted[layer] += 1

    def _settle_guesses(self, layer: int, hits: list[int], arriving: list[int]) -> None:
        for expert in hits:
            if (layer, expert) in self._guessed:
                self._guessed.remove((layer, expert))
                self.counters.useful[layer] += 1
        for expert in arriving:
            if (layer, expert) in self._guessed:  # and not brought in to warm the start
                self._guessed.remove((layer, expert))
                self.counters.late[layer] += 1


def check_capacity(shape: CacheShape, top_k: int) -> None:
    """Raise CapacityError where a layer could get less than top_k slots."""
    per_layer = shape.slots_per_layer
    if per_layer is not None and per_layer < top_k:
        raise CapacityError(
            f"{per_layer} expert slots a layer, but a token uses {top_k} experts of each layer; "
            f"give at least expert_cache_slots {top_k}"
        )
    needed = top_k * shape.num_layers
    if shape.total_slots < needed:
        raise CapacityError(
            f"{shape.total_slots} expert slots for {shape.num_layers} layers, but a token uses "
            f"{top_k} experts of each layer; give at least {needed} in all"
        )
