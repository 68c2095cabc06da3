"""A backbone's files: where they lie and the digest that names them."""

import hashlib
from pathlib import Path

from transformers.utils import cached_file

from shards.digest import digest_of
from shards.errors import BackboneError

COUNTED = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model",
    "*.safetensors", "*.safetensors.index.json", "preprocessor_config.json",
)  # fmt: skip
"""Files that decide what the backbone computes. Pickled weights are never read, so they do not count."""


def locate(source: str) -> Path:
    """Directory of a backbone: a local path, or a hub id that was downloaded before. Nothing is fetched.

    Raises:
        BackboneError: neither.
    """
    if (directory := Path(source)).is_dir():
        return directory
    try:
        return Path(str(cached_file(source, "config.json", local_files_only=True))).parent
    except OSError:
        raise BackboneError(
            f"no directory {source!r} and no downloaded hub model of that name: run `hf download {source}` where "
            "the network allows it, or give a directory with config, tokenizer and safetensors files"
        ) from None


def backbone_digest(directory: Path) -> str:
    """SHA-256 over names and SHA-256 of the directory's config, tokenizer and weight files.

    Raises:
        BackboneError: no config or no safetensors weights there.
    """
    names = sorted({path.name for pattern in COUNTED for path in directory.glob(pattern) if path.is_file()})
    if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
        raise BackboneError(f"{directory} holds no config.json with safetensors weights; save the model again")
    files: dict[str, str] = {}
    for name in names:
        with (directory / name).open("rb") as file:
            files[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digest_of({"type": "expunge backbone v1", "files": files})
