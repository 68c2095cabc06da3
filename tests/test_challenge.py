"""Challenge audits: nobody can know what a witness's cosignature draws, and what is drawn is trained again."""

import copy
import json
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from api_client import Api
from conftest import Database
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from psycopg.types.json import Jsonb
from test_workers_path import build
from world import World, make_world
from world_copies import SUBJECTS, Copy

from service.cli.main import main
from service.domain.errors import ConflictError, NotFoundError
from service.evidence import note
from service.evidence.challenge import ChallengeError, check, draw_stages, unseen
from service.evidence.events import EventKind
from service.evidence.keys import load_signing_key, public_pem
from service.evidence.leaves import Leaf, open_leaf
from service.evidence.signers import SigningKey
from service.evidence.tree_head import TreeHead, sign_head, write_proof
from service.store import challenges, ledger, models, publish
from service.store.database import transaction
from shards.engine.s3t import S3T
from shards.recipe import Backbone
from workers.replay_one import replay_one
from workers.replays import Replays
from workers.sequencer import Sequencer

pytest_plugins = ("api_fixtures", "world_fixtures")
pytestmark = pytest.mark.integration
WITNESS = "witness.example/w"


@dataclass
class Audit:
    """An installation, its sequencer, and a witness of another party."""

    world: World
    sequencer: Sequencer
    mine: Ed25519PrivateKey
    given: str = ""
    """What the last challenge was opened with."""

    @property
    def vkey(self) -> str:
        return note.vkey(WITNESS, self.mine.public_key(), note.COSIGNATURE)

    @property
    def operator(self) -> SigningKey:
        return load_signing_key(self.world.context.settings.keys_dir / "signing.pem")

    def cosigned(self) -> str:
        """What the witness gives for the newest tree head."""
        while self.sequencer.sequence():
            pass
        self.sequencer.publish()
        with transaction(self.world.pool) as connection:
            (head,) = connection.execute("SELECT note FROM tree_head ORDER BY size DESC LIMIT 1").fetchone() or ("",)
        return str(note.cosign(note.parse(head), WITNESS, self.mine, 1_000))

    def open(self, checkpoint: str, count: int = 10) -> UUID:
        with transaction(self.world.pool) as connection:
            found = challenges.open_challenge(
                connection,
                "tiny",
                checkpoint=checkpoint,
                witness=self.vkey,
                count=count,
                actor=self.world.actor,
            )
        self.given = checkpoint
        return found

    def replay_all(self) -> None:
        for (replay_id,) in self.world.rows("SELECT replay_id FROM replay WHERE outcome IS NULL ORDER BY replay_id"):
            with transaction(self.world.pool) as connection:
                (token,) = connection.execute(
                    "UPDATE replay SET token = token + 1, attempts = 1, started_at = clock_timestamp()"
                    " WHERE replay_id = %s RETURNING token",
                    [replay_id],
                ).fetchone() or (0,)
            replay_one(self.world.context, replay_id, token)

    def document(self, challenge_id: UUID) -> dict[str, Any]:
        with transaction(self.world.pool) as connection:
            return json.loads(json.dumps(challenges.document(connection, "tiny", challenge_id)))


def audit_of(world: World) -> Audit:
    sequencer = Sequencer(world.pool, world.context.artifacts, world.context.settings)
    return Audit(world, sequencer, Ed25519PrivateKey.generate())


@pytest.fixture
def audit(world: Copy) -> Audit:
    return audit_of(world)


@pytest.fixture
def corrupted(
    database: Database, tmp_path: Path, small_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Audit, list[str]]]:
    """One leaf was trained on other labels than its manifest says; the ledger was told what came of that."""
    world = make_world(database, tmp_path, small_backbone, epochs=2)
    world.add(SUBJECTS)
    real, planted = S3T.train, list[str]()

    def train(engine: S3T, stage: Any, records: Any, parents: Any, *more: Any) -> bytes:
        if len(stage.prefix) == world.recipe.slices and not planted:
            planted.append(stage.key)
            first, *others = records
            records = [replace(first, label="no" if first.label == "yes" else "yes"), *others]
        return real(engine, stage, records, parents, *more)

    with monkeypatch.context() as patch:
        patch.setattr(S3T, "train", train)
        build(world)
    yield audit_of(world), planted
    world.pool.close()


