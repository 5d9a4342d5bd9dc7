"""A forward pass that shows its routing at every layer, and runs experts as its watcher says."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from moe_serve.kernels.forward.base import Pairs, Stopped, Stops, Watcher
from moe_serve.kernels.gpu.buckets import Bucket, Part, Stage
from moe_serve.kernels.gpu.pieces import Pieces, Routed, StepInputs
from moe_serve.kernels.gpu.slot_tables import SlotTables
from moe_serve.kernels.gpu.staging import Incoming, Outgoing

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Look:
    """A layer's routing in host memory: counts [num_experts], ids and weights [num_tokens, top_k].

    Valid until the next one, unless it was recorded.
    """

    counts: Array
    ids: Array
    weights: Array


class Steps(Protocol):
    """A pass in steps; number: of an MoE layer, from 0. Only `look` waits for the device."""

    def begin(self) -> None:
        """Run up to the first router."""
        ...

    def look(self, number: int) -> Look:
        """Return what the router chose."""
        ...

    def force(self, number: int, ids: Tensor, weights: Tensor) -> None:
        """Have these, in host memory, in place of what the router chose."""
        ...

    def residual(self, number: int) -> Tensor:
        """Return what entered the norm before the router, [num_tokens, hidden_size]."""
        ...

    def pairs(self, number: int) -> Pairs:
        """Return what experts that run elsewhere take, and where `rest` finds what they give."""
        ...

    def some(self, number: int, only: Tensor | None) -> None:
        """Run some of the experts; only: uint8 [num_experts], in host memory, or None for all."""
        ...

    def rest(self, number: int) -> None:
        """Go on to the next router, all experts having run."""
        ...

    def finish(self, number: int) -> None:
        """Run all experts, and go on."""
        ...


class Eager:
    """Steps of any batch, launched one kernel after the other. result: once there is one."""

    def __init__(
        self,
        pieces: Pieces,
        tables: SlotTables,
        inputs: StepInputs,
        outgoing: Outgoing,
        incoming: Incoming,
    ) -> None:
        self._pieces = pieces
        self._tables = tables
        self._inputs = inputs
        self._outgoing = outgoing
        self._incoming = incoming
        self._found: Routed | Tensor | None = None
        self._outbox: Tensor | None = None

    @property
    def routed(self) -> Routed:
        assert isinstance(self._found, Routed)
        return self._found

    @property
    def result(self) -> Tensor:
        assert isinstance(self._found, Tensor)
        return self._found

    def begin(self) -> None:
        self._found = self._pieces.begin(self._inputs)

    def look(self, number: int) -> Look:
        routed = self.routed
        sources = [part.contiguous() for part in (routed.counts, routed.ids, routed.weights)]
        return Look(*(part.numpy() for part in self._incoming.fetch(sources)))

    def force(self, number: int, ids: Tensor, weights: Tensor) -> None:
        forced_ids, forced_weights = self._outgoing.tensors([ids, weights])
        counts, rows, places = self._pieces.sorted(number, forced_ids, None)
        self._found = replace(
            self.routed, ids=forced_ids, weights=forced_weights, counts=counts, row_of_pair=rows,
            pair_of_choice=places,
        )  # fmt: skip

    def residual(self, number: int) -> Tensor:
        return self.routed.residual

    def pairs(self, number: int) -> Pairs:
        routed = self.routed
        if self._outbox is None:
            shape = routed.row_of_pair.shape[0], routed.hidden.shape[1]
            self._outbox = routed.hidden.new_empty(shape)
        return Pairs(rows=routed.hidden, row_of_pair=routed.row_of_pair, out=self._outbox)

    def some(self, number: int, only: Tensor | None) -> None:
        out = self.pairs(number).out
        if only is not None:
            (only,) = self._outgoing.tensors([only])
        self._pieces.experts(number, self.routed, self._tables.tables[number], only, out)

    def rest(self, number: int) -> None:
        assert self._outbox is not None
        self._found = self._pieces.go_on(number, self.routed, self._outbox, self._inputs)
        self._outbox = None

    def finish(self, number: int) -> None:
        self.some(number, None)
        self.rest(number)


class Graphed:
    """Steps of `count` decodes in a bucket, whose inputs are in place."""

    def __init__(
        self,
        pieces: Pieces,
        stage: Stage,
        bucket: Bucket,
        count: int,
        outgoing: Outgoing,
        incoming: Incoming,
    ) -> None:
        self._pieces = pieces
        self._stage = stage
        self._bucket = bucket
        self._rows = bucket.size.num_seqs
        self._count = count
        self._outgoing = outgoing
        self._incoming = incoming

    def play(self, part: Part) -> None:
        """Replay a part's graph, or run it eagerly while it has none."""
        graph = self._bucket.graphs.get(part)
        if graph is not None:
            graph.replay()
            return
        self._bucket.wanted.add(part)
        self._stage.work(part, self._rows, self._bucket.inputs)()

    def begin(self) -> None:
        self.play(Part("begin"))

    def look(self, number: int) -> Look:
        source, layout = self._stage.look(self._rows, number)
        (memory,) = self._incoming.fetch([source])
        seen = {name: view.numpy() for name, view in layout.views(memory).items()}
        return Look(seen["counts"], seen["ids"][: self._count], seen["weights"][: self._count])

    def force(self, number: int, ids: Tensor, weights: Tensor) -> None:
        routed = self._stage.routed(self._rows, number)
        forced_ids, forced_weights = self._outgoing.tensors([ids, weights])
        routed.ids[: self._count].copy_(forced_ids)
        routed.weights[: self._count].copy_(forced_weights)
        pairs = self._pieces.sorted(number, routed.ids, self._bucket.inputs.num_rows)
        for place, part in zip(
            (routed.counts, routed.row_of_pair, routed.pair_of_choice), pairs, strict=True
        ):
            place.copy_(part)

    def residual(self, number: int) -> Tensor:
        return self._stage.routed(self._rows, number).residual[: self._count]

    def pairs(self, number: int) -> Pairs:
        routed = self._stage.routed(self._rows, number)
        num_pairs = self._count * routed.ids.shape[1]
        return Pairs(
            rows=routed.hidden[: self._count],
            row_of_pair=routed.row_of_pair[:num_pairs],
            out=self._stage.outbox(self._rows, number)[:num_pairs],
        )

    def some(self, number: int, only: Tensor | None) -> None:
        if only is not None:
            (only,) = self._outgoing.tensors([only])
        routed = self._stage.routed(self._rows, number)
        table, outbox = self._stage.tables.tables[number], self._stage.outbox(self._rows, number)
        self._pieces.experts(number, routed, table, only, outbox)

    def rest(self, number: int) -> None:
        self.play(Part("rest", number))

    def finish(self, number: int) -> None:
        self.play(Part("finish", number))


