"""Payloads made of a topic's payload type: random, the same for the same seed, with keys that meet again."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from pydantic import PydanticSchemaGenerationError, PydanticUserError, TypeAdapter, ValidationError

from eoframework.errors import ConfigurationError, EncodeError
from eoframework.topic import Topic

POOL = 5
"""So many values has a text field: `sku` is one of sku-1 to sku-5."""
_IDS = ("id", "_id", "Id", "ID", "uuid", "_no", "number")
_TRIES = 20
_DEPTH = 6
_BEGIN = datetime(2026, 1, 1, tzinfo=UTC)

Schema = Mapping[str, Any]


class NotGenerable(ConfigurationError):
    """Nobody can guess what a payload of this topic looks like."""


class Payloads:
    """Makes payloads of one topic."""

    def __init__(self, topic: Topic[Any], *, seed: int) -> None:
        """Raises NotGenerable."""
        self._topic = topic
        self._random = random.Random(f"{seed} {topic.name}")
        self._next = 0
        self._adapter: TypeAdapter[Any] = TypeAdapter(topic.payload_type)
        try:
            self._schema: Schema = self._adapter.json_schema()
        except (PydanticUserError, PydanticSchemaGenerationError) as error:
            raise self._refused(str(error).partition("\n")[0]) from error
        if not _describes_anything(self._schema):
            raise self._refused("its payload type says nothing of what is in it")
        self._pooled: frozenset[str] = frozenset()
        self._pooled = self._fields_of_the_key()

    def make(self) -> Any:
        """One payload. Raises NotGenerable when none is valid."""
        last: Exception | None = None
        for _ in range(_TRIES):
            try:
                return self._adapter.validate_json(json.dumps(self._value(self._schema, self._topic.name, _DEPTH)))
            except ValidationError as error:
                last = error
        raise self._refused(f"what was made of its payload type is not valid: {last}")

    def identity(self) -> UUID:
        """A message id for a topic whose payloads name none."""
        return UUID(int=self._random.getrandbits(128), version=4)

    def _refused(self, why: str) -> NotGenerable:
        return NotGenerable(
            f"messages of {self._topic.name!r} cannot be generated: {why}.",
            remedy='Give some: --sample FILE, one {"topic": ..., "payload": ...} a line; or --range TOPIC:START-END.',
        )

    def _fields_of_the_key(self) -> frozenset[str]:
        """Fields that would make each key a new one: messages of one key are what an order is about."""
        first, second = self.make(), self.make()
        if not isinstance(self._as_json(first), dict) or self._key(first) != self._key(first):
            return frozenset()
        found = set()
        for name, other in self._as_json(second).items():
            changed = self._changed(first, name, other)
            if changed is None or self._key(changed) == self._key(first):
                continue
            # What also names the message has to differ: the second one would be a duplicate.
            if not self._topic.has_id or self._topic.choose_id(changed, None) == self._topic.choose_id(first, None):
                found.add(name)
        return frozenset(found)

    def _changed(self, payload: Any, name: str, value: Any) -> Any:
        try:
            return self._adapter.validate_json(json.dumps({**self._as_json(payload), name: value}))
        except ValidationError:
            return None

    def _as_json(self, payload: Any) -> Any:
        return self._adapter.dump_python(payload, mode="json", by_alias=True)

    def _key(self, payload: Any) -> bytes | None:
        try:
            return self._topic.encode_key(payload, None)
        except EncodeError:
            return None

    # --- a value of a JSON schema ---

    def _value(self, schema: Schema, name: str, depth: int) -> Any:
        if "$ref" in schema:
            definitions = self._schema.get("$defs", {})
            return self._value(definitions[schema["$ref"].rpartition("/")[2]], name, depth)
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return self._random.choice(schema["enum"])
        for several in ("anyOf", "oneOf"):
            if several in schema:
                return self._value(self._one_of(schema[several], depth), name, depth)
        if "allOf" in schema:
            return self._value({key: one for part in schema["allOf"] for key, one in part.items()}, name, depth)
        kind = schema.get("type", "object" if "properties" in schema else "string")
        if kind == "array":
            return self._array(schema, name, depth)
        if kind == "object":
            return self._object(schema, depth)
        return self._scalar(str(kind), schema, name)

    def _one_of(self, schemas: list[Schema], depth: int) -> Schema:
        # A type that holds itself must end somewhere.
        ends = [one for one in schemas if "$ref" not in one and one.get("type") != "array"]
        return self._random.choice(ends if ends and depth <= 0 else schemas)

    def _array(self, schema: Schema, name: str, depth: int) -> list[Any]:
        if "prefixItems" in schema:
            return [self._value(one, name, depth - 1) for one in schema["prefixItems"]]
        least = int(schema.get("minItems", 0))
        most = max(least, min(int(schema.get("maxItems", 3)), 3 if depth > 0 else 0))
        return [self._value(schema.get("items", {}), name, depth - 1) for _ in range(self._random.randint(least, most))]

    def _object(self, schema: Schema, depth: int) -> dict[str, Any]:
        required = set(schema.get("required", ()))
        made = {}
        for name, one in schema.get("properties", {}).items():
            if name in required or (depth > 0 and self._random.random() < 0.8):
                made[name] = self._value(one, name, depth - 1)
        return made

    def _scalar(self, kind: str, schema: Schema, name: str) -> Any:
        if kind == "null":
            return None
        if kind == "boolean":
            return self._random.random() < 0.5
        if kind == "integer":
            return self._integer(schema, name)
        if kind == "number":
            low, high = _bounds(schema, 0, 100)
            return round(self._random.uniform(low, high), 2)
        return self._text(schema, name)

    def _integer(self, schema: Schema, name: str) -> int:
        low, high = _bounds(schema, 1, 9)
        if self._is_new(name):
            self._next += 1
            return max(int(low), 1) + self._next - 1
        if name in self._pooled:
            high = min(high, low + POOL - 1)
        return self._random.randint(int(low), max(int(low), int(high)))

    def _text(self, schema: Schema, name: str) -> str:
        form = schema.get("format", "")
        moment = _BEGIN + timedelta(seconds=self._random.randrange(86400 * 300))
        known = {
            "date-time": moment.isoformat(),
            "date": moment.date().isoformat(),
            "time": moment.time().isoformat(),
            "email": f"{name}-{self._random.randint(1, POOL)}@example.com",
            "uri": f"https://example.com/{name}",
            "duration": "PT1M",
            "ipv4": "192.0.2.1",
        }
        if form in known:
            return known[form]
        number = self._random.randint(1, POOL)
        if self._is_new(name):
            self._next += 1
            number = self._next
        if form == "uuid":
            return str(UUID(int=self._random.getrandbits(128) if self._is_new(name) else number, version=4))
        if "pattern" in schema and _is_decimal(schema["pattern"]):
            return str(number)
        text = f"{name}-{number}".ljust(int(schema.get("minLength", 0)), "x")
        return text[-int(schema["maxLength"]) :] if "maxLength" in schema else text

    def _is_new(self, name: str) -> bool:
        """Whether no two payloads have it in common, as far as its name tells."""
        return name not in self._pooled and name.endswith(_IDS)


def _bounds(schema: Schema, low: float, high: float) -> tuple[float, float]:
    least = schema.get("minimum", schema["exclusiveMinimum"] + 1 if "exclusiveMinimum" in schema else None)
    most = schema.get("maximum", schema["exclusiveMaximum"] - 1 if "exclusiveMaximum" in schema else None)
    if least is None:
        least = low if most is None else min(low, most)
    return least, most if most is not None and most < high else max(high, least)


def _describes_anything(schema: Schema) -> bool:
    return bool(
        {"properties", "$ref", "anyOf", "oneOf", "allOf", "enum", "const", "items", "prefixItems"} & set(schema)
    )


def _is_decimal(pattern: str) -> bool:
    # What pydantic writes for Decimal.
    return "\\d" in pattern and "[+-]" in pattern
