"""What lies in a file: its bytes as they are, and everything that its format packs, compresses or escapes."""

import bz2
import gzip
import io
import json
import lzma
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

DEPTH = 5
"""Archives within archives that are opened."""
LIMIT_BYTES = 2**30
"""Bytes that one layer may unpack to; what is larger is reported as not searched."""

Part = tuple[str, bytes]
"""What a piece of a file is called, and its bytes."""


class TooDeepError(Exception):
    """A file that unpacks to more than is looked through."""


def parts(data: bytes, depth: int = 0) -> Iterator[Part]:
    """The bytes themselves under the name "", then what each known format holds, layer by layer.

    Raises:
        TooDeepError: more layers, or larger ones, than are looked through.
    """
    yield "", data
    for at, begins, unpack in _FORMATS:
        if data[at : at + len(begins)] == begins:
            if depth == DEPTH:
                raise TooDeepError
            yield from _unpacked(unpack, data, depth)
    if data[8:9] == b"{":
        yield from _safetensors(data)
    elif data[:1] in {b"{", b"["}:
        yield from _json_lines(data)


def _unpacked(unpack: Callable[[bytes], Iterator[Part]], data: bytes, depth: int) -> Iterator[Part]:
    with suppress(*_MISTAKEN):
        for name, inner in unpack(data):
            for deeper, found in parts(inner, depth + 1):
                yield "/".join(filter(None, (name, deeper))), found


def _limited(read: Callable[[int], bytes]) -> bytes:
    data = read(LIMIT_BYTES + 1)
    if len(data) > LIMIT_BYTES:
        raise TooDeepError
    return data


def _gzip(data: bytes) -> Iterator[Part]:
    with gzip.open(io.BytesIO(data)) as file:
        yield "gzip", _limited(file.read)


def _bzip(data: bytes) -> Iterator[Part]:
    with bz2.open(io.BytesIO(data)) as file:
        yield "bzip2", _limited(file.read)


def _xz(data: bytes) -> Iterator[Part]:
    with lzma.open(io.BytesIO(data)) as file:
        yield "xz", _limited(file.read)


def _zstd(data: bytes) -> Iterator[Part]:
    with pa.CompressedInputStream(pa.BufferReader(data), "zstd") as file:
        yield "zstd", _limited(file.read)


def _zip(data: bytes) -> Iterator[Part]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for number, info in enumerate(archive.infolist()):
            yield f"zip entry {number} name", info.filename.encode() + info.comment
            with archive.open(info) as file:
                yield f"zip entry {number}", _limited(file.read)


def _tar(data: bytes) -> Iterator[Part]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for number, info in enumerate(archive):
            yield f"tar entry {number} name", info.name.encode()
            file = archive.extractfile(info)
            if file is not None:
                yield f"tar entry {number}", _limited(file.read)


def _parquet(data: bytes) -> Iterator[Part]:
    file = pq.ParquetFile(io.BytesIO(data))
    metadata = file.schema_arrow.metadata or {}
    yield "Parquet metadata", b"\n".join(part for pair in metadata.items() for part in pair)
    for batch in file.iter_batches(batch_size=1024):
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            yield f"Parquet column {name}", b"\n".join(map(as_bytes, column.to_pylist()))


def _safetensors(data: bytes) -> Iterator[Part]:
    """The header, with the JSON in its strings: the tensors are the bytes that follow."""
    (size,) = struct.unpack_from("<Q", data)
    if size > len(data) - 8:
        return
    try:
        header = json.loads(data[8 : 8 + size])
    except ValueError:
        return
    yield "safetensors header", as_bytes(header)


def _json_lines(data: bytes) -> Iterator[Part]:
    """Strings as they read, without their escapes; of a file of lines each that is JSON."""
    for line in [data] if data[:1] == b"[" else data.split(b"\n"):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        yield "JSON", as_bytes(value)


def as_bytes(value: Any) -> bytes:
    """A value as the bytes that a search should see: text as UTF-8, nested values one string a line."""
    match value:
        case None:
            return b""
        case bytes() | bytearray() | memoryview():
            return bytes(value)
        case str():
            return b"\n".join(_nested(value))
        case dict():
            return b"\n".join(as_bytes(part) for pair in value.items() for part in pair)
        case list() | tuple() | set() | frozenset():
            return b"\n".join(map(as_bytes, value))
        case _:
            return str(value).encode()


def _nested(text: str) -> Iterator[bytes]:
    """The text, and if it is JSON in a string, what it says."""
    yield text.encode("utf-8", "surrogatepass")
    if text[:1] in {"{", "["}:
        try:
            yield as_bytes(json.loads(text))
        except (ValueError, RecursionError):
            return


_FORMATS: tuple[tuple[int, bytes, Callable[[bytes], Iterator[Part]]], ...] = (
    (0, b"\x1f\x8b", _gzip),
    (0, b"BZh", _bzip),
    (0, b"\xfd7zXZ\x00", _xz),
    (0, b"\x28\xb5\x2f\xfd", _zstd),
    (0, b"PK\x03\x04", _zip),
    (0, b"PAR1", _parquet),
    (257, b"ustar", _tar),
)
_MISTAKEN = (
    OSError, EOFError, ValueError, KeyError, RuntimeError, struct.error, lzma.LZMAError, zlib.error,
    pa.ArrowException, zipfile.BadZipFile, tarfile.TarError,
)  # fmt: skip
"""Raised by what only begins like a format, or is cut; its bytes as they are were looked through."""
