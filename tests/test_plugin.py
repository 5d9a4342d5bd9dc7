"""Folders of alternatives."""

from __future__ import annotations

import pytest

from moe_serve import plugin
from moe_serve.errors import ConfigError

PACKAGE = "moe_serve.engine.policies"


def test_names_are_the_files_but_base() -> None:
    assert plugin.names(PACKAGE) == ("decode_first", "fcfs", "priority", "shortest_prompt")


def test_an_unknown_name_lists_the_known_and_the_nearest() -> None:
    with pytest.raises(ConfigError) as caught:
        plugin.load(PACKAGE, "fcsf")
    message = str(caught.value)
    assert "policies: there is no 'fcsf'; did you mean 'fcfs'?" in message
    assert "shortest_prompt" in message


@pytest.mark.parametrize("name", ["base", "__init__", "../fcfs", "os", ""])
def test_nothing_else_can_be_imported(name: str) -> None:
    with pytest.raises(ConfigError):
        plugin.load(PACKAGE, name)
