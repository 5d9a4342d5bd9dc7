"""A whole forward pass on a GPU: decodes as CUDA graphs, also where experts are in a cache.

The kernels and their order are those of models/decoder.py: the same bits. What runs is one of

- a batch of decodes whose experts are all there: one graph;
- one behind a cache: one graph that notes what every router chose, and whether an expert was
  missing; the host looks once, at the end. If one was missing, or where that is to be expected,
  graphs from router to router, with a look at what each chose;
- anything else, prompts among it: kernels one after the other, with such looks behind a cache.

A graph's nodes cost some KiB of the card's memory each: a step of 48 layers has about 700, which
is a few MiB, and takes some tens of milliseconds to capture; router to router they are as many
again, in as many graphs as there are layers. What they allocate is shared by all. Batches and
contexts are rounded up to buckets, of which the `_MOST_BUCKETS` used last are kept.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moe_serve.errors import CapacityError
from moe_serve.kernels.forward.base import ModelPart, Stops, Watcher
from moe_serve.kernels.gpu import graphs as gpu_graphs
from moe_serve.kernels.gpu import streams as gpu_streams
from moe_serve.kernels.gpu.attention_plan import Plan
from moe_serve.kernels.gpu.buckets import Bucket, Notes, Part, Size, Stage, size_of
from moe_serve.kernels.gpu.graphs import Graphs
from moe_serve.kernels.gpu.pieces import Operations, Pieces, StepInputs
from moe_serve.kernels.gpu.slot_tables import SlotTables
from moe_serve.kernels.gpu.staging import Incoming, Outgoing
from moe_serve.kernels.gpu.stepwise import Eager, Graphed, Look, Walk, note
from moe_serve.kernels.gpu.streams import Streams

logger = logging.getLogger(__name__)

MOST_SEQS = 256
_MOST_BUCKETS = 64


class Forward:
    """One model's forward pass, for one thread."""

    def __init__(
        self,
        kernels: Operations,
        model: ModelPart,
        graphs: Graphs | None = None,
        streams: Streams | None = None,
        most_seqs: int = MOST_SEQS,
    ) -> None:
        """most_seqs: of a batch of decodes that runs as graphs.

        graphs, streams: None for those of the kernels' device.
        """
        self._device = kernels.device
        self._graphs = gpu_graphs.graphs(self._device) if graphs is None else graphs
        self._streams = gpu_streams.streams(self._device) if streams is None else streams
        self._outgoing, self._incoming = Outgoing(self._streams), Incoming(self._streams)
        self._pieces = Pieces(kernels, model)
        parts = [model.layers[layer].moe for layer in self._pieces.moe_layers]
        tables = [part.experts for part in parts if part is not None]
        self._tables = SlotTables(self._device, self._outgoing, tables)
        self._stage = Stage(self._pieces, self._tables, most_seqs, self._device)
        self._most_context = int(model.layers[0].heads.cos.shape[0])
        self._buckets: OrderedDict[Size, Bucket] = OrderedDict()
        self._has_warned = False

    @torch.inference_mode()
    def __call__(
        self,
        token_ids: Tensor,
        positions: Tensor,
        slots: Sequence[Tensor],
        plans: Sequence[Any],
        watcher: Watcher | None = None,
    ) -> Tensor:
        """Return the residual stream after the last norm, [num_tokens, hidden_size].

        token_ids, positions: int64 [num_tokens]; slots, plans: one for each cache group. They may
        be in host memory: that of a step goes to the device in one copy. Writes this step's keys
        and values into the caches. watcher: whom to ask about missing experts.

        The result is of memory that the next call may write to: read it before. The host waits for
        the device only where the watcher wants notes (once, at the end) or may be asked.
        """
        size = self._size(token_ids, plans)
        if size is None:
            return self._run_eagerly(token_ids, positions, slots, plans, watcher)
        bucket = self._bucket(size, plans[0].block_size, [plan.window for plan in plans])
        is_noted = watcher is not None and (watcher.ids is not None or watcher.weights is not None)
        may_stop = watcher is not None and (watcher.is_forced or watcher.stops is not Stops.NEVER)
        is_whole = not may_stop or self._is_whole_first(bucket, watcher)
        if is_whole:
            self._prepare(bucket, [Part("noted" if is_noted or may_stop else "whole")])
        else:
            self._prepare(bucket, self._walked())
        self._fill(bucket, token_ids, positions, slots, plans)
        self._tables.refresh()
        count = token_ids.shape[0]
        steps = Graphed(self._pieces, self._stage, bucket, count, self._outgoing, self._incoming)
        if watcher is None or not (is_noted or may_stop):
            steps.play(Part("whole"))
        elif is_whole:
            self._run_noted(bucket, steps, watcher, count)
        else:
            self._walk(bucket, steps, watcher)
        return self._stage.result[:count]

    def warm_up(
        self,
        sizes: Iterable[tuple[int, int]],
        block_size: int,
        windows: Sequence[int | None],
        is_watched: bool,
    ) -> None:
        """Capture graphs before they are needed, for batches of (num_seqs, longest context).

        windows: of each cache group. is_watched: whether steps will have a watcher: behind a cache.
        Those for which there is no memory are left out: such batches run eagerly.
        """
        with torch.inference_mode():
            parts = [Part("noted"), *self._walked()] if is_watched else [Part("whole")]
            # the largest first: what they allocate serves the others
            for num_seqs, context in sorted(set(sizes), reverse=True):
                size = size_of(num_seqs, context, self._stage.most_seqs, self._most_context)
                if size is not None:
                    self._prepare(self._bucket(size, block_size, windows), parts)

    # -- buckets -----------------------------------------------------------------------------------

    def _size(self, token_ids: Tensor, plans: Sequence[Any]) -> Size | None:
        """Return the bucket of a step, or None where it is no batch of decodes, or too large."""
        longest = 0
        for plan in plans:
            if not isinstance(plan, Plan) or len(plan.parts) != 1:
                return None
            (part,) = plan.parts
            if part.kind != "decode" or part.items is not None:
                return None
            longest = max(longest, part.max_context)
        if not plans:
            return None
        return size_of(token_ids.shape[0], longest, self._stage.most_seqs, self._most_context)

    def _bucket(self, size: Size, block_size: int, windows: Sequence[int | None]) -> Bucket:
        if size not in self._buckets:
            if len(self._buckets) >= _MOST_BUCKETS:
                self._streams.current().record().wait()  # none that goes is being replayed
                self._buckets.popitem(last=False)
            num_layers = len(self._pieces.moe_layers)
            self._buckets[size] = Bucket(size, block_size, windows, num_layers, self._device)
        self._buckets.move_to_end(size)
        return self._buckets[size]

    def _walked(self) -> list[Part]:
        """Return the parts of a pass from router to router."""
        numbers = range(len(self._pieces.moe_layers))
        return [Part("begin"), *(Part("finish", number) for number in numbers)]

    def _prepare(self, bucket: Bucket, parts: Sequence[Part]) -> None:
        """Capture what has no graph yet of `parts`, and of what was wanting one before."""
        parts = [*parts, *sorted(bucket.wanted.difference(parts))]
        if bucket.is_eager or all(part in bucket.graphs for part in parts):
            return
        # what runs for the sake of capturing is a batch of padding: it changes nothing
        self._fill_with_padding(bucket)
        rows, inputs = bucket.size.num_seqs, bucket.inputs
        try:
            for part in parts:
                if part not in bucket.graphs:
                    self._stage.clear()
                    work = self._stage.work(part, rows, inputs)
                    bucket.graphs[part] = self._graphs.capture(work)
                bucket.wanted.discard(part)
        except CapacityError as error:
            bucket.is_eager = True
            if not self._has_warned:
                logger.warning(
                    "batches of %d decodes run without CUDA graphs, which is slower: %s",
                    bucket.size.num_seqs, error,
                )  # fmt: skip
            self._has_warned = True

    def _fill_with_padding(self, bucket: Bucket) -> None:
        memory = self._outgoing.memory(bucket.layout.num_bytes)
        memory.zero_()
        for name, view in self._outgoing.views(bucket.layout).items():
            if name.startswith("slots"):
                view.fill_(-1)
        self._outgoing.send(memory, bucket.memory)

    def _fill(
        self,
        bucket: Bucket,
        token_ids: Tensor,
        positions: Tensor,
        slots: Sequence[Tensor],
        plans: Sequence[Plan],
    ) -> None:
        """Bring a step's inputs to where the graphs read them; what they leave over is padding."""
        count = token_ids.shape[0]
        memory = self._outgoing.memory(bucket.layout.num_bytes)
        host = self._outgoing.views(bucket.layout)
        on_device: list[tuple[Tensor, Tensor]] = []

        def put(name: str, source: Tensor, padding: int = 0) -> None:
            host[name][count:].fill_(padding)
            part = tuple(slice(0, length) for length in source.shape)
            if source.device.type == "cpu":
                host[name][part].copy_(source)
            else:
                on_device.append((bucket.views[name][part], source))

        put("token_ids", token_ids)
        put("positions", positions)
        put("contexts", plans[0].parts[0].contexts)
        host["num_rows"].fill_(count)
        for group, (places, plan) in enumerate(zip(slots, plans, strict=True)):
            put(f"slots{group}", places, padding=-1)
            width = host[f"table{group}"].shape[1]
            put(f"table{group}", plan.block_table[:, :width])
        self._outgoing.send(memory, bucket.memory)
        for target, source in on_device:
            target.copy_(source)

    # -- a step ------------------------------------------------------------------------------------

    def _is_whole_first(self, bucket: Bucket, watcher: Watcher | None) -> bool:
        """Whether a step that may miss runs as a whole before anybody looks."""
        if watcher is None or watcher.is_forced or watcher.stops is not Stops.MISSING:
            return False
        return bucket.pace.is_whole_faster

    def _run_noted(self, bucket: Bucket, steps: Graphed, watcher: Watcher, count: int) -> None:
        """Run a step whole; where an expert was missing, run it again from router to router."""
        start_s = time.perf_counter()
        steps.play(Part("noted"))
        rows = bucket.size.num_seqs
        (memory,) = self._incoming.fetch([self._stage.all_notes(rows)])
        bucket.pace.ran_whole(time.perf_counter() - start_s)
        notes = self._stage.notes_in(memory, rows)
        looks = [self._look(notes, number, count) for number in range(len(notes.ids))]
        for layer, look in zip(self._pieces.moe_layers, looks, strict=True):
            note(watcher, layer, look.ids, look.weights)
        if watcher.stops is Stops.NEVER:
            return
        first = next(
            (n for n, look in enumerate(looks) if self._tables.are_missing(n, look.counts)), None
        )
        if first is None:
            bucket.pace.missed(None)
        else:
            self._walk(bucket, steps, watcher, (first, looks[first]))

    def _look(self, notes: Notes, number: int, count: int) -> Look:
        return Look(
            notes.counts[number].numpy(),
            notes.ids[number][:count].numpy(),
            notes.weights[number][:count].numpy(),
        )

    def _walk(
        self,
        bucket: Bucket,
        steps: Graphed,
        watcher: Watcher,
        known: tuple[int, Look] | None = None,
    ) -> None:
        """Run a step from router to router, and note what that took."""
        layers = self._pieces.moe_layers
        walk = Walk(steps, self._tables, layers, watcher)
        start_s = time.perf_counter()
        walk.run(known)
        if watcher.is_forced or watcher.stops is not Stops.MISSING:
            return
        seconds = time.perf_counter() - start_s - walk.serving_s
        bucket.pace.ran_looking(seconds, len(layers) - (0 if known is None else known[0]))
        bucket.pace.missed(walk.first_missed)

    def _run_eagerly(
        self,
        token_ids: Tensor,
        positions: Tensor,
        slots: Sequence[Tensor],
        plans: Sequence[Any],
        watcher: Watcher | None,
    ) -> Tensor:
        """Run any batch, kernel by kernel."""
        inputs = self._sent(token_ids, positions, slots, plans)
        self._tables.refresh()
        steps = Eager(self._pieces, self._tables, inputs, self._outgoing, self._incoming)
        layers = self._pieces.moe_layers
        if watcher is not None and (watcher.is_forced or watcher.stops is not Stops.NEVER):
            Walk(steps, self._tables, layers, watcher).run()
            return steps.result
        steps.begin()
        seen: list[Tensor] = []
        is_noted = watcher is not None and (watcher.ids is not None or watcher.weights is not None)
        for number in range(len(layers)):
            if is_noted:
                seen += [steps.routed.ids.contiguous(), steps.routed.weights.contiguous()]
            steps.finish(number)
        if watcher is not None and is_noted:
            found = [part.numpy() for part in self._incoming.fetch(seen)]
            for layer, ids, weights in zip(layers, found[::2], found[1::2], strict=True):
                note(watcher, layer, ids, weights)
        return steps.result

    def _sent(
        self,
        token_ids: Tensor,
        positions: Tensor,
        slots: Sequence[Tensor],
        plans: Sequence[Any],
    ) -> StepInputs:
        """Return a step's inputs on the device: what is not there goes in one copy."""
        tensors = [token_ids, positions, *slots]
        for plan in plans:
            if isinstance(plan, Plan):
                tensors.append(plan.block_table)
                for part in plan.parts:
                    tensors.append(part.contexts)
                    if part.items is not None:
                        tensors.append(part.items)
        sent = iter(self._outgoing.tensors(tensors))
        token_ids, positions = next(sent), next(sent)
        slots = [next(sent) for _ in slots]
        moved: list[Any] = []
        for plan in plans:
            if not isinstance(plan, Plan):
                moved.append(plan)
                continue
            table = next(sent)
            parts = []
            for part in plan.parts:
                contexts = next(sent)
                items = None if part.items is None else next(sent)
                parts.append(replace(part, contexts=contexts, items=items))
            moved.append(replace(plan, parts=tuple(parts), block_table=table))
        return StepInputs(token_ids, positions, slots, moved)


def builder(kernels: Operations) -> Callable[[ModelPart], Forward]:
    """Return what makes a `Forward` of a model."""
    return lambda model: Forward(kernels, model)
