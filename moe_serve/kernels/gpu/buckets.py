"""The sizes of batches that run as graphs, with the memory that such graphs read and write.

A bucket is a number of decodes and a bound of their contexts. All buckets share one stage: no two
steps run at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from moe_serve.kernels.gpu.attention_plan import PART_BYTES, Shape, cut, decode_plan
from moe_serve.kernels.gpu.graphs import Graph
from moe_serve.kernels.gpu.numerics import Numerics
from moe_serve.kernels.gpu.pace import Pace
from moe_serve.kernels.gpu.pieces import Pieces, Routed, StepInputs
from moe_serve.kernels.gpu.slot_tables import SlotTables
from moe_serve.kernels.gpu.staging import Layout
from moe_serve.kernels.moe.base import ExpertTable

_FEW_SEQS = (1, 2, 4)
_SEQS_STEP = 8
_LEAST_CONTEXT = 1024
# Sequences times their bound of contexts: scratch of attention grows with it (38 MB for 32 heads of
# 128), and hardly any cache holds more keys.
_MOST_KEYS = 2**20
_COUNTLESS = 2**20  # multiprocessors


class Size(NamedTuple):
    """num_seqs, context: the most of each that a bucket takes."""

    num_seqs: int
    context: int


def size_of(num_seqs: int, context: int, most_seqs: int, most_context: int) -> Size | None:
    """Return the bucket of decodes whose longest has `context` tokens; None where there is none."""
    padded = next((few for few in _FEW_SEQS if num_seqs <= few), -(-num_seqs // _SEQS_STEP) * 8)
    if num_seqs < 1 or num_seqs > most_seqs or context > most_context:
        return None
    padded = min(padded, most_seqs)
    bound = min(max(_LEAST_CONTEXT, 1 << (context - 1).bit_length()), most_context)
    return Size(padded, bound) if padded * bound <= _MOST_KEYS else None


def most_part_bytes(shape: Shape, most_seqs: int, most_context: int, numerics: Numerics) -> int:
    """Return a bound of what attention's parts take in the decodes of any bucket."""
    found, context = 0, min(_LEAST_CONTEXT, most_context)
    while True:
        num_seqs = min(most_seqs, max(1, _MOST_KEYS // context))
        lens = torch.empty(num_seqs, dtype=torch.int32, device="meta")
        table = torch.empty(num_seqs, context, dtype=torch.int32, device="meta")
        (part,) = decode_plan(lens, table, 1, None, context).parts
        # on a device that is never full contexts are cut most, and left whole only for their bytes
        how = cut(part, shape, None, numerics, num_multiprocessors=_COUNTLESS)
        is_too_much = how.is_whole and how.num_splits > 1
        found = max(found, PART_BYTES if is_too_much else how.part_bytes(shape.head_dim))
        if context >= most_context:
            return found
        context = min(2 * context, most_context)


class Part(NamedTuple):
    """What one graph holds.

    whole: a step. noted: a step that leaves what was routed on the stage, and counts uses only if
    no expert was missing. begin: up to the first router; finish: the experts of MoE layer `number`,
    and on to the next router, or the end; rest: that, but for experts that have run already.
    """

    kind: Literal["whole", "noted", "begin", "finish", "rest"]
    number: int = 0


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source to its target, in as few launches as there are dtypes."""
    for dtype in dict.fromkeys(target.dtype for target in targets):
        chosen = [index for index, target in enumerate(targets) if target.dtype == dtype]
        torch._foreach_copy_([targets[i] for i in chosen], [sources[i] for i in chosen])


@dataclass(frozen=True, slots=True)
class Notes:
    """What a noted step leaves, by MoE layer; see `Routed`."""

    ids: Sequence[Tensor]
    weights: Sequence[Tensor]
    counts: Sequence[Tensor]


class Stage:
    """The memory between graphs, in place, on the device: one for all buckets of a model.

    result: [most_seqs, hidden_size], where a step's last norm goes.
    """

    def __init__(
        self, pieces: Pieces, tables: SlotTables, most_seqs: int, device: torch.device
    ) -> None:
        model = pieces.model
        self._pieces = pieces
        self._hidden_size, self._dtype = model.norm.shape[0], model.norm.dtype
        moes = [model.layers[layer].moe for layer in pieces.moe_layers]
        self._shapes = [
            (moe.recipe.top_k, moe.recipe.num_experts) for moe in moes if moe is not None
        ]
        self.tables = tables
        self.most_seqs = most_seqs
        self._looks: dict[tuple[int, int, int], tuple[Tensor, Layout]] = {}
        self._routed: dict[tuple[int, int], Routed] = {}
        shapes = set(self._shapes)
        sizes = {
            "between": max((self._between(most_seqs, *s).num_bytes for s in shapes), default=0),
            "look": max((self._look_layout(most_seqs, *s).num_bytes for s in shapes), default=0),
            "notes": self._notes_layout(most_seqs).num_bytes,
        }
        with torch.inference_mode(False):
            self.result = torch.zeros(
                most_seqs, self._hidden_size, dtype=self._dtype, device=device
            )
            self._memory = {
                name: torch.zeros(size, dtype=torch.uint8, device=device)
                for name, size in sizes.items()
            }
            # what experts of a noted step count is thrown away
            most_experts = max((num_experts for _, num_experts in shapes), default=0)
            self._unused = torch.zeros(most_experts, dtype=torch.int64, device=device)

    # -- layouts -----------------------------------------------------------------------------------

    def _between(self, rows: int, top_k: int, num_experts: int) -> Layout:
        states = (rows, self._hidden_size)
        return Layout(
            {
                "hidden": (self._dtype, states),
                "residual": (self._dtype, states),
                "shared": (self._dtype, states),
                "shared_weights": (torch.float32, (rows,)),
                "row_of_pair": (torch.int64, (rows * top_k,)),
                "pair_of_choice": (torch.int64, (rows, top_k)),
                "outbox": (self._dtype, (rows * top_k, self._hidden_size)),
            }
        )

    @staticmethod
    def _look_layout(rows: int, top_k: int, num_experts: int) -> Layout:
        return Layout(
            {
                "counts": (torch.int64, (num_experts,)),
                "ids": (torch.int64, (rows, top_k)),
                "weights": (torch.float32, (rows, top_k)),
            }
        )

    def _notes_layout(self, rows: int) -> Layout:
        choices = rows * sum(top_k for top_k, _ in self._shapes)
        return Layout(
            {
                "counts": (torch.int64, (sum(experts for _, experts in self._shapes),)),
                "ids": (torch.int64, (choices,)),
                "weights": (torch.float32, (choices,)),
            }
        )

    def clear(self) -> None:
        """Have nothing on the stage: no expert has pairs."""
        for memory in self._memory.values():
            memory.zero_()

    # -- views -------------------------------------------------------------------------------------

    def look(self, rows: int, number: int) -> tuple[Tensor, Layout]:
        """Return what the host copies after a router, uint8, and what is where in it."""
        key = rows, *self._shapes[number]
        if key not in self._looks:
            layout = self._look_layout(*key)
            self._looks[key] = self._memory["look"][: layout.num_bytes], layout
        return self._looks[key]

    def all_notes(self, rows: int) -> Tensor:
        """Return what the host copies after a noted step, uint8; see `notes_in`."""
        return self._memory["notes"][: self._notes_layout(rows).num_bytes]

    def notes_in(self, memory: Tensor, rows: int) -> Notes:
        """View the notes of a step in `memory`, as `all_notes` gave it."""
        views = self._notes_layout(rows).views(memory)
        sizes = [rows * top_k for top_k, _ in self._shapes]
        ids, weights = (
            [part.view(rows, -1) for part in torch.split(views[name], sizes)]
            for name in ("ids", "weights")
        )
        num_experts = [experts for _, experts in self._shapes]
        return Notes(ids, weights, torch.split(views["counts"], num_experts))

    def routed(self, rows: int, number: int) -> Routed:
        """Return where a step waits before the experts of a layer."""
        if (rows, number) not in self._routed:
            self._routed[rows, number] = self._view_routed(rows, number)
        return self._routed[rows, number]

    def _view_routed(self, rows: int, number: int) -> Routed:
        shape = self._shapes[number]
        layer = self._pieces.model.layers[self._pieces.moe_layers[number]]
        assert layer.moe is not None
        states = self._between(rows, *shape).views(self._memory["between"])
        look = self._look_layout(rows, *shape).views(self._memory["look"])
        has_shared = layer.gate_up is not None
        has_gate = has_shared and layer.moe.shared_gate is not None
        return Routed(
            hidden=states["hidden"],
            residual=states["residual"],
            ids=look["ids"],
            weights=look["weights"],
            counts=look["counts"],
            row_of_pair=states["row_of_pair"],
            pair_of_choice=states["pair_of_choice"],
            shared=states["shared"] if has_shared else None,
            shared_weights=states["shared_weights"] if has_gate else None,
        )

    def outbox(self, rows: int, number: int) -> Tensor:
        """Return where experts that run in parts leave their rows, [num_pairs, hidden_size]."""
        layout = self._between(rows, *self._shapes[number])
        return layout.views(self._memory["between"])["outbox"]

    # -- what graphs do ----------------------------------------------------------------------------

    def work(self, part: Part, rows: int, inputs: StepInputs) -> Callable[[], None]:
        """Return what the graph of a part is captured from."""
        pieces, tables, number = self._pieces, self.tables.tables, part.number

        def keep(number: int, found: Routed | Tensor) -> None:
            if isinstance(found, Tensor):
                self.result[:rows].copy_(found)
                return
            place = self.routed(rows, number)
            names = [f.name for f in fields(place) if getattr(place, f.name) is not None]
            copy_all([getattr(place, n) for n in names], [getattr(found, n) for n in names])

        def whole() -> None:
            keep(0, self._run(inputs, tables))

        def noted() -> None:
            seen: list[tuple[Tensor, Tensor, Tensor]] = []
            uncounted = [replace(t, uses=self._unused[: t.num_experts]) for t in tables]
            keep(0, self._run(inputs, uncounted, seen))
            self._note(rows, seen)

        def begin() -> None:
            keep(0, pieces.begin(inputs))

        def finish() -> None:
            routed = self.routed(rows, number)
            outbox = pieces.experts(number, routed, tables[number])
            keep(number + 1, pieces.go_on(number, routed, outbox, inputs))

        def rest() -> None:
            outbox = self.outbox(rows, number)
            keep(number + 1, pieces.go_on(number, self.routed(rows, number), outbox, inputs))

        works = {"whole": whole, "noted": noted, "begin": begin, "finish": finish, "rest": rest}
        return works[part.kind]

    def _run(
        self,
        inputs: StepInputs,
        tables: Sequence[ExpertTable],
        seen: list[tuple[Tensor, Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """Run a whole pass; seen: where each layer's ids, counts and weights are to go."""
        found = self._pieces.begin(inputs)
        for number, table in enumerate(tables):
            assert isinstance(found, Routed)
            if seen is not None:
                seen.append((found.ids, found.counts, found.weights))
            outbox = self._pieces.experts(number, found, table)
            found = self._pieces.go_on(number, found, outbox, inputs)
        assert isinstance(found, Tensor)
        return found

    def _note(self, rows: int, seen: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
        memory = self.all_notes(rows)
        notes = self.notes_in(memory, rows)
        places = zip(notes.ids, notes.counts, notes.weights, strict=True)
        copy_all(
            [place for of_layer in places for place in of_layer],
            [part for of_layer in seen for part in of_layer],
        )
        counts = self._notes_layout(rows).views(memory)["counts"]
        if self.tables.flat is not None:
            is_missing = ((counts > 0) & (self.tables.flat < 0)).any()
            counts = counts.masked_fill(is_missing, 0)
        uses = [table.uses for table in self.tables.tables]
        torch._foreach_add_(uses, list(torch.split(counts, [len(part) for part in uses])))


class Bucket:
    """One size of decodes: its inputs, in place, and the graphs that read them.

    wanted: parts that were run without a graph, for want of one. is_eager: there is no memory for
    graphs of this size. layout, memory: of the inputs, uint8 on the device; views: the same.
    """

    def __init__(
        self,
        size: Size,
        block_size: int,
        windows: Sequence[int | None],
        num_layers: int,
        device: torch.device,
    ) -> None:
        """windows: of each cache group; num_layers: that have experts."""
        rows, context = size
        width = -(-context // block_size)
        groups = range(len(windows))
        self.size = size
        self.layout = Layout(
            {
                "token_ids": (torch.int64, (rows,)),
                "positions": (torch.int64, (rows,)),
                **{f"slots{group}": (torch.int64, (rows,)) for group in groups},
                "contexts": (torch.int32, (rows,)),
                "num_rows": (torch.int32, (1,)),
                **{f"table{group}": (torch.int32, (rows, width)) for group in groups},
            }
        )
        with torch.inference_mode(False):
            self.memory = torch.zeros(self.layout.num_bytes, dtype=torch.uint8, device=device)
        self.views = self.layout.views(self.memory)
        contexts = self.views["contexts"]
        self.inputs = StepInputs(
            self.views["token_ids"],
            self.views["positions"],
            [self.views[f"slots{group}"] for group in groups],
            [
                decode_plan(contexts, self.views[f"table{group}"], block_size, window, context)
                for group, window in zip(groups, windows, strict=True)
            ],
            self.views["num_rows"],
        )
        self.graphs: dict[Part, Graph] = {}
        self.wanted: set[Part] = set()
        self.is_eager = False
        self.pace = Pace(num_layers)
