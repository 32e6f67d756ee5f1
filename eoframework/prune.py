"""Keeps the table of processed messages bounded, without ever blocking a batch."""

from __future__ import annotations

import logging

from eoframework.db.retention import forget_processed
from eoframework.db.session import Database
from eoframework.errors import Retryable
from eoframework.settings import Settings

_log = logging.getLogger(__name__)

_BREATH = 0.05


class PruneWorker:
    """Deletes expired message ids in slices; the workers of all processes take turns."""

    name = "prune"

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._settings = settings
        self._drained = False

    def start(self) -> None:
        """Nothing to open: each slice takes a connection from the pool and gives it back."""

    def step(self) -> float:
        """Delete one slice; a full slice is followed by the next after a breath, else it is time to sleep."""
        settings = self._settings
        self._drained = True
        try:
            deleted = forget_processed(
                self._database, older_than=settings.processed_retention, limit=settings.prune_batch
            )
        except Retryable as error:
            _log.info("%s The slice is left for the next time; old ids are only kept longer.", error)
            return settings.prune_interval
        if deleted:
            _log.debug("forgot %d message ids older than %s", deleted, settings.processed_retention)
        self._drained = deleted != settings.prune_batch
        return settings.prune_interval if self._drained else _BREATH

    def drained(self) -> bool:
        """Whether nothing more is expired."""
        return self._drained

    def close(self) -> None:
        """Nothing is held between slices."""