def test_a_planted_fraud_is_missed_no_more_often_than_the_bound_says() -> None:
    stages = [f"{number:064x}" for number in range(60)]
    for share, count in ((0.05, 10), (0.2, 5), (0.5, 3)):
        wrong = set(stages[: round(share * len(stages))])
        draws = [draw_stages(stages, count, secrets.token_bytes(72)) for _ in range(4000)]
        assert all(len(set(each)) == count for each in draws)
        missed = sum(wrong.isdisjoint(each) for each in draws) / len(draws)
        bound = unseen(share, count)
        error = (bound * (1 - bound) / len(draws)) ** 0.5
        assert missed <= bound + 5 * error
        assert missed >= bound * 0.55  # not because everything were drawn: without replacement it is a little less
    assert draw_stages(stages, 100, b"x") == draw_stages(stages[::-1], 100, b"x")
    assert draw_stages(stages, 5, b"x") != draw_stages(stages, 5, b"y")


def test_what_was_drawn_is_trained_again_and_checked_without_us(audit: Audit) -> None:
    challenge_id = audit.open(audit.cosigned())
    key = audit.operator.public_key()
    waiting = check(audit.document(challenge_id), key, audit.vkey, audit.given)
    assert waiting.stages == len(waiting.drawn) == audit.world.recipe.shards
    assert set(waiting.outcomes.values()) == {None}
    with pytest.raises(ConflictError, match="another challenge"):
        audit.open(audit.cosigned())
    audit.replay_all()
    unsigned = check(audit.document(challenge_id), key, audit.vkey, audit.given)
    assert unsigned.equal == 0  # not under a tree head yet
    audit.cosigned()
    result = check(audit.document(challenge_id), key, audit.vkey, audit.given)
    assert result.equal == len(result.drawn)
    assert (result.witness, result.cosigned, result.version) == (WITNESS, 1_000, 1)
    assert "p <= (1 - f)^2" in result.statement()
    assert result.unseen(0.1) == unseen(0.1, 2)
    again = audit.open(audit.cosigned(), count=1)  # today's sample, and a challenge of today, hinder no other
    assert len(audit.document(again)["drawn"]) == 1
    with transaction(audit.world.pool) as connection:
        listed = challenges.list_challenges(connection, audit.world.model_id)
    assert [(each["drawn"], each["ended"], each["equal"]) for each in listed] == [(1, 0, 0), (2, 2, 2)]


def test_a_daily_sample_is_drawn_beside_a_challenge(audit: Audit) -> None:
    audit.open(audit.cosigned())
    with transaction(audit.world.pool) as connection:
        connection.execute("UPDATE artifact SET created_at = created_at - interval '1 day'")
    bells = audit.world.context.bell
    assert Replays(audit.world.pool, bells, sample=2).look() == 2  # type: ignore[arg-type]


def test_a_stage_that_was_trained_wrongly_is_seen(corrupted: tuple[Audit, list[str]]) -> None:
    audit, planted = corrupted
    challenge_id = audit.open(audit.cosigned())
    audit.replay_all()
    audit.cosigned()
    result = check(audit.document(challenge_id), audit.operator.public_key(), audit.vkey, audit.given)
    assert {stage for stage, outcome in result.outcomes.items() if outcome == "mismatch"} == set(planted)
    assert result.equal == len(result.drawn) - 1
    assert (result.unseen(0.1), "bounds nothing" in result.statement()) == (1.0, True)


