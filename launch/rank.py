"""`python -m moe_serve.launch.child rank FOLDER ...`: one rank of a world of a supervisor's.

The environment has its place, as torchrun would give it; FOLDER has the options and the socket of
the coordinator. A world may have one rank only.
"""

from __future__ import annotations

import json
import logging
import signal
import socket
from pathlib import Path

from moe_serve.channel import Channel
from moe_serve.config import EngineConfig
from moe_serve.engine.build import build_engine
from moe_serve.engine.lockstep import LockstepEngine
from moe_serve.errors import ConfigError, MoeServeError
from moe_serve.kernels import suite
from moe_serve.launch.environment import read_environment
from moe_serve.launch.gpus import take_gpu
from moe_serve.launch.messages import Call, Hello
from moe_serve.launch.rendezvous import Rendezvous
from moe_serve.launch.worker import Follower, Heart, RankWorker, tell_failure

OPTIONS_FILE = "options.json"
SOCKET_FILE = "coordinator.sock"


def main(argument: str) -> int:
    """Load this rank's part and do what the coordinator says; return the exit code."""
    folder = Path(argument)
    # the coordinator says when it is over, also where all processes of a service are told to end
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    environment = read_environment()
    if environment is None:
        raise ConfigError("no RANK and WORLD_SIZE in the environment; this is started by moe-serve")
    logging.basicConfig(
        level=logging.WARNING if environment.rank == 0 else logging.ERROR,
        format=f"moe-serve: rank {environment.rank}: %(levelname)s: %(message)s",
    )
    given = json.loads((folder / OPTIONS_FILE).read_text())
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(folder / SOCKET_FILE))
    channel: Channel[Call] = Channel(connection, Call)
    channel.send(Hello(environment.rank, given["token"]))
    heart = Heart(channel)
    try:
        config = EngineConfig.from_options(given["options"])
        model = Path(given["model"])
        if environment.world_size == 1:
            worker = RankWorker(build_engine(config, model))
        else:
            worker = open_worker(config, model, Rendezvous.join(environment))
        follower = Follower(worker, channel, heart)
    except BaseException as error:
        tell_failure(channel, error)
        if isinstance(error, MoeServeError):
            return error.exit_code
        raise
    try:
        follower.follow(until_close=True)
    except MoeServeError as error:
        return error.exit_code
    return 0


def open_worker(config: EngineConfig, model: Path, rendezvous: Rendezvous) -> RankWorker:
    """Load this rank's part of the model in the folder `model`. Every rank must call it.

    Raises what any rank refuses, on all of them.
    """
    try:
        device = suite.device_of(config.runtime.kernels, config.runtime.isa)
        if device.type == "cuda":
            take_gpu(rendezvous.environment)
        ranks = rendezvous.ranks(device)
        engine = build_engine(config, model, ranks=ranks)
    except MoeServeError as error:
        rendezvous.refuse(error)
        raise
    assert isinstance(engine, LockstepEngine)
    mesh = ranks.mesh
    nodes = "1 node" if mesh.num_nodes == 1 else f"{mesh.num_nodes} nodes"
    return RankWorker(
        engine, ranks.world, f"{mesh.num_ranks} ranks on {nodes}, {engine.about_ranks}"
    )
