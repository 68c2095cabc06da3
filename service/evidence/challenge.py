"""Challenge audits: which served stages are trained again is drawn by a witness's cosignature, after they were logged.

Keys of stages are in the ledger before their training, digests after it, both below the tree head that the witness
cosigns. So whoever planted a wrong stage did it without knowing which ones would be looked at.
"""

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from service.domain.replays import ReplayOutcome, draw
from service.evidence import note
from service.evidence.events import EventKind
from service.evidence.leaves import Leaf, open_leaf, parse_leaf
from service.evidence.merkle import leaf_hash, verify_consistency
from service.evidence.tree_head import TreeHead, TreeHeadError, check_proof, open_head
from shards.assembly import Assembly, Member

TYPE = "expunge challenge v1"
OUTCOMES = {
    EventKind.STAGE_REPLAY_EQUAL: ReplayOutcome.EQUAL,
    EventKind.STAGE_REPLAY_MISMATCH: ReplayOutcome.MISMATCH,
    EventKind.STAGE_REPLAY_OTHER_PLATFORM: ReplayOutcome.OTHER_PLATFORM,
    EventKind.STAGE_REPLAY_SKIPPED: ReplayOutcome.SKIPPED,
    EventKind.STAGE_REPLAY_FAILED: ReplayOutcome.FAILED,
}


class ChallengeError(ValueError):
    """A challenge that does not hold; the message says at which step."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A leaf with its content, once leaf, opening and proof hold together."""

    leaf: Leaf
    body: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Result:
    """What a challenge shows."""

    head: TreeHead
    """The tree head that the witness cosigned."""
    witness: str
    cosigned: int
    """Unix seconds, by the witness's clock."""
    version: int
    stages: int
    """Served stages that could have been drawn."""
    asked: int
    """How many were to be drawn; all where fewer serve."""
    drawn: Mapping[str, str]
    """Stage key -> digest, as logged before the draw."""
    outcomes: Mapping[str, ReplayOutcome | None]
    """None: not replayed yet, or not under the newest tree head."""

    @property
    def equal(self) -> int:
        """How many of those drawn gave the same bits again."""
        return sum(each is ReplayOutcome.EQUAL for each in self.outcomes.values())

    def unseen(self, share: float) -> float:
        """The chance that a fraud on this share of the stages is unseen; 1 unless each drawn one is equal.

        Whoever may let some of those drawn come to nothing can let the wrong ones.
        """
        return unseen(share, self.equal) if self.equal == len(self.drawn) else 1.0

    def statement(self) -> str:
        """The bound, in words."""
        said = f"{self.equal} of {len(self.drawn)} drawn stages were trained again to the same bits"
        if self.equal < len(self.drawn):
            return f"{said}: this bounds nothing, since a fraud may lie in the others"
        return (
            f"{said}, out of {self.stages} served. A fraud touching a share f of the stages stays unseen with"
            f" p <= (1 - f)^{self.equal}: for a tenth of them {self.unseen(0.1):.2g}"
        )


def unseen(share: float, replayed: int) -> float:
    """The chance that stages drawn without replacement miss a fraud on this share of them: at most (1 - f)^k."""
    return (1 - share) ** replayed


def draw_stages(stages: Sequence[str], count: int, cosignature: bytes) -> list[str]:
    """The stages to be replayed: a function of the keys and of a cosignature that nobody could foresee."""
    return draw(stages, count, sha256(b"expunge challenge v1\n" + cosignature).hexdigest())


def speaking(assembly: Assembly) -> dict[str, Member]:
    """The stages that speak for a shard, by key: replaying one trains all that it stands on."""
    return {member.stage: member for member in assembly.members if member}


def check(document: Mapping[str, Any], key: Ed25519PublicKey, witness: str, given: str) -> Result:
    """Check the document that the API gives for a challenge.

    Args:
        document: as it was fetched.
        key: the operator's public key.
        witness: the witness's public key (C2SP vkey), from the witness.
        given: the cosigned checkpoint that the challenge was opened with, from whoever opened it. A witness cosigns
            many tree heads: an operator who may say which one draws can take the one that draws what he likes.

    Raises:
        ChallengeError: something in it does not hold.
    """
    try:
        return _check(document, key, witness, given)
    except ChallengeError:
        raise
    except ValueError as error:  # of notes, tree heads, leaves
        raise ChallengeError(str(error)) from None
    except (KeyError, TypeError, AttributeError, IndexError):
        raise ChallengeError("not a challenge as the API gives it: fetch it again") from None


