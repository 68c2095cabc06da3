"""A zip archive made while it is read: files come as pieces, and nothing is written to disk or kept."""

import zipfile
from collections.abc import Callable, Generator, Iterable
from typing import NamedTuple

from service.reports.pieces import Pieces

PIECE = 256 * 1024
"""Bytes that are handed on at once, at least."""
EPOCH = (1980, 1, 1, 0, 0, 0)
"""The time of every file in it, so that equal contents make equal bytes."""


class File(NamedTuple):
    """A file of the archive."""

    name: str
    pieces: Callable[[], Iterable[bytes]]
    """Called when its turn has come."""


def write_zip(files: Iterable[File]) -> Generator[bytes]:
    """The archive; files of any size, each read once."""
    out = Pieces()
    with zipfile.ZipFile(out, "w") as archive:  # pyright: ignore[reportArgumentType] - it needs write and flush alone
        for file in files:
            info = zipfile.ZipInfo(file.name, EPOCH)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = 0o644 << 16
            with archive.open(info, "w", force_zip64=True) as member:
                for piece in file.pieces():
                    member.write(piece)
                    if out.waiting >= PIECE:
                        yield out.drain()
    yield out.drain()
