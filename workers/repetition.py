"""Whether a training command of the operator's gives the same bits twice: tried once per model, on its first stage.

Our own engines are deterministic by construction and by test; of a command nothing is known. Where it is not, the
model's certificates claim `influence-free` alone (design.md, section 2).
"""

from collections.abc import Sequence

import structlog

from service.evidence.events import EventKind
from service.store import events, models
from service.store.database import Connection, transaction
from service.store.models import Model
from shards.digest import digest_of, sha256_hex
from shards.stages import Stage
from workers.context import Context

log = structlog.get_logger()


def untried(model: Model) -> bool:
    """Whether the model's next stage is to be trained twice."""
    return model.parsed_recipe.engine == "external" and model.reproducible is None


def compare(context: Context, model: Model, stage: Stage, once: bytes, again: bytes, platform: dict[str, str]) -> None:
    """Note on the model whether both runs of one stage gave the same artefact, and record what was seen."""
    digests = [sha256_hex(once), sha256_hex(again)]
    with transaction(context.pool) as connection:
        note(connection, model, stage.key, digests, digest_of(platform))


def note(connection: Connection, model: Model, stage_key: str, digests: Sequence[str], fingerprint: str) -> None:
    """Note what several runs of one stage gave, once; a difference is never undone by a later equality."""
    found = sorted(set(digests))
    if models.mark_reproducible(connection, model.model_id, found=len(found) == 1):
        events.append(
            connection,
            EventKind.MODEL_REPRODUCIBLE,
            model_id=model.model_id,
            stage=stage_key,
            digests=found,
            fingerprint=fingerprint,
        )
    if len(found) > 1:
        log.warning("model.not_reproducible", model=model.name, stage=stage_key)
