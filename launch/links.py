"""A coordinator's end to the ranks: in other processes, and maybe one in its own."""

from __future__ import annotations

import select
import time
from collections import deque
from collections.abc import Sequence

from moe_serve.channel import Channel, Closed
from moe_serve.errors import CommError
from moe_serve.launch.messages import Beat, Call, FromRank, Ready, Release, Reply
from moe_serve.launch.worker import BEAT_S, RankWorker

# without a sign of life of a rank that is at work
DEAD_AFTER_S = 5 * BEAT_S
# a step may take ten times as long as the longest before it, but at least this
_LEAST_STEP_S = 300.0
# after one rank has complained of others, for what became of those
_CAUSE_S = 0.5


class Gone(CommError):
    """A rank has ended, whatever the others say of it."""


class LocalLink:
    """To the rank of this very process, which works in `finish`."""

    rank = 0
    silent_s = 0.0

    def __init__(self, worker: RankWorker) -> None:
        self.ready = worker.ready()
        self._worker = worker
        self._calls: deque[Call] = deque()

    def start(self, call: Call, data: bytes) -> None:
        if not isinstance(call, Release):
            self._calls.append(call)

    def finish(self) -> Reply:
        """Do what `start` was given first. Raises CommError where other ranks fail this one."""
        return self._worker.do(self._calls.popleft())

    def close(self) -> None:
        self._worker.close()


class RemoteLink:
    """To a rank in another process."""

    def __init__(self, rank: int, channel: Channel[FromRank]) -> None:
        self.rank = rank
        self._channel = channel
        self._ready: Ready | None = None
        self._last_s = time.monotonic()

    def start(self, call: Call, data: bytes) -> None:
        """Say what to do; data: `call`, encoded. Raises CommError when the rank is gone."""
        self._last_s = time.monotonic()
        try:
            self._channel.send_encoded(data)
        except Closed as error:
            raise self._is_gone(error) from error

    def take(self) -> Ready | Reply | None:
        """Read one message, which is there; None: it was a sign of life. Raises CommError."""
        self._last_s = time.monotonic()
        try:
            message = self._channel.receive(DEAD_AFTER_S)
        except Closed as error:
            raise self._is_gone(error) from error
        except TimeoutError as error:
            raise self._is_frozen() from error
        if isinstance(message, Beat):
            return None
        if not isinstance(message, Ready | Reply):
            raise CommError(f"rank {self.rank} said {type(message).__name__}, no reply")
        return message

    @property
    def is_ready(self) -> bool:
        return self._ready is not None

    @property
    def ready(self) -> Ready:
        assert self._ready is not None
        return self._ready

    def take_ready(self) -> None:
        """Read one message of a rank that is loading. Raises what it failed of."""
        message = self.take()
        if isinstance(message, Reply) and message.failure is not None:
            raise message.failure.error()
        if isinstance(message, Ready):
            self._ready = message

    @property
    def silent_s(self) -> float:
        """How long ago a sign of life came."""
        return time.monotonic() - self._last_s

    def check(self) -> None:
        """Raise CommError where there was no sign of life for too long."""
        if self.silent_s > DEAD_AFTER_S:
            raise self._is_frozen()

    def listen(self) -> None:
        """Hear a rank that was told nothing. Raises CommError where it is gone, or replies."""
        while select.select([self], [], [], 0)[0]:
            if (message := self.take()) is not None:
                raise CommError(f"rank {self.rank} said {type(message).__name__}, unasked")
        self.check()

    def fileno(self) -> int:
        return self._channel.fileno()

    def close(self) -> None:
        self._channel.close()

    def _is_gone(self, error: Closed) -> CommError:
        return Gone(f"rank {self.rank} is gone: {error}")

    def _is_frozen(self) -> CommError:
        return CommError(f"rank {self.rank} has given no sign of life for {DEAD_AFTER_S:.0f} s")


Link = LocalLink | RemoteLink


def finish_all(links: Sequence[Link], longest_s: float = 0.0) -> list[Reply]:
    """Wait for the replies to what all were told, in the order of `links`.

    longest_s: how long such a call took at most so far. Raises CommError as soon as a rank is gone,
    frozen, of another mind than the others, or alive but at it for ten times that; of the one that
    is to blame, where that is known.
    """
    late_s = time.monotonic() + max(_LEAST_STEP_S, 10 * longest_s)
    replies: dict[int, Reply] = {}
    complaint: CommError | None = None
    for link in links:
        if isinstance(link, LocalLink):
            try:
                replies[link.rank] = link.finish()
            except CommError as error:
                complaint = error
    pending = [link for link in links if isinstance(link, RemoteLink)]
    end_s = time.monotonic() + _CAUSE_S
    while pending:
        if complaint is not None and time.monotonic() > end_s:
            break
        there, _, _ = select.select(pending, [], [], _CAUSE_S)
        for link in there:
            reply = link.take()
            if isinstance(reply, Reply):
                pending.remove(link)
                replies[link.rank] = reply
                if complaint is None:
                    complaint = _complaint(link.rank, reply)
                    end_s = time.monotonic() + _CAUSE_S
        for link in pending:
            link.check()
            if time.monotonic() > late_s:
                raise CommError(
                    f"rank {link.rank} lives, but has been at one call for far longer than any "
                    f"before ({longest_s:.1f} s): it hangs"
                )
    if complaint is not None:
        raise complaint
    return [replies[link.rank] for link in links]


def wait_until_ready(links: Sequence[RemoteLink]) -> None:
    """Return when all ranks have loaded their part. Raises what one of them failed of."""
    while not poll_all(links, _CAUSE_S):
        pass


def poll_all(links: Sequence[RemoteLink], wait_s: float = 0.0) -> bool:
    """Read what ranks that load have said; return whether all are ready.

    Raises what one of them failed of; if that is another one's end, of that.
    """
    pending = [link for link in links if not link.is_ready]
    complaint: CommError | None = None
    for _ in range(2):
        there, _, _ = select.select(pending, [], [], wait_s)
        for link in there:
            try:
                link.take_ready()
            except Gone:
                raise
            except CommError as error:
                complaint = error
                pending.remove(link)
        if complaint is None:
            break
        wait_s = _CAUSE_S  # for what became of those it complains of
    if complaint is not None:
        raise complaint
    for link in pending:
        link.check()
    return all(link.is_ready for link in links)


def _complaint(rank: int, reply: Reply) -> CommError | None:
    """Return what a rank has to say of the others, if it does."""
    failure = reply.failure
    if failure is None or failure.kind != CommError.__name__:
        return None
    return CommError(f"rank {rank}: {failure.message}")
