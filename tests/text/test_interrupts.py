"""Ctrl-C waits for the end of a step, once."""

from __future__ import annotations

import signal
import threading

import pytest

from moe_serve.text.interrupts import HeldInterrupt


def test_an_interrupt_comes_at_the_end() -> None:
    done: list[str] = []

    def work() -> None:
        with HeldInterrupt():
            with HeldInterrupt():
                signal.raise_signal(signal.SIGINT)
            done.append("the rest")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["the rest"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with HeldInterrupt():  # the signal is not told twice
        pass


def test_a_second_one_comes_at_once() -> None:
    def work() -> None:
        with HeldInterrupt():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            pytest.fail("the second was held back")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_another_thread_and_another_handler_are_left_alone() -> None:
    inside = []

    def enter() -> None:
        with HeldInterrupt():
            inside.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert inside == [signal.default_int_handler]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        enter()
        assert inside[1] is signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
