"""Payload types of every kind, and a record to decode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, Field
from typing_extensions import TypedDict

from eoframework.message import Headers, Record


class Order(BaseModel):
    order_id: int
    sku: str = "a"


class Camel(BaseModel):
    order_id: int = Field(alias="orderId")


@dataclass
class Refund:
    order_id: int
    amount: float = 1.0


class Note(TypedDict):
    order_id: int
    text: str


class Placed(BaseModel):
    kind: Literal["placed"] = "placed"
    order_id: int


class Cancelled(BaseModel):
    kind: Literal["cancelled"] = "cancelled"
    order_id: int
    why: str


AnyOrder = Annotated[Placed | Cancelled, Field(discriminator="kind")]


def record(value: bytes | None, *, headers: Headers = (), key: bytes | None = None, timestamp: int = 0) -> Record:
    return Record("orders", 3, 42, key, value, headers, timestamp)
