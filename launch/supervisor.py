"""Starts the ranks of one machine as processes of their own, and ends them.

The caller's script is never imported again: a rank is `moe_serve.launch.rank` in a process of its
own. The store in which ranks find each other is in this process, so that it outlives them. A world
that was lost is not mended: all its ranks are ended, and another supervisor starts another one.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moe_serve.channel import Channel, Closed
from moe_serve.config import EngineConfig
from moe_serve.errors import CommError
from moe_serve.launch.environment import RankEnvironment
from moe_serve.launch.lifeline import Lifeline
from moe_serve.launch.links import RemoteLink, wait_until_ready
from moe_serve.launch.messages import FromRank, Hello
from moe_serve.launch.rank import OPTIONS_FILE, SOCKET_FILE
from moe_serve.launch.rendezvous import JOIN_S

_HELLO_S = 2.0
_END_S = 5.0
_LOCALHOST = "127.0.0.1"


class Supervisor:
    """The processes of a world, all on this machine. generation: how many worlds were before it."""

    def __init__(
        self, config: EngineConfig, model: Path, num_ranks: int, generation: int = 0
    ) -> None:
        """Start them; `links` waits until they are there. Raises CommError."""
        self._folder = new_folder()
        self._generation = generation
        self._lifeline = Lifeline()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._token = secrets.token_hex(16)
        self._links: dict[int, RemoteLink] = {}
        try:
            self._store = _store()
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(str(self._folder / SOCKET_FILE))
            self._listener.listen(num_ranks)
            given = {"token": self._token, "model": str(model), "options": config.options()}
            (self._folder / OPTIONS_FILE).write_text(json.dumps(given))
            for rank in range(num_ranks):
                self._processes.append(self._start(rank, num_ranks))
        except BaseException:
            self.end(CommError("not started"))
            raise

    def links(self) -> list[RemoteLink]:
        """Wait until all ranks have loaded their part. Raises what one of them refused."""
        try:
            links = self._connected()
            wait_until_ready(links)
            self._forget_folder()  # all have read what is there, and all have come
            self._listener.close()
            return links
        except BaseException as error:
            self.end(error)
            raise

    def end(self, error: BaseException | None = None) -> None:
        """End all ranks: they have been told to, or else, after an error, they are killed."""
        end_s = time.monotonic() + _END_S
        for process in self._processes:
            if error is None:
                try:
                    process.wait(max(0.0, end_s - time.monotonic()))
                except subprocess.TimeoutExpired:
                    process.kill()
            else:
                process.kill()
        for process in self._processes:
            process.wait()
        for link in self._links.values():
            link.close()
        self._lifeline.close()
        if hasattr(self, "_listener"):
            self._listener.close()
        self._forget_folder()

    def _forget_folder(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self, rank: int, num_ranks: int) -> subprocess.Popen[bytes]:
        environment = RankEnvironment(
            rank=rank,
            world_size=num_ranks,
            local_rank=rank,
            local_world_size=num_ranks,
            master_host=_LOCALHOST,
            master_port=self._store.port,
            has_store=True,
            generation=self._generation,
        )
        variables = {**child_environment(), **environment.variables()}
        threads = max(1, len(os.sched_getaffinity(0)) // num_ranks)
        variables.setdefault("OMP_NUM_THREADS", str(threads))
        return self._lifeline.start("rank", str(self._folder), variables)

    def _connected(self) -> list[RemoteLink]:
        """Accept every rank's connection."""
        links = self._links
        end_s = time.monotonic() + JOIN_S
        while len(links) < len(self._processes):
            for rank, process in enumerate(self._processes):
                if process.poll() is not None:
                    raise CommError(f"rank {rank} ended at its start, code {process.returncode}")
            if time.monotonic() > end_s:
                missing = sorted(set(range(len(self._processes))) - set(links))
                raise CommError(f"ranks {missing} have not connected within {JOIN_S:.0f} s")
            if not select.select([self._listener], [], [], 0.1)[0]:
                continue
            channel: Channel[FromRank] = Channel(self._listener.accept()[0], FromRank)
            who = said_hello(channel, self._token)
            if who is not None:
                links[who] = RemoteLink(who, channel)
        return [links[rank] for rank in sorted(links)]


def _store() -> Any:
    """Return a store that listens for this machine alone: by itself it would for all."""
    listener = socket.create_server((_LOCALHOST, 0))
    return dist.TCPStore(  # type: ignore[attr-defined]
        _LOCALHOST,
        listener.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),  # the store closes it
    )


def child_environment() -> dict[str, str]:
    """Return this process' environment, with which a child finds this package."""
    package = str(Path(__file__).absolute().parents[2])  # links not followed: launch is one
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def new_folder() -> Path:
    """Make a folder that nobody else may enter, with a name short enough for a socket's."""
    folder = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="moe-serve-", dir="/tmp" if len(folder) > 60 else folder))


def said_hello(channel: Channel[FromRank], token: str) -> int | None:
    """Return who connected; None, and the connection closed, if it is nobody of ours."""
    try:
        hello = channel.receive(_HELLO_S)
        if isinstance(hello, Hello) and secrets.compare_digest(
            hello.token.encode(), token.encode()
        ):
            return hello.rank
    except (CommError, Closed, TimeoutError):
        pass
    channel.close()
    return None
