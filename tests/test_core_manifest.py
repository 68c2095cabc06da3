import dataclasses
import random
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.errors import ManifestMismatchError
from shards.manifest import Manifest, Record, check_records, commitment_of

RECORDS = [Record(uuid.UUID(int=n), bytes([n]) * 32, f"text {n}", "yes") for n in range(12)]


def root_of(records: list[Record]) -> str:
    return Manifest.of(record.commitment for record in records).root


@given(st.permutations(RECORDS))
def test_a_manifest_does_not_know_the_order_of_its_records(records: list[Record]) -> None:
    assert root_of(records) == root_of(RECORDS)
    check_records(records, root_of(RECORDS))


@given(st.sets(st.integers(0, 11)), st.sets(st.integers(0, 11)))
def test_two_record_sets_share_a_root_only_if_they_are_equal(left: set[int], right: set[int]) -> None:
    roots = [root_of([RECORDS[number] for number in side]) for side in (left, right)]
    assert (roots[0] == roots[1]) == (left == right)


@pytest.mark.parametrize(
    "change", [{"text": "other"}, {"label": "no"}, {"salt": b"s" * 32}, {"record_id": uuid.UUID(int=99)}]
)
def test_every_field_of_a_record_is_committed_to(change: dict[str, object]) -> None:
    changed = [dataclasses.replace(RECORDS[0], **change), *RECORDS[1:]]  # type: ignore[arg-type]
    with pytest.raises(ManifestMismatchError, match="plan the stage again"):
        check_records(changed, root_of(RECORDS))


def test_missing_and_additional_records_are_refused() -> None:
    for records in (RECORDS[1:], [*RECORDS, RECORDS[0]], []):
        with pytest.raises(ManifestMismatchError):
            check_records(records, root_of(RECORDS))


def test_text_and_label_do_not_run_together() -> None:
    one = Record(uuid.UUID(int=1), b"s" * 32, "ab", "c")
    other = Record(uuid.UUID(int=1), b"s" * 32, "a", "bc")
    assert one.content_digest != other.content_digest


def test_a_commitment_needs_the_salt_only_through_the_content_digest() -> None:
    record = random.Random(0).choice(RECORDS)
    assert record.commitment == commitment_of(record.record_id, record.content_digest)
    assert len(record.commitment) == 32
