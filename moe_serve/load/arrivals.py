"""When requests are sent: offsets in seconds from the start of a run, never decreasing.

None where there is no such time: a closed loop sends a request when another has ended.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from moe_serve.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ArrivalOptions:
    """An open loop of random arrivals, bursts, or both; or all at once.

    request_rate: a second; inf: all at once. burstiness: shape of the gamma distribution of gaps; 1
    is a Poisson process, less is burstier. burst_every_s, burst_size: so many at once, again and
    again, from the start on; without a finite request_rate there is nothing else.
    """

    request_rate: float = math.inf
    burstiness: float = 1.0
    burst_every_s: float | None = None
    burst_size: int | None = None

    def __post_init__(self) -> None:
        """Raise ConfigError for what cannot be, or has no effect."""
        for flag, value in (
            ("--request-rate", self.request_rate),
            ("--burstiness", self.burstiness),
            ("--burst-every", self.burst_every_s),
        ):
            if value is not None and not value > 0:
                raise ConfigError(f"{flag} is {value}; it must be above 0")
        if math.isinf(self.burstiness):
            raise ConfigError("--burstiness is inf; it must be finite")
        if (self.burst_every_s is None) != (self.burst_size is None):
            raise ConfigError("--burst-every and --burst-size go together; give both")
        if self.burst_size is not None and self.burst_size < 1:
            raise ConfigError(f"--burst-size is {self.burst_size}; it must be at least 1")
        if self.burstiness != 1 and math.isinf(self.request_rate):
            raise ConfigError("--burstiness has no effect without --request-rate")

    @property
    def is_at_once(self) -> bool:
        return math.isinf(self.request_rate) and self.burst_every_s is None

    def offsets_s(self, noise: random.Random) -> Iterator[float]:
        """Yield offsets without end."""
        if self.is_at_once:
            return itertools.repeat(0.0)
        if self.burst_every_s is None:
            return self._gamma(noise)
        if math.isinf(self.request_rate):
            return self._bursts()
        return heapq.merge(self._gamma(noise), self._bursts())

    def _gamma(self, noise: random.Random) -> Iterator[float]:
        scale = 1 / (self.request_rate * self.burstiness)
        offset_s = 0.0
        while True:
            offset_s += noise.gammavariate(self.burstiness, scale)
            yield offset_s

    def _bursts(self) -> Iterator[float]:
        assert self.burst_every_s is not None
        assert self.burst_size is not None
        for number in itertools.count():
            yield from itertools.repeat(number * self.burst_every_s, self.burst_size)
