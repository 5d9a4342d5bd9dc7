"""Formats of placements: what is written is read, and what is damaged or odd says why."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_serve import plugin
from moe_serve.errors import ConfigError
from moe_serve.experts.placement.base import Array, Mesh, Placement, from_holds, from_owners
from moe_serve.experts.placement_file import FORMATS, export_placement, read_placement
from moe_serve.experts.placement_formats import eplb
from moe_serve.experts.placement_formats.base import array_bytes, to_physical

NAMES = plugin.names(FORMATS)
WITHOUT_REPLICAS = ("exflow", "vllm")
EVEN = tuple(name for name in NAMES if name not in WITHOUT_REPLICAS)
MESH = Mesh(num_ranks=4, ranks_per_node=2)
LAYER_IDS = (1, 2, 4)  # layers 0 and 3 of the model have no experts


def random_placement(seed: int, *, replicas: bool, alike: bool = False) -> Placement:
    """Return 3 layers of 8 experts on 4 ranks, as many on each; with replicas 3 on a rank."""
    rng = np.random.default_rng(seed)
    holds = np.zeros((3, 8, 4), bool)
    for layer in holds:
        layer[np.arange(8), rng.permutation(np.repeat(np.arange(4), 2))] = True
        for rank in range(4 if replicas else 0):
            layer[rng.choice(np.flatnonzero(~layer[:, rank])), rank] = True
    if alike:
        holds[1:] = holds[0]
    return from_holds(MESH, holds, "random")


def read(path: Path, **known: Any) -> Placement:
    given = {"mesh": MESH, "num_experts": 8, "layer_ids": LAYER_IDS}
    return read_placement(path, **{**given, **known})


def check_refused(tmp_path: Path, data: bytes | str, says: str, **known: Any) -> None:
    path = tmp_path / "file"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(ConfigError, match=says) as caught:
        read(path, **known)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_read(tmp_path: Path, name: str, seed: int) -> None:
    path = tmp_path / "file"
    placement = random_placement(
        seed, replicas=name not in WITHOUT_REPLICAS and seed % 2 == 0, alike=name == "vllm"
    )
    export_placement(path, name, placement, LAYER_IDS)
    assert read(path).ranks == placement.ranks
    assert [plugin.load(FORMATS, one).recognises(path.read_bytes()) for one in NAMES] == [
        one == name for one in NAMES
    ]


@pytest.mark.parametrize("name", NAMES)
def test_ranks_must_be_named_and_layers_and_experts_must_be_the_model_s(
    tmp_path: Path, name: str
) -> None:
    path = tmp_path / "file"
    export_placement(path, name, random_placement(0, replicas=False, alike=True), LAYER_IDS)
    with pytest.raises(ConfigError, match="says nothing of ranks: name them"):
        read(path, mesh=None)
    for layer_ids in ((1, 2), (1, 2, 2), (-1, 0, 1), (0, 1, 10**9)):
        with pytest.raises(ConfigError, match="layers"):
            export_placement(path, name, random_placement(0, replicas=False), layer_ids)
    with pytest.raises(ConfigError):
        read(path, num_experts=9)


@pytest.mark.parametrize("name", NAMES)
def test_a_part_of_a_file_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "file"
    export_placement(path, name, random_placement(3, replicas=False, alike=True), LAYER_IDS)
    data = path.read_bytes()
    # a CSV or YAML that lost nothing but its last line's end, or digits of it, is another one
    for length in (0, 3, len(data) // 3, len(data) // 2, len(data) - 6):
        check_refused(tmp_path, data[:length], "file: .")


@pytest.mark.parametrize("name", WITHOUT_REPLICAS)
def test_replicas_are_refused_where_there_is_one_rank_an_expert(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"one rank for each expert, but expert \d of layer 0"):
        export_placement(tmp_path / "file", name, random_placement(0, replicas=True), LAYER_IDS)
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize("name", EVEN)
def test_uneven_ranks_are_refused_where_slots_are_even(tmp_path: Path, name: str) -> None:
    uneven = from_owners(MESH, np.array([[0, 0, 1, 1, 2, 2, 3, 0]] * 3), "uneven")
    with pytest.raises(ConfigError, match="this placement has 1 to 3"):
        export_placement(tmp_path / "file", name, uneven, LAYER_IDS)


def test_exflow_says_uneven_ranks(tmp_path: Path) -> None:
    uneven = from_owners(MESH, np.array([[0, 0, 1, 1, 2, 2, 3, 0]] * 3), "uneven")
    export_placement(tmp_path / "file", "exflow", uneven)
    assert read(tmp_path / "file").ranks == uneven.ranks
    assert (tmp_path / "file").read_bytes().startswith(b"Expert,Node\r\n0,0\r\n1,0\r\n2,1\r\n")


def test_vllm_needs_layers_placed_alike(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one list for all layers, but layer 1"):
        export_placement(tmp_path / "file", "vllm", random_placement(0, replicas=False))


def test_sglang_has_a_row_for_every_layer(tmp_path: Path) -> None:
    placement = random_placement(0, replicas=True)
    export_placement(tmp_path / "file", "sglang", placement, LAYER_IDS)
    rows = json.loads((tmp_path / "file").read_text())["physical_to_logical_map"]
    assert len(rows) == 5
    assert rows[0] == rows[3] == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]
    assert [rows[layer] for layer in LAYER_IDS] == to_physical(placement).tolist()
    with pytest.raises(ConfigError, match="5 rows, but the model has experts up to layer 9"):
        read(tmp_path / "file", layer_ids=(1, 2, 9))


def test_the_three_arrays_of_eplb_are_checked_against_each_other(tmp_path: Path) -> None:
    """EPLB's own example: 12 experts in 16 slots (its README)."""
    physical = np.array(
        [
            [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
            [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
        ]
    )
    count = np.array([np.bincount(row) for row in physical])
    slots = np.full((2, 12, 2), -1)
    for layer, row in enumerate(physical):
        for slot, expert in reversed(list(enumerate(row))):  # any order of replicas will do
            slots[layer, expert, (slots[layer, expert] >= 0).sum()] = slot
    names = (eplb.MAP, eplb.SLOTS, eplb.COUNT)

    def archive(*arrays: Array) -> bytes:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as members:
            for name, array in zip(names, arrays, strict=True):
                members.writestr(f"{name}.npy", array_bytes(array))
        return file.getvalue()

    known = {"mesh": Mesh(num_ranks=8, ranks_per_node=4), "num_experts": None, "layer_ids": None}
    (tmp_path / "file").write_bytes(archive(physical, slots, count))
    found = read(tmp_path / "file", **known)
    assert found.ranks[0][5] == (0, 1)
    assert found.ranks[1][1] == (5, 7)
    for wrong, says in (
        ((physical, slots, count + np.eye(2, 12, dtype=int)), "logical_count is not"),
        ((physical, slots, count[:, :11]), "16 slots cannot hold 11"),
        ((physical, slots[::-1], count), "logical_to_physical_map does not"),
        ((physical, slots + 1, count), "logical_to_physical_map does not"),
        ((physical, np.where(slots < 0, slots, 0), count), "logical_to_physical_map does not"),
        ((physical, slots[0], count), "logical_to_physical_map does not"),
        ((physical.astype(float), slots, count), "whole numbers are needed"),
        ((physical, slots, np.full((2, 12), 2**62)), "logical_count is not"),
    ):
        check_refused(tmp_path, archive(*wrong), says, **known)
    check_refused(tmp_path, archive(physical, slots, count), "has 12 experts, not 8", mesh=MESH)
    empty = io.BytesIO()
    np.savez(empty, other=physical)
    check_refused(tmp_path, empty.getvalue(), "no physical_to_logical_map")


def test_arrays_that_are_none_are_refused(tmp_path: Path) -> None:
    good = array_bytes(np.zeros((3, 8), np.int64))
    nan = array_bytes(np.full((3, 8), np.nan))
    vast = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        vast, {"descr": "<i8", "fortran_order": False, "shape": (10**9, 10**9)}
    )
    for data, says in (
        (good, "expert 1 of the placement's layer 0 is on no rank"),
        (nan, "an array of float64"),
        (vast.getvalue(), "has not 0 bytes"),
        (good + b"more", "bytes"),
        (array_bytes(np.zeros(8, np.int64)), r"is \[layers, slots\]"),
        (array_bytes(np.full((3, 8), 2**64 - 1, np.uint64)), "cannot hold"),
        (b"\x93NUMPY\x09\x00", "not a .npy array"),
    ):
        check_refused(tmp_path, data, says)
    fortran = np.asfortranarray(to_physical(random_placement(0, replicas=True)))
    (tmp_path / "file").write_bytes(array_bytes(fortran))
    assert read(tmp_path / "file").ranks == random_placement(0, replicas=True).ranks


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"physical_to_logical_map": [[0, 1], [2]]}', "different lengths"),
        ('{"physical_to_logical_map": [[0, NaN, 2, 3]]}', "not float64"),
        ('{"physical_to_logical_map": [[0, 1e400, 2, 3]]}', "not float64"),
        ('{"physical_to_logical_map": [[0, 1, 2, 99999999999999999999999]]}', "not object"),
        ('{"physical_to_logical_map": [["0", "1"]]}', "whole numbers"),
        ('{"physical_to_logical_map": [0, 1, 2, 3]}', r"\[layers, slots\]"),
        ('{"physical_to_logical_map": [[0, 1, 2, 3, 4, 5, 6, 8]]}', "cannot hold 8 experts"),
        ('{"physical_to_logical_map": [[0, 1, 2, 3, 4, 5, 6, 6]]}', "expert 7 .* on no rank"),
        ('{"expert_to_ep_rank": [[0, 1, 2, 3, 0, 1, 2, 3]]}', "is one list of ranks"),
        ('{"expert_to_ep_rank": []}', "below 2|one list"),
        ('{"expert_to_ep_rank": 5}', "is one list of ranks"),
        ('{"expert_to_ep_rank": [0, 1, 2]}', "has 3 experts, not 8"),
        (
            '{"expert_to_ep_rank": [0, 1, 2, 3, 0, 1, 2, 4]}',
            r"on ranks \[4\], of which there are 4",
        ),
        ('{"expert_to_ep_rank": [0, 1, 2, 3, 0, 1, 2, -1]}', r"on ranks \[-1\]"),
        ('{"expert_to_ep_rank": [0, 1, 2, 3, 0, 1, 2, 0.5]}', "not float64"),
    ],
)
def test_json_that_is_none_is_refused(tmp_path: Path, text: str, says: str) -> None:
    check_refused(tmp_path, text, says)


