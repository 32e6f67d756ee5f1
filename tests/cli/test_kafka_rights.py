"""A cluster with logins and access rights: a wrong password, a missing right; on a broker of our own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
from confluent_kafka.admin import (
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
)

from eoframework import dev
from eoframework.dev import processes
from eoframework.settings import Settings
from tests.cli.conftest import APP, Shell

USER, PASSWORD, WRONG = "eo", "the-right-canary", "the-wrong-canary"


@dataclass(frozen=True)
class Guarded:
    """One broker, two doors: whoever comes by `open` may do everything, by `login` what the rights of `eo` allow."""

    open: str
    login: str

    def grant(self, kind: ResourceType, *operations: AclOperation) -> None:
        admin = AdminClient({"bootstrap.servers": self.open})
        for operation in operations:
            right = AclBinding(
                kind, "*", ResourcePatternType.LITERAL, f"User:{USER}", "*", operation, AclPermissionType.ALLOW
            )
            for future in admin.create_acls([right]).values():
                future.result(10)

    def revoke_all(self) -> None:
        everything = AclBindingFilter(
            ResourceType.ANY, None, ResourcePatternType.ANY, None, None, AclOperation.ANY, AclPermissionType.ANY
        )
        admin = AdminClient({"bootstrap.servers": self.open})
        for future in admin.delete_acls([everything]).values():
            future.result(10)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    open_port, login_port, controller_port = free_ports(3)
    doors = f"PLAINTEXT://127.0.0.1:{open_port},LOGIN://127.0.0.1:{login_port}"
    properties = {
        "listeners": f"{doors},CONTROLLER://127.0.0.1:{controller_port}",
        "advertised.listeners": doors,
        "controller.quorum.bootstrap.servers": f"127.0.0.1:{controller_port}",
        "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,LOGIN:SASL_PLAINTEXT",
        "listener.name.login.sasl.enabled.mechanisms": "PLAIN",
        "listener.name.login.plain.sasl.jaas.config": "org.apache.kafka.common.security.plain.PlainLoginModule "
        f'required user_{USER}="{PASSWORD}";',
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "super.users": "User:ANONYMOUS",
    }
    options = dev.KafkaOptions(port=open_port, properties=properties)
    with dev.start(tmp_path_factory.mktemp("guarded") / ".eo", kafka=options):
        yield Guarded(f"127.0.0.1:{open_port}", f"127.0.0.1:{login_port}")


@pytest.fixture
def login(guarded: Guarded, bare_shell: Shell) -> Iterator[Shell]:
    """A shell that has to log in, and whose topics exist."""
    by_open = {"kafka_bootstrap_servers": guarded.open}
    replace(bare_shell, settings=bare_shell.settings.model_copy(update=by_open)).run("topics", "apply", APP)
    settings = Settings.load(
        database_url=bare_shell.settings.require_database_url(), kafka_bootstrap_servers=guarded.login
    )
    yield replace(bare_shell, settings=settings, extra=LOGIN)
    guarded.revoke_all()


LOGIN = {
    "EO_KAFKA_SECURITY_PROTOCOL": "SASL_PLAINTEXT",
    "EO_KAFKA_SASL_MECHANISM": "PLAIN",
    "EO_KAFKA_SASL_USERNAME": USER,
    "EO_KAFKA_SASL_PASSWORD": PASSWORD,
}


@pytest.mark.parametrize("command", ["run", "relay"])
def test_a_wrong_password_is_not_waited_for(login: Shell, command: str) -> None:
    done = login.run(command, APP, code=3, EO_KAFKA_SASL_PASSWORD=WRONG)
    assert "refuses the login" in done.stderr
    assert WRONG not in done.stderr + done.stdout


def test_without_rights_on_the_topic(login: Shell) -> None:
    said = login.run("run", APP, code=3).stderr
    assert login.orders.split(".")[0] in said
    assert "Grant the right" in said


def test_without_rights_on_the_group(login: Shell, guarded: Guarded) -> None:
    guarded.grant(ResourceType.TOPIC, AclOperation.READ, AclOperation.DESCRIBE_CONFIGS)
    said = login.run("run", APP, code=3).stderr
    assert f"group {login.consumer}" in said
    assert "Grant the right" in said


def test_without_rights_on_the_relays_transactions(login: Shell, guarded: Guarded) -> None:
    login.publish(0, 3)
    guarded.grant(ResourceType.TOPIC, AclOperation.READ, AclOperation.WRITE, AclOperation.DESCRIBE_CONFIGS)
    guarded.grant(ResourceType.GROUP, AclOperation.READ)
    done = login.run("relay", APP, "--once", code=3)
    assert "transactional" in done.stderr.lower()
    assert login.scalar("SELECT count(*) FROM eo.outbox_message") == 3


def test_with_all_rights_everything_runs(login: Shell, guarded: Guarded) -> None:
    guarded.grant(ResourceType.TOPIC, AclOperation.READ, AclOperation.WRITE, AclOperation.DESCRIBE_CONFIGS)
    guarded.grant(ResourceType.GROUP, AclOperation.READ, AclOperation.DESCRIBE)
    guarded.grant(ResourceType.TRANSACTIONAL_ID, AclOperation.WRITE, AclOperation.DESCRIBE)
    login.publish(0, 10)
    login.run("relay", APP, "--once")
    login.run("run", APP, "--once", "--handler", "book")
    assert login.scalar("SELECT count(*) FROM booking") == 10


def free_ports(count: int) -> list[int]:
    found: list[int] = []
    while len(found) < count:
        found.append(processes.free_port(avoid=found))
    return found
