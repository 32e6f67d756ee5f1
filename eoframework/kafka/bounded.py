"""Calls of the Kafka client that can last for ever although they are given a timeout."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from confluent_kafka import KafkaError, KafkaException

from eoframework import clock

# The client's own timeout comes first where it works: it knows what it was waiting for.
_GRACE = 2.0


class NoReturn(KafkaException):
    """The call is still under way, and may be for ever; its client can neither be used nor closed any more."""


def bounded(call: Callable[[float], object], timeout: float) -> float:
    """Make the call, which gets the `timeout`; returns the seconds it took, or raises what it raises, or NoReturn.

    Seen with librdkafka 2.16: `send_offsets_to_transaction` with 15 s never came back when the group's coordinator died
    meanwhile (its answer "outdated" ends in no reply to the caller), and `abort_transaction` with 3 s after 25 s. The
    worker would stand still for ever, alive to everybody.
    """
    ended: queue.SimpleQueue[float | BaseException] = queue.SimpleQueue()

    def work() -> None:
        started = clock.monotonic()
        try:
            call(timeout)
        except BaseException as error:  # noqa: BLE001 - raised on the caller's thread
            ended.put(error)
        else:
            ended.put(clock.monotonic() - started)

    # A daemon: one that never comes back must not keep the process from ending.
    threading.Thread(target=work, name=f"{threading.current_thread().name} kafka call", daemon=True).start()
    try:
        result = ended.get(timeout=timeout + _GRACE)
    except queue.Empty:
        text = f"the client did not come back within {timeout + _GRACE:g} s"
        raise NoReturn(KafkaError(KafkaError._TIMED_OUT, text)) from None
    if isinstance(result, BaseException):
        raise result
    return result
