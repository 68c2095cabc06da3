"""What a certificate says of models without a backbone, and of training that is not known to be deterministic."""

from dataclasses import replace
from typing import Any

import pytest
from certificate_sample import PEM, resigned, sample
from test_certificate import refused

from service.evidence.certificate import build
from service.evidence.verify import verify

OWN = replace(sample(), engine="external", backbone_digest=None, provenance=None)


def test_a_model_without_a_backbone_has_a_certificate() -> None:
    envelope = resigned(lambda _statement: None, OWN)
    assert all(check.passed for check in verify(envelope, PEM))
    said = build(OWN)["predicate"]
    assert said["model"]["backbone"] is None
    (assumed,) = (item["statement"] for item in said["assumptions"] if item["code"] == "backbone")
    assert assumed.startswith("There is no pretrained backbone")


@pytest.mark.parametrize("lone", [{"backbone": None}, {"provenance": None}])
def test_backbone_and_provenance_come_together(lone: dict[str, Any]) -> None:
    assert refused(resigned(lambda statement: statement["predicate"]["model"].update(lone))) == ["claims"]


@pytest.mark.parametrize(
    ("engine", "method"),
    [("s3t", "(S3T)"), ("sisa", "(SISA)"), ("ridge", "(ridge"), ("external", "(SISA, by the operator's own")],
)
def test_the_method_names_the_engine(engine: str, method: str) -> None:
    assert method in build(replace(sample(), engine=engine))["predicate"]["method"]


def test_training_that_may_differ_claims_no_more_than_influence_free() -> None:
    unsure = replace(OWN, retrain_equal=False)
    said = build(unsure)["predicate"]
    assert [claim["claim"] for claim in said["claims"]] == ["influence-free", "deactivated", "erased"]
    assert "retrain_equal_not_claimed" in {item["code"] for item in said["open_items"]}
    assert refused(resigned(lambda _statement: None, unsure)) == []
    (claim,) = (claim for claim in build(OWN)["predicate"]["claims"] if claim["claim"] == "retrain-equal")

    def lie(statement: dict[str, Any]) -> None:
        statement["predicate"]["claims"].insert(1, claim)

    assert refused(resigned(lie, unsure)) == ["claims"]
