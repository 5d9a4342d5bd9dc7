"""A server: one process that hosts the engine, one that talks to clients, and the engine's ranks.

This process holds the listening socket, so that clients who come while a front end is started again
wait in the system's queue. Everything it starts ends with it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from moe_serve.channel import Mailbox
from moe_serve.config import EngineConfig
from moe_serve.errors import CommError, ConfigError
from moe_serve.launch.coordinator import RankedEngine
from moe_serve.launch.environment import read_environment
from moe_serve.launch.host import Host
from moe_serve.launch.lasting import LastingEngine
from moe_serve.launch.lifeline import Lifeline, hear_of_end
from moe_serve.launch.open import open_served
from moe_serve.launch.stats_line import StatsLine
from moe_serve.launch.supervisor import child_environment
from moe_serve.launch.worker import Follower
from moe_serve.server.front_end import FrontOptions
from moe_serve.server.messages import SILENT_AFTER_S, ToHost
from moe_serve.server.options import ServerConfig

logger = logging.getLogger(__name__)

# exit codes: ranks lost too often; stopped by a second signal, with requests under way
RANK_FAILURE = 4
STOPPED = 143
_BACKLOG = 1024
# front ends lost in so long count together
_LOSSES_IN_S = 60.0
_MOST_LOSSES = 5
_END_S = 2.0
# for answers that are cut, to say so
_LAST_WORDS_S = 0.5
# in the environment of what torchrun's agent starts
_AGENT = "TORCHELASTIC_RUN_ID"
# comes once for each thread of the agent's, while SIGTERM a second time means to end at once
_ORPHANED = signal.SIGUSR1


class FrontEnd:
    """The process that talks to clients, and its successors."""

    silent_after_s = SILENT_AFTER_S

    def __init__(self, listener: socket.socket, options: FrontOptions) -> None:
        self._listener = listener
        self._options = options
        self._lifeline = Lifeline()
        self._losses_s: deque[float] = deque()
        self._is_closed = False
        self.mailbox: Mailbox[ToHost] | None = None
        self._process = self._start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def check(self) -> str | None:
        """Return why it is to be given up; None: it is not."""
        code = self._process.poll()
        return None if code is None else f"it has ended, code {code}"

    def lost(self, why: str) -> None:
        """End what is left of it and start another one. Raises CommError after too many."""
        self._end()
        logger.error("the front end was lost, and is started again: %s", why)
        now_s = time.monotonic()
        self._losses_s.append(now_s)
        while now_s - self._losses_s[0] > _LOSSES_IN_S:
            self._losses_s.popleft()
        if len(self._losses_s) > _MOST_LOSSES:
            raise CommError(
                f"the front end was lost {len(self._losses_s)} times within "
                f"{_LOSSES_IN_S:.0f} s; the last time: {why}"
            )
        self._process = self._start()

    def close(self, limit_s: float = 0.0) -> None:
        """End it, if it is not ended; it has so long to do so once its mailbox is closed."""
        if self._is_closed:
            return
        self._is_closed = True
        mailbox, self.mailbox = self.mailbox, None
        if mailbox is not None:
            mailbox.close()
        try:
            self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._lifeline.close()

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()
        mailbox, self.mailbox = self.mailbox, None
        if mailbox is not None:
            mailbox.close()

    def _start(self) -> subprocess.Popen[bytes]:
        ours, theirs = socket.socketpair(socket.AF_UNIX)
        self.mailbox = Mailbox(ours, ToHost)
        self.mailbox.send(self._options)
        files = (self._listener.fileno(), theirs.fileno())
        process = self._lifeline.start(
            "front_end", ":".join(map(str, files)), child_environment(), files
        )
        theirs.close()
        return process


def serve(
    config: EngineConfig,
    server: ServerConfig,
    options: FrontOptions,
    on_address: Callable[[str], None],
) -> int:
    """Serve until SIGTERM, SIGINT or SIGHUP; return the exit code.

    on_address: told where it listens, once engine and front end are there. Raises what the engine's
    options or the model's folder refuse, and ConfigError for an address that is not to be had.
    """
    network, service = server.network, server.service
    if _is_follower():
        return _follow(config, Path(options.model))
    if _AGENT in os.environ:  # nobody would stop it any more: it drains, and the others end with it
        hear_of_end(_ORPHANED)
    engine: LastingEngine | RankedEngine | None = None
    with contextlib.ExitStack() as ends:
        try:
            with _signals() as signals:
                listener = ends.enter_context(listen(network.host, network.port))
                front = FrontEnd(listener, options)
                ends.callback(front.close, _LAST_WORDS_S)
                host = Host(front, service.shutdown_timeout, service.stream_interval)
                ends.callback(host.close)
                signals.host = host
                address = _shown(listener, network.host)
                host.on_front = _once(functools.partial(on_address, address))
                if service.stats_interval:
                    host.on_stats = StatsLine(service.stats_interval).take
                logger.info("loading %s", options.name)
                opened = open_served(
                    config,
                    Path(options.model),
                    max_losses=service.max_worlds,
                    on_loss=host.lost_world,
                    on_world=host.has_world,
                )
                assert not isinstance(opened, Follower)
                engine = opened
                ends.callback(engine.abandon)
                host.run(engine)
                front.close(_END_S)
                engine.close()
                logger.info("stopped")
        except _Stopped:  # while it was loading, or a second time
            logger.info("stopped at once")
            return STOPPED if engine is not None else 0
        except CommError as error:
            logger.error("%s", error)
            return RANK_FAILURE
    return 0


def _is_follower() -> bool:
    environment = read_environment()
    return environment is not None and environment.rank > 0


def _follow(config: EngineConfig, model: Path) -> int:
    """Work for rank 0 until it ends: signals are for it, which then drains."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    follower = open_served(config, model)
    assert isinstance(follower, Follower)
    try:
        follower.follow(until_close=True)
    except CommError as error:
        logger.error("%s", error)
        return RANK_FAILURE
    return 0


def _once(call: Callable[[], None]) -> Callable[[], None]:
    """Return what makes a call the first time only."""
    calls = iter([call])
    return lambda: next(calls, _nothing)()


def _nothing() -> None:
    """Be called in vain."""


class _Stopped(BaseException):
    """A signal that cannot wait for its turn."""


@dataclass
class _Signals:
    """Whom signals stop, as soon as there is one."""

    host: Host | None = None


@contextmanager
def _signals() -> Iterator[_Signals]:
    """Have signals stop a host: at once while there is no engine, or a second time.

    SIGHUP, which a terminal sends when it is closed, does so unless nohup has it ignored. So does
    the end of torchrun's agent, but it is one end however often it is heard.
    """

    signals = _Signals()

    def handle(number: int, frame: FrameType | None) -> None:
        host = signals.host
        if host is None:
            raise _Stopped
        if number == _ORPHANED and host.num_stops:
            return
        host.stop()
        if host.is_loading or host.num_stops > 1:
            raise _Stopped

    assert threading.current_thread() is threading.main_thread()
    numbers = [signal.SIGTERM, signal.SIGINT, _ORPHANED]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens there. Raises ConfigError where that cannot be."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error.strerror or error}; give another --port "
            "(0: a free one) or --host"
        ) from error
    return listener


def _shown(listener: socket.socket, host: str) -> str:
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{listener.getsockname()[1]}"
