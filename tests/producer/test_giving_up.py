"""A Producer that is ended under what it holds: what may be in the log is never said not to be."""

from __future__ import annotations

import socket

import pytest

from eoframework import OutcomeUnknown, Sent
from tests.processes import eventually
from tests.producer.conftest import MakeProducer, Order, Own, numbers, orders_on, outcome
from tests.protocol_proxy import PRODUCE, Request


def test_written_and_waiting_to_be_sent_again(own: Own, intact: Own, make_producer: MakeProducer) -> None:
    """The answer got lost with the connection; the client waits to send it again, and is closed.

    Seen to fail (said not to be written, and to be sent again) with `_PURGE_QUEUE` taken for "never sent".
    """
    orders = orders_on(own.settings())
    producer = make_producer(own.settings())
    assert producer.send(orders, Order(number=0))
    forward = own.wire._forward
    hung_up: list[bytes] = []

    def last_request(frame: bytes, client: socket.socket, server: socket.socket) -> bool:
        client.shutdown(socket.SHUT_RDWR)
        if Request.parse(frame).key == PRODUCE and not hung_up:
            hung_up.append(frame)
            server.sendall(frame)
        return True

    own.wire._forward = last_request  # type: ignore[method-assign]
    try:
        future = producer.send_soon(orders, Order(number=1))
        eventually(lambda: bool(hung_up), "the record is on its way", seconds=20)
        with pytest.raises(OutcomeUnknown):
            producer.close(1)
        result = outcome(future)
    finally:
        own.wire._forward = forward  # type: ignore[method-assign]
    assert numbers(own.settings(), orders) == [0, 1]
    assert not isinstance(result, Sent)
    assert isinstance(result, OutcomeUnknown), result