def note(watcher: Watcher, layer: int, ids: Array, weights: Array) -> None:
    """Write a layer's routing into what the watcher wants noted; layer: the model's number."""
    if watcher.ids is not None:
        watcher.ids[layer].copy_(torch.from_numpy(ids))
    if watcher.weights is not None:
        watcher.weights[layer].copy_(torch.from_numpy(weights))


class Walk:
    """One pass in steps, from router to router.

    first_missed: the first MoE layer where an expert was missing, as far as that was looked at.
    serving_s: seconds in which the watcher was asked.
    """

    def __init__(
        self, steps: Steps, tables: SlotTables, layers: list[int], watcher: Watcher
    ) -> None:
        """layers: the model's numbers of those that have experts."""
        self._steps = steps
        self._tables = tables
        self._layers = layers
        self._watcher = watcher
        self._stops = watcher.stops
        self.first_missed: int | None = None
        self.serving_s = 0.0

    def run(self, known: tuple[int, Look] | None = None) -> None:
        """Run all of it.

        known: an MoE layer where an expert is missing, what was chosen there, and that before it
        nothing is missing and all is noted: up to there nothing is looked at.
        """
        self._steps.begin()
        for number, layer in enumerate(self._layers):
            if known is not None and number < known[0]:
                self._steps.finish(number)
                continue
            look = known[1] if known is not None and number == known[0] else self._look(number)
            if self._stops is Stops.ALWAYS or self._is_missing(number, look):
                self._serve(number, layer, look)
            else:
                self._steps.finish(number)

    def _look(self, number: int) -> Look:
        watcher, layer = self._watcher, self._layers[number]
        if not watcher.is_forced:
            look = self._steps.look(number)
            note(watcher, layer, look.ids, look.weights)
            return look
        assert watcher.ids is not None
        assert watcher.weights is not None
        ids, weights = watcher.ids[layer], watcher.weights[layer]
        self._steps.force(number, ids, weights)
        num_experts = len(self._tables.tables[number].slot_of_expert)
        counts = np.bincount(ids.numpy().ravel(), minlength=num_experts)
        return Look(counts, ids.numpy(), weights.numpy())

    def _is_missing(self, number: int, look: Look) -> bool:
        is_missing = False
        if self._stops is not Stops.NEVER:
            is_missing = self._tables.are_missing(number, look.counts)
        if is_missing and self.first_missed is None:
            self.first_missed = number
        return is_missing

    def _serve(self, number: int, layer: int, look: Look) -> None:
        """Run the experts of a layer in the parts that the watcher gives."""
        stopped = Stopped(
            layer=layer,
            expert_ids=look.ids,
            weights=look.weights,
            counts=look.counts,
            residual=self._steps.residual(number),
            pairs=self._steps.pairs(number),
        )
        has_ended = False
        start_s = time.perf_counter()
        for run in self._watcher.serve(stopped, can_wait=False):
            self.serving_s += time.perf_counter() - start_s
            assert not has_ended, "more experts after the last"
            self._tables.refresh()
            is_run = look.counts > 0
            if run.only is not None:
                is_run &= run.only.numpy() != 0
            asked = np.where(is_run, look.counts, 0)
            assert not self._tables.are_missing(number, asked), "an expert without a slot"
            if run.is_last and np.array_equal(asked, look.counts):
                self._steps.finish(number)
            else:
                self._steps.some(number, run.only)
                if run.is_last:
                    self._steps.rest(number)
            has_ended = run.is_last
            start_s = time.perf_counter()
        self.serving_s += time.perf_counter() - start_s
        assert has_ended, "the experts of a layer were not all served"
