"""The protocols as small machines, every state of them: python -m tests.campaign.model [--only NAME] [--without NAME]

What a crash test samples, this enumerates: every order in which two workers, a server, a broker and a network can act,
with two crashes at any moment, a pause, a late EndTxn. Each step carries the events of crashtest/points.py that it
passes, so the model cannot forget a boundary (test_model.py); each protection of the design is a flag, and with any one
of them taken away the exploration finds what goes wrong, and the shortest way there.

Three machines and not one: consuming, relaying and transforming share no state but the outbox rows, which the first
only adds and the second only takes. Explored together they would be each other's product, ten thousand times as many
states that say nothing new.

It says nothing about the code: that each step is one there, and atomic where it is one here, is what the crash tests on
real services are for.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.campaign.exploration import Found, Machine, explore
from tests.campaign.model_consume import Consume
from tests.campaign.model_relay import Relay
from tests.campaign.model_transform import Transform
from tests.campaign.report_file import DIRECTORY, commit, write_json

MACHINES: dict[str, type[Consume] | type[Relay] | type[Transform]] = {
    machine.name: machine for machine in (Consume, Relay, Transform)
}
REPORT = DIRECTORY / "model.json"


def machine_of(name: str, without: str = "") -> Machine:
    """One of MACHINES, as it is or without a protection."""
    return MACHINES[name](without)


def document(results: Sequence[Found], *, started: datetime) -> dict[str, Any]:
    """The report of this layer (tests/campaign/report.py)."""
    whole = [found for found in results if not found.without]
    return {
        "layer": "model",
        "what": "Every order of steps of two workers, server, broker and network, in small models of the protocols.",
        "commit": commit(),
        "versions": {"python": platform.python_version()},
        "seeds": [],
        # Nothing here is a sample: the rule of three has nothing to say about it.
        "injected": {},
        "enumerated": {f"crash, {found.machine}": found.fired["crash"] for found in whole},
        "violations": [f"{found.machine}: {found.wrong}" for found in whole if found.wrong],
        "seconds": round(sum(found.seconds for found in results), 1),
        "started": started.isoformat(timespec="seconds"),
        "updated": datetime.now(UTC).isoformat(timespec="seconds"),
        "cells": {_cell(found): _measured(found) for found in results},
    }


def _cell(found: Found) -> str:
    return f"{found.machine} without {found.without}" if found.without else found.machine


def _measured(found: Found) -> dict[str, Any]:
    return {
        "states": found.states,
        "steps": found.steps,
        "seconds": round(found.seconds, 1),
        "expected": "a violation" if found.without else "none",
        "found": found.wrong,
        "trace": [f"{step.who}: {step.action}" for step in found.trace],
    }


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.campaign.model")
    parser.add_argument("--only", choices=sorted(MACHINES), help="one machine")
    parser.add_argument("--without", metavar="PROTECTION", help="only without this one, as the report names it")
    parser.add_argument("--report", type=Path, default=REPORT, help="written when nothing is left out")
    asked = parser.parse_args(arguments)
    started, results = datetime.now(UTC), list[Found]()
    for name, machine in MACHINES.items():
        wanted = [without for without in ("", *machine.PROTECTIONS) if asked.without in (None, without)]
        for without in wanted if asked.only in (None, name) else []:
            results.append(explore(machine_of(name, without), without=without))
            print(*results[-1].lines(), sep="\n", flush=True)
    if not results:
        parser.error(f"no machine has a protection called {asked.without!r}")
    if asked.only is None and asked.without is None:
        write_json(asked.report, document(results, started=started))
    return 0 if all(bool(found.wrong) == bool(found.without) for found in results) else 4


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