def test_csv_that_is_none_is_refused(tmp_path: Path) -> None:
    lines = [f"{expert},{expert % 4}" for expert in range(24)]
    for changed, says in (
        (lines[:-1], "23 experts in all, not 3 layers of 8"),
        ([*lines[:-1], "24,0"], "expert 23 is on no rank, but there is an expert 24"),
        ([*lines, "5,2"], "line 26: expert 5 is there twice"),
        ([*lines[:-1], "23,4"], r"on ranks \[4\], of which there are 4"),
        ([*lines[:-1], "23,nan"], "line 25 is b'23,nan', not an expert and a rank"),
        ([*lines[:-1], "23,-1"], "not an expert and a rank"),
        ([*lines[:-1], "99999999999,1"], "not an expert and a rank"),
        ([], "0 experts in all"),
    ):
        check_refused(tmp_path, "\n".join(["Expert,Node", *changed]), says)
    text = "\n".join(["Expert,Node", *reversed(lines), ""])  # lines may be in any order
    (tmp_path / "file").write_text(text)
    assert read(tmp_path / "file").ranks == read(tmp_path / "file", layer_ids=None).ranks
    check_refused(tmp_path, text, "24 experts in all, which", num_experts=7, layer_ids=None)
    check_refused(tmp_path, text, "how many experts a layer has", num_experts=None)


