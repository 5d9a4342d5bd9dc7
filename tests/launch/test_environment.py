"""What a process is told of its place among others."""

from __future__ import annotations

import pytest

from moe_serve.errors import ConfigError
from moe_serve.launch.environment import RankEnvironment, read_environment

PLACE = RankEnvironment(
    rank=5,
    world_size=8,
    local_rank=1,
    local_world_size=4,
    master_host="10.0.0.1",
    master_port=29500,
    has_store=True,
    generation=2,
)


def test_it_is_read_as_it_was_written() -> None:
    assert read_environment(PLACE.variables()) == PLACE


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_a_process_started_alone_has_no_place(missing: str) -> None:
    assert read_environment({}) is None
    variables = PLACE.variables()
    del variables[missing]
    assert read_environment(variables) is None


def test_what_torchrun_need_not_say_follows_from_the_rest() -> None:
    needed = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1234"}
    found = read_environment(needed)
    assert found is not None
    assert (found.local_rank, found.local_world_size, found.generation) == (1, 2, 0)
    assert not found.has_store


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("RANK", "8", "RANK is 8; it must be from 0 to 7"),
        ("RANK", "-1", "RANK is -1"),
        ("WORLD_SIZE", "many", "'many'; it must be a whole number"),
        ("WORLD_SIZE", "0", "WORLD_SIZE is 0"),
        ("LOCAL_WORLD_SIZE", "3", "every node must have as many ranks"),
        ("LOCAL_RANK", "4", "LOCAL_RANK is 4; it must be from 0 to 3"),
        ("MASTER_PORT", "70000", "MASTER_PORT is 70000"),
    ],
)
def test_contradictions_are_refused(name: str, value: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        read_environment({**PLACE.variables(), name: value})
