"""A recorder makes a trace, sequence by sequence, of steps that came in any order."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_serve.errors import TraceError
from moe_serve.experts.recorder import RoutingRecorder, StepNotes
from moe_serve.experts.trace import DECODE, PREFILL, read_trace
from moe_serve.types import ForwardBatch, Routing

LAYERS = [1, 3]  # of four
TOP_K = 2


def batch_of(parts: list[tuple[int, int, int, int]]) -> ForwardBatch:
    """Return a step of (sequence, first position, length, prompt length) each."""
    positions = [torch.arange(first, first + length) for _, first, length, _ in parts]
    lengths = torch.tensor([length for _, _, length, _ in parts])
    numbers = torch.tensor([number for number, _, _, _ in parts])
    sequence_ids = numbers.repeat_interleave(lengths)
    return ForwardBatch(
        token_ids=sequence_ids * 100 + torch.cat(positions),
        positions=torch.cat(positions),
        sequence_ids=sequence_ids,
        query_lens=tuple(lengths.tolist()),
        context_lens=tuple(first + length for _, first, length, _ in parts),
        prompt_lens=tuple(prompt for _, _, _, prompt in parts),
        slot_mapping=(),
        block_tables=(),
        block_size=16,
        sample_rows=torch.empty(0, dtype=torch.int64),
    )


def notes_of(batch: ForwardBatch) -> StepNotes:
    """Return notes whose first expert tells the token and the layer."""
    notes = StepNotes(4, batch.num_tokens, TOP_K)
    for layer in LAYERS:
        first = (batch.token_ids + layer) % 200
        ids = torch.stack([first, first + 1], 1)
        weights = torch.tensor([0.75, 0.25]).expand(batch.num_tokens, 2)
        notes.note(layer, Routing(ids, weights))
    return notes


def recorder(path: Path, num_experts: int = 256) -> RoutingRecorder:
    return RoutingRecorder(path, LAYERS, num_experts, TOP_K, "00ff")


STEPS = (
    [(0, 0, 3, 5)],
    [(0, 3, 2, 5), (2, 0, 4, 4)],
    [(2, 4, 1, 4), (0, 5, 1, 5), (1, 0, 1, 2)],
    [(0, 3, 3, 5)],  # preempted, and computed again from position 3
)


def test_steps_become_sequences(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    made = recorder(path)
    for number, parts in enumerate(STEPS):
        batch = batch_of(parts)
        made.add(10 + number, batch, notes_of(batch))
    assert made.num_tokens == 15
    trace = made.close()
    assert trace is not None
    assert made.close() is None
    read = read_trace(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.npz"]
    assert read.seq_offsets.tolist() == [0, 9, 10, 15]
    assert read.token_ids is not None
    assert read.step is not None
    assert read.phase is not None
    assert read.token_ids.tolist() == [0, 1, 2, 3, 3, 4, 4, 5, 5, 100, 200, 201, 202, 203, 204]
    assert read.step.tolist() == [10, 10, 10, 11, 13, 11, 13, 12, 13, 12, 11, 11, 11, 11, 12]
    assert read.phase.tolist() == [PREFILL] * 7 + [DECODE] * 2 + [PREFILL] * 5 + [DECODE]
    for index, layer in enumerate(LAYERS):
        assert read.ids[:, index, 0].tolist() == [(t + layer) % 200 for t in read.token_ids]
    np.testing.assert_array_equal(read.ids[..., 1], read.ids[..., 0] + 1)
    assert read.weights[3].tolist() == [[0.75, 0.25]] * 2
    assert (read.ids.dtype, read.num_experts, read.top_k) == (np.uint8, 256, TOP_K)
    assert (read.model_id, read.layer_ids.tolist()) == ("00ff", LAYERS)


def test_nothing_that_ran_is_an_empty_trace(tmp_path: Path) -> None:
    recorder(tmp_path / "a.npz", num_experts=257).close()
    trace = read_trace(tmp_path / "a.npz")
    assert (trace.num_tokens, trace.num_seqs, trace.ids.dtype) == (0, 0, np.uint16)


def test_what_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"no/a\.npz: its folder is not there"):
        recorder(tmp_path / "no" / "a.npz")


def test_memory_does_not_grow_with_what_is_recorded(tmp_path: Path) -> None:
    made = recorder(tmp_path / "a.npz")
    batch = batch_of([(0, 0, 2000, 2000)])
    notes = notes_of(batch)
    for step in range(20):
        made.add(step, batch, notes)
    held = sum(len(getattr(made, name, ())) for name in ("_files", "_layers"))
    assert held < 10, "only the files' handles"
    assert sum(os.fstat(file.fileno()).st_size for file in made._files.values()) > 20 * 2000 * 40
    made.close()


@pytest.mark.parametrize("name", ["ids", "weights", "tokens"])
def test_a_full_disk_costs_one_step_and_no_more(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step that could not be recorded says so; the trace has the others, and fits together."""
    made = recorder(tmp_path / "a.npz")

    class Full:
        def __init__(self, file: Any) -> None:
            self._file = file

        def write(self, data: bytes) -> int:
            self._file.write(data[: len(data) // 2])
            raise OSError(28, "No space left on device")

        def __getattr__(self, attribute: str) -> Any:
            return getattr(self._file, attribute)

    batches = [batch_of(parts) for parts in STEPS[:3]]
    made.add(0, batches[0], notes_of(batches[0]))
    with monkeypatch.context() as patch:
        patch.setitem(made._files, name, Full(made._files[name]))
        with pytest.raises(TraceError, match="No space left"):
            made.add(1, batches[1], notes_of(batches[1]))
    made.add(2, batches[2], notes_of(batches[2]))
    made.close()
    trace = read_trace(tmp_path / "a.npz")
    assert trace.token_ids is not None
    assert trace.token_ids.tolist() == [0, 1, 2, 5, 100, 204]
    assert trace.ids[:, 0, 0].tolist() == [(t + 1) % 200 for t in trace.token_ids]
    assert trace.weights[5].tolist() == [[0.75, 0.25]] * 2
