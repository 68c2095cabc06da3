"""Rows that the ledger can rebuild: events of kind `rows.changed`, written by triggers, applied by a restore.

Applied in the ledger's order each gives the rows as they were after its transaction. Not all is there: who was
ingested is in payload files (`restore_records`); secrets of API keys, callers' references and recipients of exports
are nowhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from psycopg import sql
from psycopg.types.json import Jsonb

from service.store.database import Connection


@dataclass(frozen=True, slots=True)
class Table:
    """A table whose changes are recorded."""

    key: tuple[str, ...]
    lost: dict[str, str] = field(default_factory=dict)
    """What stands in columns that are not recorded and may not be NULL."""
    counted: str | None = None
    """An identity column, which goes on behind the highest value."""


TABLES: dict[str, Table] = {
    "dataset": Table(("dataset_id",)),
    "prior_class": Table(("dataset_id", "prior")),
    "cell": Table(("cell_id",), counted="cell_id"),
    "cell_manifest": Table(("cell_id", "generation")),
    "record": Table(("record_id",)),
    "subject": Table(("subject_id",)),
    "subject_alias": Table(("type", "digest")),
    "subject_prior": Table(("dataset_id", "subject_id")),
    "api_key": Table(("prefix",), {"name": "restored", "secret_hash": "\\x" + "00" * 32}),
    "deletion_request": Table(("request_id",)),
    "deletion_request_record": Table(("request_id", "record_id")),
    "tombstone": Table(("record_id",)),
    "absence": Table(("record_id", "removed")),
    "do_not_train": Table(("entry_id",)),
    "hold": Table(("hold_id",)),
    "model": Table(("model_id",), counted="model_id"),
    "request_target": Table(("request_id", "model_id")),
    "deferral": Table(("model_id", "record_id")),
    "stage": Table(("stage_key",)),
    "stage_cell": Table(("stage_key", "cell_id")),
    "platform": Table(("fingerprint",)),
    "artifact": Table(("object_name",)),
    "assembly": Table(("digest",)),
    "model_version": Table(("model_id", "version")),
    "gate": Table(("model_id", "assembly")),
    "challenge": Table(("challenge_id",)),
    "replay": Table(("replay_id",), counted="replay_id"),
    "export": Table(("export_id",), {"recipient": "unknown"}),
}
NOT_MIRRORED = {
    "alembic_version": "the schema's own",
    "key_check": "written down again at the next start",
    "record_subject": "who was ingested: comes back from payload files, goes with the record",
    "idempotency_key": "a repeated call makes a new request, which finds nothing left",
    "certificate": "the text is its holders'; its digest is in the event certificate.issued",
    "certificate_supplement": "goes with its certificate",
    "certificate_open": "goes with its certificate",
    "stage_job": "what is missing is planned again",
    "machine": "measured again",
    "lease": "all leases end in a restore",
    "event_pending": "the events themselves",
    "ledger_queue": "the ledger's own",
    "ledger_leaf": "the ledger's own",
    "ledger_node": "the ledger's own",
    "ledger_opening": "the ledger's own",
    "ledger_head": "the ledger's own",
    "tree_head": "the ledger's own",
    "vetting": "the state of this very database",
    "restore_loss": "of a restore",
}
"""Why the other tables need no rebuilding."""


def apply(connection: Connection, table: str, change: str, rows: Sequence[dict[str, Any]]) -> int:
    """Make the rows of one change so; how many of them were found. Run under `expunge.mode` applying.

    Raises:
        ValueError: a table or a change that is not recorded: the event is of a newer version of this program.
        psycopg.Error: the rows do not fit, since something before them is missing.
    """
    known, step = TABLES.get(table), {"insert": _insert, "update": _update, "delete": _delete}.get(change)
    if known is None or step is None:
        raise ValueError(f"an event changes {table} by {change}, which this version cannot apply: use a newer one")
    if not rows:
        return 0  # of a request about nobody who is known
    columns = sorted({column for row in rows for column in row})
    return connection.execute(step(table, known, columns), {"rows": Jsonb(list(rows))}).rowcount


def count_on(connection: Connection) -> None:
    """Let identity columns go on behind the rows that were applied. For the schema's owner."""
    for name, table in TABLES.items():
        if table.counted:
            query = sql.SQL("SELECT setval(pg_get_serial_sequence({}, {}), greatest(max({}), 1)) FROM {}").format(
                sql.Literal(name), sql.Literal(table.counted), sql.Identifier(table.counted), sql.Identifier(name)
            )
            connection.execute(query)


def _insert(name: str, table: Table, columns: Sequence[str]) -> sql.Composed:
    set_again = [
        sql.SQL("{} = EXCLUDED.{}").format(sql.Identifier(column), sql.Identifier(column))
        for column in columns
        if column not in table.key
    ]
    conflict = sql.SQL("DO UPDATE SET {}").format(sql.SQL(", ").join(set_again)) if set_again else sql.SQL("DO NOTHING")
    return sql.SQL(
        "INSERT INTO {table} ({columns}) OVERRIDING SYSTEM VALUE SELECT {values}"
        " FROM jsonb_populate_recordset(NULL::{table}, %(rows)s::jsonb) ON CONFLICT ({key}) {conflict}"
    ).format(
        table=_named(name),
        columns=_list([*columns, *table.lost]),
        values=sql.SQL(", ").join([*map(sql.Identifier, columns), *map(sql.Literal, table.lost.values())]),
        key=_list(table.key),
        conflict=conflict,
    )


def _update(name: str, table: Table, columns: Sequence[str]) -> sql.Composed:
    changed = [
        sql.SQL("{} = (jsonb_populate_record(t, e)).{}").format(sql.Identifier(column), sql.Identifier(column))
        for column in columns
        if column not in table.key
    ]
    return sql.SQL("UPDATE {table} t SET {changed} FROM jsonb_array_elements(%(rows)s::jsonb) e WHERE {same}").format(
        table=_named(name), changed=sql.SQL(", ").join(changed), same=_same(name, table)
    )


def _delete(name: str, table: Table, _columns: Sequence[str]) -> sql.Composed:
    return sql.SQL("DELETE FROM {table} t USING jsonb_array_elements(%(rows)s::jsonb) e WHERE {same}").format(
        table=_named(name), same=_same(name, table)
    )


def _same(name: str, table: Table) -> sql.Composed:
    each = [
        sql.SQL("t.{key} = (jsonb_populate_record(NULL::{table}, e)).{key}").format(
            key=sql.Identifier(key), table=_named(name)
        )
        for key in table.key
    ]
    return sql.SQL(" AND ").join(each)


def _named(table: str) -> sql.Identifier:
    """With its schema: `record` alone is a type of Postgres' own."""
    return sql.Identifier("public", table)


def _list(names: Sequence[str]) -> sql.Composed:
    return sql.SQL(", ").join(map(sql.Identifier, names))
