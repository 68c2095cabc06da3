"""Opaque cursors of lists that run from the newest row back."""

import base64
import binascii
import json
from datetime import datetime
from uuid import UUID

from service.domain.errors import InvalidInputError


def make_cursor(moment: datetime, row_id: UUID) -> str:
    """The cursor of what follows the row."""
    return base64.urlsafe_b64encode(json.dumps([moment.isoformat(), str(row_id)]).encode()).decode()


def open_cursor(cursor: str) -> tuple[datetime, UUID]:
    """The row that a cursor names.

    Raises:
        InvalidInputError: it is none that this API gave out.
    """
    try:
        moment, row_id = json.loads(base64.urlsafe_b64decode(cursor))
        return datetime.fromisoformat(moment), UUID(row_id)
    except (binascii.Error, ValueError, TypeError, AttributeError):
        raise InvalidInputError("the cursor is not one that this API gave out", field="cursor") from None
