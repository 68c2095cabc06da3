"""Restrict, object, lift and revoke: what each takes out and brings back, and what is refused."""

import base64
import json
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from test_erasure import add_model, train, verified
from world_copies import Copy
from world_requests import DONE, RESTRICTED, deactivate, hold, record_id, refused, release, served, stored, withdraw

from service.domain.errors import NotFoundError
from service.domain.requests import Kind
from service.store import datasets, lifts, preview, request_steps, work
from service.store import models as model_rows
from service.store.database import transaction
from service.store.declare import declare_model
from shards.rebuild import Policy
from workers import certify, erase, steps
from workers.barrier import Barrier
from workers.relay import Relay

pytest_plugins = ("world_fixtures",)
pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True)
def _no_spacing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "SPACING_SECONDS", 0)


@pytest.mark.parametrize("kind", [Kind.RESTRICT, Kind.OBJECT])
def test_a_restriction_takes_out_seals_and_says_no_more(world: Copy, kind: Kind) -> None:
    before, sealed = served(world), stored(world)
    request_id = deactivate(world, "s1", kind)
    assert world.shown(request_id) == ("deactivated", None)
    assert served(world) != before
    world.log()
    Relay(world.pool, world.context.bell).look()
    assert world.context.bell.rung[-2:] == [  # type: ignore[attr-defined]
        ("target.certify", (str(request_id), world.model_id)),
        ("model.rebuild", (world.model_id,)),
    ]
    world.finish(request_id)
    assert world.states(request_id) == RESTRICTED
    assert world.shown(request_id) == ("completed", "restricted")
    assert stored(world) == sealed
    assert world.rows("SELECT 1 FROM artifact WHERE state IN ('doomed', 'destroyed')") == []
    assert world.events("target.completed") == [{"outcome": "restricted"}]
    assert verified(world, request_id)
    (envelope,) = world.row("SELECT envelope FROM certificate WHERE request_id = %s", request_id)
    said = json.loads(base64.b64decode(envelope["payload"]))["predicate"]
    assert (said["outcome"], said["request"]["kind"], len(said["records"])) == ("restricted", kind.value, 2)
    assert "erased" not in {claim["claim"] for claim in said["claims"]}
    assert (said["cells"], said["payloads"]) == ([], [])
    assert said["tainted"]
    assert world.add({"s1": ["more"], "s2": ["other"]}).skipped == 1


def test_a_lift_brings_the_same_assembly_back_and_leaves_the_floor(world: Copy) -> None:
    before = served(world)
    request_id = deactivate(world, "s1", Kind.RESTRICT)
    world.finish(request_id)
    assert withdraw(world, request_id) == [world.model_id]
    assert served(world) == before
    assert world.bounds() == (3, 2, 2)
    assert world.row("SELECT cause FROM model_version WHERE version = 3") == ("lift",)
    assert (world.states(request_id), world.shown(request_id)) == ([("lifted", None)], ("lifted", None))
    assert world.events("target.lifted") == [
        {"actor": world.actor, "reason_code": "contested_no_more", "records": 2, "version": 3}
    ]
    assert world.active("s1") == 2
    assert world.add({"s1": ["more"]}).accepted == 1
    refused(world, request_id, lifts.lift, "lifted already")
    refused(world, request_id, lifts.revoke, "lifted already")
    again = deactivate(world, "s1", Kind.RESTRICT)
    world.finish(again)
    assert (world.states(again), world.active("s1")) == (RESTRICTED, 0)


