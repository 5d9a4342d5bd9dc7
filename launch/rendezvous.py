"""Ranks find each other, and make sure that they are of one mind before anything is loaded."""

from __future__ import annotations

import datetime
import itertools
import time
from collections.abc import Callable, Mapping
from typing import Any, Self

import msgspec
import torch
import torch.distributed as dist

from moe_serve.comm._world import HOST, World
from moe_serve.engine.ranks import Ranks
from moe_serve.errors import CommError, MoeServeError
from moe_serve.experts.placement.base import Mesh
from moe_serve.launch.environment import RankEnvironment
from moe_serve.launch.messages import Failure

# until all are there: processes start within seconds of each other, where their start is one
JOIN_S = 60.0
# until all have read their weights, and have had compiled what a step may need
LOAD_S = 24 * 3600.0
# of one collective: a rank may compute for long between two of them
COLLECTIVE_S = 60.0
_POLL_S = 0.05
# of this process, which may load one model after another; ranks make them in the same order
_WORLDS = itertools.count()

Store = Any  # torch's stores have no stubs


class _Alike(msgspec.Struct, frozen=True):
    """What one rank says of itself: what must be alike, or why it cannot take part."""

    alike: dict[str, str] = {}
    failure: Failure | None = None


class Rendezvous:
    """The store of one world, and this rank's place in it.

    watch: called while it waits; raises when it is of no use any more.
    """

    def __init__(self, environment: RankEnvironment, store: Store) -> None:
        self.environment = environment
        self.store = store
        self.watch: Callable[[], object] = _nothing
        self._has_spoken = False

    @classmethod
    def join(cls, environment: RankEnvironment) -> Self:
        """Reach the store. Raises CommError where it is not to be reached, or a port is in use."""
        where = f"{environment.master_host}:{environment.master_port}"
        try:
            store = dist.TCPStore(  # type: ignore[attr-defined]
                environment.master_host,
                environment.master_port,
                is_master=environment.rank == 0 and not environment.has_store,
                timeout=datetime.timedelta(seconds=JOIN_S),
                wait_for_workers=False,
                multi_tenant=True,  # a script, or a model before this one, may have made it
            )
        except RuntimeError as error:
            raise CommError(
                f"rank {environment.rank}: no store at {where}, where MASTER_ADDR and MASTER_PORT "
                f"say it is: {str(error).splitlines()[0]}; is the port in use by another program?"
            ) from error
        prefix = f"moe_serve/{environment.generation}/{next(_WORLDS)}"
        return cls(environment, dist.PrefixStore(prefix, store))  # type: ignore[attr-defined]

    def ranks(self, device: torch.device = HOST) -> Ranks:
        """Make the process group, and return what an engine needs to know of it.

        device: where this rank's rows are; of a GPU, which `take_gpu` has made this process' own,
        they travel over NCCL. Raises CommError where a rank does not come within JOIN_S.
        """
        environment = self.environment
        limit = datetime.timedelta(seconds=COLLECTIVE_S)
        try:
            if not dist.is_initialized():  # a script may have done so, or a model before this one
                dist.init_process_group(
                    "gloo",
                    store=dist.PrefixStore("group", self.store),  # type: ignore[attr-defined]
                    rank=environment.rank,
                    world_size=environment.world_size,
                    timeout=limit,
                )
            backend = "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:nccl"
            group = dist.new_group(backend=backend, timeout=limit)
        except (RuntimeError, ValueError) as error:
            raise CommError(
                f"rank {environment.rank}: the {environment.world_size} ranks did not come "
                f"together: {str(error).splitlines()[0]}"
            ) from error
        return Ranks(
            world=World(group, device),
            mesh=Mesh(
                num_ranks=environment.world_size, ranks_per_node=environment.local_world_size
            ),
            num_here=environment.local_world_size,
            agree=self.agree,
            wait_for_all=self.wait_for_all,
            generation=environment.generation,
        )

    def agree(self, alike: Mapping[str, str]) -> None:
        """See `Ranks`. Raises what made another rank refuse, too, with its number."""
        self._say(_Alike(alike=dict(alike)))
        said = [self._heard(rank) for rank in range(self.environment.world_size)]
        for rank, one in enumerate(said):
            if one.failure is not None:
                raise one.failure.error(f"rank {rank}: ")
        for name in said[0].alike:
            for rank, one in enumerate(said):
                if one.alike.get(name) != said[0].alike[name]:
                    raise CommError(_difference(name, rank, said[0].alike, one.alike))

    def refuse(self, error: MoeServeError) -> None:
        """Tell the others why this rank cannot take part, if they have not heard of it yet."""
        if not self._has_spoken:
            self._say(_Alike(failure=Failure.of(error)))

    def wait_for_all(self, what: str) -> None:
        """Return when all ranks have called this with the same word."""
        world_size = self.environment.world_size
        self._set(f"{what}/{self.environment.rank}", b"1")
        self._wait([f"{what}/{rank}" for rank in range(world_size)], LOAD_S)

    def tell(self, name: str, text: str) -> None:
        """Leave a word for the other ranks."""
        self._set(name, text.encode())

    def told(self, name: str) -> str:
        """Wait for a word that another rank leaves. Raises CommError."""
        self._wait([name], JOIN_S)
        text: str = self.store.get(name).decode()
        return text

    def _say(self, said: _Alike) -> None:
        self._has_spoken = True
        self._set(f"alike/{self.environment.rank}", msgspec.json.encode(said))

    def _heard(self, rank: int) -> _Alike:
        name = f"alike/{rank}"
        try:
            self._wait([name], JOIN_S)
        except CommError as error:
            raise CommError(
                f"rank {rank} of {self.environment.world_size} has not come after {JOIN_S:.0f} s; "
                "was it started, with the same options?"
            ) from error
        return msgspec.json.decode(self.store.get(name), type=_Alike)

    def _set(self, name: str, value: bytes) -> None:
        try:
            self.store.set(name, value)
        except RuntimeError as error:
            raise CommError(f"the store of the ranks is gone: {error}") from error

    def _wait(self, names: list[str], limit_s: float) -> None:
        """Wait in short turns, so that an interrupt is heard. Raises CommError."""
        end_s = time.monotonic() + limit_s
        try:
            while not self.store.check(names):
                self.watch()
                if time.monotonic() > end_s:
                    raise CommError(f"no answer after {limit_s:.0f} s: {', '.join(names)}")
                time.sleep(_POLL_S)
        except RuntimeError as error:
            raise CommError(f"the store of the ranks is gone: {error}") from error


def _nothing() -> None:
    """Watch nobody."""


def _difference(name: str, rank: int, first: Mapping[str, str], other: Mapping[str, str]) -> str:
    if name == "options":
        ours, theirs = (msgspec.json.decode(alike[name]) for alike in (first, other))
        unlike = [key for key in ours if ours[key] != theirs.get(key)]
        told = ", ".join(f"{key} {ours[key]!r} and {theirs.get(key)!r}" for key in unlike)
        return f"ranks 0 and {rank} were given different options: {told}; give all the same"
    return (
        f"ranks 0 and {rank} differ in {name}: {first[name]} and {other.get(name)}; all ranks must "
        "have the same"
    )
