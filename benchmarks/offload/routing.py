"""Recorded routing in place of the router's own: what each token of a run uses is read off a trace.

Token `position` of sequence i goes where the trace's did. The routers compute as ever, but what
they find is not used. Knows engines and traces, no cases and no clock.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from moe_serve.engine.engine import Engine
from moe_serve.experts.executor import ResidentExperts
from moe_serve.experts.offload import OffloadedExperts
from moe_serve.experts.recorder import StepNotes
from moe_serve.experts.trace import Trace
from moe_serve.types import ForwardBatch, Request, SamplingParams

Array = np.ndarray[Any, Any]


def start(engine: Engine, trace: Trace) -> None:
    """Have `engine`, which has nothing to do, decode the sequences of `trace` as it routed them.

    A sequence of n tokens is a prompt of one token and n steps, so that the engine takes them as
    `study.replay.batched_steps` does: first come first served, a place refilled in the next step.
    Raises ValueError where the model is not the trace's: every layer must have experts.
    """
    assert not engine.has_unfinished
    recipes = [None if layer.moe is None else layer.moe.router for layer in engine.spec.layers]
    wanted = (trace.num_layers, trace.num_experts, trace.top_k)
    found = {None if r is None else (len(recipes), r.num_experts, r.top_k) for r in recipes}
    if found != {wanted}:
        raise ValueError(
            f"trace {trace.name} has {wanted} layers, experts and top_k; the model has {found}"
        )
    experts = engine.runner.model.experts
    assert isinstance(experts, ResidentExperts | OffloadedExperts), type(experts)
    experts.replay = Replay(trace)
    for index, length in enumerate(np.diff(trace.seq_offsets).tolist()):
        engine.add(
            Request(
                request_id=str(index),
                prompt_ids=(index % engine.spec.vocab_size,),
                sampling=SamplingParams(temperature=0, max_tokens=length, ignore_eos=True),
            )
        )


class Replay:
    """Says of a step's tokens what the trace's used; the first step that it sees is the first."""

    def __init__(self, trace: Trace) -> None:
        self._offsets = trace.seq_offsets
        # [num_layers, num_tokens, top_k], as a pass takes them
        self._ids = np.ascontiguousarray(trace.ids.transpose(1, 0, 2).astype(np.int64))
        self._weights = np.ascontiguousarray(trace.weights.transpose(1, 0, 2).astype(np.float32))
        self._first_number: int | None = None

    def rows(self, batch: ForwardBatch) -> Array:
        """Return which token of the trace each of the batch's is, int64 [num_tokens].

        Sequences are numbered in the order in which they were added.
        """
        numbers = batch.sequence_ids.numpy()
        if self._first_number is None:
            self._first_number = int(numbers.min())
        rows: Array = self._offsets[numbers - self._first_number] + batch.positions.numpy()
        return rows

    def __call__(self, batch: ForwardBatch, notes: StepNotes) -> None:
        """Fill the notes of a step."""
        rows = self.rows(batch)
        notes.ids[:] = torch.from_numpy(self._ids[:, rows])
        notes.weights[:] = torch.from_numpy(self._weights[:, rows])
