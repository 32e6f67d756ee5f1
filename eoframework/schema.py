"""The PostgreSQL schema our tables live in."""

from __future__ import annotations

import re
from dataclasses import dataclass

from eoframework.errors import ConfigurationError

_NAME = re.compile(r"[a-z_][a-z0-9_]{0,62}")


@dataclass(frozen=True, slots=True)
class Schema:
    """A validated schema name; SQL of this package writes `{eo}.table` and asks `sql` to fill it in."""

    name: str = "eo"

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigurationError(
                f"database schema name {self.name!r} is not usable.",
                remedy="Use lower-case letters, digits and underscores, at most 63, not starting with a digit.",
            )

    def sql(self, template: str) -> str:
        """The statement with this schema's quoted name; never used for values, those are bound."""
        return template.replace("{eo}", f'"{self.name}"')