def swap(entry: dict[str, Any], name: str, by: Callable[[str], str]) -> None:
    entry[name] = by(entry[name])


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "type": (lambda d: d.update(type="x"), "its type"),
    "fewer": (lambda d: d["drawn"].pop(), "other stages were drawn"),
    "asked": (lambda d: d.update(asked=1), "other stages were drawn"),
    "order": (lambda d: d["drawn"].reverse(), "other stages were drawn"),
    "assembly": (lambda d: d["assembly"]["members"][0].update(stage="0" * 64), "not the one that was published"),
    "model": (lambda d: d.update(model_id=9), "about another model"),
    "published": (lambda d: d.update(published=d["drawn"][0]["queued"]), "not version.published"),
    "swapped": (lambda d: d["drawn"][0].update(trained=d["drawn"][1]["trained"]), "not of stage"),
    "queued": (lambda d: d["drawn"][0].update(queued=d["drawn"][0]["trained"]), "not stage.queued"),
    "opening": (lambda d: swap(d["drawn"][0]["trained"], "opening", lambda t: t.replace("digest", "digesT")), "open"),
    "proof": (lambda d: swap(d["drawn"][0]["trained"], "proof", lambda t: t.replace("\nindex ", "\nindex 1")), "leaf"),
    "later": (lambda d: d["drawn"][0].update(outcome=d["drawn"][1]["outcome"]), "of another stage"),
    "not an outcome": (lambda d: d["drawn"][0].update(outcome=d["drawn"][0]["trained"]), "no outcome"),
    "consistency": (lambda d: d.update(consistency=[]), "does not continue"),
    "newest": (lambda d: d.update(newest=d["checkpoint"]), "does not continue"),
    "checkpoint": (lambda d: swap(d, "checkpoint", lambda t: t.replace("\n", "x\n", 1)), "signature"),
    "form": (lambda d: d.pop("published"), "fetch it again"),
    "not cosigned": (lambda d: d.update(checkpoint=d["newest"]), "no cosignature"),
}


def test_whatever_is_changed_is_seen(audit: Audit) -> None:
    challenge_id = audit.open(audit.cosigned())
    audit.replay_all()
    audit.cosigned()
    document, key = audit.document(challenge_id), audit.operator.public_key()
    assert check(document, key, audit.vkey, audit.given).equal == 2
    for damage, said in DAMAGE.values():
        damaged = copy.deepcopy(document)
        damage(damaged)
        with pytest.raises(ChallengeError, match=said):
            check(damaged, key, audit.vkey, audit.given)
    other = Ed25519PrivateKey.generate().public_key()
    with pytest.raises(ChallengeError, match="take the key of the operator"):
        check(document, other, audit.vkey, audit.given)
    with pytest.raises(ChallengeError, match="no cosignature"):
        check(document, key, note.vkey(WITNESS, other, note.COSIGNATURE), audit.given)
    with pytest.raises(ChallengeError, match="C2SP"):
        check(document, key, note.vkey(WITNESS, other), audit.given)


def test_the_operator_cannot_choose_which_cosignature_draws(audit: Audit) -> None:
    """He holds many of an honest witness's: one challenge a head, and the one that draws what he likes is shown."""
    asked = audit.cosigned()
    first = audit.open(asked)
    audit.replay_all()
    second = audit.open(audit.cosigned())
    audit.replay_all()
    audit.cosigned()
    key = audit.operator.public_key()
    assert check(audit.document(second), key, audit.vkey, audit.given).equal == 2
    with pytest.raises(ChallengeError, match="another cosignature"):
        check(audit.document(second), key, audit.vkey, asked)
    assert check(audit.document(first), key, audit.vkey, asked).equal == 2


