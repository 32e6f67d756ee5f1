"""Whether what looks for bugs finds the ones we plant: each protection taken out in a copy, until a layer objects.

    eo dev run -- python -m tests.campaign.mutation [--minutes N] [--only NAME] [--again]

What was found out is kept in docs/campaign/mutation.json, with the commit: a later run goes on where this one stopped.
A layer counts only if it is silent about the source as it is, a test only if it passes without the bug. Exit code 4 if
a planted bug was not found.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eoframework import clock
from tests.campaign.mutant import LAYERS, Mutant
from tests.campaign.mutants import MUTANTS
from tests.campaign.report_file import DIRECTORY, commit, write_json
from tests.processes import REPOSITORY

REPORT = DIRECTORY / "mutation.json"
LONGEST = 420.0
"""Seconds that a layer may take; a bug that makes everything stand still counts as found then."""


@dataclass(frozen=True, slots=True)
class Heard:
    """What a layer said about a copy."""

    objects: bool
    seconds: float
    first: str
    """The first test that failed."""


class Copy:
    """The source as it is, in a directory of its own, for bugs to be planted in."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._sound: dict[str, str] = {}
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, check=True).stdout
        for name in filter(None, listed.decode().split("\0")):
            if (REPOSITORY / name).is_file():
                target = directory / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(REPOSITORY / name, target)
        # Reports say which commit they are of.
        who = ("-c", "user.name=mutation", "-c", "user.email=mutation@localhost")
        for arguments in (("init", "-q"), (*who, "commit", "-q", "--allow-empty", "-m", "A copy to plant bugs in")):
            subprocess.run(["git", *arguments], cwd=directory, check=True)

    def plant(self, mutant: Mutant) -> None:
        for path in mutant.paths:
            # Kept, and not copied anew: somebody may be at work in the source by then.
            self._sound[path] = (self.directory / path).read_text()
            (self.directory / path).write_text(planted(self._sound[path], mutant, path))

    def mend(self, mutant: Mutant) -> None:
        for path in mutant.paths:
            (self.directory / path).write_text(self._sound.pop(path))

    def hear(self, layer: str) -> Heard:
        """Run a layer over this copy."""
        files = [name for name in LAYERS[layer] if (self.directory / name.partition("::")[0]).exists()]
        return self.run(files, layer)

    def run(self, tests: Sequence[str], what: str) -> Heard:
        """Run these over this copy."""
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-n", "3", *tests]
        environment = {**os.environ, "PYTHONPATH": str(self.directory), "PYTHONDONTWRITEBYTECODE": "1"}
        started = clock.monotonic()
        try:
            ran = subprocess.run(
                command,
                cwd=self.directory,
                env=environment,
                capture_output=True,
                check=False,
                text=True,
                timeout=LONGEST,
            )
        except subprocess.TimeoutExpired:
            return Heard(True, clock.monotonic() - started, f"stood still for {LONGEST:g} s")
        failed = _first_failure(ran.stdout)
        if bool(failed) != bool(ran.returncode):
            # Not a test that failed: a layer that cannot run has found nothing.
            raise SystemExit(f"{what}: pytest ended with {ran.returncode}:\n{ran.stdout[-3000:]}{ran.stderr[-2000:]}")
        return Heard(bool(failed), clock.monotonic() - started, failed)


def planted(source: str, mutant: Mutant, path: str) -> str:
    """The source of that file with the bug in it."""
    for _, before, after in (change for change in mutant.changes if change[0] == path):
        if source.count(before) != 1:
            raise SystemExit(f"{mutant.name}: {path} has {source.count(before)} places for it, not one.")
        source = source.replace(before, after)
    return source


def _first_failure(output: str) -> str:
    found = [line.split(" - ")[0].removeprefix("FAILED ") for line in output.splitlines() if line.startswith("FAILED ")]
    return found[0] if found else ""


def look_for(mutant: Mutant, copy: Copy, silent: dict[str, bool]) -> dict[str, object]:
    """Plant one and ask its layers; what is to be reported. Empty if none of them could be asked."""
    seconds, asked = 0.0, False
    for layer in mutant.layers:
        if layer not in silent:
            silent[layer] = not copy.hear(layer).objects
            print(f"  {layer}: {'silent' if silent[layer] else 'NOT silent'} about the source as it is", flush=True)
        if not silent[layer]:
            continue
        copy.plant(mutant)
        try:
            heard = copy.hear(layer)
        finally:
            copy.mend(mutant)
        seconds += heard.seconds
        if "::" in heard.first and copy.run([heard.first], layer).objects:
            # It fails without the bug as well: by itself, on a machine that is too busy. Nobody was asked.
            continue
        asked = True
        if heard.objects:
            return {"found_by": layer, "test": heard.first, "seconds": round(seconds, 1)}
    return {"found_by": None, "seconds": round(seconds, 1)} if asked else {}


def _load(*, again: bool) -> dict[str, dict[str, object]]:
    if again or not REPORT.exists():
        return {}
    found: dict[str, dict[str, object]] = json.loads(REPORT.read_text())["mutants"]
    return found


def _store(found: dict[str, dict[str, object]]) -> None:
    report = {
        "layer": "mutation",
        "what": "each protection taken out, and what noticed it",
        "commit": commit(),
        "planted": len(MUTANTS),
        "found": sum(one["found_by"] is not None for one in found.values()),
        "mutants": found,
    }
    write_json(REPORT, report)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=600.0)
    parser.add_argument("--only", help="mutants with this in their name")
    parser.add_argument("--again", action="store_true", help="forget what earlier runs found")
    options = parser.parse_args()
    found, silent = _load(again=options.again), dict[str, bool]()
    until = clock.monotonic() + options.minutes * 60
    chosen = [one for one in MUTANTS if (options.only or "") in one.name]
    left = [one for one in chosen if options.only or found.get(one.name, {}).get("found_by") is None]
    with tempfile.TemporaryDirectory(prefix="eo-mutants-") as directory:
        copy = Copy(Path(directory))
        for number, mutant in enumerate(left, start=1):
            if clock.monotonic() > until:
                print(f"{len(left) - number + 1} left for the next run", flush=True)
                break
            told = look_for(mutant, copy, silent)
            if not told:
                # A test that fails by itself says nothing of a bug: on a machine that is too busy, for the next run.
                print(f"{number:3}/{len(left)} {mutant.name}: not asked, its layers object to the source as it is")
                continue
            found[mutant.name] = {"what": mutant.what, **told}
            print(
                f"{number:3}/{len(left)} {mutant.name}: {told['found_by'] or 'NOT FOUND'}, {told['seconds']} s",
                flush=True,
            )
            _store(found)
    missed = [one.name for one in chosen if found.get(one.name, {"found_by": ""})["found_by"] is None]
    print(f"{len(MUTANTS)} planted bugs, {sum(one['found_by'] is not None for one in found.values())} found")
    raise SystemExit(4 if missed else 0)


if __name__ == "__main__":
    main()
