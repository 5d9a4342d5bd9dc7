"""The options of a server, beside those of its engine: made once, as `EngineConfig` is."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from moe_serve.config import build_branches, options_of
from moe_serve.errors import ConfigError
from moe_serve.server.limits import DEFAULT_LIMITS, Limits

MOST_S = 24 * 3600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkConfig:
    """Where a server listens, and whom it answers."""

    host: str = field(
        default="127.0.0.1",
        metadata={"help": "Address to listen on; other than this machine's own needs a key."},
    )
    port: int = field(default=8000, metadata={"help": "Port to listen on; 0: a free one."})
    api_key: str | None = field(
        default=None,
        metadata={
            "help": "Keys, separated by commas: a request must bring one. Better given as "
            "MOE_SERVE_API_KEY, which other users of the machine cannot see."
        },
    )
    allowed_hosts: str | None = field(
        default=None,
        metadata={"help": "Host names that requests may name, separated by commas."},
    )
    served_model_name: str | None = field(
        default=None, metadata={"help": "The model's name in the API; default: as it was given."}
    )

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port}; it must be from 0 to 65535")
        if not self.host:
            raise ConfigError("host is empty; give an address, 127.0.0.1 for this machine alone")
        if self.api_key is not None and not all(self.keys or [""]):
            raise ConfigError("api_key has an empty key; give one key, or several with commas")
        name = self.served_model_name
        if name is not None and (not name.isprintable() or not 0 < len(name) <= 256):
            raise ConfigError("served_model_name must be 1 to 256 printable characters")

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys, () where none is asked for."""
        return tuple(part.strip() for part in self.api_key.split(",")) if self.api_key else ()

    @property
    def hosts(self) -> tuple[str, ...]:
        """Host names that requests may name beside this machine's own."""
        names = (self.allowed_hosts or "").split(",")
        return tuple(name.strip().lower() for name in names if name.strip())


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceConfig:
    """How much is taken on at once, and what happens at the end."""

    max_queue_requests: int = field(
        default=DEFAULT_LIMITS.queue_requests,
        metadata={"help": "Requests that may wait for their first token; more get a 503."},
    )
    max_queue_wait: float | None = field(
        default=None,
        metadata={
            "help": "Seconds that the queue may take, as its latest requests tell; what would wait "
            "longer gets a 503. Default: no such limit."
        },
    )
    max_requests_per_key: int | None = field(
        default=None, metadata={"help": "Requests of one key at once; more get a 429."}
    )
    request_timeout: float = field(
        default=DEFAULT_LIMITS.request_s,
        metadata={"help": "Seconds that a request may take; then it ends with a 504."},
    )
    stream_interval: float | None = field(
        default=None,
        metadata={
            "help": "Seconds that tokens may wait for others to go out with, but for a request's "
            "first and last. 0: none does. Without it 1.5 ms for each request that runs, at most "
            "50 ms."
        },
    )
    shutdown_timeout: float = field(
        default=30.0,
        metadata={"help": "Seconds that requests have to end after SIGTERM, before they are cut."},
    )
    max_worlds: int = field(
        default=3,
        metadata={
            "help": "How often in five minutes processes of the engine may be lost and started "
            "again before the server gives up; 0: at once."
        },
    )
    stats_interval: float = field(
        default=10.0,
        metadata={"help": "Seconds between two lines of figures on stderr; 0: none."},
    )

    def __post_init__(self) -> None:
        counts = {"max_queue_requests": 1, "max_requests_per_key": 1, "max_worlds": 0}
        for name, least in counts.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= 2**20:
                raise ConfigError(f"{name} is {value}; it must be from {least} to {2**20}")
        times = {
            "max_queue_wait": 0.01,
            "request_timeout": 0.1,
            "stream_interval": 0.0,
            "shutdown_timeout": 0.0,
            "stats_interval": 0.0,
        }
        for name, low in times.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= MOST_S:
                raise ConfigError(f"{name} is {value:g}; it must be from {low:g} to {MOST_S:g}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """All options of a server but those of its engine."""

    network: NetworkConfig = field(default_factory=NetworkConfig)
    service: ServiceConfig = field(default_factory=ServiceConfig)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Build from leaf names and values; an unknown name or a wrong type is a ConfigError."""
        return cls(**build_branches(cls, options))

    def options(self) -> dict[str, Any]:
        """Return every leaf by name: what `from_options` makes this of."""
        return options_of(self)

    @property
    def limits(self) -> Limits:
        """The limits, with what options say of them."""
        return dataclasses.replace(
            DEFAULT_LIMITS,
            queue_requests=self.service.max_queue_requests,
            request_s=self.service.request_timeout,
        )
