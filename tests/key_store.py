"""The key store of a test's artefact store: the directory `file-keys` beside it."""

from pathlib import Path

from service.store.artifacts import Artifacts, open_artifacts


def file_keys(artifacts: Path) -> str:
    """Its URL; the directory is made on first use."""
    directory = artifacts.with_name("file-keys")
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return directory.as_uri()


def open_local(artifacts: Path) -> Artifacts:
    return open_artifacts(artifacts.as_uri(), file_keys(artifacts))