def test_restricted_rebuilt_lifted_and_restricted_again(world: Copy) -> None:
    """Each set of active records has its own assembly, whichever way led to it, and nothing is trained twice."""
    full = served(world)
    first = deactivate(world, "s1", Kind.RESTRICT)
    world.finish(first)
    train(world, world.model_id)
    without = served(world)
    assert without != full
    roots = world.rows("SELECT root FROM cell JOIN cell_manifest USING (cell_id, generation) ORDER BY cell_id")
    withdraw(world, first)
    assert served(world) == full
    trained = len(world.events("stage.trained"))
    train(world, world.model_id)
    assert (served(world), len(world.events("stage.trained"))) == (full, trained)
    second = deactivate(world, "s1", Kind.OBJECT)
    assert served(world) == without
    train(world, world.model_id)
    assert (served(world), len(world.events("stage.trained"))) == (without, trained)
    assert world.rows("SELECT root FROM cell JOIN cell_manifest USING (cell_id, generation) ORDER BY cell_id") == roots
    world.finish(second)
    erased = deactivate(world, "s1", Kind.ERASE)
    world.finish(erased)
    assert served(world) == without
    assert all(verified(world, each) for each in (second, erased))
    assert world.states(erased) == DONE
    assert withdraw(world, second) == []
    assert (served(world), world.active("s1")) == (without, 0)
    assert world.add({"s1": ["more"]}).skipped == 1, "the erasure keeps them out for good"


def test_a_record_stays_out_as_long_as_any_request_stands(world: Copy) -> None:
    before = served(world)
    both = [deactivate(world, who, Kind.RESTRICT) for who in ("ann", "bob")]  # one record is about both
    named = deactivate(
        world, None, Kind.RESTRICT, record_ids=[record_id(world, "shared")], dataset_id=world.dataset.dataset_id
    )
    world.finish(*both, named)
    assert withdraw(world, both[0]) == []
    assert (world.active("ann"), world.active("bob")) == (0, 0)
    assert world.add({"ann": ["anns"]}).accepted == 1
    assert withdraw(world, both[1]) == [world.model_id]
    assert (world.active("ann"), world.active("bob")) == (1, 1)
    assert world.bounds()[0] > 2
    withdraw(world, named)
    assert world.active("bob") == 2
    train(world, world.model_id)
    assert served(world) != before  # with the new record
    assert world.row("SELECT canonical FROM model_version ORDER BY version DESC LIMIT 1") == (True,)


def test_do_not_train_lasts_as_long_as_any_request_of_the_person(world: Copy) -> None:
    one, two = (deactivate(world, "s1", Kind.RESTRICT) for _ in range(2))
    withdraw(world, one)
    assert world.add({"s1": ["still not"]}).skipped == 1
    withdraw(world, two)
    assert world.add({"s1": ["again"]}).accepted == 1


def test_a_restriction_of_nobody_is_lifted_too(world: Copy) -> None:
    request_id = deactivate(world, "nobody", Kind.RESTRICT)
    assert world.shown(request_id) == ("completed", "no_match")
    assert withdraw(world, request_id) == []
    assert world.shown(request_id) == ("lifted", None)


def test_a_revoked_erasure_never_was(world: Copy) -> None:
    before, sealed = served(world), stored(world)
    early = world.ask("s1")
    refused(world, early, lifts.lift, "asks for erasure")
    assert withdraw(world, early, lifts.revoke) == []
    assert world.shown(early) == ("revoked", None)
    assert steps.plan_targets(world.context, world.model_id) == 0
    held = hold(world, "s1")
    late = deactivate(world, "s1", Kind.ERASE)
    world.finish(late)
    assert withdraw(world, late, lifts.revoke) == [world.model_id]
    assert (world.shown(late), served(world), stored(world)) == (("revoked", None), before, sealed)
    assert world.events("target.revoked")[-1]["records"] == 2
    release(world, held)
    with transaction(world.pool) as connection:
        assert work.list_to_erase(connection) == []
    assert world.add({"s1": ["more"]}).accepted == 1


def test_what_has_gone_too_far_is_refused_and_says_what_to_do(world: Copy) -> None:
    deactivating = world.ask("s1", kind=Kind.RESTRICT)
    refused(world, deactivating, lifts.lift, "revoke the request")
    steps.plan_targets(world.context, world.model_id)
    refused(world, deactivating, lifts.lift, "try again when it is deactivated")
    refused(world, deactivating, lifts.revoke, "try again when it is deactivated")
    Barrier(world.pool, margin=0.05).look()
    refused(world, deactivating, lifts.revoke, "lift it instead")
    erased = deactivate(world, "s2", Kind.ERASE)
    erase._begin(world.context, erased, world.model_id)
    refused(world, erased, lifts.revoke, "erasing has begun")
    world.finish(erased)
    unknown = deactivate(world, "nobody", Kind.ERASE)
    for completed in (erased, unknown):  # whoever may only write learns nothing of whether somebody is known
        refused(world, completed, lifts.revoke, "^the request is completed: there is no way back from it$")
    failed = deactivate(world, "s3", Kind.ERASE)
    world.as_owner(f"UPDATE request_target SET state = 'failed' WHERE request_id = '{failed}'")
    refused(world, failed, lifts.revoke, "retry it first")
    for verb in (lifts.lift, lifts.revoke):
        with transaction(world.pool) as connection, pytest.raises(NotFoundError):
            verb(connection, UUID(int=0), actor=world.actor, reason_code="x")


