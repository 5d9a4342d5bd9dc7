"""What a front end and the host of its engine say to each other, over a unix socket.

The front end has texts and connections, the host has the engine; neither waits for the other.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from moe_serve.engine.engine import EngineStats
from moe_serve.types import Request, StepOutput

# between two signs of life, from either side
BEAT_S = 1.0
# without one: the other side is taken for frozen
SILENT_AFTER_S = 5.0

EngineState = Literal["loading", "serving", "reforming", "draining", "failed"]
ErrorKind = Literal["request", "capacity", "engine"]


class Join(msgspec.Struct, frozen=True, tag=True):
    """The first message of a front end: it is there."""


class Start(msgspec.Struct, frozen=True, tag=True):
    """Serve a request: there will be Outputs until all its outputs have ended, or Refused."""

    request: Request


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """Drop a request: nobody waits for it any more."""

    request_id: str


class StopOutput(msgspec.Struct, frozen=True, tag=True):
    """End one output, whose text is complete."""

    request_id: str
    index: int


class FrontBeat(msgspec.Struct, frozen=True, tag=True):
    """The front end lives. num_open: HTTP requests that it has begun and not ended."""

    num_open: int


class Drained(msgspec.Struct, frozen=True, tag=True):
    """After Drain: every answer was sent."""


class CannotStart(msgspec.Struct, frozen=True, tag=True):
    """In place of Join: what keeps a front end from starting, and would keep another one.

    kind: the error's class in `moe_serve.errors`.
    """

    kind: str
    message: str


ToHost = Join | CannotStart | Start | Cancel | StopOutput | FrontBeat | Drained


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """The engine is there. about: of its ranks, "" of one process."""

    max_model_len: int
    numerics_id: str
    about: str


class Outputs(msgspec.Struct, frozen=True, tag=True):
    """What a step gave, or several short ones."""

    outputs: tuple[StepOutput, ...]


class Refused(msgspec.Struct, frozen=True, tag=True):
    """A request that was not taken, and why. kind: whose fault; see `ErrorKind`."""

    request_id: str
    kind: ErrorKind
    message: str


class RankState(msgspec.Struct, frozen=True):
    """One rank as its host sees it. age_s: since its last sign of life."""

    rank: int
    is_up: bool
    age_s: float


class Beat(msgspec.Struct, frozen=True, tag=True):
    """The host lives, sent every BEAT_S from a thread of its own.

    generation: how often the world of ranks was formed; num_steps: of all its worlds.
    """

    state: EngineState
    generation: int
    num_steps: int
    ranks: tuple[RankState, ...] = ()
    why: str = ""


class StatsReport(msgspec.Struct, frozen=True, tag=True):
    """What was counted: about once a second while there are steps, and at once after the last."""

    stats: EngineStats
    num_resubmitted: int
    num_worlds_lost: int


class Drain(msgspec.Struct, frozen=True, tag=True):
    """Take nothing new; say Drained when all that runs has ended. After limit_s the rest is cut."""

    limit_s: float


class Failed(msgspec.Struct, frozen=True, tag=True):
    """There is no engine any more, and none will come: answer everybody, and end.

    kind: the error's class in `moe_serve.errors`.
    """

    message: str
    kind: str = "CommError"


ToFront = Welcome | Outputs | Refused | Beat | StatsReport | Drain | Failed
