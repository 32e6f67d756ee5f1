"""Who owns which shard of the outbox: leases for liveness, epochs for safety. All times are the database's own."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import Connection
from sqlalchemy.engine.interfaces import IsolationLevel

from eoframework.db.faults import classified
from eoframework.db.links import check_confirmed, connected
from eoframework.db.session import Database
from eoframework.errors import Fenced
from eoframework.settings import Settings


class ShardLost(Fenced):
    """Another relay owns the shard now; this one may change nothing of it any more."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A shard as owned by one relay: valid as long as the row in the database carries this epoch."""

    shard: int
    epoch: int
    owner: str

    def __str__(self) -> str:
        return f"shard {self.shard} (epoch {self.epoch})"


@dataclass(frozen=True, slots=True)
class ShardState:
    """What the database knows of a shard's batches."""

    batch_no: int
    cluster_id: str | None
    topic_id: UUID | None


@dataclass(frozen=True, slots=True)
class Standing:
    """What a heartbeat found: the living relays, all shards, and which of them are ours at which epoch."""

    members: int
    shards: int
    mine: Mapping[int, int]


class Shards:
    """The tables `outbox`, `relay_shard` and `relay_member`."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._lease = settings.relay_lease
        # A relay frozen inside a transaction holds the locks that its successor needs. Ours contain nothing but our
        # own statements, so a pause as long as the lease means frozen.
        self._guards = {
            "idle": int(min(settings.relay_lease, settings.idle_in_transaction_timeout) * 1000),
            "lock": int(settings.lock_timeout * 1000),
            "statement": int(settings.statement_timeout * 1000),
        }

    def outbox(self) -> tuple[UUID, int]:
        """The outbox's identity, minted by the migration, and its number of shards."""
        with self.single("reading the outbox's identity") as connection:
            found = connection.exec_driver_sql(self.sql("SELECT id, shards FROM {eo}.outbox")).one()
        return found[0], found[1]

    def states(self) -> dict[int, ShardState]:
        """Every shard's state, as last committed."""
        statement = "SELECT shard, batch_no, cluster_id, checkpoint_topic_id FROM {eo}.relay_shard"
        with self.single("reading the relay's shards") as connection:
            found = connection.exec_driver_sql(self.sql(statement)).all()
        return {row[0]: ShardState(*row[1:]) for row in found}

    def heartbeat(self, owner: str, *, sharing: bool = True) -> Standing:
        """Say that `owner` lives, renew its leases, and look around; without `sharing` it counts for no one's share."""
        values = {"owner": owner, "lease": self._lease}
        with self.writing("relay heartbeat") as connection:
            if sharing:
                self._sign_on(connection, values)
            mine = connection.exec_driver_sql(
                self.sql("""
                    UPDATE {eo}.relay_shard SET lease_until = clock_timestamp() + make_interval(secs => %(lease)s)
                     WHERE owner = %(owner)s RETURNING shard, epoch"""),
                values,
            ).all()
            members, shards = connection.exec_driver_sql(
                self.sql("""
                    SELECT (SELECT count(*) FROM {eo}.relay_member WHERE lease_until > clock_timestamp()),
                           (SELECT count(*) FROM {eo}.relay_shard)""")
            ).one()
            connection.exec_driver_sql(
                self.sql("""
                    DELETE FROM {eo}.relay_member WHERE owner IN (
                        SELECT owner FROM {eo}.relay_member WHERE lease_until < clock_timestamp() - interval '1 minute'
                           FOR UPDATE SKIP LOCKED)""")
            )
        return Standing(members, shards, {row[0]: row[1] for row in mine})

    def _sign_on(self, connection: Connection, values: dict[str, object]) -> None:
        connection.exec_driver_sql(
            self.sql("""
                INSERT INTO {eo}.relay_member (owner, lease_until)
                VALUES (%(owner)s, clock_timestamp() + make_interval(secs => %(lease)s))
                ON CONFLICT (owner) DO UPDATE SET lease_until = excluded.lease_until"""),
            values,
        )

    def acquire(self, owner: str, *, limit: int, among: Collection[int]) -> list[Claim]:
        """Take up to `limit` shards that nobody owns or whose lease has run out; each gets its next epoch.

        From the COMMIT on, no transaction of an earlier owner that compares its epoch can change anything.
        """
        # SKIP LOCKED: another relay is taking that row, or its owner is frozen inside a transaction, which the idle
        # timeout will end; waiting for it would let our own leases run out.
        statement = """
            UPDATE {eo}.relay_shard
               SET owner = %(owner)s, epoch = epoch + 1,
                   lease_until = clock_timestamp() + make_interval(secs => %(lease)s)
             WHERE shard IN (SELECT shard FROM {eo}.relay_shard
                              WHERE (owner IS NULL OR lease_until < clock_timestamp())
                                AND shard = ANY (%(among)s::smallint[])
                              ORDER BY shard LIMIT %(limit)s FOR UPDATE SKIP LOCKED)
            RETURNING shard, epoch"""
        values = {"owner": owner, "lease": self._lease, "limit": limit, "among": list(among)}
        with self.writing("taking relay shards") as connection:
            taken = connection.exec_driver_sql(self.sql(statement), values).all()
        return [Claim(shard, epoch, owner) for shard, epoch in sorted(tuple(row) for row in taken)]

    def release(self, claim: Claim) -> None:
        """Give the shard back, so that another relay need not wait for the lease; nothing when it is not ours."""
        statement = """
            UPDATE {eo}.relay_shard SET owner = NULL, lease_until = NULL
             WHERE shard = %(shard)s AND epoch = %(epoch)s AND owner = %(owner)s"""
        with self.writing(f"releasing relay {claim}") as connection:
            connection.exec_driver_sql(self.sql(statement), _values(claim))

    def leave(self, owner: str) -> None:
        """Say that `owner` lives no longer: the others' shares grow at once."""
        with self.writing("leaving the relays") as connection:
            connection.exec_driver_sql(
                self.sql("DELETE FROM {eo}.relay_member WHERE owner = %(owner)s"), {"owner": owner}
            )

    def check(self, claim: Claim) -> ShardState:
        """The shard's state, if it is still ours. Raises ShardLost.

        Reads with a row lock: a COMMIT whose answer was lost may still be on its way (it waits for a standby), and a
        plain SELECT would show the state before it.
        """
        statement = """
            SELECT batch_no, cluster_id, checkpoint_topic_id FROM {eo}.relay_shard
             WHERE shard = %(shard)s AND epoch = %(epoch)s FOR UPDATE"""
        with self.writing(f"checking relay {claim}") as connection:
            found = connection.exec_driver_sql(self.sql(statement), _values(claim)).one_or_none()
        if found is None:
            raise ShardLost(f"relay {claim} has been taken over.")
        return ShardState(*found)

    def bind(self, claim: Claim, *, cluster_id: str, topic_id: UUID) -> None:
        """Remember, before the first batch, which cluster and checkpoint topic this shard's batches go to."""
        statement = """
            UPDATE {eo}.relay_shard SET cluster_id = %(cluster_id)s, checkpoint_topic_id = %(topic_id)s
             WHERE shard = %(shard)s AND epoch = %(epoch)s AND cluster_id IS NULL"""
        values = _values(claim) | {"cluster_id": cluster_id, "topic_id": topic_id}
        with self.writing(f"binding relay {claim} to its cluster") as connection:
            if connection.exec_driver_sql(self.sql(statement), values).rowcount != 1:
                raise ShardLost(f"relay {claim} has been taken over.")

    def oldest_snapshot(self) -> tuple[int, float] | None:
        """Backend pid and age in seconds of the oldest transaction that keeps dead rows from being removed."""
        statement = """
            SELECT pid, extract(epoch FROM clock_timestamp() - xact_start)::float8 FROM pg_stat_activity
             WHERE backend_xmin IS NOT NULL AND xact_start IS NOT NULL AND pid <> pg_backend_pid()
             ORDER BY age(backend_xmin) DESC, xact_start LIMIT 1"""
        with self.single("looking for old snapshots") as connection:
            found = connection.exec_driver_sql(statement).one_or_none()
        return None if found is None else (found[0], found[1])

    def sql(self, template: str) -> str:
        """The statement with the schema's name filled in."""
        return self._database.schema.sql(template)

    @contextmanager
    def single(self, what: str) -> Iterator[Connection]:
        """For one statement that is a transaction by itself: one round trip, and no lock is left to a frozen client."""
        with self._connection(what, "AUTOCOMMIT") as connection:
            yield connection

    @contextmanager
    def in_index_order(self, what: str) -> Iterator[Connection]:
        """A reading transaction whose plans follow the index instead of sorting.

        Statistics of a queue are always old: taken while it was empty, they make PostgreSQL fetch and sort a whole
        backlog for each batch of it (25 ms instead of 4 at 7,000 rows, and it grows with the backlog).
        """
        with self._connection(what, "READ COMMITTED") as connection, connection.begin():
            connection.exec_driver_sql(
                "SELECT set_config('enable_sort', 'off', true), set_config('enable_bitmapscan', 'off', true),"
                " set_config('enable_seqscan', 'off', true)"
            )
            yield connection

    @contextmanager
    def writing(self, what: str) -> Iterator[Connection]:
        """A durable transaction that cannot hold its locks for long, whatever happens to this process.

        Durable whatever the database's default: a delete lost in a crash after the next Kafka transaction would leave
        the database two batches behind its checkpoint.
        """
        with self._connection(what, "READ COMMITTED") as connection, connection.begin():
            connection.exec_driver_sql(
                """SELECT set_config('idle_in_transaction_session_timeout', %(idle)s::text, true),
                          set_config('lock_timeout', %(lock)s::text, true),
                          set_config('statement_timeout', %(statement)s::text, true),
                          set_config('synchronous_commit',
                                     CASE WHEN current_setting('synchronous_commit') IN ('off', 'local') THEN 'on'
                                          ELSE current_setting('synchronous_commit') END, true)""",
                self._guards,
            )
            yield connection

    @contextmanager
    def _connection(self, what: str, isolation: IsolationLevel) -> Iterator[Connection]:
        # Set on the connection, over whatever the user's engine says: every check here is a comparison inside one
        # statement, or behind a row lock, and READ COMMITTED is what makes it see the newest row.
        with classified(what), connected(self._database.engine) as connection:
            yield connection.execution_options(isolation_level=isolation)
            check_confirmed(connection, what)


def _values(claim: Claim) -> dict[str, object]:
    return {"shard": claim.shard, "epoch": claim.epoch, "owner": claim.owner}
