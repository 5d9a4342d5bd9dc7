"""Usage profiles: kept from run to run, of one model, and never half written."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_serve.errors import TraceError
from moe_serve.experts.profile import ProfileKeeper, UsageProfile, read_profile, write_profile
from moe_serve.kernels.moe.base import ExpertTable

USES = np.array([[0.0, 5.0, 2.0], [7.0, 0.0, 0.0]])


def table(uses: list[int]) -> ExpertTable:
    empty = torch.empty(0, dtype=torch.int32)
    return ExpertTable(empty, empty, torch.tensor(uses), 1, 1, torch.float32)


def test_the_hottest_of_each_layer_come_before_any_second() -> None:
    profile = UsageProfile("m", USES)
    assert profile.hottest() == [(0, 1), (1, 0), (0, 2)]
    assert UsageProfile("m", np.zeros((2, 3))).hottest() == []


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.profile"
    state = {"heat": np.arange(6.0).reshape(2, 3), "age": np.array(4)}
    write_profile(path, UsageProfile("m", USES, "heat", state))
    read = read_profile(path, "m", 2, 3)
    assert (read.model_id, read.policy) == ("m", "heat")
    np.testing.assert_array_equal(read.uses, USES)
    assert read.policy_state.keys() == state.keys()
    for name, array in state.items():
        np.testing.assert_array_equal(read.policy_state[name], array)
    assert [entry.name for entry in path.parent.iterdir()] == ["a.profile"]


def test_a_file_that_is_not_there_is_an_empty_profile(tmp_path: Path) -> None:
    read = read_profile(tmp_path / "a", "m", 2, 3)
    assert read.uses.tolist() == [[0] * 3] * 2
    assert (read.policy, dict(read.policy_state)) == ("", {})


def test_a_run_halves_what_was_before_it(tmp_path: Path) -> None:
    path = tmp_path / "a"
    keeper = ProfileKeeper(path, UsageProfile("m", USES), "lfu")
    # by layer of the model, the second one's with fewer experts
    keeper.write({4: table([1, 1]), 2: table([3, 0, 1])}, {"x": np.ones(1)})
    read = read_profile(path, "m", 2, 3)
    assert read.uses.tolist() == [[3.0, 2.5, 2.0], [4.5, 1.0, 0.0]]
    assert (read.policy, list(read.policy_state)) == ("lfu", ["x"])


@pytest.mark.parametrize(
    ("model_id", "shape"), [("other", (2, 3)), ("m", (2, 4)), ("m", (3, 3))], ids=str
)
def test_another_models_is_refused(tmp_path: Path, model_id: str, shape: tuple[int, int]) -> None:
    path = tmp_path / "a"
    write_profile(path, UsageProfile("m", USES))
    with pytest.raises(TraceError, match=rf"^{path}: a usage profile of another model \(m, .*give"):
        read_profile(path, model_id, *shape)


def test_what_is_no_profile_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_profile(path, UsageProfile("m", USES))
    data = path.read_bytes()
    for bad in (b"", b"nothing", data[:20], data[:-1], data.replace(b"profile 1", b"profile 2")):
        path.write_bytes(bad)
        with pytest.raises(TraceError, match=rf"^{path}: not a usage profile"):
            read_profile(path, "m", 2, 3)
    with pytest.raises(TraceError, match="no regular file"):
        read_profile(tmp_path, "m", 2, 3)
    with pytest.raises(TraceError, match="its folder is not there"):
        read_profile(tmp_path / "no" / "a", "m", 2, 3)
    for wrong in (np.full((2, 3), np.nan), -USES, USES > 0):
        write_profile(path, UsageProfile("m", wrong))
        with pytest.raises(TraceError, match="finite numbers"):
            read_profile(path, "m", 2, 3)


def test_what_cannot_be_written_leaves_what_there_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    write_profile(path, UsageProfile("m", USES))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(TraceError, match=r"cannot be written \(No space"):
        write_profile(path, UsageProfile("m", USES * 2))
    monkeypatch.undo()
    np.testing.assert_array_equal(read_profile(path, "m", 2, 3).uses, USES)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]
