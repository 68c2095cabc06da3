"""`expunge verify --recipe`: train the stages that a certificate says are served again, and compare their digests."""

import json
from pathlib import Path
from typing import Any

from service.cli.replay import Served, replay_stages
from service.store.artifacts import ArtifactMissingError, Artifacts
from service.store.directory import Directory
from service.store.file_keys import FileKeys, FileKeysError
from service.store.replay_files import find_files
from shards.digest import digest_of
from shards.errors import ShardsError
from shards.recipe import Recipe


def replay_served(said: dict[str, Any], recipe_file: bytes, artifacts: Path, file_keys: Path) -> str:
    """What came of it, where every served stage gave the same bits.

    Args:
        said: the predicate of a certificate that holds.
        recipe_file: the recipe as JSON.
        artifacts: the artefact store's directory.
        file_keys: the key store's directory.

    Raises:
        ValueError: one gave other bits, or could not be trained or compared here.
    """
    try:
        recipe = Recipe.from_json(json.loads(recipe_file))
        if recipe.digest != said["model"]["recipe"]:
            raise ValueError(f"recipe {recipe.digest[:12]} is not the certificate's, {said['model']['recipe'][:12]}")
        served = _served(said)
        files = find_files(Artifacts(Directory(artifacts), FileKeys(file_keys)))
        results = replay_stages(files, served, recipe)
    except (ShardsError, ArtifactMissingError, FileKeysError, LookupError, OSError) as error:
        raise ValueError(f"it could not be done: {error}") from None
    for result in results:
        which = f"stage {result['stage'][:12]}"
        if result["outcome"] == "mismatch":
            raise ValueError(f"{which} gave {result['found'][:12]} instead of {result['expected'][:12]}")
        if result["outcome"] != "equal":
            differs = ", ".join(result.get("differs") or []) or result.get("reason") or "a stage that it stands on"
            raise ValueError(f"{which} cannot be compared here: {result['outcome'].replace('_', ' ')} ({differs})")
    return f"{len(results)} of {len(served)} served stages trained again from nothing, each with the same bits"


def _served(said: dict[str, Any]) -> dict[str, Served]:
    """Digest and platform of each stage that the assembly stands on."""
    stages = {digest_of(stage): stage for stage in said["stages"]}
    platforms = {
        key: {field["name"]: field["value"] for field in platform["fields"]}
        for platform in said["platforms"]
        for key in platform["stages"]
    }
    served: dict[str, Served] = {}
    for member in said["after"]["assembly"]["members"]:
        key: str | None = member["stage"] if member else None
        for digest in reversed(member["artifacts"] if member else []):
            if key is not None:
                served[key] = Served(digest, platforms[key])
                key = stages[key]["parent"]
    return served
