"""Work that is launched as a whole: the only place that names CUDA's graphs.

A graph does again what its work launched when it was captured, on the same memory, without Python
in between. On a CPU the work is run again, so that the same code runs there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from moe_serve.errors import CapacityError
from moe_serve.kernels.gpu.waiting import NoWaiting

_cuda: Any = torch.cuda  # parts of which have no types
# What a capture must find free, of what its work holds at once: the allocator takes memory in
# pieces of 2 MiB or 20 MiB, and CUDA keeps the nodes. To run out within a capture is no error that
# every version of torch recovers from (pytorch issue 159594), so it is looked at before.
_HEADROOM = 2
_LEAST_FREE_BYTES = 128 * 2**20


class Graph(Protocol):
    """Captured work."""

    def replay(self) -> None:
        """Do it again, in the order of the current stream; the host does not wait."""
        ...


class Graphs(Protocol):
    """Captures work, all in one pool of memory.

    Graphs share that memory: after another one was captured or replayed, what a graph's work had
    allocated means nothing. What is to stay must be in tensors that were there before.
    """

    def capture(self, work: Callable[[], None]) -> Graph:
        """Run `work` once, to have all it needs compiled, then capture it. Waits for the device.

        It must read nothing but tensors that stay in place, and must not wait for the device: what
        it decides by Python's numbers is decided now. Raises CapacityError where there is no memory
        for it; then nothing was captured.
        """
        ...


def graphs(device: torch.device) -> Graphs:
    """Return CUDA's graphs of `device`; of a CPU those that run their work again."""
    return CudaGraphs(device) if device.type == "cuda" else HostGraphs()


class HostGraph:
    """See `Graph`."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work

    def replay(self) -> None:
        self._work()


class HostGraphs:
    """See `Graphs`. Fails, as CUDA would, on work that waits for the device."""

    def capture(self, work: Callable[[], None]) -> Graph:
        with NoWaiting():  # type: ignore[no-untyped-call]
            work()
        return HostGraph(work)


class CudaGraphs:
    """See `Graphs`. Sets torch's peak of allocated memory back: it measures with it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = _cuda.graph_pool_handle()
        self._stream = _cuda.Stream(device)

    def capture(self, work: Callable[[], None]) -> Graph:
        try:
            self._check_memory(self._peak_bytes(work))
            graph = _cuda.CUDAGraph()
            with _cuda.stream(self._stream):
                # other threads may go on copying and allocating
                # what torch makes at its first capture must serve those in any mode
                with torch.inference_mode(False):
                    graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    work()
                finally:
                    graph.capture_end()
        except BaseException as error:
            # a pool goes with its last graph, and nothing may be captured into one that is gone
            self._pool = _cuda.graph_pool_handle()
            if isinstance(error, RuntimeError) and _is_out_of_memory(error):
                raise CapacityError(f"no memory for a CUDA graph: {error}") from error
            raise
        captured: Graph = graph
        return captured

    def _peak_bytes(self, work: Callable[[], None]) -> int:
        """Run the work; return how much memory it held at once."""
        before = int(_cuda.memory_allocated(self._device))
        _cuda.reset_peak_memory_stats(self._device)
        work()
        _cuda.synchronize(self._device)
        return int(_cuda.max_memory_allocated(self._device)) - before

    def _check_memory(self, peak_bytes: int) -> None:
        needed = _HEADROOM * peak_bytes + _LEAST_FREE_BYTES
        if _cuda.mem_get_info(self._device)[0] < needed:
            _cuda.empty_cache()
        free = int(_cuda.mem_get_info(self._device)[0])
        if free < needed:
            raise CapacityError(
                f"{free} bytes of the GPU's memory are free, but a CUDA graph may need {needed}; "
                "lower gpu_memory_utilization"
            )


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory that ran out led to `error`: a capture that ends so hides why."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        error = error.__context__
    return False
