"""PDFs, each made in a process of its own that is ended when it takes too long: no caller waits behind another's."""

import json
import subprocess
import sys
from collections.abc import Mapping
from threading import BoundedSemaphore
from typing import Any

from service.domain.errors import UnavailableError

SECONDS = 20.0
"""A page takes a fraction of one."""
_FREE = BoundedSemaphore(2)


def render(template: str, content: Mapping[str, Any]) -> bytes:
    """A PDF of `template`, the same bytes for the same content.

    Raises:
        UnavailableError: it took more than `SECONDS`, or could not be made.
    """
    command = [sys.executable, "-m", "service.reports", template]
    text = json.dumps(content, ensure_ascii=False).encode()
    if not _FREE.acquire(timeout=SECONDS):
        raise UnavailableError("other PDFs are being made: try again")
    try:
        done = subprocess.run(command, input=text, capture_output=True, check=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"the PDF was not ready within {SECONDS:.0f} s: try again, or take the JSON") from None
    except subprocess.CalledProcessError as error:
        raise UnavailableError(f"the PDF could not be made ({error.returncode}): take the JSON") from None
    finally:
        _FREE.release()
    return done.stdout
