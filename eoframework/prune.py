"""Keeps the tables of processed messages and of external results bounded, without ever blocking a batch."""

from __future__ import annotations

import logging
from datetime import datetime

from eoframework import events
from eoframework.db.coverage import raise_coverage
from eoframework.db.external_calls import forget_external_calls
from eoframework.db.retention import forget_processed
from eoframework.db.session import Database
from eoframework.errors import Retryable
from eoframework.settings import Settings

_log = logging.getLogger(__name__)

_BREATH = 0.05


class PruneWorker:
    """Deletes expired message ids, and results of calls, in slices; the workers of all processes take turns."""

    name = "prune"

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._settings = settings
        self._drained = False
        self._before: datetime | None = None
        """What is older may be forgotten: the coverage says so already."""

    def start(self) -> None:
        """Nothing to open: each slice takes a connection from the pool and gives it back."""

    def step(self) -> float:
        """Delete one slice; a full slice is followed by the next after a breath, else it is time to sleep.

        Before the first slice of a round the coverage is raised: on a crash between the two nothing is forgotten that
        counts as covered.
        """
        settings = self._settings
        self._drained = True
        try:
            deleted = self._forget()
            results = forget_external_calls(
                self._database, older_than=settings.processed_retention, limit=settings.prune_batch
            )
            events.emit("prune.results_forgotten", results=results)
        except Retryable as error:
            _log.info("%s The slice is left for the next time; old ids are only kept longer.", error)
            return settings.prune_interval
        if deleted:
            _log.debug("forgot %d message ids older than %s", deleted, settings.processed_retention)
        if results:
            _log.debug("forgot %d results of external calls older than %s", results, settings.processed_retention)
        if deleted != settings.prune_batch:
            self._before = None
        self._drained = settings.prune_batch not in (deleted, results)
        return settings.prune_interval if self._drained else _BREATH

    def _forget(self) -> int | None:
        if self._before is None:
            covered = raise_coverage(self._database, older_than=self._settings.processed_retention)
            if covered is None:
                return None
            self._before = covered.before
            events.emit("prune.covered", raised=covered.raised)
        deleted = forget_processed(self._database, before=self._before, limit=self._settings.prune_batch)
        events.emit("prune.forgotten", ids=deleted)
        return deleted

    def drained(self) -> bool:
        """Whether nothing more is expired."""
        return self._drained

    def close(self) -> None:
        """Nothing is held between slices."""
