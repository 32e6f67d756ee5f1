"""What tests of programs built on eoframework need.

`plugin`: the pytest fixture `eo`, there wherever eoframework is installed.
`containers`: real services in containers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eoframework.testing.plugin_database import TestDatabases as TestDatabases
    from eoframework.testing.plugin_eo import Eo as Eo

_HOMES = {"Eo": "plugin_eo", "TestDatabases": "plugin_database"}


def __getattr__(name: str) -> object:
    # pytest imports the plugin in every project of an environment that has eoframework installed, also where nothing of
    # it is used: SQLAlchemy and the Kafka client come with the first test that asks for one of the fixtures.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
