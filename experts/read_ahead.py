"""A device's memory for records that have no slot yet, so that the link never waits for one.

A prompt uses more experts of each layer than there are slots (FlexGen, Sheng et al. 2023, section
4: the next layer's weights are loaded while one computes). What this layer still needs, and after
it what the next one will, comes into a ring of places here as soon as one is free; when it gets its
slot it is copied within the device, which takes a fortieth of the time. The cache knows nothing of
it: hits, misses and who leaves are what they would be without.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from moe_serve.experts.cache import Event as CacheEvent
from moe_serve.experts.cache import ExpertCache
from moe_serve.experts.policies.base import CacheShape
from moe_serve.kernels.gpu.streams import Event, Streams

# enough for the time in which a layer needs nothing of the link: its attention, 2 to 5 ms of copies
_MOST_BYTES = 2**29
_SHARE_OF_SLOTS = 16
_LEAST_PLACES = 2
# where a layer uses such a share of its experts the next one will, too: a prompt, or many sequences
_NEARLY_ALL = 0.9

_Key = tuple[int, int]

logger = logging.getLogger(__name__)


def default_places(shape: CacheShape, record_bytes: int) -> int:
    """Return for how many records there is a place: 1/16 of the slots' memory, 512 MiB at most.

    Not more than may be missing of two layers; 0 where it would be less than two.
    """
    by_memory = min(_MOST_BYTES // record_bytes, shape.total_slots // _SHARE_OF_SLOTS)
    most = min(by_memory, most_places(shape))
    return most if most >= _LEAST_PLACES else 0


def most_places(shape: CacheShape) -> int:
    """Return how many records may be missing of two layers; more places are never in use."""
    held = shape.slots_per_layer or 0  # where layers share slots, one may have none
    return 2 * (shape.num_experts - held)


@dataclass(slots=True, eq=False)
class Place:
    """Room for one record. event: when `record` may be read, or `memory`, if free, be written."""

    memory: Tensor
    record: Tensor
    event: Event


class ReadAhead:
    """Copies of records on their way to places, or there. One thread's, that of the transfers.

    num_copied, num_used: since the start; unused: how many came for nothing, by MoE layer.
    """

    def __init__(
        self,
        streams: Streams,
        places: Tensor,
        record_of: Callable[[int, int], Tensor],
        num_layers: int,
    ) -> None:
        """places: uint8 [num_places, record_bytes], on the streams' device.

        record_of(layer, expert): uint8, pinned; nothing ever changes it.
        """
        self._streams = streams
        self._stream = streams.stream()
        self._record_of = record_of
        self._memory = places
        self._free: list[Place] = []
        self._held: dict[_Key, Place] = {}
        self._event: CacheEvent | None = None  # the one that was followed last
        self.num_copied = 0
        self.num_used = 0
        self.unused = np.zeros(num_layers, np.int64)
        self.forget()

    @property
    def num_places(self) -> int:
        return int(self._memory.shape[0])

    def follow(self, event: CacheEvent, cache: ExpertCache) -> None:
        """Have what comes next on its way: what an event has no slots for yet, then the next layer.

        Of the next layer only where it will use nearly all, those first that are used most. Call
        it once for each event, and then for each of its waves.
        """
        if event is self._event and not self._free:
            return
        self._event = event
        after = event.layer + 1
        expected: list[int] = []
        is_nearly_over = len(event.misses) < self.num_places and after < cache.shape.num_layers
        num_held = int(cache.is_held[event.layer].sum())
        if is_nearly_over and len(event.expert_ids) >= _NEARLY_ALL * num_held:
            absent = np.flatnonzero(cache.absent(after)).tolist()
            scores = cache.policy.scores(after, absent)
            order = sorted(zip(scores, absent, strict=True), reverse=True)
            expected = [expert for _, expert in order]
        self.move_on(event.layer, event.misses, expected)

    def move_on(self, layer: int, misses: Iterable[int], expected: Iterable[int]) -> None:
        """Copy what comes next, as far as there are places: misses, then what is expected.

        misses: of `layer`, all that have no slot yet, as they will get one; expected: of the layer
        after it. What is here of neither is given up.
        """
        next_keys = [(layer, expert) for expert in misses]
        next_keys += [(layer + 1, expert) for expert in expected]
        if self._held:
            for key in self._held.keys() - next_keys:
                self._free.append(self._held.pop(key))
                self.unused[key[0]] += 1
        for key in next_keys:
            if not self._free:
                return
            if key not in self._held and not self._has_copied(key):
                return

    def held(self, layer: int) -> set[int]:
        """Return the experts of a layer that are here, or on their way."""
        return {expert for own, expert in self._held if own == layer}

    def take(self, layer: int, expert: int) -> Place | None:
        """Return the place of a record, if it has one; who takes it gives it back by `give_back`.

        It may be read after its event.
        """
        place = self._held.pop((layer, expert), None)
        self.num_used += place is not None
        return place

    def give_back(self, place: Place, event: Event) -> None:
        """Take a place back. event: done when nobody reads it any more."""
        place.event = event
        self._free.append(place)

    def report(self) -> dict[str, int]:
        """Return how many records there is a place for, came, were used, and came for nothing."""
        return {
            "places": self.num_places,
            "copied": self.num_copied,
            "used": self.num_used,
            "unused": int(self.unused.sum()),
        }

    def forget(self) -> None:
        """Wait until nothing is on its way, and hold nothing: nobody reads a place any more."""
        self._stream.record().wait()
        now = self._streams.current().record()
        self._held.clear()
        self._free = [Place(memory, memory, now) for memory in self._memory]

    def close(self) -> None:
        """Wait until nothing is on its way any more."""
        self._stream.record().wait()

    def _has_copied(self, key: _Key) -> bool:
        """Ask for a record; where that fails whoever needs it asks again, and is told."""
        place = self._free[-1]
        try:
            source = self._record_of(*key)
            self._stream.after(place.event)
            place.record = place.memory[: source.shape[0]]
            self._stream.copy(place.record, source)
            place.event = self._stream.record()
        except Exception as error:
            logger.warning("expert %d of MoE layer %d was not read ahead: %s", *key[::-1], error)
            return False
        self._held[key] = self._free.pop()
        self.num_copied += 1
        return True
