"""`GET /v1/audit/export`: requests, targets and events as files, the evidence about them, and the report."""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from itertools import chain
from typing import Annotated, Any, NamedTuple
from uuid import UUID, uuid4

from fastapi import APIRouter, Query, Response

from service.api.auth import Auditor
from service.api.context import Context, Here
from service.api.errors import RESPONSES
from service.api.evidence_bundle import bundle_files
from service.api.streaming import Streamed
from service.domain.audit_exports import Format, What
from service.domain.errors import InvalidInputError, UnavailableError
from service.evidence.events import EventKind
from service.evidence.leaves import moment
from service.logs import get_logger
from service.reports import compliance as report
from service.reports.bundle import write_zip
from service.reports.pdf import render
from service.reports.tables import WRITERS
from service.store import compliance, events, export_rows, requests
from service.store.database import Connection, transaction
from service.store.export_rows import EventRow, Range, RequestRow, TargetRow

router = APIRouter(tags=["audit"], responses=RESPONSES)
log = get_logger(__name__)


class _Table(NamedTuple):
    kind: type
    rows: Callable[[Connection, Range], Iterator[Any]]


TABLES = {
    What.REQUESTS: _Table(RequestRow, export_rows.list_requests),
    What.TARGETS: _Table(TargetRow, export_rows.list_targets),
    What.EVENTS: _Table(EventRow, export_rows.list_events),
}
MEDIA_TYPES = {
    Format.JSONL: "application/x-ndjson",
    Format.CSV: "text/csv; charset=utf-8; header=present",
    Format.PARQUET: "application/vnd.apache.parquet",
    Format.BUNDLE: "application/zip",
    Format.PDF: "application/pdf",
}
_DAY = re.compile(r"\d{4}-\d{2}-\d{2}")
Moment = Annotated[str | None, Query(max_length=40)]


class Export:
    """One export under way; its end is recorded, with the digest of what was handed over."""

    def __init__(self, here: Context, export_id: UUID, stack: ExitStack, pieces: Iterable[bytes]) -> None:
        """Takes over the stack, which holds the snapshot that `pieces` are read from."""
        self._here = here
        self._export_id = export_id
        self._stack = stack
        self._pieces = iter(pieces)
        self._hash = hashlib.sha256()
        self._bytes = 0
        self._recorded = False

    def __iter__(self) -> Iterator[bytes]:
        """The pieces, once; whoever has seen their end finds it recorded."""
        for piece in self._pieces:
            self._hash.update(piece)
            self._bytes += len(piece)
            yield piece
        self._record(whole=True)

    def close(self) -> None:
        """End the query, free the connection, and record what was handed over."""
        del self._pieces  # closes the cursor, while there is a connection
        self._stack.close()
        if not self._recorded:
            self._record(whole=False)

    def _record(self, *, whole: bool) -> None:
        self._recorded = True
        try:
            with transaction(self._here.pool) as connection:
                events.append(
                    connection,
                    EventKind.AUDIT_EXPORT_ENDED,
                    export_id=str(self._export_id),
                    digest=self._hash.hexdigest(),
                    bytes=self._bytes,
                    whole=whole,
                )
        except UnavailableError:  # its beginning is recorded
            log.warning("export_end_not_recorded", export_id=str(self._export_id))


@router.get("/v1/audit/export", response_class=Response)
def export_audit(
    here: Here,
    caller: Auditor,
    format: Format,  # noqa: A002 - the call's word
    what: Annotated[What | None, Query(description="The table; of `bundle` and `pdf`: none.")] = None,
    since: Annotated[Moment, Query(alias="from", description="RFC 3339 with a zone, or a day in UTC.")] = None,
    until: Annotated[Moment, Query(alias="to", description="The first moment behind the range.")] = None,
    request: Annotated[UUID | None, Query(description="One request instead of a range.")] = None,
) -> Response:
    """What was received (events: what happened) in a range, or all of one request; streamed from one snapshot.

    Neither identifiers nor callers' texts are in it. The export itself is an event. An empty range gives a valid file
    without rows, and the header `X-Expunge-Empty: true`.
    """
    if what is not None and format in {Format.BUNDLE, Format.PDF}:
        raise InvalidInputError(f"{format} has no tables to choose from: leave `what` out", field="what")
    chosen = _range(since, until, request)
    export_id = uuid4()
    with ExitStack() as stack:
        connection = stack.enter_context(here.snapshots.open())
        if request is not None:
            requests.get_request(connection, request)
        pieces, empty = _pieces(here, connection, format, what or What.REQUESTS, chosen)
        with transaction(here.pool) as recording:
            events.append(
                recording,
                EventKind.AUDIT_EXPORTED,
                export_id=str(export_id),
                actor=caller.prefix,
                format=format.value,
                what=(what or What.REQUESTS).value if format in WRITERS else None,
                since=moment(chosen.since) if chosen.since else None,
                until=moment(chosen.until) if chosen.until else None,
                about=str(request) if request else None,
            )
        name = f"expunge-{what or What.REQUESTS}.{format}" if format in WRITERS else _FILES[format]
        headers = {
            "Content-Disposition": f'attachment; filename="{name}"',
            "X-Expunge-Export": str(export_id),
            **({"X-Expunge-Empty": "true"} if empty else {}),
        }
        return Streamed(
            Export(here, export_id, stack.pop_all(), pieces), media_type=MEDIA_TYPES[format], headers=headers
        )


_FILES = {Format.BUNDLE: "expunge-evidence.zip", Format.PDF: "expunge-report.pdf"}


def _pieces(
    here: Context, connection: Connection, form: Format, what: What, chosen: Range
) -> tuple[Iterable[bytes], bool]:
    """The file, and whether nothing is in the range."""
    if form is Format.PDF:
        found = compliance.count(connection, chosen)
        return [render("compliance", report.compose(found))], not found.months
    table = TABLES[What.REQUESTS if form is Format.BUNDLE else what]
    rows = table.rows(connection, chosen)
    first = next(rows, None)
    rows = rows if first is None else chain((first,), rows)
    if form is Format.BUNDLE:
        return write_zip(bundle_files(here, connection, chosen, rows)), first is None
    return WRITERS[form](table.kind, rows), first is None


def _range(since: str | None, until: str | None, request: UUID | None) -> Range:
    if request is not None and (since or until):
        raise InvalidInputError("give a range or a request, not both", field="request")
    begin, end = _moment(since, "from"), _moment(until, "to")
    if begin and end and begin > end:
        raise InvalidInputError("from is after to: a range goes from the earlier to the later", field="from")
    return Range(since=begin, until=end, request_id=request)


def _moment(text: str | None, field: str) -> datetime | None:
    if text is None:
        return None
    try:
        found = datetime.fromisoformat(f"{text}T00:00:00Z" if _DAY.fullmatch(text) else text)
        if found.tzinfo is not None:
            return found.astimezone(UTC)
    except (ValueError, OverflowError):
        pass
    raise InvalidInputError(
        f"{field} must be a day (2026-01-31, in UTC) or a time with its zone (2026-01-31T00:00:00Z; in a URL a + is"
        " written %2B)",
        field=field,
    )
