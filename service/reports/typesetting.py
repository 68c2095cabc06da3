"""Typst: a template of this directory and JSON make a PDF. Offline: fonts are the library's own, no package is used."""

from pathlib import Path

import typst

HERE = Path(__file__).parent
STANDARD = "a-3b"
"""PDF/A-3: for archives, and what it was made from may lie inside."""


def typeset(template: str, content: bytes) -> bytes:
    """The PDF: the same bytes for the same content, whose `date` is the document's."""
    return typst.compile(
        str(HERE / f"{template}.typ"),
        root=str(HERE),
        sys_inputs={"content": content.decode()},
        ignore_system_fonts=True,
        pdf_standards=STANDARD,
    )
