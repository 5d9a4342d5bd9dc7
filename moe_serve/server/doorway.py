"""The door of a server: a thread that accepts connections, and answers /live by itself.

What is alive must be told also while the event loop is busy, so accepting does not wait for it: a
connection is handed over when its first bytes are there, unless they ask for /live. The thread
blocks on no client. It knows nothing of HTTP but these first bytes.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import resource
import selectors
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import TypeAlias

from moe_serve.server.limits import Limits
from moe_serve.server.refusals import Refusal, response_bytes

logger = logging.getLogger(__name__)

_LIVE = b"GET /live "
_LIVE_BODY = b'{"status":"live"}'
_RETRY = ((b"retry-after", b"5"),)
_TOO_MANY = Refusal(
    503,
    "there are too many connections; try again later",
    code="too_many_connections",
    headers=((b"retry-after", b"1"),),
).wire()
# of one turn, so that those who wait are heard between
_MOST_ACCEPTED = 64
# what a connection over the limit has to say that it asks for /live
_OVER_S = 0.5
# what is read at once of a connection that was answered; who sends more than that is not heard out
_LAST_BYTES = 2**16
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_LEAST_PAUSE_S, _MOST_PAUSE_S = 0.05, 1.0

# Until when each may stay as it is. All of one dict wait equally long: the first is the next due.
_Deadlines: TypeAlias = dict[socket.socket, float]


def ensure_descriptors(limits: Limits, others: int = 256) -> bool:
    """Let this process open as many files as its connections and `others` need.

    Returns whether it may, and logs where it may not: connections then wait to be accepted.
    """
    needed = limits.connections + 2 * limits.spare_connections + others
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return True
    most = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if most > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if most < needed:
        logger.warning(
            "%d files may be open, and %d connections need %d: raise `ulimit -Hn`, or connections "
            "will wait",
            most,
            limits.connections,
            needed,
        )
    return most >= needed


class Doorway:
    """Accepts the connections of `listener` in a thread of its own, between `start` and `stop`.

    liveness: whether the process is alive, and if not, why; called in that thread, must not block.
    hand_over: gets a socket (non-blocking, nothing of it read) whose first bytes are there; called
    in that thread, usually `loop.call_soon_threadsafe`. Whoever gets it must call `release` once
    when it is closed. The listener is made non-blocking, and is not closed.
    counts: "accepted", "live", "not_live" (a 503 among those), "over" (503), "silent" (closed after
    header_s), "gone" (by the client, before a byte), "not_accepted" (no free file descriptor),
    "failed" (errors of ours).
    """

    def __init__(
        self,
        listener: socket.socket,
        limits: Limits,
        liveness: Callable[[], tuple[bool, str]],
        hand_over: Callable[[socket.socket], None],
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._listener = listener
        self._limits = limits
        self._liveness = liveness
        self._hand_over = hand_over
        self._lock = threading.Lock()
        self._num_handed = 0
        self._waiting: _Deadlines = {}
        self._over: _Deadlines = {}
        self._lingering: _Deadlines = {}
        self._pause_s = _LEAST_PAUSE_S
        self._accept_again: float | None = None
        self._is_stopping = False
        self._selector = selectors.DefaultSelector()
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="doorway", daemon=True)

    @property
    def num_connections(self) -> int:
        """How many count for the limit: those that have said nothing yet, and those handed over."""
        return len(self._waiting) + self._num_handed

    def start(self) -> None:
        """Begin to accept."""
        self._listener.setblocking(False)
        self._woken.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._woken, selectors.EVENT_READ, self._on_wake)
        self._thread.start()

    def stop(self) -> None:
        """Accept nothing more, and close what was not handed over. Returns when that is done."""
        self._is_stopping = True
        if self._thread.ident is None:
            self._close()
        elif self._thread.is_alive():
            # it may have seen that it is to stop, and have closed its end
            with contextlib.suppress(OSError):
                self._wake.send(b"x")
            self._thread.join()
        self._wake.close()

    def release(self) -> None:
        """Note that a connection that was handed over is gone. From any thread."""
        with self._lock:
            self._num_handed -= 1
        assert self._num_handed >= 0, "a connection was released twice"

    # -- the thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._is_stopping:
            try:
                self._turn()
            except Exception:
                # deaf is worse than late: whatever it was, the next turn may work
                self.counts["failed"] += 1
                logger.exception("accepting connections failed; it goes on")
                time.sleep(_LEAST_PAUSE_S)
        self._close()

    def _close(self) -> None:
        for held in self._all_held():
            for sock in held:
                sock.close()
            held.clear()
        self._selector.close()
        self._woken.close()

    def _turn(self) -> None:
        for key, _ in self._selector.select(self._timeout_s()):
            key.data(key.fileobj)
        now = time.monotonic()
        while sock := _due(self._waiting, now):
            self.counts["silent"] += 1
            self._forget(sock)
            sock.close()
        while sock := _due(self._over, now):
            self._refuse(sock)
        while sock := _due(self._lingering, now):
            self._forget(sock)
            sock.close()
        if self._accept_again is not None and now >= self._accept_again:
            self._accept_again = None
            self._selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def _timeout_s(self) -> float | None:
        due = [next(iter(held.values())) for held in self._all_held() if held]
        if self._accept_again is not None:
            due.append(self._accept_again)
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _all_held(self) -> tuple[_Deadlines, _Deadlines, _Deadlines]:
        return self._waiting, self._over, self._lingering

    def _on_wake(self, woken: socket.socket) -> None:
        woken.recv(64)

    def _accept(self, listener: socket.socket) -> None:
        limits = self._limits
        for _ in range(_MOST_ACCEPTED):
            try:
                sock, _ = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _EXHAUSTED:
                    raise
                self._pause_accepting()
                return
            self._pause_s = _LEAST_PAUSE_S
            self.counts["accepted"] += 1
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, limits.send_buffer_bytes)
            now = time.monotonic()
            if self.num_connections < limits.connections:
                self._waiting[sock] = now + limits.header_s
            elif len(self._over) < limits.spare_connections:
                self._over[sock] = now + min(_OVER_S, limits.header_s)
            else:
                self._refuse(sock)
                continue
            self._selector.register(sock, selectors.EVENT_READ, self._on_first_bytes)

    def _pause_accepting(self) -> None:
        """Stop accepting for a while: without it, the listener would be ready again at once."""
        self.counts["not_accepted"] += 1
        self._selector.unregister(self._listener)
        self._accept_again = time.monotonic() + self._pause_s
        self._pause_s = min(2 * self._pause_s, _MOST_PAUSE_S)

    def _on_first_bytes(self, sock: socket.socket) -> None:
        try:
            first = sock.recv(len(_LIVE), socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            first = b""
        if not first:
            self.counts["gone"] += 1
            self._forget(sock)
            sock.close()
        elif first == _LIVE:
            self._answer_live(sock)
        elif sock in self._over and self.num_connections >= self._limits.connections:
            self._refuse(sock)
        else:
            self._forget(sock)
            self._give(sock)

    def _give(self, sock: socket.socket) -> None:
        with self._lock:
            self._num_handed += 1
        try:
            self._hand_over(sock)
        except Exception as error:
            self.release()
            sock.close()
            if not isinstance(error, RuntimeError):  # which is a loop that is closed
                raise

    def _answer_live(self, sock: socket.socket) -> None:
        self.counts["live"] += 1
        try:
            is_live, why = self._liveness()
        except Exception:
            logger.exception("whether the server is alive could not be found out")
            is_live, why = False, "unknown"
        answer = response_bytes(200, _LIVE_BODY)
        if not is_live:
            self.counts["not_live"] += 1
            answer = Refusal(503, why, code="unhealthy", headers=_RETRY).wire()
        self._say_and_close(sock, answer)

    def _refuse(self, sock: socket.socket) -> None:
        self.counts["over"] += 1
        self._say_and_close(sock, _TOO_MANY)

    def _say_and_close(self, sock: socket.socket, answer: bytes) -> None:
        """Send a short answer, and close when the client has closed or linger_s later.

        To close at once, with bytes of the client unread, would reset the connection and could take
        the answer from the client.
        """
        self._forget(sock)
        try:
            # an answer fits the kernel's empty buffer, so this does not wait
            sock.send(answer)
            sock.shutdown(socket.SHUT_WR)
        except OSError:
            sock.close()
            return
        if len(self._lingering) >= self._limits.spare_connections:
            oldest = next(iter(self._lingering))
            self._forget(oldest)
            oldest.close()
        self._lingering[sock] = time.monotonic() + self._limits.linger_s
        self._selector.register(sock, selectors.EVENT_READ, self._on_last_bytes)

    def _on_last_bytes(self, sock: socket.socket) -> None:
        try:
            if 0 < len(sock.recv(_LAST_BYTES)) < _LAST_BYTES:
                return
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            logger.debug("a client reset its connection after an answer")
        self._forget(sock)
        sock.close()

    def _forget(self, sock: socket.socket) -> None:
        for held in self._all_held():
            if held.pop(sock, None) is not None:
                self._selector.unregister(sock)


def _due(held: _Deadlines, now: float) -> socket.socket | None:
    """Return the one whose time is over the longest, or None."""
    for sock, deadline in held.items():
        return sock if now >= deadline else None
    return None
