"""What every Kafka client is configured with, and what cannot be changed."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import confluent_kafka
import pytest
from confluent_kafka import Consumer, Producer
from confluent_kafka.admin import AdminClient

from eoframework import kafka_keys
from eoframework.errors import ConfigurationError
from eoframework.kafka import config
from eoframework.settings import Settings


def load(**kafka: str) -> Settings:
    return Settings.load(kafka_bootstrap_servers="127.0.0.1:1", kafka=kafka)


@pytest.mark.parametrize("key", sorted(kafka_keys.REASONS))
def test_a_fixed_key_is_refused_by_name_with_the_reason(key: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        load(**{key: "1"})
    assert key in raised.value.what
    assert kafka_keys.REASONS[key] in raised.value.what


@pytest.mark.parametrize(
    ("spelling", "value"),
    [
        ("EO_KAFKA_ENABLE_AUTO_COMMIT", "true"),
        ("EO_KAFKA_ACKS", "1"),
        ("EO_KAFKA_ISOLATION_LEVEL", "read_uncommitted"),
        ("EO_KAFKA_REBALANCE_CB", "x"),
        ("eo_kafka_enable_idempotence", "false"),
        ("EO_KAFKA_MAX_IN_FLIGHT", "6"),
        ("EO_KAFKA_RETRIES", "0"),
    ],
)
def test_an_unsafe_environment_variable_is_refused(spelling: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(spelling, value)
    with pytest.raises(ConfigurationError, match="cannot be overridden"):
        Settings.load()


@pytest.mark.parametrize("key", sorted(kafka_keys.CLASSIC_ONLY))
def test_keys_of_the_classic_protocol_need_it(key: str) -> None:
    with pytest.raises(ConfigurationError, match="EO_GROUP_PROTOCOL=classic"):
        load(**{key: "1"})
    Settings.load(group_protocol="classic", kafka={key: "1"})


def test_consumer_and_producers_are_safe() -> None:
    settings = load(**{"linger.ms": "7", "fetch.min.bytes": "2", "socket.timeout.ms": "9000"})
    consumer = config.consumer_config(settings, group="g", client_id="c")
    assert (
        consumer.items()
        >= {
            "group.id": "g",
            "group.protocol": "consumer",
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "auto.offset.reset": "error",
            "isolation.level": "read_committed",
            "check.crcs": True,
            "max.poll.interval.ms": 300_000,
            "fetch.min.bytes": "2",
            "socket.timeout.ms": "9000",
        }.items()
    )
    assert "linger.ms" not in consumer
    producer = config.transactional_config(settings, transactional_id="t", client_id="c")
    assert (
        producer.items()
        >= {
            "acks": "all",
            "enable.idempotence": True,
            "partitioner": "murmur2_random",
            "transactional.id": "t",
            "retry.backoff.ms": 100,
            "linger.ms": "7",
        }.items()
    )
    assert producer["retry.backoff.max.ms"] >= producer["retry.backoff.ms"]
    assert "fetch.min.bytes" not in producer


def test_a_producers_clients_compress_and_do_not_wait_unless_told_otherwise() -> None:
    made = config.sending_config(load(), client_id="c"), config.sending_transaction_config(load(), transactional_id="t")
    assert [one["compression.type"] for one in made] == ["lz4", "lz4"]
    assert (made[0]["linger.ms"], made[0]["acks"], made[0]["enable.idempotence"]) == (0, "all", True)
    for key in ("compression.type", "compression.codec"):
        told = config.sending_config(load(**{key: "none", "linger.ms": "7"}), client_id="c")
        assert (told[key], told["linger.ms"]) == ("none", "7")
        assert len({"compression.type", "compression.codec"} & told.keys()) == 1


@pytest.mark.parametrize("protocol", ["consumer", "classic"])
@pytest.mark.parametrize(
    "kafka",
    [{}, {"socket.timeout.ms": "4000"}, {"socket.timeout.ms": "90000", "message.max.bytes": "80000000"}],
    ids=["defaults", "impatient", "slow line, large messages"],
)
def test_librdkafka_takes_every_configuration(protocol: str, kafka: dict[str, str]) -> None:
    """Seen to fail, for the slow line, without `_within` in kafka/config.py: librdkafka refuses a socket timeout above
    the transaction's; and without `largest` in `consumer_config`: it refuses fetches smaller than a message.
    """
    settings = Settings.load(kafka_bootstrap_servers="127.0.0.1:1", group_protocol=protocol, kafka=kafka)
    clients: list[Callable[[], object]] = [
        lambda: Consumer(config.consumer_config(settings, group="g", client_id="c")),
        lambda: Producer(config.producer_config(settings, client_id="c")),
        lambda: Producer(config.transactional_config(settings, transactional_id="t", client_id="c")),
        lambda: Producer(config.transform_config(settings, transactional_id="t", client_id="c")),
        lambda: Producer(config.sending_config(settings, client_id="c")),
        lambda: Producer(config.sending_transaction_config(settings, transactional_id="t")),
        lambda: AdminClient(config.admin_config(settings)),
    ]
    for make in clients:
        assert make() is not None


def test_a_silent_broker_is_given_up_after_ten_seconds_or_what_was_asked_for() -> None:
    """And sooner where a Kafka transaction would be over by then."""
    patient, hasty = load(), load(**{"socket.timeout.ms": "4000", "request.timeout.ms": "2000"})
    for made in (config.consumer_config(patient, group="g", client_id="c"), config.admin_config(patient)):
        assert made["socket.timeout.ms"] == 10_000
    relay = config.transactional_config(patient, transactional_id="t", client_id="c")
    assert (relay["socket.timeout.ms"], relay["request.timeout.ms"]) == (10_000, 9_000)
    assert config.transform_config(patient, transactional_id="t", client_id="c")["socket.timeout.ms"] == 5_000
    relay = config.transactional_config(hasty, transactional_id="t", client_id="c")
    assert (relay["socket.timeout.ms"], relay["request.timeout.ms"]) == (4_000, "2000")
    assert config.admin_config(hasty)["socket.timeout.ms"] == "4000"


def test_the_list_of_keys_is_the_installed_librarys(tmp_path: Path) -> None:
    """Fails when a new librdkafka knows other keys: then kafka_keys needs them too."""
    assert set(_installed_keys(tmp_path / "keys")) == set(kafka_keys.KNOWN)


def _installed_keys(file: Path) -> list[str]:
    package = Path(confluent_kafka.__file__).parent
    (library,) = [*package.parent.glob("confluent_kafka.libs/librdkafka-*")]
    rdkafka, libc = ctypes.CDLL(str(library)), ctypes.CDLL(None)
    libc.fopen.restype = ctypes.c_void_p
    output = ctypes.c_void_p(libc.fopen(str(file).encode(), b"w"))
    rdkafka.rd_kafka_conf_properties_show(output)
    libc.fclose(output)
    rows = (line.split("|") for line in file.read_text().splitlines() if line.count("|") >= 5)
    names = (row[0].strip() for row in rows)
    return [name for name in names if name and name != "Property" and not name.startswith("-")]
