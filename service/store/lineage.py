"""What a stage reads: its cells at the generation that its manifests are of."""

from dataclasses import dataclass
from typing import LiteralString

from psycopg.rows import class_row

from service.store.database import Connection

LIST_READS: LiteralString = """
SELECT c.cell_id, c.shard, c.slice, sc.generation, c.object_name
FROM stage_cell sc JOIN cell c ON c.cell_id = sc.cell_id
WHERE sc.stage_key = %(stage_key)s::text
ORDER BY c.cell_id
"""


@dataclass(frozen=True, slots=True)
class Read:
    """One cell that a stage reads, with the object that holds its payloads now."""

    cell_id: int
    shard: int
    slice: int
    generation: int
    object_name: str | None


def list_reads(connection: Connection, stage_key: str) -> list[Read]:
    """The cells of a stage's lineage by id."""
    with connection.cursor(row_factory=class_row(Read)) as cursor:
        return cursor.execute(LIST_READS, {"stage_key": stage_key}).fetchall()
