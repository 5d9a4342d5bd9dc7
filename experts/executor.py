"""Runs experts on the rows that arrived for them; here all are resident, which is the fast path."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from torch import Tensor

from moe_serve.comm.base import Inbox
from moe_serve.experts.profile import ProfileKeeper
from moe_serve.experts.recorder import RoutingRecorder, StepNotes
from moe_serve.experts.records import ExpertArena
from moe_serve.kernels.forward.base import Run, Stopped, Stops, Watcher
from moe_serve.kernels.moe.base import ExpertTable
from moe_serve.types import ForwardBatch, Routing

Replay = Callable[[ForwardBatch, StepNotes], None]


class Experts(Protocol):
    """The experts of all layers of a model, wherever they are. layers: tables by layer."""

    @property
    def layers(self) -> dict[int, ExpertTable]: ...

    def step(
        self, batch: ForwardBatch, is_noted: bool = False
    ) -> AbstractContextManager[Watcher | None]:
        """Enclose a forward pass; gives what a fused pass must ask, or None.

        is_noted: what it gives has, after the pass, fused or not, every token's experts (`ids`).
        """
        ...

    def resident(self) -> list[list[int]]:
        """Return 1 for the experts of each layer that are in memory now, else 0; [] where all are.

        By layer, in order, [num_experts] each.
        """
        ...

    def run(self, layer: int, inbox: Inbox, routing: Routing, residual: Tensor) -> Tensor:
        """Return one row for each pair of the inbox, unweighted, [num_pairs, hidden_size].

        routing, residual: of this rank's own tokens, for records and predictions; see `Stopped`.
        """
        ...

    def rehearsal(self) -> Experts:
        """Return what runs the same kernels, and brings in, notes and predicts nothing.

        Rows of experts that are not in memory are of no meaning. Uses are counted all the same.
        """
        ...

    def report(self) -> dict[str, Any]:
        """Return what happened since the start, as JSON can hold it."""
        ...

    def close(self) -> None:
        """End what runs beside the steps, and write what is to be kept."""
        ...

    def abandon(self) -> None:
        """End what runs beside the steps, and write nothing: the engine was not built."""
        ...


class ResidentExperts:
    """Every expert of every MoE layer, held in memory. layers: tables by layer.

    replay: for studies; fills a step's notes, which a fused pass then takes for its routing.
    """

    def __init__(
        self,
        moe: Callable[..., Tensor],
        layers: dict[int, ExpertTable],
        top_k: int,
        recorder: RoutingRecorder | None = None,
        keeper: ProfileKeeper | None = None,
        arenas: Mapping[int, ExpertArena] | None = None,
    ) -> None:
        """arenas: of each layer's records, where experts of a rank may come and go."""
        self._moe = moe
        self.arenas = arenas
        self.layers = layers
        self.top_k = top_k
        self.recorder = recorder
        self._keeper = keeper
        self.replay: Replay | None = None
        self._step = 0
        self._notes: StepNotes | None = None

    @contextmanager
    def step(self, batch: ForwardBatch, is_noted: bool = False) -> Iterator[Watcher | None]:
        """Enclose a forward pass; nothing is asked, but a recorder has it noted."""
        if self.recorder is None and self.replay is None and not is_noted:
            yield None
            return
        self._notes = StepNotes(max(self.layers) + 1, batch.num_tokens, self.top_k)
        if self.replay is not None:
            self.replay(batch, self._notes)
        try:
            yield _Noting(self._notes, self.replay is not None)
            if self.recorder is not None and batch.num_seqs:
                self.recorder.add(self._step, batch, self._notes)
        finally:
            self._step += 1
            self._notes = None

    def run(self, layer: int, inbox: Inbox, routing: Routing, residual: Tensor) -> Tensor:
        """See `Experts`."""
        if self._notes is not None:
            self._notes.note(layer, routing)
        return self._moe(inbox.rows, inbox.row_of_pair, inbox.counts, self.layers[layer])

    def resident(self) -> list[list[int]]:
        """See `Experts`."""
        return []

    def rehearsal(self) -> ResidentExperts:
        """See `Experts`."""
        return ResidentExperts(self._moe, self.layers, self.top_k)

    def report(self) -> dict[str, Any]:
        """See `Experts`: all is resident, so there is nothing to tell."""
        return {}

    def close(self) -> None:
        """Write the trace and the profile, if they were asked for."""
        try:
            if self.recorder is not None:
                self.recorder.close()
        finally:
            if self._keeper is not None:
                self._keeper.write(self.layers)

    def abandon(self) -> None:
        """See `Experts`: nothing runs."""


class _Noting:
    """A watcher that only has things noted, or shows what to take."""

    stops = Stops.NEVER

    def __init__(self, notes: StepNotes, is_forced: bool) -> None:
        self.ids = notes.ids
        self.weights = notes.weights
        self.is_forced = is_forced

    def serve(self, stopped: Stopped, can_wait: bool = True) -> Iterator[Run]:
        raise AssertionError("a pass that never stops has stopped")
