"""A host whose rank makes many steps at a time hears its front end all the same."""

from __future__ import annotations

import time
from typing import Any, cast

import pytest

from moe_serve.engine.engine import Engine
from moe_serve.launch.lasting import LastingEngine
from moe_serve.server.messages import Cancel, Outputs, Start
from tests.launch.test_host import Played
from tests.launch.test_steps_ahead import ranked, request


def test_who_asks_while_steps_are_made_does_not_wait_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step = Engine.step

    def slow_step(engine: Engine, move_bytes: int = 0) -> Any:
        time.sleep(0.02)
        return step(engine, move_bytes)

    monkeypatch.setattr(Engine, "step", slow_step)
    with ranked() as engine:
        played = Played(cast(Any, LastingEngine(lambda generation: engine)), gap_s=120.0)
        played.say(Start(request("long", (5,), 240)))
        played.tokens("long", until_end=False)
        time.sleep(0.3)  # it is at steps that may last for a minute
        begun_s = time.monotonic()
        played.say(Start(request("late", (6,), 240)))
        played.tokens("late", until_end=False)
        assert time.monotonic() - begun_s < 2.0
        played.say(Cancel("late"), Cancel("long"))
        while engine.has_unfinished:
            assert time.monotonic() - begun_s < 4.0
            time.sleep(0.01)
        ended = [out for said in played.said if isinstance(said, Outputs) for out in said.outputs]
        assert not any(out.finish_reason for out in ended)
        played.end()
