"""Admissions: which trained stages a model's gate or canary has let into service; the others are `gated`.

Every change is made under the model's lock.
"""

from datetime import datetime
from typing import LiteralString

from service.store.database import Connection
from service.store.stages import HOLDS

MARK_GATED_OPEN: LiteralString = """
UPDATE stage s SET gated = true
FROM stage_job j
WHERE j.stage_key = s.stage_key AND s.model_id = %(model_id)s::bigint AND j.state IN ('queued', 'running')
  AND NOT EXISTS (SELECT FROM artifact a WHERE a.stage_key = s.stage_key AND a.kind = 'stage')
"""
IN_ASSEMBLY: LiteralString = """
    EXISTS (SELECT FROM jsonb_array_elements(b.body -> 'members') m
            JOIN artifact a ON m -> 'artifacts' ? a.digest AND a.stage_key = s.stage_key AND a.kind = 'stage')
"""
"""Whether a stage `s` speaks, or another stands on it, in an assembly `b`."""
ADMIT: LiteralString = (
    """
UPDATE stage s SET gated = false
WHERE s.model_id = %(model_id)s::bigint AND s.gated
  AND (%(until)s::timestamptz IS NULL  -- else what was trained after the assembly was measured waits for its own turn
       OR EXISTS (SELECT FROM artifact a
                  WHERE a.stage_key = s.stage_key AND a.kind = 'stage' AND a.created_at <= %(until)s::timestamptz))
  AND (EXISTS (SELECT FROM assembly b WHERE b.digest = %(assembly)s::text AND """
    + IN_ASSEMBLY
    + """)
       OR NOT (
           EXISTS (SELECT FROM stage_cell sc JOIN tombstone t ON t.cell_id = sc.cell_id AND t.lifted_at IS NULL
                   WHERE sc.stage_key = s.stage_key AND """
    + HOLDS
    + """)
           OR EXISTS (  -- kept out by a word that stands: of nothing that holds a record which is out
               SELECT FROM gate g JOIN assembly b ON b.digest = g.assembly
               WHERE g.model_id = s.model_id AND g.state IN ('refused', 'aborted') AND """
    + IN_ASSEMBLY
    + """
                 AND NOT EXISTS (
                     SELECT FROM jsonb_array_elements(b.body -> 'members') m
                     JOIN stage_cell sc ON sc.stage_key = m ->> 'stage'
                     JOIN tombstone t ON t.cell_id = sc.cell_id AND t.lifted_at IS NULL AND """
    + HOLDS
    + """))))
"""
)
ADMIT_ALL: LiteralString = "UPDATE stage SET gated = false WHERE model_id = %(model_id)s::bigint AND gated"


def admit(connection: Connection, model_id: int, assembly: str, *, until: datetime | None = None) -> None:
    """Let an assembly's stages into service, and the gated ones beside it that there were at `until` (None: all).

    Not those that are out now, since a lift may bring them back, nor those of an assembly that was refused or aborted,
    while it is clean: they come to the gate again, if they are ever the best.
    """
    connection.execute(ADMIT, {"model_id": model_id, "assembly": assembly, "until": until})


def admit_all(connection: Connection, model_id: int) -> None:
    """Let every stage of the model into service: there is nothing any more that would keep one out."""
    connection.execute(ADMIT_ALL, {"model_id": model_id})


def gate_open(connection: Connection, model_id: int) -> None:
    """Gate what is being trained now."""
    connection.execute(MARK_GATED_OPEN, {"model_id": model_id})
