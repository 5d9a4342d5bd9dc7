"""`Transfers` by the native library's threads: no interpreter between a need and its arrival.

The same order as `TransferQueue` has, which serves where there is no native library. What the
library could not bring in is tried again here, by the source itself, which says what is wrong.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from moe_serve.errors import CapacityError, StoreError
from moe_serve.experts.transfer import (
    CHUNK_BYTES,
    EmulatedLink,
    StoreSource,
    Transfer,
    TransferQueue,
    Transfers,
)
from moe_serve.kernels.native.loader import Native, NotBuilt, load

_GIVEN_UP, _WHOLE = 0, 1


class _Source(ctypes.Structure):
    _fields_ = (
        ("descriptor", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
        ("host", ctypes.c_void_p),
        ("bytes_per_s", ctypes.c_double),
        ("num_layers", ctypes.c_int64),
        ("num_experts", ctypes.c_int64),
        ("first_bytes", ctypes.c_void_p),
        ("record_bytes", ctypes.c_void_p),
        ("headers", ctypes.c_char_p),
        ("slots", ctypes.c_void_p),
        ("slot_bytes", ctypes.c_int64),
        ("num_slots", ctypes.c_int64),
        ("piece_bytes", ctypes.c_int64),
        ("urgent_piece_bytes", ctypes.c_int64),
    )


class _Arrivals(ctypes.Structure):
    _fields_ = (
        ("transfers", ctypes.c_void_p),
        ("layer", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("expert_ids", ctypes.c_void_p),
        ("was_run", ctypes.c_void_p),
        ("stall_s", ctypes.c_double),
    )


class NativeArrivals:
    """See `transfer.Awaited`."""

    def __init__(self, transfers: int, layer: int, experts: Sequence[int]) -> None:
        self._experts = experts
        count = len(experts)
        self._ids = (ctypes.c_int64 * count)(*experts)
        self._was_run = (ctypes.c_uint8 * count)()
        self._native = _Arrivals(
            transfers,
            layer,
            count,
            ctypes.addressof(self._ids),
            ctypes.addressof(self._was_run),
        )
        self.address = ctypes.addressof(self._native)

    @property
    def stall_s(self) -> float:
        return float(self._native.stall_s)

    def left(self) -> list[int]:
        return [expert for expert, was in zip(self._experts, self._was_run, strict=True) if not was]


class NativeTransfers:
    """`Transfers` from a store, or from host memory behind an emulated link."""

    def __init__(
        self,
        native: Native,
        source: StoreSource | EmulatedLink,
        records: Tensor,
        num_slots: int,
        num_threads: int,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        """records: uint8 [at least num_slots, record_bytes]; chunk_bytes: a multiple of 4,096.

        Raises CapacityError without memory or threads.
        """
        self._source = source
        self.records = records
        place = source.place
        self._kept = (
            np.array(place.first_bytes, np.int64),
            np.array([source.record_bytes(layer) for layer in range(place.num_layers)], np.int64),
        )
        assert records.stride(1) == 1, records.stride()
        assert self._kept[1].max() <= records.shape[1], records.shape
        what = _Source(
            place.descriptor,
            num_threads,
            place.host,
            place.bytes_per_s,
            place.num_layers,
            place.num_experts,
            *(part.ctypes.data for part in self._kept),
            place.headers,
            records.data_ptr(),
            records.stride(0),
            num_slots,
            chunk_bytes,
            chunk_bytes if place.is_shared else int(self._kept[1].max()),
        )
        if native.machine_function("transfer_source_bytes", "", "l")() != ctypes.sizeof(_Source):
            raise NotBuilt("transfers of the native library are other ones; install again")
        self._begin = native.machine_function("transfers_begin", "pllpi")
        self._hurry = native.machine_function("transfers_hurry", "pll")
        self._give_up = native.machine_function("transfers_give_up", "pll", "i")
        self._ended = native.machine_function("transfers_ended", "pilp", "l")
        self._is_known = native.machine_function("transfers_is_known", "pll", "i")
        self._count = native.machine_function("transfers_count", "pp")
        self._close = native.machine_function("transfers_close", "p")
        self._free = native.machine_function("transfers_free", "p")
        self._fields = np.zeros((min(num_slots, 256), 6), np.int64)
        self._counts = (ctypes.c_int64 * 2)()
        self._handle = native.machine_function("transfers_open", "p", "p")(ctypes.addressof(what))
        self._is_open = True
        if not self._handle:
            source.close()
            raise CapacityError(
                "no thread could be started to bring experts in; raise the limits of the process "
                "(ulimit -v, -u)"
            )

    def demand(self, layer: int, loads: Sequence[tuple[int, int]]) -> None:
        self._start(layer, loads, is_urgent=True)

    def guess(self, layer: int, expert: int, slot: int) -> None:
        self._start(layer, [(expert, slot)], is_urgent=False)

    def hurry(self, layer: int, expert: int) -> None:
        self._hurry(self._handle, layer, expert)

    def give_up(self, layer: int, expert: int) -> bool:
        return bool(self._give_up(self._handle, layer, expert))

    def ended(self, wait: bool = False) -> list[Transfer]:
        found: list[Transfer] = []
        fields = self._fields
        while True:
            is_waiting = wait and not found
            count = self._ended(self._handle, is_waiting, len(fields), fields.ctypes.data)
            found += [self._transfer(*row) for row in fields[:count].tolist()]
            if count < len(fields):
                return found

    def is_known(self, layer: int, expert: int) -> bool:
        return bool(self._is_known(self._handle, layer, expert))

    def arrivals(self, layer: int, experts: Sequence[int]) -> NativeArrivals:
        return NativeArrivals(self._handle, layer, experts)

    @property
    def is_busy(self) -> bool:
        self._count(self._handle, ctypes.addressof(self._counts))
        return self._counts[0] > 0

    @property
    def num_guesses(self) -> int:
        self._count(self._handle, ctypes.addressof(self._counts))
        return int(self._counts[1])

    def forget(self) -> None:
        while self.is_busy:
            self.ended(wait=True)
        self.ended()

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            self._close(self._handle)
            self._source.close()

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self.close()
            self._free(self._handle)

    def _start(self, layer: int, loads: Sequence[tuple[int, int]], is_urgent: bool) -> None:
        if not self._is_open:
            raise StoreError("experts are asked for after the end; the engine was closed")
        what = (ctypes.c_int64 * (2 * len(loads)))(*(number for load in loads for number in load))
        self._begin(self._handle, layer, len(loads), ctypes.addressof(what), is_urgent)

    def _transfer(
        self, layer: int, expert: int, slot: int, at: int, outcome: int, is_urgent: int
    ) -> Transfer:
        transfer = Transfer(layer, expert, slot, bool(is_urgent), at=at)
        transfer.is_whole = outcome == _WHOLE
        transfer.is_given_up = outcome == _GIVEN_UP
        if not transfer.is_whole and not transfer.is_given_up:
            size = self._source.record_bytes(layer)
            record = self.records[slot, :size]
            try:
                self._source.read_chunk(layer, expert, record, 0, size)
                self._source.verify(layer, expert, record)
                transfer.at, transfer.is_whole = size, True
            except Exception as error:  # whatever it is, it belongs to the step that waits
                transfer.error = error
        return transfer


def open_transfers(
    source: StoreSource | EmulatedLink, records: Tensor, num_slots: int, num_threads: int
) -> Transfers:
    """Return what brings records in, in the fastest way that is to be had here."""
    try:
        native = load()
        if native.machine_function("has_fast_crc32", "", "i")():
            return NativeTransfers(native, source, records, num_slots, num_threads)
    except NotBuilt:
        pass
    return TransferQueue(source, records, num_threads)
