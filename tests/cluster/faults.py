"""What is done to the brokers under a flow; each fault lasts as long as its block, and is undone at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from eoframework import clock, dev
from tests.cluster.brokers import Brokers
from tests.cluster.flows import Flow
from tests.processes import eventually

Fault = Callable[[Brokers, Flow], AbstractContextManager[None]]


@contextmanager
def killed(node: dev.KafkaBroker) -> Iterator[None]:
    """SIGKILL, and started again."""
    node.kill()
    yield
    node.start()


@contextmanager
def frozen(node: dev.KafkaBroker, *, seconds: float = 0.0) -> Iterator[None]:
    """SIGSTOP, for so many seconds at least, and SIGCONT: it wakes up with requests that it has not answered."""
    node.pause()
    until = clock.monotonic() + seconds
    yield
    eventually(lambda: clock.monotonic() > until, f"{seconds:g} s are over")
    node.resume()


@contextmanager
def restarted(*nodes: dev.KafkaBroker, whole: Callable[[], bool]) -> Iterator[None]:
    """Each shut down in order, so that it hands its parts over, and started again when the others are whole."""
    for node in nodes:
        eventually(whole, "all replicas in sync")
        node.stop()
        node.start()
    yield


def through(brokers: Brokers, flow: Flow, fault: AbstractContextManager[None]) -> None:
    """The flow goes on while the fault lasts and after it, nobody lending a hand."""
    with fault:
        flow.goes_on()
    eventually(brokers.in_sync, "all replicas in sync again")
    flow.goes_on()
