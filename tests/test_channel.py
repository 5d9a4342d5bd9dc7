"""Messages over a socket: what was sent arrives, and what is no message is an error."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from moe_serve.channel import MOST_BYTES, Channel, Closed, Mailbox
from moe_serve.errors import CapacityError, CommError
from moe_serve.launch.messages import Abort, Add, Beat, Call, Failure, Release, Reply
from moe_serve.types import Request, RoutedExperts, SamplingParams, StepOutput, TokenLogprobs


def pair() -> tuple[Channel[Call], socket.socket]:
    ours, theirs = socket.socketpair()
    return Channel(ours, Call), theirs


def test_a_request_arrives_as_it_was() -> None:
    ours, theirs = socket.socketpair()
    sender: Channel[Call] = Channel(ours, Call)
    receiver: Channel[Call] = Channel(theirs, Call)
    sampling = SamplingParams(
        n=2,
        seed=-(2**63),
        logit_bias={3: -1.5},
        stop=["a", "b"],
        stop_token_ids=(4,),
        allowed_token_ids=[1, 2],
        temperature=0.3,
        return_routed_experts=True,
    )
    request = Request(
        request_id="x\n",
        prompt_ids=(1, 2),
        sampling=sampling,
        eos_token_ids=frozenset({7}),
        bad_words_ids=((1, 2),),
        cache_salt="\xfc",
    )
    sender.send(Add(request))
    sender.send(Release())
    received = receiver.receive()
    assert isinstance(received, Add)
    assert received.request == request
    assert isinstance(receiver.receive(), Release)
    sender.close()
    receiver.close()


def test_outputs_keep_every_bit_of_a_logprob() -> None:
    ours, theirs = socket.socketpair()
    sender: Channel[Reply] = Channel(ours, Reply)
    receiver: Channel[Reply] = Channel(theirs, Reply)
    logprob = TokenLogprobs(3, -0.1 - 2**-52, 2, ((1, -1e-300), (2, float("-inf"))))
    output = StepOutput("r", 0, (3,), (logprob,), "stop", (None, logprob))
    experts = RoutedExperts.of(7, np.arange(12, dtype=np.int16).reshape(2, 3, 2))
    routed = StepOutput("r", 0, (3,), routed_experts=experts)
    sender.send(Reply((output, routed)))
    received = receiver.receive().outputs
    assert received == (output, routed)
    assert received[1].routed_experts is not None
    np.testing.assert_array_equal(received[1].routed_experts.array(), experts.array())
    sender.close()
    receiver.close()


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<I", 3) + b"\xc1\xc1\xc1",
        struct.pack("<I", 1) + b"\x05",
        struct.pack("<I", MOST_BYTES + 1),
        struct.pack("<I", 8) + b"\x81\xa4typ",
    ],
)
def test_what_is_no_message_is_an_error(data: bytes) -> None:
    channel, other = pair()
    other.sendall(data)
    other.close()
    with pytest.raises(CommError):
        channel.receive()
    channel.close()


def test_nobody_at_the_other_end() -> None:
    channel, other = pair()
    with pytest.raises(TimeoutError):
        channel.receive(0.05)
    threading.Timer(0.1, other.close).start()
    with pytest.raises(Closed):
        channel.receive(5)
    with pytest.raises(Closed):
        send_often(channel)
    channel.close()


def send_often(channel: Channel[Call]) -> None:
    for _ in range(3):
        channel.send(Abort("x" * 1000))


def test_several_threads_may_send() -> None:
    ours, theirs = socket.socketpair()
    sender: Channel[Beat] = Channel(ours, Beat)
    receiver: Channel[Beat | Abort] = Channel(theirs, Beat | Abort)

    def send(what: Beat | Abort) -> None:
        for _ in range(300):
            sender.send(what)

    threads = [threading.Thread(target=send, args=(m,)) for m in (Beat(), Abort("y" * 5000))]
    for thread in threads:
        thread.start()
    received = [receiver.receive(5) for _ in range(600)]
    for thread in threads:
        thread.join()
    assert sum(isinstance(one, Abort) for one in received) == 300
    sender.close()
    receiver.close()


def test_errors_travel_as_what_they_are() -> None:
    error = Failure.of(CapacityError("too much")).error("rank 3: ")
    assert type(error) is CapacityError
    assert str(error) == "rank 3: too much"
    assert type(Failure.of(KeyError("x")).error()) is CommError
    assert type(Failure("nearest", "no class of errors").error()) is CommError


@pytest.fixture
def ends() -> Iterator[Callable[[], tuple[socket.socket, socket.socket]]]:
    """Give pairs of sockets, closed at the end."""
    with contextlib.ExitStack() as stack:

        def make() -> tuple[socket.socket, socket.socket]:
            ours, theirs = socket.socketpair()
            return stack.enter_context(ours), stack.enter_context(theirs)

        yield make


Ends = Callable[[], tuple[socket.socket, socket.socket]]


def test_a_mailbox_waits_for_nobody(ends: Ends) -> None:
    ours, theirs = (Mailbox[Call](end, Call) for end in ends())
    assert theirs.receive() == []
    large = Abort("x" * 100_000)
    for _ in range(20):  # far more than the socket takes
        ours.send(large)
    assert ours.has_unsent
    received: list[Call] = []
    while not ours.flush() or len(received) < 20:
        received += theirs.receive()
    assert received == [large] * 20
    assert not ours.has_unsent
    assert theirs.receive() == []


def test_a_mailbox_that_nobody_empties_is_given_up(ends: Ends) -> None:
    mailbox: Mailbox[Call] = Mailbox(ends()[0], Call, 10**6)

    def send_all() -> None:
        for _ in range(100):
            mailbox.send(Abort("x" * 100_000))

    with pytest.raises(Closed, match="has not read"):
        send_all()
    with pytest.raises(Closed, match="has not read"):  # who did not see it learns of it here
        mailbox.flush()


def test_what_came_before_the_end_is_received_first(ends: Ends) -> None:
    ours, theirs = (Mailbox[Call](end, Call) for end in ends())
    ours.send(Abort("last"))
    ours.close()
    assert theirs.receive() == [Abort("last")]
    with pytest.raises(Closed):
        theirs.receive()
    with pytest.raises(Closed):
        theirs.send(Release())


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (struct.pack("<I", MOST_BYTES + 1), "are the most"),
        (struct.pack("<I", 1) + b"\xc1", "not a message"),
    ],
)
def test_a_mailbox_refuses_what_is_no_message(ends: Ends, data: bytes, why: str) -> None:
    ours, theirs = ends()
    mailbox: Mailbox[Call] = Mailbox(ours, Call)
    theirs.sendall(data)
    with pytest.raises(CommError, match=why):
        mailbox.receive()


def test_messages_in_pieces_are_put_together(ends: Ends) -> None:
    ours, theirs = ends()
    mailbox: Mailbox[Call] = Mailbox(ours, Call)
    sender, tap = ends()
    Channel[Call](sender, Call).send(Abort("in pieces"))
    data = tap.recv(100)
    for byte in data[:-1]:
        theirs.sendall(bytes([byte]))
        assert mailbox.receive() == []
    theirs.sendall(data[-1:])
    assert mailbox.receive() == [Abort("in pieces")]
