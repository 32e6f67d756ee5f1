"""A slice of the table of client errors, and what one of its cells is about on a real broker."""

from __future__ import annotations

import random

import pytest

from eoframework.errors import ConfigurationError
from eoframework.kafka.config import transactional_config
from eoframework.kafka.transaction import TransactionalProducer
from eoframework.settings import Settings
from tests.campaign.client_error_cells import Cell, cells
from tests.campaign.client_errors import complaints, key_of, read_table, run_all

_SEED = 6
_MORE = 150
# Of a group's member that has lost its coordinator, or its place, the client takes 5 to 80 s to notice.
_SLOW = frozenset(
    {
        "COORDINATOR_NOT_AVAILABLE",
        "NOT_COORDINATOR",
        "DROP",
        "LATE",
        "UNKNOWN_MEMBER_ID",
        "ILLEGAL_GENERATION",
        "FENCED_INSTANCE_ID",
    }
)


def test_the_table_has_every_cell() -> None:
    """A cell that is added to the program and not to the table would be checked by nobody."""
    assert read_table().keys() == {key_of(cell) for cell in cells()}
    assert len(read_table()) > 2000


def test_what_a_client_error_is_taken_for() -> None:
    """Each request's every outcome, and some more cells: as the table says, and by the rules.

    Seen to fail: without `doubt` in `TransactionalProducer._doubted`, in `abort`, and for a slow commit; with
    PRODUCER_FENCED taken out of `faults._FENCED`; with a commit's error not raised ("reported as done"); with
    `bounded` waiting 15 s longer; with `_judge_init` trying again what is final; with a record's fault not counted.
    """
    table = read_table()
    assert complaints(run_all(_slice(table)), table) == []


def _slice(table: dict[tuple[str, ...], tuple[str, ...]]) -> list[Cell]:
    quick = [cell for cell in cells() if not (cell.call.name.startswith("group_") and cell.fault in _SLOW)]
    random.Random(_SEED).shuffle(quick)
    of_each = {(cell.call, table[key_of(cell)]): cell for cell in quick}
    more = [cell for cell in quick if table[key_of(cell)][0] == "none"][:_MORE]
    return list(dict.fromkeys([*of_each.values(), *more]))


def test_a_longer_transaction_than_the_brokers_allow_is_a_wrong_setting(settings: Settings) -> None:
    """A real broker allows 15 minutes (transaction.max.timeout.ms).

    Seen to fail: without INVALID_TRANSACTION_TIMEOUT in `_judge_init` it is a Retryable, tried again for ever.
    """
    too_long = settings.model_copy(update={"transaction_timeout": 16 * 60.0})
    producer = TransactionalProducer(
        transactional_config(too_long, transactional_id="eo.relay.too-long", client_id="too-long")
    )
    with pytest.raises(ConfigurationError, match=r"960000 ms.*EO_TRANSACTION_TIMEOUT.*transaction.max.timeout.ms"):
        producer.make_ready()
    producer.close()
