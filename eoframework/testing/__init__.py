"""What tests of programs built on eoframework need.

`plugin`: the pytest fixtures `eo` and `eo_crash`, there wherever eoframework is installed (docs/crashtest.md).
`containers`: real services in containers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eoframework.testing.plugin_crash import CrashTests as CrashTests
    from eoframework.testing.plugin_database import TestDatabases as TestDatabases
    from eoframework.testing.plugin_eo import Eo as Eo

_HOMES = {"Eo": "plugin_eo", "TestDatabases": "plugin_database", "CrashTests": "plugin_crash"}


def __getattr__(name: str) -> object:
    # pytest imports the plugin in every project of an environment that has eoframework installed, also where nothing of
    # it is used: SQLAlchemy and the Kafka client come with the first test that asks for one of the fixtures.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