def _check(document: Mapping[str, Any], key: Ed25519PublicKey, witness: str, given: str) -> Result:
    _require(document["type"] == TYPE, f"its type is not {TYPE}")
    head = open_head(document["checkpoint"], key)
    name, public = note.read_vkey(witness, note.COSIGNATURE)
    cosignature = note.get_cosignature(note.parse(document["checkpoint"]), name, public)
    mine = note.get_cosignature(note.parse(given), name, public)
    _require(mine == cosignature, "it was drawn by another cosignature than that of the checkpoint given")
    assembly, model_id = Assembly.from_json(document["assembly"]), document["model_id"]
    published = _opened(document["published"], EventKind.VERSION_PUBLISHED, key, head, model_id)
    _require(published.body["assembly"] == assembly.digest, "the assembly is not the one that was published")
    served = speaking(assembly)
    drawn = draw_stages(list(served), document["asked"], cosignature)
    _require([each["stage"] for each in document["drawn"]] == drawn, "other stages were drawn by that cosignature")
    newest = _newest(document, key, head)
    outcomes: dict[str, ReplayOutcome | None] = {}
    for each in document["drawn"]:
        stage = each["stage"]
        queued = _opened(each["queued"], EventKind.STAGE_QUEUED, key, head, model_id)
        trained = _opened(each["trained"], EventKind.STAGE_TRAINED, key, head, model_id)
        _require(stage in queued.body["stages"], f"stage {stage[:12]} is not among those that were to be trained")
        _require(trained.body["stage"] == stage, f"the training is not of stage {stage[:12]}")
        _require(queued.leaf.index < trained.leaf.index, f"stage {stage[:12]} was named after its training")
        digest = served[stage].artifacts[-1]
        _require(trained.body["digest"] == digest, f"stage {stage[:12]} serves another digest than was logged")
        outcomes[stage] = None
        if (entry := each["outcome"]) is not None:
            kind = EventKind(parse_leaf(entry["leaf"].encode()).kind)
            _require(kind in OUTCOMES, f"{kind} is no outcome of a replay")
            found = _opened(entry, kind, key, newest, model_id)
            _require(found.leaf.index >= head.size, f"the replay of stage {stage[:12]} is older than the draw")
            outcomes[stage] = _outcome(found, kind, served[stage])
    return Result(
        head,
        name,
        int.from_bytes(cosignature[:8], "big"),
        published.body["version"],
        len(served),
        document["asked"],
        {stage: served[stage].artifacts[-1] for stage in drawn},
        outcomes,
    )


def _newest(document: Mapping[str, Any], key: Ed25519PublicKey, head: TreeHead) -> TreeHead:
    newest = open_head(document["newest"], key, origin=head.origin)
    try:
        path = [base64.b64decode(each, validate=True) for each in document["consistency"]]
    except binascii.Error:
        path = []
    if not verify_consistency(head.size, newest.size, path, head.root, newest.root):
        raise ChallengeError(f"{newest} does not continue {head}")
    return newest


def _outcome(found: Opened, kind: EventKind, member: Member) -> ReplayOutcome:
    """What came of replaying a member's stage; a mismatch names the first stage of its line that differs."""
    about = f"the replay of stage {member.stage[:12]}"
    if kind is EventKind.STAGE_REPLAY_MISMATCH:
        _require(found.body["digest"] in member.artifacts, f"{about} is of another stage")
    else:
        expected = (member.stage, member.artifacts[-1])
        _require((found.body["stage"], found.body["digest"]) == expected, f"{about} is of another stage")
    return OUTCOMES[kind]


def _opened(entry: Mapping[str, Any], kind: EventKind, key: Ed25519PublicKey, head: TreeHead, model_id: int) -> Opened:
    leaf = parse_leaf(entry["leaf"].encode())
    _require(leaf.kind == kind, f"leaf {leaf.index} is {leaf.kind}, not {kind}")
    index, under = check_proof(entry["proof"], leaf_hash(entry["leaf"].encode()), key)
    _require(index == leaf.index, f"leaf {leaf.index} lies at {index}")
    if under != head:
        raise TreeHeadError(f"leaf {leaf.index} is under {under}, not under {head}")
    opened = open_leaf(leaf, entry["opening"].encode())
    _require(opened["model_id"] == model_id, f"leaf {leaf.index} ({kind}) is about another model")
    return Opened(leaf, opened["body"])


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ChallengeError(otherwise)
