"""A proxy that cuts the EndTxn that commits a transaction."""

from __future__ import annotations

import struct
import threading
from collections import Counter

from tests.campaign.cuts_fates import Fates
from tests.kafka_proxy import KafkaProxy
from tests.listener import Moment
from tests.protocol_proxy import ADD_OFFSETS, ADD_PARTITIONS, END_TXN, INIT_PRODUCER, PRODUCE, Request


class CuttingProxy(KafkaProxy):
    """Cuts at EndTxn as `fates` has it."""

    def __init__(self, broker: tuple[str, int]) -> None:
        self.fates: Fates | None = None
        """None: everything passes."""
        self._deaf: set[str] = set()
        """Producers whose EndTxns get no further, until a new one takes their place."""
        self._doubtful: set[str] = set()
        """Producers whose EndTxn was cut: the next one is the same, sent again."""
        self._tainted: set[str] = set()
        """Producers of which an EndTxn may still be under way: the next one's epoch must come first."""
        self.went_on: Counter[str] = Counter()
        """Producers that sent something into another transaction all the same."""
        self._state = threading.Lock()
        super().__init__(broker)

    def asked(self, request: Request) -> Moment | None:
        if request.key not in (END_TXN, INIT_PRODUCER, PRODUCE, ADD_PARTITIONS, ADD_OFFSETS):
            return None
        who = _client_id(request)
        with self._state:
            if request.key == INIT_PRODUCER:
                for known in (self._doubtful, self._deaf, self._tainted):
                    known.discard(who)
            if request.key != END_TXN:
                if who in self._tainted:
                    self.went_on[_of(who)] += 1
                return None
            again = who in self._doubtful
            self._doubtful.discard(who)
            if who in self._deaf:
                return "before"
            if self.fates is None or again or not request.commits:
                return None
            moment = self.fates.draw("EndTxn", _of(who))
            if moment is not None:
                self._tainted.add(who)
                (self._deaf if self.fates.gives_up() else self._doubtful).add(who)
            return moment


def _of(client_id: str) -> str:
    return "a transform" if client_id.startswith("eo.transform.") else "the relay"


def _client_id(request: Request) -> str:
    """Which is, of our producers, the transactional id."""
    (size,) = struct.unpack_from(">h", request.frame, 12)
    return request.frame[14 : 14 + max(size, 0)].decode()
