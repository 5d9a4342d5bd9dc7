"""Graphs as CUDA has them, on a CPU: what was captured is done again on the very same tensors.

Work is not run again: torch's calls are, with the arguments that they had. What Python decided when
they were captured stays decided, and a tensor that was not in place is not found. What a graph
allocated is poisoned when it has been replayed: other graphs share that memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from moe_serve.errors import CapacityError
from moe_serve.kernels.gpu.graphs import Graph
from moe_serve.kernels.gpu.waiting import NoWaiting

POISON = -12_345


def tensors_of(values: Any) -> Iterator[Tensor]:
    """Yield the tensors in arguments or results of torch's calls."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        yield from tensors_of(list(values.values()))
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from tensors_of(value)


class _Tape(NoWaiting):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, Any, Any, list[Tensor], list[bool]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = {tensor.untyped_storage()._cdata for tensor in tensors_of([args, kwargs])}
        found = super().__torch_dispatch__(func, types, args, kwargs)
        results = list(tensors_of(found))
        is_new = [result.untyped_storage()._cdata not in given for result in results]
        self.calls.append((func, args, kwargs, results, is_new))
        return found


class _TapedGraph:
    def __init__(self, tape: _Tape) -> None:
        self._calls = tape.calls
        self.poison()

    def replay(self) -> None:
        for func, args, kwargs, results, is_new in self._calls:
            if "empty" in str(func):
                continue
            for result, new, found in zip(
                results, is_new, tensors_of(func(*args, **kwargs)), strict=True
            ):
                if new:
                    result.copy_(found)
        self.poison()

    def poison(self) -> None:
        """Spoil what was allocated within."""
        for *_, results, is_new in self._calls:
            for result, new in zip(results, is_new, strict=True):
                if new and result.is_floating_point():
                    result.fill_(float("nan"))
                elif new:
                    result.fill_(result.dtype == torch.bool or POISON % 128)


class TapedGraphs:
    """See `graphs.Graphs`. launch: does a replay; None: at once. room: graphs that there is
    memory for.
    """

    def __init__(
        self, launch: Callable[[Callable[[], None]], None] | None = None, room: int = 10_000
    ) -> None:
        self._launch = launch
        self.room = room
        self.num_captured = 0
        self.num_refused = 0
        self.num_replayed = 0

    def capture(self, work: Callable[[], None]) -> Graph:
        if self.num_captured >= self.room:
            self.num_refused += 1
            raise CapacityError("no memory for a graph")
        with NoWaiting():  # type: ignore[no-untyped-call]
            work()
        with _Tape() as tape:
            work()
        self.num_captured += 1
        return _Launched(self, _TapedGraph(tape))

    def play(self, graph: _TapedGraph) -> None:
        self.num_replayed += 1
        if self._launch is None:
            graph.replay()
        else:
            self._launch(graph.replay)


class _Launched:
    def __init__(self, graphs: TapedGraphs, graph: _TapedGraph) -> None:
        self._graphs = graphs
        self._graph = graph

    def replay(self) -> None:
        self._graphs.play(self._graph)