def test_another_models_events_count_for_nothing(audit: Audit, monkeypatch: pytest.MonkeyPatch) -> None:
    challenge_id = audit.open(audit.cosigned())
    audit.replay_all()
    audit.cosigned()
    document, key = audit.document(challenge_id), audit.operator.public_key()
    stages = {each["stage"] for each in document["drawn"]}

    def foreign(leaf: Leaf, opening: bytes) -> Any:
        found = open_leaf(leaf, opening)
        return {**found, "model_id": found["model_id"] + 1} if leaf.kind in wrong else found

    monkeypatch.setattr("service.evidence.challenge.open_leaf", foreign)
    for kind in ("version.published", "stage.queued", "stage.trained", "stage.replay_equal"):
        wrong = {kind}
        with pytest.raises(ChallengeError, match="about another model"):
            check(document, key, audit.vkey, audit.given)
    wrong = set[str]()
    assert set(check(document, key, audit.vkey, audit.given).outcomes) == stages


def test_a_replay_from_before_the_draw_counts_for_nothing(audit: Audit) -> None:
    """Replays that were done already tell nothing of whether the draw was foreseen."""
    first = audit.open(audit.cosigned())
    audit.replay_all()
    earlier = audit.document(first)
    audit.cosigned()
    earlier = audit.document(first)
    second = audit.open(audit.cosigned())
    audit.replay_all()
    audit.cosigned()
    document = audit.document(second)
    assert check(document, audit.operator.public_key(), audit.vkey, audit.given).equal == 2
    with transaction(audit.world.pool) as connection:
        old = challenges.find_entry(
            connection,
            audit.world.model_id,
            EventKind.STAGE_REPLAY_EQUAL,
            {"stage": document["drawn"][0]["stage"]},
            stop=10**9,
        )
        assert old is not None
        newest = ledger.find_tree_head(connection)
        assert newest is not None
        path = ledger.tree(connection, newest.size).inclusion(old.index)
    proof = write_proof(old.index, path, newest.note)
    assert bytes(old.leaf).decode() in {each["outcome"]["leaf"] for each in earlier["drawn"]}
    document["newest"] = newest.note
    document["drawn"][0]["outcome"] = {
        "leaf": bytes(old.leaf).decode(),
        "opening": bytes(old.opening or b"").decode(),
        "proof": proof,
    }
    with pytest.raises(ChallengeError, match="older than the draw"):
        check(document, audit.operator.public_key(), audit.vkey, audit.given)


def test_a_tree_head_that_is_too_old_or_of_a_fork_draws_nothing(audit: Audit) -> None:
    fork = sign_head(TreeHead("x", 1, bytes(32)), audit.operator)
    with pytest.raises(ConflictError, match="fork"):
        audit.open(str(note.cosign(note.parse(fork), WITNESS, audit.mine, 1)))
    old = audit.cosigned()
    with transaction(audit.world.pool) as connection:
        model = models.lock_model(connection, audit.world.model_id)
        publish.publish(connection, model, publish.candidate(connection, model), cause="rebuild")
    with pytest.raises(ConflictError, match="cosign the newest"):
        audit.open(old)
    assert audit.open(audit.cosigned())
    with transaction(audit.world.pool) as connection, pytest.raises(NotFoundError, match="no such challenge"):
        challenges.document(connection, "tiny", uuid4())


def test_deletions_publish_while_a_challenge_looks_up_its_stages(audit: Audit, monkeypatch: pytest.MonkeyPatch) -> None:
    cosigned, real = audit.cosigned(), challenges.find_entry

    def find_entry(*given: Any, **named: Any) -> Any:
        monkeypatch.setattr(challenges, "find_entry", real)
        with transaction(audit.world.pool) as other:
            other.execute("SET LOCAL lock_timeout = '2s'")
            model = models.lock_model(other, audit.world.model_id)
            publish.publish(other, model, publish.candidate(other, model), cause="rebuild")
        return real(*given, **named)

    monkeypatch.setattr(challenges, "find_entry", find_entry)
    with pytest.raises(ConflictError, match="published meanwhile"):
        audit.open(cosigned)
    assert audit.world.rows("SELECT * FROM challenge") == []


