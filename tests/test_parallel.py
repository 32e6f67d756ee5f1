"""What belongs together stays together, and the library still asks us."""

from __future__ import annotations

import logging

import pytest
from xdist.scheduler import LoadScopeScheduling

from tests.parallel import Scheduling, stays_together


@pytest.mark.parametrize(
    ("nodeid", "together"),
    [
        ("tests/outages/test_kafka.py::test_x[a/b::c]", "tests/outages"),
        ("tests/relay/test_broken_services.py::test_x", "tests/relay/test_broken_services.py"),
        ("tests/relay/test_flow.py::test_x[1]", "tests/relay/test_flow.py::test_x[1]"),
    ],
)
def test_tests_that_share_services_of_their_own_go_to_one_worker(nodeid: str, together: str) -> None:
    """Elsewhere the services would be started once more."""
    assert stays_together(nodeid) == together


@pytest.mark.parametrize("name", ["_split_scope", "_reschedule", "remove_node"])
def test_the_scheduler_has_what_we_override(name: str) -> None:
    assert name in vars(LoadScopeScheduling)
    assert name in vars(Scheduling)


def test_half_a_character_in_a_log_does_not_end_the_run() -> None:
    """Seen to fail, with an internal error instead of a summary, without Worker in conftest.py."""
    logging.getLogger(__name__).warning("half a character: %s", "\ud800")
