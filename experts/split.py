"""Which missing experts are copied and which run where they lie, so that both end together.

Fiddler (arXiv 2402.07033) weighs a copy against the CPU expert by expert; here the last to end is
what counts, as both go on side by side: min over subsets of max(host, link and device).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_MOST_CHOICES = 12
# above it only the heaviest are copied: there a layer takes far longer than one expert more or less
_MOST_WEIGHED = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class MissCosts:
    """Seconds, measured at start with the real kernels and the real link.

    copy_s: to bring in one expert. host_s and device_s: to run one expert where it lies, and
    host_row_s, device_row_s more for each row. is_one_processor: what runs the experts in the slots
    also runs those in host memory, one after the other.
    """

    copy_s: float
    host_s: float
    host_row_s: float
    device_s: float
    device_row_s: float
    is_one_processor: bool

    def host(self, rows: int) -> float:
        """Return the seconds that an expert with `rows` takes in host memory."""
        return self.host_s + rows * self.host_row_s

    def device(self, rows: int) -> float:
        """Return the seconds that an expert with `rows` takes in a slot."""
        return self.device_s + rows * self.device_row_s


def finish_s(
    copied: Sequence[int], in_place: Sequence[int], hits: Sequence[int], costs: MissCosts
) -> float:
    """Return when the last expert has run; each argument lists the rows of its experts.

    Copies follow one another; a copied expert runs when it is there and the device is free, the
    first copied first. The hits run before.
    """
    host_s = sum(costs.host(rows) for rows in in_place)
    at_s = sum(costs.device(rows) for rows in hits)
    if costs.is_one_processor:
        at_s += host_s
    for number, rows in enumerate(copied, 1):
        at_s = max(at_s, number * costs.copy_s) + costs.device(rows)
    return max(at_s, host_s)


def split(
    misses: Mapping[int, int], hits: Sequence[int], costs: MissCosts
) -> tuple[list[int], list[int]]:
    """Return which missing experts are copied, the first first, and which run in place.

    misses: rows of each missing expert; hits: rows of each resident one. Where all have as many
    rows only the number counts (the q* of bandwidth ratios); else choices are built up expert by
    expert, heaviest first, and those that another one beats in every way are dropped. Of equal ends
    the one with most copies is taken: what is copied is there the next time.
    """
    order = sorted(misses, key=lambda expert: (-misses[expert], expert))
    rows = [misses[expert] for expert in order]
    if not rows or rows[0] == rows[-1] or len(rows) > _MOST_WEIGHED:
        chosen = [tuple(range(cut)) for cut in range(len(rows) + 1)]
    else:
        chosen = _choices(rows, costs)

    def end(copied: tuple[int, ...]) -> tuple[float, int]:
        left = [count for place, count in enumerate(rows) if place not in copied]
        return finish_s([rows[place] for place in copied], left, hits, costs), -len(copied)

    best = min(chosen, key=end)
    in_place = [expert for place, expert in enumerate(order) if place not in best]
    return [order[place] for place in best], in_place


@dataclass(frozen=True, slots=True)
class _Choice:
    """Some experts dealt with: which are copied, and what that leads to, in seconds.

    link_s: when the last copied one has run if nothing else did; host_s, device_s: work in all.
    """

    copied: tuple[int, ...]
    link_s: float
    host_s: float
    device_s: float

    def beats(self, other: _Choice, is_one_processor: bool) -> bool:
        if self.link_s > other.link_s:
            return False
        if is_one_processor:
            return self.host_s + self.device_s <= other.host_s + other.device_s
        return self.host_s <= other.host_s and self.device_s <= other.device_s


def _choices(rows: Sequence[int], costs: MissCosts) -> list[tuple[int, ...]]:
    """Return which places of `rows` to copy, in every way that could be the best."""
    fronts: dict[int, list[_Choice]] = {0: [_Choice((), 0.0, 0.0, 0.0)]}  # by number of copies
    for place, count in enumerate(rows):
        host_s, device_s = costs.host(count), costs.device(count)
        grown: dict[int, list[_Choice]] = {}
        for number, front in fronts.items():
            for choice in front:
                there_s = max(choice.link_s, (number + 1) * costs.copy_s)
                grown.setdefault(number + 1, []).append(
                    _Choice(
                        (*choice.copied, place),
                        there_s + device_s,
                        choice.host_s,
                        choice.device_s + device_s,
                    )
                )
                grown.setdefault(number, []).append(
                    _Choice(choice.copied, choice.link_s, choice.host_s + host_s, choice.device_s)
                )
        fronts = {number: _unbeaten(found, costs) for number, found in grown.items()}
    return [choice.copied for front in fronts.values() for choice in front]


def _unbeaten(choices: list[_Choice], costs: MissCosts) -> list[_Choice]:
    """Return those that no other beats, at most _MOST_CHOICES of them, the most promising."""
    choices.sort(key=lambda choice: max(choice.link_s, choice.host_s, choice.device_s))
    kept: list[_Choice] = []
    for choice in choices:
        if not any(other.beats(choice, costs.is_one_processor) for other in kept):
            kept.append(choice)
    return kept[:_MOST_CHOICES]


class MissPlanner:
    """Splits the misses of an event as an option says.

    kind: "copy": all are copied; "split" and "auto": as `split` finds.
    """

    def __init__(self, kind: str, costs: MissCosts) -> None:
        self.kind = kind
        self.costs = costs

    def in_place(self, misses: Mapping[int, int], hits: Sequence[int]) -> list[int]:
        """Return which of the misses run where they lie."""
        return [] if self.kind == "copy" else split(misses, hits, self.costs)[1]
