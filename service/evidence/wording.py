"""What a certificate claims and assumes, word for word; docs/certificate.md explains it.

The statements themselves, and how strong each may be called, are the verifier's: `form.CLAIMS`.
"""

from service.evidence.form import CLAIMS

METHOD = {
    "erased": "stage deactivation and destruction ({})",
    "restricted": "stage deactivation ({})",
}
ENGINES = {
    "s3t": "S3T",
    "sisa": "SISA",
    "ridge": "ridge regression on sums per cell",
    "external": "SISA, by the operator's own training command",
}

SUPPORT: dict[str, dict[str, str]] = {
    "influence-free": {
        "evidence": (
            "The inputs of every served stage and of its ancestors, whose digests are the stage keys in "
            "the assembly; none of them reads a manifest listed under touched. In the cells that held the records, "
            "a Merkle path to each manifest that a served stage read shows that it lacks each of them."
        ),
        "checkable_by": "Anyone with this file and the operator's public key.",
        "must_be_trusted": (
            "That the records lay in no other cell; that each artefact was trained on the manifests that its stage "
            "key names; that the replicas serve this assembly or a later clean one; the assumption on manifests."
        ),
    },
    "retrain-equal": {
        "evidence": "The stage keys, the artefact digests in the assembly and the platform fingerprints.",
        "checkable_by": (
            "Whoever holds the remaining records, the recipe and a platform with the same fingerprint, by replay."
        ),
        "must_be_trusted": "That training is deterministic on that platform, until a replay has been made.",
    },
    "deactivated": {
        "evidence": (
            "The floor, the times, and for every process its acknowledgement, its end, or the expiry of its lease; each"
            " with its event in the ledger."
        ),
        "checkable_by": "Anyone, for consistency and for the events being in the ledger under the tree head given.",
        "must_be_trusted": "The operator's records of its processes, and assumptions A1 and A2.",
    },
    "erased": {
        "evidence": "Name, digest, time of destruction, times of absence and event in the ledger of every object.",
        "checkable_by": (
            "Whoever may read the artefact store, for what is absent now; nobody afterwards for copies made outside it."
        ),
        "must_be_trusted": (
            "The operator's list of objects, its store, and the assumptions about backups, media and other copies."
        ),
    },
    "restricted": {
        "evidence": "The floor, the times with their events in the ledger, and the assembly of this version.",
        "checkable_by": "Anyone, for consistency and for the events being in the ledger under the tree head given.",
        "must_be_trusted": "The operator's records.",
    },
}

ASSUMPTIONS: dict[str, str] = {
    "A1": (
        "Any two monotonic clocks of the replicas and the barrier differ in rate by no more than the "
        "lease's margin over one lease; no machine was paused or restored from a snapshot with its clock "
        "standing still."
    ),
    "A2": (
        "There was one Postgres primary: after a failover the old one was fenced and no acknowledged commit was lost."
    ),
    "other_identifiers": "Records under other people's or unreported identifiers are not covered.",
    "exports": "Exports handed out, retrieval indexes and prompts are outside.",
    "overwritten_media": (
        "Absence means absent from live stores and live files at the time stated; overwritten media and "
        "file system snapshots are outside."
    ),
    "late_upload": (
        "A trainer that was paused while its stage became tainted can upload later; sweeps after a minute,"
        " an hour and a day destroy such objects, which the ledger shows."
    ),
    "manifests": (
        "Each manifest lists the commitments of the records that were trained on, all of them and in their order. "
        "Whoever holds the remaining payloads computes its root again."
    ),
    "observable": "Who queried the model before and after can see that it changed.",
}

BACKBONE: dict[str | None, str] = {
    None: (
        "There is no pretrained backbone in the recipe; where the operator's training code starts from weights of its"
        " own, they are taken never to have seen the records."
    ),
    "public": "The frozen backbone is public and is taken never to have seen the records.",
    "own_clean": "The operator states that its frozen backbone was never trained on the records.",
    "own_contains_subjects": (
        "The operator states that its frozen backbone may have been trained on the records: influence-free"
        " and retrain-equal are therefore not claimed."
    ),
}
NOT_RETRAIN_EQUAL = "training the same stage twice gave other bits, or was not tried: the claim is left out"
NOT_FREED = {
    "acknowledged": "the process serves the new version, and has not reported that the old weights left its memory",
    "fenced_by_expiry": "fenced by expiry of its lease; memory release not confirmed",
    "ended": "ended; memory release not confirmed",
}
SWEPT = (
    "looks for every destroyed object follow after a minute, an hour and a day; what a paused trainer uploads late is"
    " destroyed then"
)


def backups(key_backup_days: int | None) -> str:
    """What the operator states of copies that its backups may hold."""
    if key_backup_days is None:
        return "the operator states no retention for backups of the key store: copies of sealed files may open with one"
    if key_backup_days == 0:
        return "the operator states that the key store is not backed up: no copy of a sealed file opens any more"
    return (
        f"the operator states that backups of the key store expire after {key_backup_days} days: until then a copy of"
        " a sealed file may open with one"
    )


def claims(outcome: str, provenance: str | None, *, retrain_equal: bool = True) -> list[dict[str, str]]:
    """The claims that an outcome supports.

    A backbone that holds subjects refuses those about influence; training that is not known to give the same bits
    again refuses `retrain-equal`.
    """
    about_weights = ["influence-free", "retrain-equal"] if retrain_equal else ["influence-free"]
    if provenance == "own_contains_subjects":
        about_weights = []
    made = [*about_weights, "deactivated", outcome]
    return [
        {"claim": name, "statement": CLAIMS[name][1], **SUPPORT[name], "strength": CLAIMS[name][0]} for name in made
    ]


def assumptions(provenance: str | None, key_backup_days: int | None) -> list[dict[str, str]]:
    """What the claims rest on beside the signature."""
    copies = (
        "Stored files are sealed, each under a key of its own that was destroyed with it, so that copies in snapshots"
        f" and backups do not open: {backups(key_backup_days)}. A restore replays the deletions."
    )
    said = {**ASSUMPTIONS, "backbone": BACKBONE[provenance], "backups": copies}
    return [{"code": code, "statement": said[code]} for code in sorted(said)]
