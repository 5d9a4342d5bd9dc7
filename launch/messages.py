"""What a coordinator and a rank say to each other, and errors that travel."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import msgspec
import numpy as np

from moe_serve import errors
from moe_serve.engine.engine import EngineStats
from moe_serve.errors import CommError, MoeServeError
from moe_serve.experts.placement.base import Array
from moe_serve.types import Request, StepOutput


class Failure(msgspec.Struct, frozen=True):
    """An error as it travels: its class's name in `moe_serve.errors`, and what it says."""

    kind: str
    message: str

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        if isinstance(error, MoeServeError):
            return cls(type(error).__name__, str(error))
        return cls(CommError.__name__, f"{type(error).__name__}: {error}")

    def error(self, prefix: str = "") -> MoeServeError:
        """Return the error to raise."""
        kind = getattr(errors, self.kind, None)
        if not isinstance(kind, type) or not issubclass(kind, MoeServeError):
            kind = CommError
        return kind(prefix + self.message)


class Add(msgspec.Struct, frozen=True, tag=True):
    request: Request


class Abort(msgspec.Struct, frozen=True, tag=True):
    request_id: str


class Stop(msgspec.Struct, frozen=True, tag=True):
    request_id: str
    index: int


class Step(msgspec.Struct, frozen=True, tag=True):
    """Take part in a step: all ranks are told. move_bytes: of experts that may travel before it.

    for_s: only to a rank that is alone: it goes on with steps for so long, until there is something
    that must be told at once, or another call than this waits; then it need not make any.
    """

    move_bytes: int = 0
    for_s: float = 0.0


class Place(msgspec.Struct, frozen=True, tag=True):
    """Begin to take a placement over. placement: as placement.json."""

    placement: dict[str, Any]


class TakeRouting(msgspec.Struct, frozen=True, tag=True):
    """Say what tokens used since this was asked last."""


class Resize(msgspec.Struct, frozen=True, tag=True):
    slots_per_layer: int


class Stats(msgspec.Struct, frozen=True, tag=True):
    """Say what was counted."""


class Release(msgspec.Struct, frozen=True, tag=True):
    """A run has ended: a script that runs on all ranks goes on. There is no reply."""


class Close(msgspec.Struct, frozen=True, tag=True):
    """End: write what was asked for. The reply is the last one."""


Call = Add | Abort | Stop | Step | Place | TakeRouting | Resize | Stats | Release | Close


class Hello(msgspec.Struct, frozen=True, tag=True):
    """The first message of a rank. token: that it was given, so that nobody else connects."""

    rank: int
    token: str


class Beat(msgspec.Struct, frozen=True, tag=True):
    """Sent every second while a call, or the loading, is under way."""


# large, and of the whole model
_OF_ALL_RANKS = ("expert_layers", "expert_uses", "resident", "ranks", "rank_imbalance")


class RankStats(msgspec.Struct, frozen=True):
    """One rank's counts since its start; sizes in bytes.

    num_idle_steps: in which others had tokens, and it had none. num_tokens: given to its own
    requests. pairs_computed: (token, expert) pairs that its experts were given, by all ranks;
    pairs_sent: of its own tokens', those that went to other ranks (both 0 of one that is alone).
    bytes_sent: to others, in num_collectives. exchange_s: seconds in these, waiting for others too;
    None on a GPU, where nobody waits for them. num_waits: how often dispatchers made the host wait
    for what the device counts. epoch: how often a layer
    of experts was placed anew; experts_moved, bytes_moved: for that, on all ranks together.
    """

    stats: EngineStats
    num_threads: int
    peak_rss_bytes: int
    num_steps: int
    num_idle_steps: int
    num_tokens: int
    pairs_computed: int
    pairs_sent: int
    num_collectives: int
    bytes_sent: int
    exchange_s: float | None
    num_waits: int
    epoch: int
    experts_moved: int
    bytes_moved: int
    steps_by_dispatcher: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """Return it as one flat dict, without what only all ranks together are asked for."""
        stats = {
            field.name: getattr(self.stats, field.name)
            for field in fields(self.stats)
            if field.name not in _OF_ALL_RANKS
        }
        told = {name: getattr(self, name) for name in self.__struct_fields__ if name != "stats"}
        return {**stats, **told}


class Ready(msgspec.Struct, frozen=True, tag=True):
    """A rank has loaded its part, and waits for calls."""

    max_model_len: int
    numerics_id: str
    about: str
    placement: dict[str, Any] | None
    stats: RankStats


class TokensUsed(msgspec.Struct, frozen=True):
    """token_ids: int32 [num_tokens]; experts: int16 of `shape` [num_tokens, layers, top_k]."""

    token_ids: bytes
    experts: bytes
    shape: tuple[int, int, int]

    @classmethod
    def of(cls, token_ids: Array, experts: Array) -> TokensUsed:
        num_tokens, num_layers, top_k = experts.shape
        return cls(token_ids.tobytes(), experts.tobytes(), (num_tokens, num_layers, top_k))

    def arrays(self) -> tuple[Array, Array]:
        experts = np.frombuffer(self.experts, np.int16).reshape(self.shape)
        return np.frombuffer(self.token_ids, np.int32), experts


class Reply(msgspec.Struct, frozen=True, tag=True):
    """What came of a call.

    num_steps: made, of Step. is_true: of Abort and Stop. is_moving: experts travel with the next
    steps; bytes_moved, moving_s: what has travelled since the start, on all ranks, and how long
    this one was at it. pairs_computed: see `RankStats`. failure: instead of anything else.
    """

    outputs: tuple[StepOutput, ...] = ()
    num_steps: int = 0
    is_true: bool = False
    has_unfinished: bool = False
    is_moving: bool = False
    bytes_moved: int = 0
    moving_s: float = 0.0
    pairs_computed: int = 0
    stats: RankStats | None = None
    used: TokensUsed | None = None
    failure: Failure | None = None


FromRank = Hello | Beat | Ready | Reply
