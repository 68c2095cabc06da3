"""Celery tasks: thin, named noun.verb, ids only, each safe to run twice and to die at any line."""

from uuid import UUID

from workers import replays, steps
from workers.app import app
from workers.context import context


@app.task(name="targets.plan")
def plan_targets(model_id: int) -> None:
    """Deactivate whatever the model's received targets touch, in one version."""
    steps.plan_targets(context(), model_id)


@app.task(name="target.erase")
def erase_target(request_id: str, model_id: int) -> None:
    """Destroy what one target's records touched."""
    steps.erase_target(context(), UUID(request_id), model_id)


@app.task(name="target.certify")
def certify_target(request_id: str, model_id: int) -> None:
    """Issue one target's deletion certificate."""
    steps.certify_target(context(), UUID(request_id), model_id)


@app.task(name="model.rebuild")
def rebuild_model(model_id: int) -> None:
    """Queue the stages that a model lacks."""
    steps.rebuild_model(context(), model_id)


@app.task(name="model.publish")
def publish_model(model_id: int) -> None:
    """Serve what the last jobs built."""
    steps.publish_model(context(), model_id)


@app.task(name="model.gate")
def evaluate_model(model_id: int) -> None:
    """Measure what a rebuild brought, and serve it where it keeps the model's bounds."""
    from workers.gate import evaluate_model  # noqa: PLC0415 - torch costs seconds, and only this queue needs it

    evaluate_model(context(), model_id)


@app.task(name="stages.train")
def train_stages() -> None:
    """Train queued stages until none is left that this worker could take."""
    from workers.training import train_queued  # noqa: PLC0415 - torch costs seconds, and only this queue needs it

    train_queued(context())


@app.task(name="stages.replay")
def replay_stage(replay_id: int) -> None:
    """Train a drawn stage's chain again from nothing, in a process of its own, and compare."""
    replays.run_replay(context(), replay_id)
