"""PDFs as readers see them: the words, one page, the file inside, the same bytes again, and no wait without end."""

import base64
import hashlib
import io
import json
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pypdf
import pytest
from certificate_sample import KEY, PEM, restricted, sample

from service.domain.compliance import (
    Bin,
    Compliance,
    Durations,
    MonthCount,
    Overdue,
    Punctuality,
    ReasonCount,
    YearCount,
)
from service.domain.errors import ConflictError, UnavailableError
from service.evidence.certificate import digest_of_envelope, issue
from service.evidence.verify import verify
from service.reports import certificate, compliance, pdf
from service.reports.pdf import render

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
NOTHING = Durations(0, None, None, None)


def counts(months: int = 12, overdue: int = 2, per_month: int = 50) -> Compliance:
    made = [date(2021 + month // 12, month % 12 + 1, 1) for month in range(months)]
    total = 2 * months * per_month
    return Compliance(
        as_of=NOW,
        since=datetime(2021, 1, 1, tzinfo=UTC),
        until=None,
        months=tuple(
            MonthCount(month, state, outcome, per_month)
            for month in made
            for state, outcome in (("completed", "erased"), ("rejected", None))
        ),
        to_deactivated=Durations(total, 0.031, 0.2, 90000.0),
        deactivated_bins=(Bin(0, total - 1), Bin(5, 1)),
        to_completed=Durations(total, 86400.0 * 3, 86400.0 * 20, 86400.0 * 31),
        allowance_bins=(Bin(1, total - 1), Bin(10, 1)),
        punctuality=Punctuality(total - 1, 1, 70, overdue),
        overdue=tuple(
            Overdue(UUID(int=number), "erasing", "ccpa", NOW - timedelta(days=number))
            for number in range(1, min(overdue, 20) + 1)
        ),
        reasons=(ReasonCount("rejected", "insuf_verification", 7), ReasonCount("rejected", None, 1)),
        years=tuple(
            YearCount(2021 + year, scope, 1234, 1000, 100, 30, 4, 100, 12.25, 14.5)
            for scope in ("ccpa", "all")
            for year in range(1 + months // 12)
        ),
    )


def nothing() -> Compliance:
    return replace(
        counts(0, 0), months=(), to_deactivated=NOTHING, deactivated_bins=(), to_completed=NOTHING, allowance_bins=(),
        punctuality=Punctuality(0, 0, 0, 0), reasons=(), years=(),
    )  # fmt: skip


def read(data: bytes) -> tuple[pypdf.PdfReader, str]:
    """The document and its words, line breaks and breakable places taken out."""
    reader = pypdf.PdfReader(io.BytesIO(data))
    text = " ".join(page.extract_text() for page in reader.pages)
    return reader, " ".join(text.replace("\u200b", "").split())


def test_a_compliance_report_says_its_counts_and_carries_them() -> None:
    content = compliance.compose(counts())
    data = render("compliance", content)
    reader, text = read(data)
    assert len(reader.pages) == 1
    for words in (
        "Requests received from 2021-01-01 00:00 until now (UTC), as they stood on 2026-11-22 12:00 UTC",
        "1,200 received",
        "completed 600",
        "denied 600",
        "median 31 ms",
        "longest 25.0 hours",
        "2 of the 70 requests that have not ended are past their due dates",
        "insuf_verification 7",
        "none recorded 1",
        "2021 1,234 1,000 100 30 4 100 12.2 14.5",
        content["digest"],
    ):
        assert words in text, words
    inside = reader.attachments["report.json"][0]
    assert hashlib.sha256(inside).hexdigest() == content["digest"]
    assert json.loads(inside)["years"][0]["counts"] == [1234, 1000, 100, 30, 4, 100]
    assert reader.metadata is not None
    assert content["digest"] in str(reader.metadata)
    assert render("compliance", content) == data


def test_a_report_about_nothing_says_so() -> None:
    _, text = read(render("compliance", compliance.compose(nothing())))
    assert "No request was received in this range" in text
    assert text.count("None was received in this range") == 2


@pytest.mark.parametrize(("months", "unit", "bars"), [(1, "month", 1), (60, "month", 60), (72, "year", 6)])
def test_many_months_become_years_and_long_lists_are_cut(months: int, unit: str, bars: int) -> None:
    content = compliance.compose(counts(months, overdue=57, per_month=900_000))
    assert (content["months"]["unit"], len(content["months"]["bars"])) == (unit, bars)
    reader, text = read(render("compliance", content))
    assert len(reader.pages) <= 2
    assert "57 of the 70" in text
    assert "these are the 20 oldest" in text


def test_months_without_a_request_are_shown() -> None:
    found = replace(
        counts(),
        months=(MonthCount(date(2025, 11, 1), "received", None, 3), MonthCount(date(2026, 2, 1), "failed", None, 1)),
    )
    bars = compliance.compose(found)["months"]["bars"]
    assert [bar["label"] for bar in bars] == ["2025-11", "2025-12", "2026-01", "2026-02"]
    assert [sum(bar["values"]) for bar in bars] == [3, 0, 0, 1]


@pytest.mark.parametrize("evidence", [sample, restricted])
def test_a_certificate_is_one_page_with_the_signed_file_inside(evidence: Any) -> None:
    envelope = issue(evidence(), KEY)
    content = certificate.compose(envelope)
    data = render("certificate", content)
    reader, text = read(data)
    assert len(reader.pages) == 1
    width, height = reader.pages[0].mediabox.upper_right
    assert (round(width), round(height)) == (595, 842)  # A4
    inside = json.loads(reader.attachments["certificate.json"][0])
    assert inside == envelope
    assert all(check.passed for check in verify(inside, PEM))
    said = json.loads(base64.b64decode(envelope["payload"]))["predicate"]
    digest = hashlib.sha256(reader.attachments["certificate.json"][0]).hexdigest()
    assert digest == digest_of_envelope(envelope)
    assert digest in text.replace(" ", "")
    assert reader.metadata is not None
    assert reader.metadata["/Keywords"] == f"sha256:{digest}"
    for claim in said["claims"]:
        assert claim["strength"] in text
        for words in (claim["statement"], claim["must_be_trusted"]):
            assert plain(words) in plain(text), words
    for each in said["assumptions"]:
        assert plain(each["statement"]) in plain(text)
    for row in said["times"]:
        assert row["at"][11:23] in text
    assert said["request"]["id"] in text
    assert f"model {said['model']['name']}" in text
    assert render("certificate", content) == data


def plain(text: str) -> str:
    """Without what setting a line may change."""
    return "".join(char for char in text if char.isalnum())


def test_a_long_certificate_is_still_one_page() -> None:
    envelope = issue(sample(), KEY)
    statement = json.loads(base64.b64decode(envelope["payload"]))
    said = statement["predicate"]
    said["model"]["name"] = "m" * 63
    said["records"] = said["records"] * 5000
    said["tainted"] = said["tainted"] * 400
    said["replicas"] = said["replicas"] * 64
    item = {"code": "memory_release_not_confirmed", "name": str(UUID(int=1)), "detail": "a word " * 20, "until": None}
    said["open_items"] = [item] * 90
    long = {**envelope, "payload": base64.b64encode(json.dumps(statement).encode()).decode()}
    reader, text = read(render("certificate", certificate.compose(long)))
    assert len(reader.pages) == 1
    assert "and 85 more, in the JSON" in text


def test_a_certificate_of_another_version_is_refused() -> None:
    statement = base64.b64encode(json.dumps({"predicateType": "x/v1", "predicate": {}}).encode()).decode()
    with pytest.raises(ConflictError, match="take the JSON"):
        certificate.compose({"payload": statement, "signatures": []})


def test_markup_in_a_text_stays_text() -> None:
    content = compliance.compose(replace(counts(), reasons=(ReasonCount("rejected", "#panic[*x*] $1/0$ @a", 1),)))
    _, text = read(render("compliance", content))
    assert "#panic[*x*]" in text


def test_what_takes_too_long_or_fails_is_ended_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnavailableError, match="take the JSON"):
        render("compliance", {})
    monkeypatch.setattr(pdf, "SECONDS", 0.001)
    with pytest.raises(UnavailableError, match="within"):
        render("compliance", compliance.compose(counts()))
    monkeypatch.undo()
    assert render("compliance", compliance.compose(nothing())).startswith(b"%PDF-")


def test_the_pdf_process_loads_neither_torch_nor_a_database(repository: Path) -> None:
    code = (
        "import service.reports.typesetting, service.reports.pdf, sys;"
        "print([m for m in ('torch', 'psycopg', 'pyarrow', 'numpy', 'fastapi') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=repository)
    assert done.stdout.strip() == "[]"
