"""The engine that options and environment ask for: one process, ranks of our own, or torchrun's."""

from __future__ import annotations

import atexit
import contextlib
import functools
import ipaddress
import logging
import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_serve.channel import Channel
from moe_serve.config import EngineConfig, changed
from moe_serve.engine.build import build_engine
from moe_serve.engine.engine import Engine
from moe_serve.engine.expert_parts import model_id_of
from moe_serve.engine.ranks import share_of
from moe_serve.errors import CommError, ConfigError
from moe_serve.experts.placement.base import Mesh
from moe_serve.kernels import suite
from moe_serve.launch.coordinator import RankedEngine
from moe_serve.launch.environment import RankEnvironment, read_environment
from moe_serve.launch.gpus import check_gpus
from moe_serve.launch.lasting import LastingEngine
from moe_serve.launch.links import LocalLink, RemoteLink, poll_all, wait_until_ready
from moe_serve.launch.messages import Call, FromRank, Hello
from moe_serve.launch.rank import open_worker
from moe_serve.launch.rendezvous import JOIN_S, Rendezvous
from moe_serve.launch.supervisor import Supervisor, said_hello
from moe_serve.launch.worker import Follower, Heart, tell_failure
from moe_serve.models.hf_config import HFConfig
from moe_serve.models.registry import read_spec

logger = logging.getLogger(__name__)

_ACCEPT_S = 1.0
_HAS_FOLLOWED: list[object] = []

Progress = Callable[[int, int], None] | None


def open_engine(
    config: EngineConfig, model: Path, on_progress: Progress = None
) -> Engine | RankedEngine | LastingEngine | Follower:
    """Load the model in the folder `model`, here or over ranks.

    Under torchrun every rank calls this: rank 0 gets the engine, the others what follows it. Raises
    as `build_engine` does, and CommError where ranks do not come together or are not alike.
    """
    environment = read_environment()
    wanted = config.ranks.ep_size
    if environment is not None and environment.world_size > 1:
        return _of_torchrun(config, model, environment)
    if wanted is not None and wanted > 1:
        return LastingEngine(worlds_of(config, model))
    _tell_of_unused(config)
    return build_engine(config, model, on_progress=on_progress)


def open_served(
    config: EngineConfig, model: Path, **losses: Any
) -> RankedEngine | LastingEngine | Follower:
    """As `open_engine`, for a server: the engine is in other processes, also if it is but one.

    losses: as for `LastingEngine`; without effect under torchrun, which starts worlds anew itself.
    """
    environment = read_environment()
    if environment is not None and environment.world_size > 1:
        return _of_torchrun(config, model, environment)
    if config.ranks.ep_size in (None, 1):
        _tell_of_unused(config)
    return LastingEngine(worlds_of(config, model), **losses)


def _tell_of_unused(config: EngineConfig) -> None:
    """Name the options of ranks that were given where there is only one."""
    unused = [name for name in changed(config.ranks) if name != "ep_size"]
    if unused:
        logger.warning("there is one rank, so there is no effect of: %s", ", ".join(unused))


def worlds_of(config: EngineConfig, model: Path) -> Callable[[int], RankedEngine]:
    """Return what forms a world of ranks on this machine: of one rank, if no more are asked for.

    What options and model contradict is raised here, before anything is started.
    """
    num_ranks = config.ranks.ep_size or 1
    spec = read_spec(HFConfig.read(model))
    if num_ranks > 1:
        if suite.device_of(config.runtime.kernels, config.runtime.isa).type == "cuda":
            check_gpus(num_ranks)
        mesh = Mesh(num_ranks=num_ranks, ranks_per_node=num_ranks)
        share_of(config.ranks, spec, mesh, 0, model_id_of(config, model))

    def form(generation: int) -> RankedEngine:
        supervisor = Supervisor(config, model, num_ranks, generation)
        return RankedEngine(config, spec, supervisor.links(), supervisor.end)

    return form


def _of_torchrun(
    config: EngineConfig, model: Path, environment: RankEnvironment
) -> RankedEngine | Follower:
    if config.ranks.ep_size not in (None, environment.world_size):
        raise ConfigError(
            f"ep_size is {config.ranks.ep_size}, but torchrun has started "
            f"{environment.world_size} ranks; leave it out"
        )
    rendezvous = Rendezvous.join(environment)
    if environment.rank > 0:
        channel = _connected(rendezvous)
        heart = Heart(channel)
        rendezvous.watch = channel.check
        try:
            follower = Follower(open_worker(config, model, rendezvous), channel, heart)
        except BaseException as error:
            heart.stop()
            tell_failure(channel, error)
            raise
        if not _HAS_FOLLOWED:
            _HAS_FOLLOWED.append(atexit.register(Follower.follow_all))
        return follower
    links = _listening(rendezvous)
    rendezvous.watch = functools.partial(poll_all, links)
    try:
        local = LocalLink(open_worker(config, model, rendezvous))
        wait_until_ready(links)
    except BaseException:
        for link in links:
            link.close()
        raise
    spec = read_spec(HFConfig.read(model))
    return RankedEngine(config, spec, [local, *links], lambda error: None)


def _listening(rendezvous: Rendezvous) -> list[RemoteLink]:
    """Let the other ranks connect to this one, rank 0."""
    environment = rendezvous.environment
    token = secrets.token_hex(16)
    links: dict[int, RemoteLink] = {}
    end_s = time.monotonic() + JOIN_S
    with _bound(environment) as listener:
        listener.listen(environment.world_size)
        listener.settimeout(_ACCEPT_S)
        rendezvous.tell("coordinator", f"{listener.getsockname()[1]} {token}")
        while len(links) < environment.world_size - 1:
            if time.monotonic() > end_s:
                missing = sorted(set(range(1, environment.world_size)) - set(links))
                raise CommError(f"ranks {missing} have not come after {JOIN_S:.0f} s")
            try:
                connection = listener.accept()[0]
            except TimeoutError:
                continue
            channel: Channel[FromRank] = Channel(connection, FromRank)
            rank = said_hello(channel, token)
            if rank is not None:
                links[rank] = RemoteLink(rank, channel)
    return [links[rank] for rank in sorted(links)]


def _bound(environment: RankEnvironment) -> socket.socket:
    """Return a socket at the address by which ranks reach this machine: at no other, if it can be.

    It is at all of them where `master_host` is no address of this machine (addresses are translated
    on the way), and where a name leads to the loopback here, and elsewhere to this machine.
    """
    host = environment.master_host
    is_one_machine = environment.local_world_size == environment.world_size
    found: list[Any] = []
    with contextlib.suppress(OSError):
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    for family, kind, protocol, _, address in found:
        is_loopback = ipaddress.ip_address(address[0].partition("%")[0]).is_loopback
        if is_loopback and not is_one_machine and host not in ("localhost", address[0]):
            continue
        listener = socket.socket(family, kind, protocol)
        try:
            listener.bind(address)
        except OSError:
            listener.close()
        else:
            return listener
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.bind(("", 0))
    return listener


def _connected(rendezvous: Rendezvous) -> Channel[Call]:
    """Connect to rank 0."""
    environment = rendezvous.environment
    port, _, token = rendezvous.told("coordinator").partition(" ")
    try:
        connection = socket.create_connection((environment.master_host, int(port)), JOIN_S)
    except OSError as error:
        raise CommError(
            f"rank {environment.rank} cannot reach rank 0 at {environment.master_host}:{port} "
            f"({error.strerror or error})"
        ) from error
    connection.settimeout(None)
    channel: Channel[Call] = Channel(connection, Call)
    channel.send(Hello(environment.rank, token))
    return channel
