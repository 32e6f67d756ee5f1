"""Every statement of the product that names one of our tables, with something in the place of its parameters."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

from eoframework import db
from eoframework.db.grants import Purpose

# What stands in templates besides parameters; empty where that makes a statement of it.
_PARTS = {"conditions": "true", "not_held": "true", "order": "1"}
_PART = re.compile(r"\{(\w+)\}")
_PARAMETER = re.compile(r"%\((\w+)\)s|(?<![:\w]):(\w+)")
_TYPED = {
    "horizon": "now()",
    "before": "now()",
    "seconds": "1",
    "after": "interval '1 hour'",
    "renew_after": "interval '1 hour'",
}
_BEGINNING = re.compile(r"\s*(WITH|SELECT|INSERT|UPDATE|DELETE)\b")
_RELAY = {"shards", "pending"}
# What only the owner may declare: test_what_only_the_owner_may_declare.
_OWNER = {"adopting", "outbox_adoption"}


def all_statements() -> Iterator[tuple[Purpose, str, str]]:
    """Whose it is, the module it stands in, and the statement as it can be explained."""
    for path in sorted(Path(str(db.__file__)).parent.glob("*.py")):
        if path.stem in _OWNER:
            continue
        purpose: Purpose = "relay" if path.stem in _RELAY else "app"
        for template in sorted(set(_templates(path))):
            for table in ("outbox_message", "delayed_message") if "{table}" in template else ("",):
                if _BEGINNING.match(template):
                    yield purpose, path.stem, _filled(template.replace("{table}", table), path.stem)


def _templates(path: Path) -> Iterator[str]:
    if path.stem in {"__init__", "joined"}:  # joined: which version table there is, which its test reads
        return
    for value in vars(importlib.import_module(f"eoframework.db.{path.stem}")).values():
        for text in value.values() if isinstance(value, dict) else [value]:
            if isinstance(text, str) and "{eo}" in text:
                yield text
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    for node in (inner for function in functions for inner in ast.walk(function)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "{eo}" in node.value:
            yield node.value


def _filled(template: str, module: str) -> str:
    # Typed only where NULL would be ambiguous: elsewhere a number may be asked for under the same name.
    typed = _TYPED if module in {"coverage", "processed"} else {}
    statement = template.replace("{eo}", '"eo"')
    statement = _PART.sub(lambda part: _PARTS.get(part[1], ""), statement)
    return _PARAMETER.sub(lambda parameter: typed.get(parameter[1] or parameter[2], "NULL"), statement)
