"""Exactly-once processing on Apache Kafka and PostgreSQL."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eoframework.app import App as App
    from eoframework.codec import Codec as Codec
    from eoframework.errors import BatchItemFailed as BatchItemFailed
    from eoframework.errors import ConfigurationError as ConfigurationError
    from eoframework.errors import DeclarationError as DeclarationError
    from eoframework.errors import DecodeError as DecodeError
    from eoframework.errors import EncodeError as EncodeError
    from eoframework.errors import EoError as EoError
    from eoframework.errors import Fenced as Fenced
    from eoframework.errors import HandlerMisuse as HandlerMisuse
    from eoframework.errors import OutcomeUnknown as OutcomeUnknown
    from eoframework.errors import Reject as Reject
    from eoframework.errors import Retryable as Retryable
    from eoframework.errors import RetryLater as RetryLater
    from eoframework.external import External as External
    from eoframework.external import ExternalCall as ExternalCall
    from eoframework.external import NotDone as NotDone
    from eoframework.message import Message as Message
    from eoframework.producer import Producer as Producer
    from eoframework.producer_transaction import KafkaTransaction as KafkaTransaction
    from eoframework.retry import Breaker as Breaker
    from eoframework.retry import Retry as Retry
    from eoframework.retry import exponential as exponential
    from eoframework.retry import fixed as fixed
    from eoframework.sent import NotAllSent as NotAllSent
    from eoframework.sent import Sent as Sent
    from eoframework.topic import Topic as Topic
    from eoframework.transforms import Out as Out
    from eoframework.tx import Tx as Tx

_HOMES = {
    # declaring
    "App": "app",
    "Topic": "topic",
    "Codec": "codec",
    "Retry": "retry",
    "exponential": "retry",
    "fixed": "retry",
    "Breaker": "retry",
    "External": "external",
    # inside a handler
    "Message": "message",
    "Tx": "tx",
    "Out": "transforms",
    "RetryLater": "errors",
    "Reject": "errors",
    "BatchItemFailed": "errors",
    "ExternalCall": "external",
    "NotDone": "external",
    # sending without a database
    "Producer": "producer",
    "KafkaTransaction": "producer_transaction",
    "Sent": "sent",
    "NotAllSent": "sent",
    "OutcomeUnknown": "errors",
    "Retryable": "errors",
    "Fenced": "errors",
    # errors
    "EoError": "errors",
    "ConfigurationError": "errors",
    "DeclarationError": "errors",
    "DecodeError": "errors",
    "EncodeError": "errors",
    "HandlerMisuse": "errors",
}

__all__ = [  # noqa: RUF022 - in the groups above
    "App",
    "Topic",
    "Codec",
    "Retry",
    "exponential",
    "fixed",
    "Breaker",
    "External",
    "Message",
    "Tx",
    "Out",
    "RetryLater",
    "Reject",
    "BatchItemFailed",
    "ExternalCall",
    "NotDone",
    "Producer",
    "KafkaTransaction",
    "Sent",
    "NotAllSent",
    "OutcomeUnknown",
    "Retryable",
    "Fenced",
    "EoError",
    "ConfigurationError",
    "DeclarationError",
    "DecodeError",
    "EncodeError",
    "HandlerMisuse",
]


def __getattr__(name: str) -> object:
    # `eo --help` imports this package too, and SQLAlchemy with pydantic take 0.6 s: a name is loaded when it is used.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
