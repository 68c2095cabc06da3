"""The gate: what a rebuild brought is measured by the code that serves, and then let into service or not.

On the model's evaluation set, which nobody can be deleted from. A worker that may load torch does it, outside of any
transaction; whatever is published meanwhile, the candidate is looked for again, clean as of then, before it serves.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import structlog

from service.store import cells, evaluations, gates, models, publish
from service.store.database import Connection, retrying, transaction
from service.store.gates import Score, Trial
from service.store.models import Model
from shards.assembly import Assembly
from shards.engine.determinism import prepare
from shards.engine.interface import Predictor, inputs_of
from shards.engine.registry import open_reader
from shards.errors import ShardsError
from shards.manifest import Record
from shards.recipe import Recipe
from workers import evaluation
from workers.context import Context
from workers.release import let_in

log = structlog.get_logger()

NO_ROWS = "NoRecords"
"""The evaluation set is empty."""
DIED = Score(None, None, 0, "EvaluatorDied")
"""No attempt came to its end."""


@dataclass(frozen=True, slots=True)
class Task:
    """What one evaluation reads."""

    model: Model
    trial: Trial
    assemblies: tuple[Assembly, Assembly]
    """The candidate, and what serves."""
    objects: Mapping[str, str]
    """Object name of each artefact by digest."""
    root: str
    records: tuple[str, ...]
    """Object names of the evaluation set's cells."""


def evaluate_model(context: Context, model_id: int) -> int | None:
    """Measure what waits at the model's gate, and serve it where it keeps the bounds; the new version's number."""

    def claim() -> Task | None:
        with transaction(context.pool) as connection:
            return _claim(connection, model_id)

    task = retrying(claim)
    if task is None:
        return None
    try:
        found = measure(context, task) if task.trial.attempts <= context.settings.job_attempts else DIED
    except Exception as failure:  # noqa: BLE001 - whatever kept it from being measured, the operator is told
        log.warning("gate.attempt_failed", model_id=model_id, error=type(failure).__name__)
        if task.trial.attempts < context.settings.job_attempts:
            return None  # the relay rings again, after a while
        found = Score(None, None, 0, type(failure).__name__)

    def decide() -> int | None:
        with transaction(context.pool) as connection:
            return _decide(connection, task, found)

    return retrying(decide)


def _claim(connection: Connection, model_id: int) -> Task | None:
    model = models.lock_model(connection, model_id)
    trial = gates.claim(connection, model_id)
    if trial is None or not _is_candidate(connection, model, trial) or model.evaluation_id is None:
        return None
    assemblies = (gates.find_assembly(connection, trial.assembly), gates.find_assembly(connection, trial.base))
    digests = {digest for each in assemblies for member in each.members if member for digest in member.artifacts}
    found = cells.list_cells(connection, model.evaluation_id)
    return Task(
        model,
        trial,
        assemblies,
        gates.list_objects(connection, model_id, digests),
        evaluations.evaluation_root(connection, model.evaluation_id),
        tuple(cell.object_name for cell in found if cell.object_name),
    )


def _is_candidate(connection: Connection, model: Model, trial: Trial) -> bool:
    """Whether the assembly is still the best that is clean, in the place of the same; else another takes its turn."""
    found = publish.candidate(connection, model, gated=True)
    if (found.assembly.digest, gates.base_of(connection, model)) == (trial.assembly, trial.base):
        return True
    gates.drop_evaluating(connection, model.model_id)
    models.mark_unpublished(connection, model.model_id)
    return False


def measure(context: Context, task: Task) -> Score:
    """The candidate's score and that of what serves, by the code that serves; their weights leave the memory again."""
    prepare()
    recipe = task.model.parsed_recipe
    records = evaluation.read_records(context.artifacts, task.root, task.records)
    if not records:
        return Score(None, None, 0, NO_ROWS)
    reader = open_reader(recipe, context.settings.device)
    prepared = reader.prepare(inputs_of(recipe, records))

    def score(assembly: Assembly) -> float | None:
        digests = {digest for member in assembly.members if member for digest in member.artifacts}
        if not digests:
            return None
        for digest in sorted(digests):
            if digest not in task.objects:
                raise ShardsError(f"artefact {digest[:12]} is not live any more")
            reader.load(digest, context.artifacts.get(task.objects[digest]))
        return score_of(recipe, reader.build(assembly), prepared, records)

    try:
        candidate, base = (score(assembly) for assembly in task.assemblies)
        return Score(candidate, base, len(records))
    finally:
        reader.drop(reader.held())
        evaluation.forget()


def score_of(recipe: Recipe, predictor: Predictor, prepared: object, records: tuple[Record, ...]) -> float:
    """1 is best. Of a classification the share of right answers; of a regression 1 - mean error / declared spread."""
    answers = predictor.answer(prepared)
    if recipe.task == "classification":
        labels = np.array([recipe.classes.index(record.label) for record in records], np.int64)
        return float((answers.argmax(axis=1) == labels).mean())
    spread = recipe.scale.spread if recipe.scale else 1.0
    wanted = np.array([float(record.label) for record in records], np.float64)
    return float(1 - np.abs(answers[:, 0].astype(np.float64) - wanted).mean() / spread)


def _decide(connection: Connection, task: Task, found: Score) -> int | None:
    """Verdict and publication are one transaction; taint was looked at again for the candidate in it (rule 8)."""
    model = models.lock_model(connection, task.model.model_id)
    trial = gates.find(connection, model.model_id, task.trial.assembly)
    if trial is None or trial.state != "evaluating" or model.gate is None:
        return None
    if not _is_candidate(connection, model, trial):
        return None
    if not gates.judge(connection, model, trial, found):
        return None
    candidate = publish.candidate(connection, model, gated=True)
    return let_in(connection, model, candidate, until=trial.created_at)
