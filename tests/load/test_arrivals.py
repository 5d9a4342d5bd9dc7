"""When requests are due."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from typing import Any

import pytest

from moe_serve.errors import ConfigError
from moe_serve.load.arrivals import ArrivalOptions


def gaps(options: ArrivalOptions, number: int, seed: int = 1) -> list[float]:
    offsets = list(itertools.islice(options.offsets_s(random.Random(seed)), number))
    assert offsets == sorted(offsets)
    return [b - a for a, b in itertools.pairwise([0.0, *offsets])]


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_mean_and_spread_of_a_gamma_distribution(burstiness: float) -> None:
    found = gaps(ArrivalOptions(request_rate=50.0, burstiness=burstiness), 40_000)
    assert statistics.fmean(found) == pytest.approx(1 / 50, rel=0.05)
    spread = statistics.stdev(found) / statistics.fmean(found)
    assert spread == pytest.approx(1 / math.sqrt(burstiness), rel=0.05)


def test_a_poisson_process_counts_as_one() -> None:
    offsets = itertools.accumulate(gaps(ArrivalOptions(request_rate=10.0), 40_000))
    counts = [0] * 4100
    for offset in offsets:
        counts[min(int(offset), 4099)] += 1
    whole = counts[:3900]  # seconds that are full
    assert statistics.fmean(whole) == pytest.approx(10, rel=0.05)
    assert statistics.variance(whole) == pytest.approx(10, rel=0.15)
    assert sum(gap > 0.1 for gap in gaps(ArrivalOptions(request_rate=10.0), 40_000)) / 40_000 == (
        pytest.approx(math.exp(-1), rel=0.05)
    )


def test_a_seed_gives_the_same_arrivals() -> None:
    options = ArrivalOptions(request_rate=5.0)
    assert gaps(options, 20, seed=3) == gaps(options, 20, seed=3) != gaps(options, 20, seed=4)


def test_bursts_alone_and_added_to_a_rate() -> None:
    alone = ArrivalOptions(burst_every_s=2.0, burst_size=3)
    assert list(itertools.islice(alone.offsets_s(random.Random()), 7)) == [0, 0, 0, 2, 2, 2, 4]
    both = ArrivalOptions(request_rate=20.0, burst_every_s=2.0, burst_size=3)
    until = list(itertools.takewhile(lambda s: s < 100, both.offsets_s(random.Random(1))))
    assert until == sorted(until)
    in_bursts = sum(offset % 2.0 == 0 for offset in until)
    assert in_bursts == 150
    assert len(until) - in_bursts == pytest.approx(2000, rel=0.1)


def test_all_at_once() -> None:
    assert ArrivalOptions().is_at_once
    assert gaps(ArrivalOptions(), 5) == [0.0] * 5


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"request_rate": 0.0}, "--request-rate is 0.0"),
        ({"request_rate": math.nan}, "--request-rate is nan"),
        ({"request_rate": 1.0, "burstiness": -1.0}, "--burstiness is -1.0"),
        ({"burstiness": 2.0}, "no effect without --request-rate"),
        ({"burst_every_s": 1.0}, "go together"),
        ({"burst_every_s": 1.0, "burst_size": 0}, "--burst-size is 0"),
        ({"burst_every_s": 0.0, "burst_size": 1}, "--burst-every is 0.0"),
    ],
)
def test_bad_options(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ArrivalOptions(**given)
