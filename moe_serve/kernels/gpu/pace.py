"""Whether to run a step whole and look afterwards, or to look at every layer: by what each took."""

from __future__ import annotations

_STEPS_REMEMBERED = 32


class Mean:
    """A running mean, of all values at first, then mostly of the last."""

    def __init__(self) -> None:
        self._count = 0
        self.value = 0.0

    @property
    def is_known(self) -> bool:
        return self._count > 0

    def add(self, value: float) -> None:
        self._count = min(self._count + 1, _STEPS_REMEMBERED)
        self.value += (value - self.value) / self._count


class Pace:
    """What steps of one size took, and where they first missed an expert.

    A whole step that misses is for nothing: it is run again, as a whole up to the layer that
    missed, looking at every layer from there on. What is measured leaves out the waiting for
    experts, which neither way avoids.
    """

    def __init__(self, num_layers: int) -> None:
        """num_layers: that have experts."""
        self._num_layers = num_layers
        self._whole_s = Mean()
        self._looking_s = Mean()
        # shares of all layers that a step ran again before the layer that missed, and from it on
        self._before = Mean()
        self._after = Mean()

    def ran_whole(self, seconds: float) -> None:
        self._whole_s.add(seconds)

    def ran_looking(self, seconds: float, num_layers: int) -> None:
        """Note how long it took to run the last `num_layers` layers, looking at each."""
        if num_layers:
            self._looking_s.add(seconds * self._num_layers / num_layers)

    def missed(self, first: int | None) -> None:
        """Note the first layer of a step that missed an expert, or that none did."""
        share = 0.0 if first is None else first / self._num_layers
        self._before.add(share)
        self._after.add(0.0 if first is None else 1.0 - share)

    @property
    def is_whole_faster(self) -> bool:
        """Whether a whole step is to be expected to end sooner; so until both were measured."""
        if not (self._whole_s.is_known and self._looking_s.is_known):
            return True
        again_s = self._before.value * self._whole_s.value
        again_s += self._after.value * self._looking_s.value
        return self._whole_s.value + again_s <= self._looking_s.value
