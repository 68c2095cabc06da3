"""Where an installation keeps things: its stores, and the directories that files of it may lie in."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlparse

from service.settings import Settings
from service.standalone.state import State
from service.standalone.stores import choose

STATE_PARTS = ("postgres", "valkey", "file-keys", "keys", "run", "logs")
TEMPORARY = "expunge-*"


@dataclass(frozen=True, slots=True)
class Sites:
    """What is looked at."""

    database_url: str
    """Of the owner, where it is known: the programs' role may not read every table."""
    redis_url: str
    artifact_url: str
    file_keys_url: str
    keys_dir: Path
    directories: tuple[tuple[str, Path], ...]
    """Store -> directory, apart from the artefact store's."""


def find_sites(state: Path, settings: Settings, also: tuple[Path, ...] = ()) -> Sites:
    """The stores that the environment names and those of the state directory, if there is one.

    Raises:
        StandaloneError: only one of the two database URLs is set.
    """
    temporary = [("temporary files", path) for path in sorted(Path(tempfile.gettempdir()).glob(TEMPORARY))]
    named = [("named by --also", path) for path in also]
    if not (state / "lock").exists():
        places = [("keys", settings.keys_dir), ("file-keys", _path(settings.file_keys_url))]
        return Sites(
            settings.database_owner_url or settings.database_url,
            settings.redis_url,
            settings.artifact_url,
            settings.file_keys_url,
            settings.keys_dir,
            tuple((store, path) for store, path in [*places, *temporary, *named] if path is not None),
        )
    held = State.found(state)
    stores = choose(held, settings)
    keys = settings.keys_dir if "keys_dir" in settings.model_fields_set else held.keys
    places = [(part, held.root / part) for part in STATE_PARTS]
    outside = [("keys", keys), ("file-keys", _path(stores.file_keys_url)), ("run", held.sockets)]
    places += [(store, path) for store, path in outside if path and not path.resolve().is_relative_to(held.root)]
    return Sites(
        stores.owner_url,
        stores.redis_url,
        stores.artifact_url,
        stores.file_keys_url,
        keys,
        (*places, *temporary, *named),
    )


def _path(url: str) -> Path | None:
    parsed = urlparse(url)
    return Path(unquote(parsed.path)) if parsed.scheme == "file" and parsed.path else None
