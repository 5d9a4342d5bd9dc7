"""What bounds a run: the bytes that any cache must bring in, over what their tier gives."""

from __future__ import annotations

import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path

from moe_serve.errors import ConfigError
from moe_serve.experts.policies.base import CacheShape
from moe_serve.experts.trace import Trace
from moe_serve.kernels.native.memory import allocate
from moe_serve.study.replay import batched_steps, belady_misses

# as many as the runtime reads with
DISK_THREADS = 4


class TraceLimits:
    """What of a trace is known before anything runs."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self._steps = cache(lambda batch: batched_steps(trace, batch))
        self._until = cache(self._misses_until)

    def num_steps(self, batch: int) -> int:
        """Return in how many steps `batch` places come to the end of the trace."""
        return int(self._steps(batch).max()) + 1

    def least_misses(self, batch: int, slots: int, first: int, last: int) -> int:
        """Return the fewest misses in steps `first` to `last` (not included), from a cold start.

        Belady's rule with bypass, which no policy that loads on demand can beat up to any step: so
        the number is what it has in those steps. slots: of each layer.
        """
        return self._until(batch, slots, last) - self._until(batch, slots, first)

    def _misses_until(self, batch: int, slots: int, last: int) -> int:
        trace, steps = self.trace, self._steps(batch)
        is_kept = steps < last
        shape = CacheShape(
            num_layers=trace.num_layers,
            num_experts=trace.num_experts,
            slots_per_layer=slots,
            total_slots=slots * trace.num_layers,
        )
        part = replace(trace, ids=trace.ids[is_kept], weights=trace.weights[is_kept])
        return belady_misses(part, steps[is_kept], shape)


class DiskReads:
    """Direct reads of random records of a file, into memory as slots are, by several threads."""

    def __init__(self, path: Path, record_bytes: int, num_threads: int = DISK_THREADS) -> None:
        """path: a file that ends with one record or more; record_bytes: a multiple of 4,096."""
        self._path = path
        self._record_bytes = record_bytes
        self._num_threads = num_threads

    def gb_per_s(self, seconds: float, seed: int) -> float:
        """Read for so long, once at least; return what came, in 1e9 bytes a second.

        Raises ConfigError where the file system has no direct reads.
        """
        try:
            descriptor = os.open(self._path, os.O_RDONLY | os.O_DIRECT)
        except OSError as error:
            raise ConfigError(
                f"{self._path}: no direct reads ({error.strerror}); give --cache a folder on a disk"
            ) from error
        size = os.fstat(descriptor).st_size
        memory = allocate(self._num_threads * self._record_bytes).view(self._num_threads, -1)
        start_s = time.perf_counter()

        def read(index: int) -> int:
            chance = random.Random(seed * self._num_threads + index)
            into = memory[index].numpy().data
            count = 0
            while not count or time.perf_counter() < start_s + seconds:
                from_end = 1 + chance.randrange(size // self._record_bytes)
                count += os.preadv(descriptor, [into], size - from_end * self._record_bytes)
            return count

        try:
            with ThreadPoolExecutor(self._num_threads) as pool:
                total = sum(pool.map(read, range(self._num_threads)))
            return total / (time.perf_counter() - start_s) / 1e9
        finally:
            os.close(descriptor)
