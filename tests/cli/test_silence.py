"""A server that takes the connection and never says a word."""

from __future__ import annotations

import socket

from tests.cli.conftest import APP, Shell


def test_a_silent_database_counts_as_unreachable(bare_shell: Shell) -> None:
    """The URL's own connect_timeout wins over ours (10 s), so this test need not wait for it."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql://eo:x@127.0.0.1:{silent.getsockname()[1]}/eo?connect_timeout=2"
        done = bare_shell.run("run", APP, "--no-wait", code=69, EO_DATABASE_URL=url)
    assert "timeout" in done.stderr


def test_ours_counts_where_the_url_says_nothing(bare_shell: Shell) -> None:
    """Seen to fail with connect_args taken out of open_database: it waits for two minutes."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql://eo:x@127.0.0.1:{silent.getsockname()[1]}/eo"
        done = bare_shell.run("run", APP, "--no-wait", code=69, EO_DATABASE_URL=url)
    assert "timeout" in done.stderr