ROW = "[0, 1, 2, 3, 4, 5, 6, 7]"
YAML = f"initial_global_assignments:\n  4: {ROW}\n  1: {ROW}\n  2: {ROW}\nnum_slots: 8\n"


@pytest.mark.parametrize(
    "text",
    [
        YAML,
        "---\n# a comment\n" + YAML.replace("3, 4", "3,\n     4") + "\nlayer_updates_per_iter: 2\n",
        f"{{initial_global_assignments: {{1: {ROW}, 2: {ROW},\n 4: {ROW}}}, num_slots: 8}}\n",
        f"num_slots: 8 # slots\ninitial_global_assignments: {{1: {ROW}, 2: {ROW}, 4: {ROW}}}",
    ],
)
def test_yaml_of_tensorrt_llm_is_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "file").write_text(text)
    assert read(tmp_path / "file").ranks == (tuple((expert // 2,) for expert in range(8)),) * 3


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("num_slots: 8", "num_slots: 9", "layer 4 has 8 slots, but num_slots is 9"),
        ("num_slots: 8\n", "", "num_slots are needed"),
        ("num_slots: 8", "num_slots: 8\nep_size: 4", "'ep_size' is none of"),
        ("num_slots: 8", "num_slots: 8\nnum_slots: 8", "num_slots is there twice"),
        ("num_slots: 8", "num_slots: &a 8", "not in the form of TensorRT-LLM: '&a 8"),
        ("num_slots: 8", "num_slots: 8.5", "not in the form"),
        ("num_slots: 8", "num_slots: 99999999999", "not in the form"),
        ("num_slots: 8", "num_slots: .nan", "not in the form"),
        ("  4: [0, 1, 2, 3, 4, 5, 6, 7]", "  4:\n  - 0\n  - 1", "not in the form .*- 0"),
        ("4: [0", "4: [9", "cannot hold 8 experts"),
        ("4: [0", "4: [1", "expert 0 of the placement's layer 2 is on no rank"),
        ("4: [0", "4: [-1", "not in the form"),
        ("  1: ", "  4: ", "layer 4 is there twice"),
        ("  1: ", "  0: ", "it has layers 0 to 4, 3 in all, but the model has experts in 3, 1 to"),
        ("  1: ", "   1: ", "too far in"),
        (f"  4: {ROW}\n  1: {ROW}\n  2: {ROW}\n", "", "has no layer"),
        (YAML, "initial_global_assignments: {}\nnum_slots: 8\n", "has no layer"),
        ("num_slots: 8", "num_slots: 8}", "not in the form|more after"),
        ("num_slots", "num_sl\xf6ts", "not in the form"),
    ],
)
def test_other_yaml_is_refused(tmp_path: Path, old: str, new: str, says: str) -> None:
    assert old in YAML
    check_refused(tmp_path, YAML.replace(old, new), says)


def test_pickles_are_refused_with_a_way_out(tmp_path: Path) -> None:
    torch_file = io.BytesIO()
    with zipfile.ZipFile(torch_file, "w") as archive:
        archive.writestr("file/data.pkl", pickle.dumps({}))
    for data in (pickle.dumps({"physical_to_logical_map": [[0]]}), torch_file.getvalue()):
        check_refused(tmp_path, data, "a pickle, as SGLang's .pt is.*weights_only=True")
