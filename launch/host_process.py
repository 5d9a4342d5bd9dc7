"""An engine for one process that uses it from its event loop: `HostProcess` there, `main` here.

`python -m moe_serve.launch.child host FOLDER ...` hosts the engine, whose ranks are processes below
it. It ends when the connection to who uses it is closed: with what the engine writes at its end, if
that process still lives, else at once.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import msgspec

from moe_serve.channel import Closed, Mailbox
from moe_serve.config import EngineConfig
from moe_serve.errors import MoeServeError
from moe_serve.launch.coordinator import RankedEngine
from moe_serve.launch.host import Host
from moe_serve.launch.lasting import LastingEngine
from moe_serve.launch.lifeline import Lifeline
from moe_serve.launch.open import open_served
from moe_serve.launch.supervisor import child_environment, new_folder
from moe_serve.launch.worker import Follower
from moe_serve.server.messages import Failed, ToHost

OPTIONS_FILE = "options.json"


class _Given(msgspec.Struct, frozen=True):
    """What a host is made of. model: a folder; connection: a file descriptor it was given."""

    model: str
    options: dict[str, Any]
    connection: int


class HostProcess:
    """A host, as the process that started it sees it. connection: its socket, to be taken over."""

    def __init__(self, config: EngineConfig, model: Path) -> None:
        """Start it; config: with folders for names."""
        self._folder = new_folder()
        self._lifeline = Lifeline()
        self._is_over = False
        self.connection, theirs = socket.socketpair(socket.AF_UNIX)
        try:
            given = _Given(str(model.absolute()), config.options(), theirs.fileno())
            (self._folder / OPTIONS_FILE).write_bytes(msgspec.json.encode(given))
            self._process = self._lifeline.start(
                "host", str(self._folder), child_environment(), (theirs.fileno(),)
            )
        except BaseException:
            self.connection.close()
            self._lifeline.close()
            self._forget_folder()
            raise
        finally:
            theirs.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def end(self, limit_s: float = 0.0) -> None:
        """Wait for its end, and after so long, or for 0 at once, kill it with all below it."""
        if self._is_over:
            return
        self._is_over = True
        try:
            self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._lifeline.close()
        self._forget_folder()

    def _forget_folder(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


class _Left(BaseException):
    """Nobody uses the engine any more."""


class _Attached:
    """Who uses the engine: as long as its connection is open, also if it says nothing.

    Its event loop belongs to somebody's program, which may keep it busy for as long as it likes.
    """

    silent_after_s = float("inf")

    def __init__(self, connection: socket.socket) -> None:
        self.mailbox: Mailbox[ToHost] | None = Mailbox(connection, ToHost)

    def check(self) -> str | None:
        """Return None: the connection's end says all."""
        return None

    def lost(self, why: str) -> None:
        """End the host's run."""
        raise _Left

    def say(self, message: Failed) -> None:
        if self.mailbox is not None:
            with contextlib.suppress(Closed):
                self.mailbox.send(message)

    def close(self) -> None:
        mailbox, self.mailbox = self.mailbox, None
        if mailbox is not None:
            mailbox.close()


def main(argument: str) -> int:
    """Host an engine until nobody uses it any more; return the exit code."""
    folder = Path(argument)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started it says when it is over
    logging.basicConfig(level=logging.WARNING, format="moe-serve: %(levelname)s: %(message)s")
    path = folder / OPTIONS_FILE
    given = msgspec.json.decode(path.read_bytes(), type=_Given)
    shutil.rmtree(folder, ignore_errors=True)  # who started this may be killed, and leave it
    front = _Attached(socket.socket(fileno=given.connection))
    host = Host(front)
    engine: LastingEngine | RankedEngine | None = None
    try:
        config = EngineConfig.from_options(given.options)
        opened = open_served(
            config, Path(given.model), on_loss=host.lost_world, on_world=host.has_world
        )
        assert not isinstance(opened, Follower)
        engine = opened
        with contextlib.suppress(_Left):
            host.run(engine)
        engine.close()
    except MoeServeError as error:
        front.say(Failed(str(error), type(error).__name__))
        return error.exit_code
    finally:
        host.close()
        front.close()
        if engine is not None:
            engine.abandon()
    return 0
