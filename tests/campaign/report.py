"""docs/campaign/README.md, rendered from the JSON of all layers.

python -m tests.campaign.report
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.campaign import report_file

PAGE = report_file.DIRECTORY / "README.md"
_HEAD = """# The crash campaign

Rendered by `python -m tests.campaign.report` from the files beside it, which `make campaign` adds to. What is counted
here was seen; none of it is a proof. "Rule of three": with no violation in N crashes, the chance of one is below 3/N at
95 % confidence, for crashes drawn as these were; the same for cuts, each of which leaves a call in doubt.
"""


def render(directory: Path = report_file.DIRECTORY) -> str:
    """The page."""
    layers = [json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))]
    parts = [_HEAD, *_overview(layers), ""]
    for layer in layers:
        parts += [f"## {layer['layer']}", "", str(layer["what"]), "", *_facts(layer), ""]
        parts += [*_counts(layer), *_stages(layer), *_models(layer), *_mutants(layer)]
    return "\n".join(parts).rstrip() + "\n"


def statement(layer: Mapping[str, Any]) -> str:
    """What the layer's numbers say, and no more."""
    if "planted" in layer:
        return f"{layer['found']} of {layer['planted']} planted bugs found"
    violations, (faults, what) = len(layer.get("violations", ())), _faults(layer)
    said = report_file.statement(violations, faults, f"injected {what}") if faults else f"{violations} violations"
    mended = len(layer.get("mended", ()))
    return f"{said}; {mended} found before, mended since" if mended else said


def _faults(layer: Mapping[str, Any]) -> tuple[int, str]:
    """What its statement is about: crashes; where nothing was killed, connections that were cut."""
    for begins, what in (("kill", "crashes"), ("cut ", "cuts")):
        if count := report_file.injected(layer, begins):
            return count, what
    return 0, ""


def _overview(layers: list[dict[str, Any]]) -> Iterator[str]:
    yield "| layer | what it says | seconds | commit |"
    yield "|---|---|---:|---|"
    for layer in layers:
        seconds = f"{layer['seconds']:,.0f}" if "seconds" in layer else "–"
        yield f"| {layer['layer']} | {statement(layer)} | {seconds} | `{str(layer['commit'])[:7]}` |"


def _facts(layer: Mapping[str, Any]) -> Iterator[str]:
    if "conditions" in layer:
        yield f"{layer['conditions']}"
        yield ""
    versions = ", ".join(f"{name} {version}" for name, version in (layer.get("versions") or {}).items())
    if versions:
        yield f"Versions: {versions}."
    plain = {name: value for name, value in layer.items() if isinstance(value, int | float) and name != "seconds"}
    if plain:
        yield ", ".join(f"{name.replace('_', ' ')}: {value:,}" for name, value in plain.items()) + "."
    for violation in layer.get("violations", ()):
        yield f"- **violation**: {violation}"
    for found in layer.get("mended", ()):
        yield f"- found in run {found['run']}, mended by `{found['mended_by']}`: {found['invariant']} {found['what']}"


def _counts(layer: Mapping[str, Any]) -> Iterator[str]:
    """The injected faults, and per point what was injected there, where the layer has it by a plain number."""
    for name in ("injected", "points"):
        counts = {item: count for item, count in (layer.get(name) or {}).items() if isinstance(count, int) and count}
        if counts:
            yield f"| {name} | times |"
            yield "|---|---:|"
            yield from (f"| {item.replace('|', '/')} | {count:,} |" for item, count in sorted(counts.items()))
            yield ""


def _stages(layer: Mapping[str, Any]) -> Iterator[str]:
    """Flow by flow, how many of all cases there are were run, where they are so few that all of them can be."""
    every = layer.get("every") or {}
    if not every:
        return
    yield f"| of every | {' | '.join(every)} |"
    yield f"|---|{'---:|' * len(every)}"
    for flow in sorted({flow for flows in every.values() for flow in flows}):
        counts = (flows.get(flow) for flows in every.values())
        yield f"| {flow} | {' | '.join(f'{one[0]:,} of {one[1]:,}' if one else '–' for one in counts)} |"
    yield ""


def _models(layer: Mapping[str, Any]) -> Iterator[str]:
    """What was found in each model, with and without a protection."""
    if layer["layer"] != "model":
        return
    yield from ("| model | states | steps | found |", "|---|---:|---:|---|")
    for name, cell in layer["cells"].items():
        yield f"| {name} | {cell['states']:,} | {cell['steps']:,} | {cell['found'] or 'nothing, as it should be'} |"
    yield ""


def _mutants(layer: Mapping[str, Any]) -> Iterator[str]:
    """Which bugs were planted, what they would do, who found them, and how soon."""
    if "planted" not in layer:
        return
    yield from ("| planted bug | what it does | found by | s |", "|---|---|---|---:|")
    for name, one in layer["mutants"].items():
        yield f"| {name} | {one['what']} | {one['found_by'] or '**nobody**'} | {one['seconds']:,.0f} |"
    yield ""


def main() -> None:
    PAGE.write_text(render())
    print(f"{PAGE} written")


if __name__ == "__main__":
    main()
