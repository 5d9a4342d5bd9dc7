"""Trace files: what is written is read; what is no trace is refused with the field's name."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_serve.errors import TraceError
from moe_serve.experts.trace import Trace, read_trace, write_trace

NUM_TOKENS, NUM_LAYERS, TOP_K, NUM_EXPERTS = 50, 3, 2, 8


def a_trace(**changes: Any) -> Trace:
    generator = np.random.default_rng(0)
    fields: dict[str, Any] = {
        "name": "a",
        "ids": generator.integers(0, NUM_EXPERTS, (NUM_TOKENS, NUM_LAYERS, TOP_K)).astype(np.uint8),
        "weights": generator.random((NUM_TOKENS, NUM_LAYERS, TOP_K)).astype(np.float16),
        "seq_offsets": np.array([0, 20, 20, NUM_TOKENS]),
        "layer_ids": np.array([0, 2, 5]),
        "num_experts": NUM_EXPERTS,
        "top_k": TOP_K,
        "step": np.arange(NUM_TOKENS, dtype=np.int32),
        "phase": np.repeat([0, 1], NUM_TOKENS // 2).astype(np.uint8),
        "token_ids": np.arange(NUM_TOKENS, dtype=np.int32) * 7,
        "model_id": "00ff",
    }
    return Trace(**{**fields, **changes})


def assert_same(one: Trace, other: Trace) -> None:
    for name in Trace.__slots__:
        first, second = getattr(one, name), getattr(other, name)
        if isinstance(first, np.ndarray):
            np.testing.assert_array_equal(first, second)
            assert first.dtype == second.dtype, name
        else:
            assert first == second, name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"step": None, "phase": None, "token_ids": None, "model_id": None},
        {"ids": np.full((NUM_TOKENS, NUM_LAYERS, TOP_K), 400, np.uint16), "num_experts": 401},
        {
            "ids": np.empty((0, NUM_LAYERS, TOP_K), np.uint8),
            "weights": np.empty((0, NUM_LAYERS, TOP_K), np.float16),
            "seq_offsets": np.array([0]),
            "step": None, "phase": None, "token_ids": None,
        },
    ],
    ids=["all", "least", "many-experts", "empty"],
)  # fmt: skip
def test_what_was_written_is_read(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = tmp_path / "a.npz"
    trace = a_trace(**changes)
    write_trace(path, trace)
    assert_same(read_trace(path), trace)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.npz"]


def test_sequences_are_traces_of_their_own() -> None:
    trace = a_trace()
    assert (trace.num_tokens, trace.num_layers, trace.num_seqs) == (50, 3, 3)
    last = trace.sequences(1, 3)
    assert last.seq_offsets.tolist() == [0, 0, 30]
    np.testing.assert_array_equal(last.ids, trace.ids[20:])
    assert last.step is not None
    assert last.step.tolist() == list(range(20, 50))
    assert trace.sequences(0, 0).num_tokens == 0
    assert a_trace(step=None).sequences(0, 1).step is None


def test_real_traces_are_read(shared_data: Path) -> None:
    paths = sorted((shared_data / "traces").glob("*.npz"))
    assert paths
    for path in paths:
        trace = read_trace(path)
        assert trace.num_tokens == int(trace.seq_offsets[-1]) > 0


def written(path: Path, **changes: Any) -> Path:
    """Write the arrays of a trace, some of them changed, or left out where None."""
    trace = a_trace()
    fields = {name: getattr(trace, name) for name in Trace.__slots__ if name != "name"} | changes
    np.savez(path, **{name: value for name, value in fields.items() if value is not None})
    return path


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"ids": None}, "has no ids"),
        ({"weights": None, "top_k": None}, "has no weights, top_k"),
        ({"top_k": np.array([2])}, "top_k must be one integer"),
        ({"num_experts": np.float64(8)}, "num_experts must be one integer"),
        ({"top_k": np.int64(3)}, r"ids are \[50, 3, 2\].*top_k 3"),
        ({"layer_ids": np.arange(4)}, r"4 layers"),
        ({"weights": np.zeros((50, 3, 1), np.float16)}, r"weights \[50, 3, 1\]"),
        ({"ids": np.zeros((50, 3, 2), np.float32)}, "ids is float32"),
        ({"ids": np.full((50, 3, 2), 8, np.uint8)}, "ids go from 8 to 8, but there are 8 experts"),
        ({"ids": np.full((50, 3, 2), -1, np.int8)}, "ids go from -1 to -1"),
        ({"num_experts": np.int64(1), "ids": np.zeros((50, 3, 2), np.uint8)}, "top_k is 2 of 1"),
        ({"seq_offsets": np.array([0, 20])}, "seq_offsets must rise from 0 to 50"),
        ({"seq_offsets": np.array([1, 50])}, "seq_offsets must rise from 0 to 50"),
        ({"seq_offsets": np.array([0, 30, 20, 50])}, "seq_offsets must rise from 0 to 50"),
        ({"seq_offsets": np.array([], np.int64)}, "seq_offsets must rise"),
        ({"step": np.zeros(3, np.int32)}, r"step is \[3\]; one per token"),
        ({"token_ids": np.zeros((50, 1), np.int32)}, "token_ids is int32 of 2 dimensions"),
        # arrays of another kind altogether
        ({"ids": np.uint8(3)}, "ids"),
        ({"layer_ids": np.int64(1)}, "layer_ids"),
        ({"layer_ids": np.array(["a", "b", "c"])}, "layer_ids"),
        ({"seq_offsets": np.array(["a", "b"])}, "seq_offsets"),
        ({"seq_offsets": np.array([0.0, np.nan, 50.0])}, "seq_offsets"),
        ({"weights": np.full((50, 3, 2), "a")}, "weights"),
        ({"step": np.full(50, "a")}, "step"),
        ({"ids": np.array([{}], dtype=object)}, "not a trace"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_arrays_that_do_not_fit_are_refused(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    path = written(tmp_path / "a.npz", **changes)
    with pytest.raises(TraceError, match=says) as caught:
        read_trace(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_files_that_are_no_trace_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with pytest.raises(TraceError, match="not a trace"):
        read_trace(path)
    with pytest.raises(TraceError, match="not a trace"):
        read_trace(tmp_path)
    for data in (b"", b"no zip", b"\x93NUMPY"):
        path.write_bytes(data)
        with pytest.raises(TraceError, match="not a trace"):
            read_trace(path)
    np.save(tmp_path / "b.npy", np.zeros(3))
    with pytest.raises(TraceError, match="not a trace"):
        read_trace(tmp_path / "b.npy")


def test_damaged_files_are_refused_or_read_and_nothing_else(tmp_path: Path) -> None:
    write_trace(tmp_path / "a.npz", a_trace())
    data = (tmp_path / "a.npz").read_bytes()
    chance = random.Random(0)
    damaged = tmp_path / "b.npz"
    num_refused = 0
    for place in chance.sample(range(len(data)), 300):
        flipped = bytearray(data)
        flipped[place] ^= chance.choice((1, 255))
        for part in (flipped, data[:place]):
            damaged.write_bytes(part)
            try:
                read_trace(damaged)
            except TraceError:
                num_refused += 1
    assert num_refused > 300


def test_a_trace_that_cannot_be_written_whole_replaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.npz"
    write_trace(path, a_trace())

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(TraceError, match="No space"):
        write_trace(path, a_trace(model_id="other"))
    assert read_trace(path).model_id == "00ff"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.npz"]
