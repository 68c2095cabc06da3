"""Audit exports: what can be exported, and as what."""

from enum import StrEnum


class Format(StrEnum):
    """Kinds of files."""

    JSONL = "jsonl"
    CSV = "csv"
    PARQUET = "parquet"
    BUNDLE = "bundle"
    PDF = "pdf"


class What(StrEnum):
    """Tables; they share `request_id`."""

    REQUESTS = "requests"
    TARGETS = "targets"
    EVENTS = "events"