def test_events_of_a_stage_are_found_by_an_index(audit: Audit) -> None:
    audit.cosigned()
    for kind, body, index in (
        (EventKind.STAGE_QUEUED, {"stages": ["0" * 64]}, "event_pending_stage"),
        (EventKind.VERSION_PUBLISHED, {"version": 1}, "event_pending_published"),
    ):
        values = {"model_id": 1, "kind": kind.value, "body": Jsonb(body), "first": 0, "stop": 10**9}
        with transaction(audit.world.pool) as connection:
            connection.execute("SET LOCAL enable_seqscan = off")
            plan = connection.execute("EXPLAIN " + challenges.FIND_ENTRY, values).fetchall()
        assert index in str(plan), plan


def test_calls_refuse_with_what_to_do(api: Api) -> None:
    api.dataset()
    api.model()
    path = "/v1/models/sentiment/challenges"
    body = {"checkpoint": "secret text", "witness": "w+1+x", "stages": 3}
    answer = api.client.post(path, json=body)
    assert (answer.status_code, "expunge ledger witness" in answer.text) == (422, True)
    assert "secret" not in answer.text
    assert api.client.post(path, json=body | {"stages": 0}).status_code == 422
    assert api.client.get(f"/v1/models/nobody/challenges/{uuid4()}").status_code == 404
    assert api.client.get(f"{path}/{uuid4()}").status_code == 404


def test_the_command_checks_a_file(
    audit: Audit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    challenge_id = audit.open(audit.cosigned())
    file, public, report = tmp_path / "c.json", tmp_path / "signing.pub", tmp_path / "replay.json"
    public.write_bytes(public_pem(audit.operator))
    given = tmp_path / "cosigned"
    given.write_text(audit.given)

    def run(*more: str) -> tuple[int, str]:
        file.write_text(json.dumps(audit.document(challenge_id)))
        arguments = [
            "challenge",
            "verify",
            str(file),
            "--key",
            str(public),
            "--witness",
            audit.vkey,
            "--checkpoint",
            str(given),
            *more,
        ]
        monkeypatch.setattr("sys.argv", ["expunge", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out + err

    code, said = run()
    assert (code, "waits; fetch" in said) == (1, True)
    audit.replay_all()
    audit.cosigned()
    code, said = run()
    assert (code, said.count("signed by operator")) == (0, 2)
    drawn = [
        {"stage": each["stage"], "digest": json.loads(each["trained"]["opening"])["body"]["digest"], "outcome": "equal"}
        for each in audit.document(challenge_id)["drawn"]
    ]
    report.write_text(json.dumps({"stages": drawn[:1]}))
    code, said = run("--replayed", str(report), "--json")
    assert (code, [each["re_derived"] for each in json.loads(said)["drawn"]]) == (0, [True, False])
    report.write_text(json.dumps({"stages": [drawn[0] | {"outcome": "mismatch"}]}))
    code, said = run("--replayed", str(report))
    assert (code, "your own replay" in said) == (1, True)


def test_the_witness_command_makes_what_a_challenge_needs(
    audit: Audit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    audit.cosigned()
    mine, public = tmp_path / "w.pem", tmp_path / "signing.pub"
    mine.touch(mode=0o600)
    mine.write_bytes(audit.mine.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(public_pem(audit.operator))
    log = audit.world.context.settings.artifact_url.removeprefix("file://") + "/ledger"
    arguments = ["ledger", "witness", log, "--key", str(public), "--name", WITNESS]
    monkeypatch.setattr("sys.argv", ["expunge", *arguments, "--witness-key", str(mine), "--state", str(tmp_path / "s")])
    with pytest.raises(SystemExit):
        main()
    out, err = capsys.readouterr()
    assert err.strip() == f"checked with {audit.vkey}"
    assert audit.open(out)
