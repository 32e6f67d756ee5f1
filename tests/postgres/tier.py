"""`make test-postgres`: the tests of the spine on the oldest and the newest PostgreSQL, straight and through PgBouncer.

python -m tests.postgres.tier [14] [18] [pgbouncer] [-- arguments for pytest]
What cannot be had here (a download, the program pgbouncer) ends it with the command that gets it, exit code 3.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from eoframework import dev
from eoframework.errors import EoError
from tests.conftest import REPOSITORY
from tests.postgres.bouncer import bouncer_before, program
from tests.postgres.servers import NEWEST, OLDEST, open_directory, programs_of, server_of

BOUNCER = "pgbouncer"
PARTS = (str(OLDEST), str(NEWEST), BOUNCER)

SLICE = (
    "tests/consume",
    "tests/publish",
    "tests/relay/test_flow.py",
    "tests/relay/test_crashes.py",
    "tests/relay/test_fail_closed.py",
    "tests/relay/test_hold.py",
    "tests/relay/test_sharing.py",
    "tests/relay/test_unsendable.py",
    "tests/failure",
    "tests/transform/test_beginning.py",
    "tests/transform/test_crashes.py",
    "tests/lifecycle/test_prune.py",
    "tests/migrations/test_versions.py",
    "tests/cli",
)
NOT_BEHIND_A_POOLER = (
    # They end the session that the position row names; behind a pooler it names none (tests/postgres/test_pgbouncer.py
    # tells whose transaction is ended there).
    "tests/consume/test_ownership.py::test_a_new_connection_renews_every_claim",
    "tests/consume/test_failures.py::test_a_connection_lost_in_the_handler_is_replaced_and_the_claims_name_the_new_one",
    "tests/consume/test_fail_closed.py::test_database_set_back_under_a_running_worker",
    # They change the session itself, which is others' too.
    "tests/failure/test_stalls.py::test_no_message_is_blamed_for_a_database_that_has_become_read_only",
    # Options in the URL, which PgBouncer refuses.
    "tests/failure/test_dead_try.py::test_a_server_that_counts_nothing_is_refused",
    "tests/publish/test_durability.py::test_what_we_commit_is_durable_whatever_the_default",
    # Roles of their own, whose passwords this PgBouncer does not know.
    "tests/failure/test_dead_try.py::test_a_role_with_few_rights_can_try",
    "tests/migrations/test_versions.py::TestWithoutRights",
)


def main(arguments: Sequence[str]) -> int:
    """Run the parts one after another; 0 when all of them passed."""
    words = list(arguments)
    more = words[words.index("--") + 1 :] if "--" in words else []
    parts = [word for word in words[: words.index("--") if "--" in words else None] if word] or list(PARTS)
    unknown = set(parts) - set(PARTS)
    if unknown:
        print(f"There is no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}.", file=sys.stderr)
        return 2
    try:
        _look_for_everything(parts)
        with open_directory() as directory, dev.start(directory / ".eo") as services:
            return max(_run(part, services.bootstrap_servers, more) for part in parts)
    except EoError as error:
        print(f"These tests cannot run here: {error}", file=sys.stderr)
        return 3


def _look_for_everything(parts: Sequence[str]) -> None:
    # Now, and not after the first part has run for minutes.
    for part in parts:
        if part == BOUNCER:
            program()
        else:
            programs_of(int(part))


def _run(part: str, bootstrap_servers: str, more: Sequence[str]) -> int:
    behind = part == BOUNCER
    print(f"== {'through PgBouncer' if behind else f'PostgreSQL {part}'}", flush=True)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(server_of(OLDEST if behind else int(part), max_connections="400"))
        url = stack.enter_context(bouncer_before(server.database_url)).url if behind else server.database_url
        environment = {"EO_DATABASE_URL": url, "EO_KAFKA_BOOTSTRAP_SERVERS": bootstrap_servers}
        deselected = [word for name in NOT_BEHIND_A_POOLER for word in ("--deselect", name)] if behind else []
        chosen = [] if any(Path(word.split("::")[0]).exists() for word in more) else SLICE
        command = [sys.executable, "-m", "pytest", "--quiet", *chosen, *deselected, *more]
        return subprocess.run(command, env={**os.environ, **environment}, cwd=REPOSITORY, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
