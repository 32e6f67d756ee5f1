"""The two services for real: found again, apart, dead, killed, reset, and never left behind."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import sys
from pathlib import Path

import psutil
import psycopg
import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from eoframework import dev
from eoframework.dev import java, postgres_programs, processes
from eoframework.errors import ConfigurationError, EoError
from tests.dev.conftest import alive, descendants, eo_dev, finish, names, nothing_runs_in, services_in, words_in


def sql_url(url: str) -> str:
    return url.replace("+psycopg", "")


def write(services: dev.Services) -> None:
    """One row and one committed record."""
    with psycopg.connect(sql_url(services.database_url)) as connection:
        connection.execute("create table kept as select 42 as answer")
    admin = AdminClient({"bootstrap.servers": services.bootstrap_servers})
    admin.create_topics([NewTopic("kept", 1, 1)])["kept"].result(10)
    producer = Producer({"bootstrap.servers": services.bootstrap_servers, "transactional.id": "kept"})
    producer.init_transactions(10)
    producer.begin_transaction()
    producer.produce("kept", b"42")
    producer.commit_transaction(10)


def read(services: dev.Services) -> tuple[object, bytes | None]:
    """The row and the record, by new connections."""
    with psycopg.connect(sql_url(services.database_url)) as connection:
        row = connection.execute("select answer from kept").fetchone()
    consumer = Consumer(
        {"bootstrap.servers": services.bootstrap_servers, "group.id": "reader", "auto.offset.reset": "error"}
    )
    consumer.assign([TopicPartition("kept", 0, 0)])
    try:
        record = consumer.poll(30)
        assert record is not None
        assert record.error() is None
        return row and row[0], record.value()
    finally:
        consumer.close()


def test_up_finds_the_running_ones_and_down_keeps_the_data(state_dir: Path) -> None:
    """Two `up` at once and a third later start one broker and one server; `down` and `up` keep ports and data."""
    both = [eo_dev("up", "--state-dir", state_dir) for _ in range(2)]
    answers = [finish(process) for process in both]
    assert [code for code, _, _ in answers] == [0, 0], answers
    assert answers[0][1] == answers[1][1]
    lines = [shlex.split(line) for line in answers[0][1].splitlines()]
    assert [words[0] for words in lines] == ["export", "export"]
    assert [words[1].partition("=")[0] for words in lines] == ["EO_DATABASE_URL", "EO_KAFKA_BOOTSTRAP_SERVERS"]
    assert len({process.ppid() for process in services_in(state_dir) if process.name() == "java"}) == 1

    services = dev.find(state_dir)
    write(services)
    assert (state_dir / "state.json").stat().st_mode & 0o077 == 0

    code, out, _ = finish(eo_dev("up", "--state-dir", state_dir, "--json"))
    assert code == 0
    assert json.loads(out)["found_running"] is True
    assert json.loads(out)["EO_DATABASE_URL"] == services.database_url

    other = services.kafka.port + 1
    code, out, err = finish(eo_dev("up", "--state-dir", state_dir, "--kafka-port", str(other)))
    assert (code, out) == (3, "")
    assert f"on port {services.kafka.port} and not on {other}" in err

    assert finish(eo_dev("down", "--state-dir", state_dir))[0] == 0
    assert nothing_runs_in(state_dir)
    assert finish(eo_dev("status", "--state-dir", state_dir))[0] == 69
    with dev.start(state_dir) as again:
        assert again.environment() == services.environment()
        assert read(again) == (42, b"42")
    assert nothing_runs_in(state_dir)


def test_parallel_projects_do_not_collide_and_run_leaves_nothing(tmp_path: Path) -> None:
    """Two `run` at once: own ports, own data, the command's exit code, and nothing afterwards."""
    script = (
        "import os; print(os.environ['EO_DATABASE_URL'], os.environ['EO_KAFKA_BOOTSTRAP_SERVERS']); raise SystemExit(7)"
    )
    directories = [tmp_path / "one", tmp_path / "two"]
    both = [eo_dev("run", "--state-dir", each, "--", sys.executable, "-c", script) for each in directories]
    answers = [finish(process) for process in both]
    assert [code for code, _, _ in answers] == [7, 7], answers
    words = [set(out.split()) for _, out, _ in answers]
    assert len(words[0] | words[1]) == 4
    for directory in directories:
        assert nothing_runs_in(directory)
        assert dev.reset(directory)
        assert not directory.exists()


def test_killed_parent_leaves_nothing(state_dir: Path) -> None:
    """SIGKILL of `eo dev run`. Seen to fail with the two `_end` calls of the guard's loop removed."""
    process = eo_dev("run", "--state-dir", state_dir, "--", "sleep", "300")
    family = whole_family(process.pid)
    process.kill()
    process.communicate()
    assert processes.wait_until(lambda: not any(alive(child) for child in family), 15)
    assert nothing_runs_in(state_dir)


