"""What was asked for on the command line, and which run its number is."""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from eoframework import dev
from tests.campaign.full_world import Plan
from tests.campaign.nemeses import Role, points_of
from tests.campaign.nemeses_disk import FullDisk
from tests.campaign.nemeses_network import LateRequests
from tests.campaign.nemeses_services import Outages
from tests.protocol_proxy import ProtocolProxy

_PAIRS_A_RUN = 6


@dataclass(frozen=True)
class Options:
    """The command line."""

    seed: int = 1
    kills: int = 10**9
    minutes: float = 10.0
    runs: int = 10**9
    lanes: int = 4
    points: tuple[str, ...] = ()
    pairs: bool = False
    outages: bool = False
    late: bool = False
    upkeep: bool = False
    full_disk: bool = False
    gentle: bool = False
    kills_a_run: int = 40
    longest: float = 45.0
    state_dir: Path | None = None
    replay: str = ""
    verbose: bool = False
    without: str = ""

    @classmethod
    def parse(cls, description: str) -> Options:
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--seed", type=int, default=cls.seed)
        parser.add_argument("--kills", type=int, default=cls.kills)
        parser.add_argument("--minutes", type=float, default=cls.minutes)
        parser.add_argument("--runs", type=int, default=cls.runs)
        parser.add_argument("--lanes", type=int, default=cls.lanes, help="runs side by side")
        parser.add_argument("--points", type=lambda names: tuple(names.split(",")), default=())
        parser.add_argument("--pairs", action="store_true", help="a kill, and another while its successor recovers")
        parser.add_argument("--outages", action="store_true", help="broker and server are killed and frozen, one lane")
        parser.add_argument("--late", action="store_true", help="requests of Kafka transactions come late, one lane")
        parser.add_argument("--upkeep", action="store_true", help="what was processed is deleted from the topics")
        parser.add_argument("--full-disk", action="store_true", help="the server's disk is full, one lane; needs root")
        parser.add_argument("--gentle", action="store_true", help="crash points and nothing else")
        parser.add_argument("--kills-a-run", type=int, default=cls.kills_a_run)
        parser.add_argument("--longest", type=float, default=cls.longest, help="seconds of faults in a run")
        parser.add_argument("--state-dir", type=Path, help="services that run already, or stay there")
        parser.add_argument("--replay", default="", metavar="SEED:RUN", help="the same faults in the same order")
        parser.add_argument("--without", default="", help="a protection to run without: the checker must see it")
        parser.add_argument("--verbose", action="store_true")
        options = cls(**vars(parser.parse_args()))
        return options._settled()

    def _settled(self) -> Options:
        changes: dict[str, object] = {}
        if self.outages or self.late or self.full_disk:
            changes["lanes"] = 1
        if self.replay:
            seed, _ = self.replay.split(":")
            changes |= {"seed": int(seed), "runs": 1, "lanes": 1}
        return Options(**{**vars(self), **changes})


def plan_of(
    options: Options, number: int, services: dev.Services, proxy: ProtocolProxy | None, disk: Path | None
) -> Plan:
    """The run of this number: from the seed alone, whoever runs it and when."""
    if options.replay:
        number = int(options.replay.split(":")[1])
    seed = f"{options.seed}:{number}"
    outage = FullDisk(services, disk, seed) if disk is not None else None
    return Plan(
        seed=seed,
        kills=options.kills_a_run,
        longest=options.longest,
        only=options.points,
        pairs=_pairs(options.seed, number) if options.pairs else (),
        gentle=options.gentle,
        without=options.without,
        outage=Outages(services, seed) if options.outages else outage,
        upkeep=options.upkeep,
        long=options.late or options.upkeep or options.full_disk,
        network=LateRequests(proxy, seed) if proxy is not None else None,
    )


def _pairs(seed: int, number: int) -> tuple[tuple[Role, str, str], ...]:
    """A few pairs of each role: run after run, all of them come by."""
    found: list[tuple[Role, str, str]] = []
    roles: tuple[Role, ...] = ("book", "settle", "crumble", "relay")
    for role in roles:
        every = [(first, second) for first, second in product(points_of(role), repeat=2)]
        random.Random(f"{seed} {role}").shuffle(every)
        at = number * _PAIRS_A_RUN % len(every)
        found += [(role, first, second) for first, second in (every + every)[at : at + _PAIRS_A_RUN]]
    return tuple(found)
