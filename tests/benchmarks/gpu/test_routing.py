from __future__ import annotations

import numpy as np

from benchmarks.gpu.routing import first_layers, made_up, widened
from moe_serve.experts.trace import Trace, read_trace, write_trace


def trace() -> Trace:
    """Three sequences of 3, 2 and 4 tokens, two layers, 4 experts, top 2."""
    chance = np.random.default_rng(0)
    ids = np.argsort(chance.random((9, 2, 4)), axis=2)[:, :, :2].astype(np.uint8)
    weights = np.sort(chance.random((9, 2, 2)), axis=2)[:, :, ::-1].astype(np.float16)
    return Trace(
        name="three",
        ids=ids,
        weights=weights,
        seq_offsets=np.array([0, 3, 5, 9]),
        layer_ids=np.arange(2),
        num_experts=4,
        top_k=2,
    )


def test_each_half_of_the_experts_keeps_a_token_s_routing() -> None:
    given = trace()
    wide = widened(given, 8, 2)
    assert wide.seq_offsets.tolist() == [0, 2, 4, 7]
    pairs = [(0, 3), (1, 4), (3, 5), (4, 6), (5, 0), (6, 1), (7, 2)]
    for row, (left, right) in enumerate(pairs):
        for layer in range(2):
            want = {
                int(given.ids[left, layer, 0]): given.weights[left, layer, 0],
                int(given.ids[right, layer, 0]) + 4: given.weights[right, layer, 0],
            }
            found = dict(zip(wide.ids[row, layer].tolist(), wide.weights[row, layer], strict=True))
            assert found == want
            assert wide.weights[row, layer, 0] >= wide.weights[row, layer, 1], "heaviest first"


def test_a_widened_trace_can_be_written_and_read(tmp_path: object) -> None:
    from pathlib import Path

    assert isinstance(tmp_path, Path)
    wide = widened(trace(), 8, 4)
    write_trace(tmp_path / "wide.npz", wide)
    assert np.array_equal(read_trace(tmp_path / "wide.npz").ids, wide.ids)


def test_first_layers() -> None:
    given = trace()
    one = first_layers(given, 1)
    assert one.num_layers == 1
    assert np.array_equal(one.ids[:, 0], given.ids[:, 0])
    assert one.layer_ids.tolist() == [0]


def test_made_up_routing_uses_each_expert_once() -> None:
    found = made_up(2, 4, 2)
    assert found.num_seqs == 2
    assert (found.ids[:, :, 0] != found.ids[:, :, 1]).all()