def test_interrupt_reaches_the_command_and_then_ends_the_services(state_dir: Path, tmp_path: Path) -> None:
    """Ctrl-C goes to the terminal's whole group: the command finishes in its own way, with the services still there."""
    script = tmp_path / "command.py"
    script.write_text(COMMAND)
    process = eo_dev("run", "--state-dir", state_dir, "--", sys.executable, script, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    family = descendants(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    code, out, err = finish(process)
    assert (code, out) == (9, "still there\n"), err
    assert processes.wait_until(lambda: not any(alive(child) for child in family), 15)
    assert nothing_runs_in(state_dir)


COMMAND = """
import os, signal, sys
import psycopg

def interrupted(number, frame):
    with psycopg.connect(os.environ["EO_DATABASE_URL"].replace("+psycopg", "")) as connection:
        print(connection.execute("select 'still there'").fetchone()[0])
    sys.exit(9)

signal.signal(signal.SIGINT, interrupted)
print("ready", flush=True)
signal.pause()
"""


def whole_family(pid: int) -> list[psutil.Process]:
    """All processes of an `eo dev run` whose command sleeps, once that has begun."""
    assert processes.wait_until(lambda: "sleep" in names(descendants(pid)), 60)
    family = descendants(pid)
    assert {"java", "postgres", "sleep"} <= names(family)
    return family


@pytest.mark.parametrize("moment", ["format", "kafka.Kafka"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_stopped_while_starting_leaves_nothing(state_dir: Path, moment: str, number: signal.Signals) -> None:
    """Ctrl-C and SIGKILL of `up` while the storage tool or the broker is on its way."""
    process = eo_dev("up", "--state-dir", state_dir)
    assert processes.wait_until(lambda: moment in words_in(state_dir), 60)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert nothing_runs_in(state_dir)


def test_dead_broker_is_told_and_started_again(state_dir: Path) -> None:
    """Also a state file whose pid belongs to somebody else by now: nothing is killed, the services are new."""
    code, _, err = finish(eo_dev("up", "--state-dir", state_dir))
    assert code == 0, err
    services = dev.find(state_dir)
    write(services)
    assert services.kafka.identity is not None
    os.kill(services.kafka.identity.pid, signal.SIGKILL)
    assert processes.wait_until(lambda: not services.kafka.running(), 10)

    code, out, _ = finish(eo_dev("status", "--state-dir", state_dir))
    assert code == 69
    assert "kafka     dead" in out
    assert "so it was killed" in out
    assert "`eo dev up` starts it again" in out
    code, out, _ = finish(eo_dev("status", "--state-dir", state_dir, "--json"))
    assert json.loads(out)["postgres"]["state"] == "running"

    state = json.loads((state_dir / "state.json").read_text())
    state["kafka"][0]["process"]["pid"] = os.getpid()
    (state_dir / "state.json").write_text(json.dumps(state))
    with dev.start(state_dir) as again:
        assert not again.found_running
        assert again.environment() == services.environment()
        assert read(again) == (42, b"42")


def test_kill_pause_and_restart_keep_what_was_committed(state_dir: Path) -> None:
    """The handles that failure tests use, on the Java and the PostgreSQL of the wheels."""
    nowhere = str(state_dir)
    wheels = {
        "kafka": dev.KafkaOptions(java=java.find(path=nowhere), session_timeout_ms=3_000),
        "postgres": dev.PostgresOptions(programs=postgres_programs.find(path=nowhere)),
    }
    with dev.start(state_dir, **wheels) as services:  # type: ignore[arg-type]
        write(services)
        addresses = services.environment()
        services.kafka.kill()
        services.postgres.stop(mode="immediate")
        assert [service.state for service in dev.status(state_dir)] == ["stopped", "stopped"]
        services.postgres.start()
        services.kafka.start()
        assert services.environment() == addresses
        assert read(services) == (42, b"42")
        assert services.kafka.identity is not None
        broker = psutil.Process(services.kafka.identity.pid)
        services.kafka.pause()
        assert processes.wait_until(lambda: broker.status() == psutil.STATUS_STOPPED, 5)
        services.kafka.resume()
        assert processes.wait_until(lambda: broker.status() != psutil.STATUS_STOPPED, 5)
        services.postgres.stop(mode="kill")
        services.postgres.start()
        assert read(services) == (42, b"42")


def test_broker_that_dies_while_starting_shows_the_decisive_line(state_dir: Path) -> None:
    broken = dev.KafkaOptions(properties={"num.io.threads": "none"})
    with pytest.raises(EoError, match=r"exit code 1 while starting: .*num\.io\.threads") as caught:
        dev.start(state_dir, kafka=broken)
    assert caught.value.exit_code in (3, 69)
    assert caught.value.remedy
    assert nothing_runs_in(state_dir)


def test_data_of_another_major_version_are_refused(state_dir: Path) -> None:
    state_dir.mkdir()
    process = {"pid": 1, "started": "0"}
    kafka = {"cluster_id": "", "port": None, "controller_port": None, "formatted": False, "process": process}
    postgres = {"password": "x", "port": None, "home": "", "initialised": "9", "process": None}
    document = {"version": 1, "kafka": kafka, "postgres": postgres, "owner": None}
    (state_dir / "state.json").write_text(json.dumps(document))
    with pytest.raises(ConfigurationError, match="are PostgreSQL 9's") as caught:
        dev.start(state_dir)
    assert "eo dev reset" in caught.value.remedy
    assert nothing_runs_in(state_dir)


def test_used_port_is_named(state_dir: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, out, err = finish(eo_dev("up", "--state-dir", state_dir, "--postgres-port", str(port)))
    assert (code, out) == (3, "")
    assert f"Port {port} for PostgreSQL is in use by another program. Stop that program" in err
    assert nothing_runs_in(state_dir)


def test_unreadable_state_is_told_and_reset_clears_it(state_dir: Path) -> None:
    state_dir.mkdir()
    (state_dir / "state.json").write_text("{")
    (state_dir / "mine.txt").write_text("not eoframework's")
    code, _, err = finish(eo_dev("status", "--state-dir", state_dir))
    assert code == 3
    assert "`eo dev reset`" in err
    assert finish(eo_dev("reset", "--state-dir", state_dir))[0] == 0
    assert [file.name for file in state_dir.iterdir()] == ["mine.txt"]


def test_unknown_command_of_run(state_dir: Path) -> None:
    code, _, err = finish(eo_dev("run", "--state-dir", state_dir, "--", "no-such-command"))
    assert code == 5
    assert "'no-such-command' is not found" in err
