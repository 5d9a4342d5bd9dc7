"""Placement files: what is written is what is read, and what is no placement says why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_serve.errors import ConfigError
from moe_serve.experts.placement.base import Mesh, Placement
from moe_serve.experts.placement_file import (
    as_json,
    export_placement,
    read_placement,
    write_placement,
)
from moe_serve.experts.placement_formats.base import from_physical, to_physical

MESH = Mesh(num_ranks=4, ranks_per_node=2)
PLACEMENT = Placement(
    MESH,
    3,
    (((0, 3), (1,), (2,)), ((0,), (1, 2), (3,))),
    "joint",
    {"trace": "intent", "tokens": 5},
    "abc",
)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_placement(tmp_path / "p.json", PLACEMENT)
    assert read_placement(tmp_path / "p.json") == PLACEMENT
    assert json.loads((tmp_path / "p.json").read_text())["layers"][0] == [[0, 3], [1], [2]]


def test_slot_maps_there_and_back(tmp_path: Path) -> None:
    physical = to_physical(PLACEMENT)
    assert physical.tolist() == [[0, 1, 2, 0], [0, 1, 1, 2]]
    assert from_physical(physical, MESH).ranks == PLACEMENT.ranks
    export_placement(tmp_path / "s.json", "sglang", PLACEMENT)
    assert read_placement(tmp_path / "s.json", MESH).ranks == PLACEMENT.ranks
    with pytest.raises(ConfigError, match="says nothing of ranks"):
        read_placement(tmp_path / "s.json")


def test_an_expert_twice_on_a_rank_counts_once() -> None:
    mesh = Mesh(num_ranks=2, ranks_per_node=2)
    placement = from_physical(np.array([[0, 0, 1, 0]]), mesh)
    assert placement.ranks == (((0, 1), (1,)),)
    with pytest.raises(ConfigError, match="has 1 to 2"):
        to_physical(placement)


@pytest.mark.parametrize(
    ("physical", "says"),
    [
        (np.zeros(4, np.int64), "is \\[layers, slots\\] of whole numbers"),
        (np.zeros((1, 4)), "of whole numbers"),
        (np.zeros((1, 3), np.int64), "3 slots cannot be shared by 4 ranks"),
        (np.full((1, 4), -1), "below 0"),
        (np.zeros((0, 4), np.int64), "is \\[layers, slots\\] of whole numbers"),
    ],
)
def test_a_map_that_is_none_is_refused(physical: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        from_physical(physical, MESH)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema": 9}, "schema is 9, not 1"),
        ({"num_layers": 5}, "num_layers is 5, but layers has 2"),
        ({"num_experts": 4}, "layer 0 has 3 experts, not 4"),
        ({"num_ranks": 3}, "3 ranks cannot be 2 on every node"),
        ({"num_ranks": 2}, "of which there are 2"),
        ({"layers": [[[0], [1], ["x"]]] * 2}, "ranks are whole numbers"),
        ({"layers": 7}, "not a placement"),
    ],
)
def test_a_file_that_is_none_says_why(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps({**as_json(PLACEMENT), **change}))
    with pytest.raises(ConfigError, match=says) as caught:
        read_placement(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"schema": 1}'])
def test_what_is_no_json_of_it_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(ConfigError, match=r"not a placement|num_ranks"):
        read_placement(tmp_path / "p.json")
    with pytest.raises(ConfigError, match="not a placement"):
        read_placement(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"schema": 1, "num_ranks": 1e999}', "num_ranks is inf, not a whole number"),
        ('{"schema": 1, "num_ranks": 1.7}', "num_ranks is 1.7, not a whole number"),
        ("[" * 100_000, "not a placement"),
    ],
)
def test_numbers_that_are_none_and_depth_without_end(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(ConfigError, match=says):
        read_placement(tmp_path / "p.json")


def test_a_map_with_more_experts_than_slots_is_refused() -> None:
    with pytest.raises(ConfigError, match="4 slots cannot hold 1000000000001 experts"):
        from_physical(np.array([[0, 1, 2, 10**12]]), MESH)
