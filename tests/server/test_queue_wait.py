from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

import pytest

from moe_serve.server.queue_wait import QueueWait


@dataclass
class Clock:
    now_s: float = 100.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Line:
    """A queue on a virtual clock whose requests are named by numbers."""

    clock: Clock = field(default_factory=Clock)
    num_joined: int = 0
    num_left: int = 0

    def __post_init__(self) -> None:
        self.wait = QueueWait(self.clock)

    def join(self, count: int = 1, num_tokens: int = 100) -> None:
        for _ in range(count):
            self.wait.join(str(self.num_joined), num_tokens)
            self.num_joined += 1

    def serve(self, count: int = 1, each_s: float = 0.0) -> None:
        for _ in range(count):
            self.clock.now_s += each_s
            self.wait.serve(str(self.num_left))
            self.num_left += 1


def test_an_empty_queue_takes_no_time() -> None:
    line = Line()
    assert line.wait.guess_s() == 0
    line.join()
    line.serve(each_s=5)
    assert line.wait.guess_s() == 0
    assert len(line.wait) == line.wait.tokens == 0


def test_nothing_is_guessed_before_the_first_was_served() -> None:
    line = Line()
    line.join(200)
    line.clock.now_s += 60
    assert line.wait.guess_s() == 0


@pytest.mark.parametrize("each_s", [0.002, 0.05, 1.0])
def test_a_steady_queue_takes_its_requests_times(each_s: float) -> None:
    line = Line()
    line.join(50)
    for _ in range(200):
        line.serve(each_s=each_s)
        line.join()
    assert line.wait.guess_s() == pytest.approx(50 * each_s, rel=0.3)
    line.serve(25, each_s)
    assert line.wait.guess_s() == pytest.approx(25 * each_s, rel=0.3)


def test_idle_time_says_nothing() -> None:
    """A server that was asked once in a while is not slow: a burst must not be refused."""
    line = Line()
    for _ in range(20):
        line.clock.now_s += 3
        line.join()
        line.serve(each_s=0.02)
    line.clock.now_s += 3
    line.join(40)
    assert line.wait.guess_s() == pytest.approx(40 * 0.02, rel=0.2)


def test_a_first_that_waits_makes_the_guess_longer() -> None:
    line = Line()
    line.join(20)
    line.serve(10, 0.1)
    before_s = line.wait.guess_s()
    line.clock.now_s += 5
    assert line.wait.guess_s() > 4 * before_s
    # and so it is known at once when it goes on, and forgotten soon
    line.serve(1)
    assert line.wait.guess_s() > 3 * before_s
    line.join(50)
    line.serve(45, 0.1)
    assert line.wait.guess_s() == pytest.approx(14 * 0.1, rel=0.5)


def test_who_is_next_waits_for_nobody() -> None:
    """A model that needs ten seconds for a prompt still takes a second one."""
    line = Line()
    line.join()
    line.serve(each_s=10)
    line.join()
    line.clock.now_s += 9
    assert line.wait.guess_s() == 0
    line.join()
    assert line.wait.guess_s() > 5


def test_long_prompts_count_as_such() -> None:
    short, long = Line(), Line()
    for line in (short, long):
        line.join(100)
        line.serve(100, 0.01)
        line.join()
    short.join(10)
    long.join(10, num_tokens=1000)
    assert long.wait.guess_s() > 4 * short.wait.guess_s()


def test_who_leaves_counts_no_more() -> None:
    line = Line()
    line.join(11)
    line.serve(each_s=0.1)
    for number in range(3, 11):
        line.wait.leave(str(number))
    line.wait.leave("unknown")
    assert len(line.wait) == 2
    assert line.wait.tokens == 200
    assert line.wait.guess_s() < 0.2


@dataclass
class Simulated:
    """A server in virtual time: `slots` sequences at once, steps of `decode_s` and the prompts'.

    most_s: what would wait longer is refused.
    """

    slots: int
    decode_s: float
    prompt_s: float
    most_s: float

    def run(self, rate: float, seconds: float) -> tuple[float, list[float], int]:
        """Return served a second in the latter half, sorted waits for it, and how many refused."""
        noise = random.Random(f"{self.slots} {rate}")
        clock = Clock(0.0)
        queue = QueueWait(clock)
        waiting: deque[tuple[int, float]] = deque()
        running: list[int] = []
        number = num_refused = num_ended = 0
        arrival_s = noise.expovariate(rate)
        waits: list[float] = []
        while clock.now_s < seconds:
            now_s = clock.now_s
            while arrival_s <= now_s:
                clock.now_s = arrival_s
                if queue.guess_s() > self.most_s:
                    num_refused += 1
                else:
                    queue.join(str(number), 100)
                    waiting.append((number, arrival_s))
                    number += 1
                arrival_s += noise.expovariate(rate)
            clock.now_s = now_s
            new = [waiting.popleft() for _ in range(min(len(waiting), self.slots - len(running)))]
            step_s = self.decode_s + self.prompt_s * len(new)
            clock.now_s += step_s
            is_late = clock.now_s > seconds / 2
            num_ended += is_late * sum(left == 1 for left in running)
            running = [left - 1 for left in running if left > 1]
            for name, came_s in new:
                queue.serve(str(name))
                running.append(noise.randint(48, 80))
                if is_late:
                    waits.append(clock.now_s - came_s)
        return num_ended / (seconds / 2), sorted(waits), num_refused


@pytest.mark.parametrize(("slots", "decode_s", "prompt_s"), [(32, 0.01, 0.002), (256, 0.06, 0.008)])
def test_three_times_too_much_is_served_as_well_as_enough(
    slots: int, decode_s: float, prompt_s: float
) -> None:
    server = Simulated(slots, decode_s, prompt_s, most_s=1.0)
    most = 1 / (prompt_s + 64 * decode_s / slots)
    _, waits, num_refused = server.run(0.7 * most, 60)
    assert num_refused == 0
    assert waits[-1] < 1
    over, waits, num_refused = server.run(3 * most, 60)
    assert over > 0.9 * most
    assert num_refused > most * 60
    # nobody whom it takes waits much longer than it says, and it is not idle in between
    assert waits[int(0.99 * len(waits))] < 2
    assert waits[len(waits) // 2] > 0.5