def test_an_erasure_that_failed_half_way_goes_on_and_is_not_revoked(
    world: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    request_id = deactivate(world, "s1", Kind.ERASE)
    attempts = world.context.settings.target_attempts
    with monkeypatch.context() as patch:
        patch.setattr(erase, "_erase_cell", fails)
        for _ in range(attempts):
            with pytest.raises(OSError, match="full"):
                steps.erase_target(world.context, request_id, world.model_id)
        assert not steps.erase_target(world.context, request_id, world.model_id)
    assert world.states(request_id) == [("failed", None)]
    assert world.rows("SELECT 1 FROM artifact WHERE state = 'destroyed'")
    with transaction(world.pool) as connection:
        request_steps.retry(connection, request_id, actor=world.actor)
    refused(world, request_id, lifts.revoke, "erasing has begun")
    world.finish(request_id)
    assert world.states(request_id) == DONE


def fails(*_: Any) -> None:
    raise OSError("full")


def test_a_withdrawal_before_the_certificate_leaves_none(world: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    request_id = deactivate(world, "s1", Kind.RESTRICT)
    real = certify.issue

    def late(*arguments: Any) -> Any:
        withdraw(world, request_id)
        return real(*arguments)

    monkeypatch.setattr(certify, "issue", late)
    world.log()
    assert not steps.certify_target(world.context, request_id, world.model_id)
    assert world.rows("SELECT 1 FROM certificate") == []
    assert world.states(request_id) == [("lifted", None)]


def test_what_a_restriction_cancelled_is_trained_after_the_lift(world: Copy) -> None:
    world.add({"new": ["new1", "new2"]})
    steps.rebuild_model(world.context, world.model_id)
    request_id = deactivate(world, "new", Kind.RESTRICT)
    assert world.events("stage.cancelled")
    withdraw(world, request_id)
    train(world, world.model_id)
    assert world.row("SELECT canonical FROM model_version ORDER BY version DESC LIMIT 1") == (True,)


def test_a_deferred_erasure_is_revoked(world: Copy) -> None:
    """Under `rebuild_first` its records are out of the manifests already, though the model serves on with them."""
    before = served(world)
    with transaction(world.pool) as connection:
        model_rows.mark_policy(connection, world.model_id, Policy(kind="rebuild_first"))
    request_id = deactivate(world, "s1", Kind.ERASE)
    assert (world.shown(request_id), served(world)) == (("received", None), before)
    steps.rebuild_model(world.context, world.model_id)
    assert world.active("s1") == 0
    withdraw(world, request_id, lifts.revoke)
    assert (world.shown(request_id), served(world), world.active("s1")) == (("revoked", None), before, 2)
    assert world.rows("SELECT 1 FROM deferral") == []
    train(world, world.model_id)
    assert served(world) == before
    assert world.add({"s1": ["more"]}).accepted == 1


def test_one_of_two_deferred_erasures_is_revoked(world: Copy) -> None:
    before = served(world)
    with transaction(world.pool) as connection:
        model_rows.mark_policy(connection, world.model_id, Policy(kind="rebuild_first"))
    both = [deactivate(world, who, Kind.ERASE) for who in ("ann", "bob")]
    assert {world.shown(each) for each in both} == {("received", None)}
    withdraw(world, both[1], lifts.revoke)
    assert (world.active("ann"), world.active("bob"), served(world)) == (0, 1, before)
    with transaction(world.pool) as connection:
        model_rows.mark_policy(connection, world.model_id, model_rows.NOW)
    withdraw(world, both[0], lifts.revoke)
    assert (world.active("ann"), world.active("bob"), served(world)) == (1, 2, before)


def test_every_model_on_the_dataset_has_it_back(world: Copy) -> None:
    second = add_model(world, "second")
    train(world, second)
    digests = "SELECT DISTINCT ON (model_id) assembly FROM model_version ORDER BY model_id, version DESC"
    before = world.rows(digests)
    request_id = deactivate(world, "s1", Kind.RESTRICT)
    world.finish(request_id)
    assert world.states(request_id) == RESTRICTED * 2
    assert withdraw(world, request_id) == [world.model_id, second]
    assert world.rows(digests) == before


def test_a_model_declared_later_honours_a_restriction(world: Copy) -> None:
    request_id = deactivate(world, "s1", Kind.RESTRICT)
    world.finish(request_id)
    late = add_model(world, "late")
    train(world, late)
    sealed = [record_id(world, name) for name in ("s1r0", "s1r1")]
    assert world.active("s1") == 0
    with transaction(world.pool) as connection:
        model = model_rows.get_model_by_id(connection, late)
        assert preview.preview(connection, model, sealed).preview.records == 0
    withdraw(world, request_id)
    train(world, late)
    assert world.rows("SELECT canonical FROM model_version WHERE model_id = %s ORDER BY version", late) == [
        (True,),
        (True,),
    ]


def test_a_dataset_that_gets_its_first_model_honours_restrictions(world: Copy) -> None:
    with transaction(world.pool) as connection:
        world.dataset = datasets.insert_dataset(
            connection, name="other", shards=2, slices=2, classes=["no", "yes"], deletable=True, subject_row_cap=9
        )
    world.add({"s1": ["other1"], "s2": ["other2"]})
    request_id = deactivate(world, "s1", Kind.RESTRICT)
    world.finish(request_id)
    recipe = type(world.recipe).from_json(world.recipe.to_json() | {"seed": 77})
    with transaction(world.pool) as connection:
        late = declare_model(
            connection,
            name="other",
            dataset_id=world.dataset.dataset_id,
            evaluation_id=None,
            recipe=recipe,
            erase_after=timedelta(0),
        ).model_id
    assert world.shown(request_id) == ("received", None)
    steps.plan_targets(world.context, late)
    world.finish(request_id)
    assert world.states(request_id) == RESTRICTED * 2
    withdraw(world, request_id)
    assert world.active("s1") == 3


def declare(world: Copy, name: str, dataset_id: UUID) -> int:
    recipe = type(world.recipe).from_json(world.recipe.to_json() | {"seed": sum(name.encode())})
    with transaction(world.pool) as connection:
        return declare_model(
            connection, name=name, dataset_id=dataset_id, evaluation_id=None, recipe=recipe, erase_after=timedelta(0)
        ).model_id


def test_a_new_model_owes_what_was_lifted_and_is_asked_for_again(world: Copy) -> None:
    """As it does for records that were never restricted: the first model's planner has died on the request."""
    withdraw(world, deactivate(world, "s1", Kind.RESTRICT))
    request_id = world.ask("s1")
    world.as_owner(f"UPDATE request_target SET state = 'failed' WHERE request_id = '{request_id}'")
    declare(world, "second", world.dataset.dataset_id)
    assert world.states(request_id) == [("failed", None), ("received", None)]


def test_a_new_model_owes_nothing_to_a_request_that_named_models_of_another_dataset(world: Copy) -> None:
    first = world.dataset
    with transaction(world.pool) as connection:
        world.dataset = datasets.insert_dataset(
            connection, name="other", shards=2, slices=2, classes=["no", "yes"], deletable=True, subject_row_cap=9
        )
    declare(world, "other", world.dataset.dataset_id)
    world.add({"s1": ["other1"]})
    request_id = world.ask("s1", model_ids=[world.model_id])
    steps.plan_targets(world.context, world.model_id)
    world.finish(request_id)
    assert world.states(request_id) == DONE
    declare(world, "later", world.dataset.dataset_id)
    assert world.states(request_id) == DONE
    declare(world, "late", first.dataset_id)  # nothing of hers is left in the first
    assert world.states(request_id) == DONE
