"""The house rules that a linter does not know: who may import whom, where clocks are read, how large things get."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

PACKAGE = REPOSITORY / "eoframework"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts)
TREES = {path: ast.parse(path.read_text(), str(path)) for path in MODULES}
NAMES = {
    path: ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__") for path in MODULES
}

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
BANNED_NAMES = {
    "utils",
    "util",
    "helpers",
    "helper",
    "common",
    "base",
    "core",
    "misc",
    "manager",
    "service",
    "services",
}
MAY_READ_THE_ENVIRONMENT = ("eoframework.settings", "eoframework.dev", "eoframework.testing")
CLOCKS = {
    ("time", "sleep"),
    ("time", "time"),
    ("time", "monotonic"),
    ("time", "perf_counter"),
    ("datetime", "now"),
    ("datetime", "utcnow"),
    ("datetime", "today"),
    ("date", "today"),
}
WALLS = {"sqlalchemy": "eoframework.db", "psycopg": "eoframework.db", "confluent_kafka": "eoframework.kafka"}
# SQLAlchemy's types (Session, Engine, Connection) are part of what users see.
MAY_NAME_TYPES_OF = {
    "sqlalchemy": (
        "eoframework.app",
        "eoframework.tx",
        "eoframework.handlers",
        "eoframework.consume",
        "eoframework.testing",
    ),
    "psycopg": ("eoframework.dev", "eoframework.testing"),
    "confluent_kafka": ("eoframework.testing",),
}


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def imports(path: Path) -> Iterator[tuple[ast.Import | ast.ImportFrom, str]]:
    """Every imported name with its node; `from a import b` gives a.b, and a unless b is a module."""
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            parts = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = [part for part in parts if part in NAMES.values()]
            # `from package import module` needs the module; the package's own names only if one of them is asked for.
            if len(modules) < len(parts):
                yield node, str(node.module)
            yield from ((node, part) for part in parts)


def for_typing_only(path: Path) -> set[int]:
    """The lines of imports under TYPE_CHECKING: nothing is imported there when the program runs."""
    found: set[int] = set()
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            found |= {child.lineno for child in ast.walk(node) if isinstance(child, ast.Import | ast.ImportFrom)}
    return found


def test_import_linter_agrees() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).parent / "lint-imports")], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_import_cycles_counting_those_inside_functions() -> None:
    known = {name: path for path, name in NAMES.items()}
    graph = {
        name: {
            target
            for node, target in imports(path)
            if target in known and target != name and node.lineno not in for_typing_only(path)
        }
        for name, path in known.items()
    }
    cycle = _find_cycle(graph)
    assert not cycle, " -> ".join(cycle)


def test_the_search_for_cycles_finds_one() -> None:
    assert _find_cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": set()})
    assert not _find_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()})


def test_imports_stand_at_the_top() -> None:
    offenders = [
        f"{path}:{node.lineno}"
        for path in MODULES
        if not within(NAMES[path], "eoframework.cli")
        for function in ast.walk(TREES[path])
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom) or _loads_ours(node)
    ]
    assert not offenders


@pytest.mark.parametrize("library", sorted(WALLS))
def test_the_walls_stand(library: str) -> None:
    offenders = [
        f"{path}:{node.lineno} imports {target}"
        for path in MODULES
        if not within(NAMES[path], WALLS[library], *MAY_NAME_TYPES_OF[library])
        for node, target in imports(path)
        if within(target, library) and node.lineno not in for_typing_only(path)
    ]
    assert not offenders


def test_clocks_are_read_in_one_place() -> None:
    offenders = [
        f"{path}:{node.lineno} {ast.unparse(node)}"
        for path in MODULES
        if NAMES[path] != "eoframework.clock"
        for node in ast.walk(TREES[path])
        if (isinstance(node, ast.Attribute) and _dotted_pair(node) in CLOCKS)
        or (isinstance(node, ast.ImportFrom) and node.module == "time")
    ]
    assert not offenders


def test_the_environment_is_read_in_one_place() -> None:
    offenders = [
        f"{path}:{node.lineno}"
        for path in MODULES
        if not within(NAMES[path], *MAY_READ_THE_ENVIRONMENT)
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.Attribute) and _dotted_pair(node) in {("os", "environ"), ("os", "getenv")}
    ]
    assert not offenders


def test_files_are_short() -> None:
    long = {str(path): lines for path in MODULES if (lines := len(path.read_text().splitlines())) > MAX_FILE_LINES}
    assert not long


def test_functions_are_short() -> None:
    long = [
        f"{path}:{node.lineno} {node.name} has {length} lines"
        for path in MODULES
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or 0) - node.lineno + 1) > MAX_FUNCTION_LINES
    ]
    assert not long


def test_modules_are_named_for_what_they_are() -> None:
    assert not [name for name in NAMES.values() if BANNED_NAMES & set(name.split("."))]


def test_nothing_is_left_for_later() -> None:
    left = re.compile("TO" + "DO|FIX" + "ME|XX" + "X|HA" + "CK")
    files = [*MODULES, *(REPOSITORY / "tests").rglob("*.py"), *(REPOSITORY / "examples").rglob("*.py")]
    offenders = [
        f"{path}:{number}"
        for path in files
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if left.search(line)
    ]
    assert not offenders


def test_no_error_is_swallowed_without_a_word() -> None:
    """`except ...: pass` hides a failure from everybody; a comment or a log line must say why it may be ignored."""
    offenders = [
        f"{path}:{node.lineno}"
        for path in MODULES
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.ExceptHandler) and len(node.body) == 1 and isinstance(node.body[0], ast.Pass)
    ]
    assert not offenders


def test_no_test_is_excused() -> None:
    excuses = re.compile(r"mark\.(skip|skipif|xfail|flaky)\b|pytest\.(skip|xfail|importorskip)\(")
    offenders = [
        f"{path}:{number}"
        for path in (REPOSITORY / "tests").rglob("*.py")
        if path != Path(__file__)
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if excuses.search(line)
    ]
    assert not offenders


def test_delivery_is_never_called_exactly_once() -> None:
    """Nobody can promise it; what we promise is processing. The glossary's table names it as the word to avoid."""
    claim = re.compile(r"exactly[- ]once[- ]delivery", re.IGNORECASE)
    files = [*MODULES, *REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md"), REPOSITORY / "pyproject.toml"]
    offenders = [
        f"{path}:{number}: {line.strip()}"
        for path in files
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if claim.search(line) and not line.startswith("|") and not re.search(r"\b(no|not|never|nobody)\b", line, re.I)
    ]
    assert not offenders


def _find_cycle(graph: dict[str, set[str]]) -> list[str]:
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        for target in sorted(graph[name]):
            if cycle := visit(target, [*way, name]):
                return cycle
        done.add(name)
        return []

    return next((cycle for name in sorted(graph) if (cycle := visit(name, []))), [])


def _loads_ours(node: ast.AST) -> bool:
    """Whether it is `import_module` of one of our own modules; a user's app and optional packages come that way too."""
    called = isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module")
    return called and "eoframework" in ast.unparse(node)


def _dotted_pair(node: ast.Attribute) -> tuple[str, str]:
    return ast.unparse(node.value).split(".")[-1], node.attr
