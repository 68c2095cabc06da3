"""What lies in Postgres, in Redis and in the artefact store, decoded, piece by piece."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import redis

from service.doctor.formats import TooDeepError, as_bytes, parts
from service.store import tables
from service.store.artifacts import ArtifactMissingError, Artifacts, is_public
from service.store.tables import TableError
from shards.errors import ArtifactDigestError

PIECE_BYTES = 2**20

Piece = tuple[str, bytes]
"""A place, and bytes that lie there."""


def database_pieces(url: str, skip: Callable[[str, str], None]) -> Iterator[Piece]:
    """The values of every column of every table; `skip` is told of tables that this role may not read.

    Raises:
        TableError: Postgres cannot be read.
    """
    with tables.reading(url) as connection:
        for table in tables.list_tables(connection):
            name = f"{table.schema}.{table.name}"
            waiting: defaultdict[str, list[bytes]] = defaultdict(list)
            sizes: defaultdict[str, int] = defaultdict(int)
            try:
                for column, value in tables.read_table(connection, table):
                    for _, data in _opened(value):
                        waiting[column].append(data)
                        sizes[column] += len(data)
                    if sizes[column] > PIECE_BYTES:
                        yield f"{name}.{column}", b"\n".join(waiting.pop(column))
                        sizes[column] = 0
            except TableError as error:
                skip("postgres", f"{name} ({error})")
            for column, values in waiting.items():
                yield f"{name}.{column}", b"\n".join(values)


def redis_pieces(url: str) -> Iterator[Piece]:
    """Every key and what it holds, of the URL's database.

    Raises:
        redis.RedisError: it does not answer.
    """
    read: dict[bytes, Callable[[Any, bytes], Any]] = {
        b"string": lambda client, key: client.get(key),
        b"list": lambda client, key: client.lrange(key, 0, -1),
        b"hash": lambda client, key: client.hgetall(key),
        b"set": lambda client, key: client.smembers(key),
        b"zset": lambda client, key: client.zrange(key, 0, -1),
        b"stream": lambda client, key: client.xrange(key),
    }
    client: Any = redis.Redis.from_url(url, socket_timeout=10.0)
    try:
        for number, key in enumerate(client.scan_iter(count=500)):
            kind = client.type(key)
            yield f"name of key {number} of type {kind.decode()}", key
            if kind in read:
                for part, data in _opened(read[kind](client, key)):
                    yield f"value of key {number} of type {kind.decode()} {part}".strip(), data
            else:
                yield f"dump of key {number} of type {kind.decode()}", client.dump(key) or b""
    finally:
        client.close()


def _opened(value: Any) -> Iterator[Piece]:
    """A value's bytes, and what lies packed in those of them that a format has."""
    match value:
        case bytes():
            yield from parts(value)
        case dict():
            for pair in value.items():
                yield from _opened(pair)
        case list() | tuple() | set():
            for each in value:
                yield from _opened(each)
        case _:
            yield "", as_bytes(value)


def object_pieces(artifacts: Artifacts, skip: Callable[[str], None]) -> Iterator[Piece]:
    """Each object as it lies on disk, and opened with its key where there still is one; unfinished ones, too."""
    for name in artifacts.files.names(older_than=-60):
        try:
            sealed = artifacts.files.get(name)
            yield f"name of {name.partition('/')[0]} object", name.encode()
            yield f"{name} as it lies there", sealed
            for part, data in parts(sealed if is_public(name) else artifacts.get(name)):
                yield f"{name} opened {part}".strip(), data
        except (FileNotFoundError, ArtifactMissingError):
            continue  # gone meanwhile, or nobody can read it
        except (ArtifactDigestError, OSError, TooDeepError):
            skip(name)
