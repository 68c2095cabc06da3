"""What a certificate says was destroyed: the operator's statement, and a look into the store itself."""

import hashlib
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

from service.evidence.course import micros
from service.evidence.opening import Case, Refused, require
from shards.digest import digest_of, sha256_hex


def _objects(said: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [*said["payloads"], *(artifact for entry in said["tainted"] for artifact in entry["artifacts"])]


def destruction(case: Case) -> str:
    """Every object that had to go was destroyed and then found absent, as the operator states."""
    said, objects = case.said, _objects(case.said)
    if said["outcome"] == "restricted":
        require(not said["payloads"], "a restriction erases no payloads")
        return "nothing was to be destroyed"
    require(
        said["payloads"] or not said["records"],
        "records were erased, but no payload object is listed",
    )
    require(len({entry["object_name"] for entry in objects}) == len(objects), "an object is listed twice")
    back = said["clock_back_microseconds"]
    for entry in objects:
        name, looks = entry["object_name"], entry["absent_at"]
        require(entry["destroyed_at"], f"{name} was not destroyed")
        course = [micros(each) for each in (entry["destroyed_at"], *looks, said["issuer"]["issued_at"])]
        require(
            len(looks) == 2 and all(one <= other + back for one, other in pairwise(course[:3])),
            f"{name} was not found absent twice after its destruction",
        )
        require(course[2] <= course[3] + back, f"{name} was destroyed after the certificate")
    emptied = {(entry["shard"], entry["slice"]) for entry in said["payloads"]}
    rewritten = {(cell["shard"], cell["slice"]) for cell in said["cells"]}
    require(emptied == rewritten, "the payload files listed are not those of the cells that were written again")
    for entry in said["tainted"]:
        key = digest_of(entry["stage"])
        for artifact in entry["artifacts"]:
            name = artifact["object_name"]
            require(key in name.split("/"), f"{name} is not named for the tainted stage it is listed under")
    return f"{len(objects)} objects destroyed and twice found absent, as the operator states"


def directory_check(case: Case, directory: Path, on_bytes: Callable[[int, int], None]) -> str:
    """None of the destroyed objects lies there, nor anything of a tainted stage, nor a copy that was not sealed."""
    said = case.said
    if said["outcome"] == "restricted":
        return "nothing to look for: a restriction destroys nothing"
    gone = {entry["object_name"]: entry["digest"] for entry in _objects(said)}
    keys = {digest_of(entry["stage"]) for entry in said["tainted"]}
    try:
        found = _hashed(directory, on_bytes)
        for name in gone:  # last: what a paused writer put under its name meanwhile was not listed
            require(not (directory / name).exists() and not (directory / name).is_symlink(), f"{name} is still there")
    except OSError as error:
        raise Refused(f"cannot read {error.filename}: {error.strerror}; read it with more rights, or a copy") from None
    for path, digest in found.items():
        require(keys.isdisjoint(Path(path).parts), f"{path} belongs to a tainted stage")
        require(digest not in gone.values(), f"{path} has the content of a destroyed object")
    require(found, "there is no file at all: is it the artefact store?")
    members = [member for member in said["after"]["assembly"]["members"] if member]
    served = {digest for member in members for digest in member["artifacts"]}
    here = served.intersection(part for path in found for part in Path(path).parts)
    return f"{len(found)} files, none destroyed; {len(here)} of {len(served)} served artefacts are there"


def keys_check(case: Case, directory: Path) -> str:
    """None of the keys that opened the destroyed objects lies in the key store: copies in backups do not open."""
    if case.said["outcome"] == "restricted":
        return "nothing to look for: a restriction destroys no key"
    require((directory / "store").is_file(), "there is no file `store`: is it the key store?")
    names = [entry["object_name"] for entry in _objects(case.said)]
    for name in names:
        digest = sha256_hex(name.encode())  # a key's file is named by the digest of its object's name
        left = [path for path in (directory / digest[:2]).glob(f"*{digest}*") if path.stat().st_size]
        require(not left, f"the key of {name} is still there")
    return f"{len(names)} keys looked for, none there"


def _hashed(directory: Path, on_bytes: Callable[[int, int], None]) -> dict[str, str]:
    """File -> digest. A store in use loses files, such as tiles that longer ones replace: gone is gone.

    Raises:
        OSError: a file or directory cannot be read; it is never passed over.
    """
    sizes: dict[Path, int] = {}
    for folder, _, names in os.walk(directory, onerror=_unless_gone):
        for path in (Path(folder, name) for name in names):
            with suppress(FileNotFoundError):
                if path.is_file():
                    sizes[path] = path.stat().st_size
    done, total, found = 0, sum(sizes.values()), dict[str, str]()
    for path, size in sorted(sizes.items()):
        with suppress(FileNotFoundError), path.open("rb") as file:
            found[str(path.relative_to(directory))] = hashlib.file_digest(file, "sha256").hexdigest()
        done += size
        on_bytes(done, total)
    return found


def _unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error
