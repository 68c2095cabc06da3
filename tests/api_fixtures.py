"""Fixtures of the API's tests; a pytest plugin, so nothing is imported from it."""

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_client import Api, Run, serving, write_keys
from key_store import file_keys

from service.cli.main import main
from service.settings import Settings
from service.store import api_keys
from service.store.api_keys import Scope
from service.store.database import make_pool


@pytest.fixture
def api_settings(database: Any, valkey: str, tmp_path: Path) -> Settings:
    return Settings(
        database_url=database.app_url,
        redis_url=valkey,
        artifact_url=(tmp_path / "artifacts").as_uri(),
        file_keys_url=file_keys(tmp_path / "artifacts"),
        keys_dir=write_keys(tmp_path / "keys"),
        record_limit_bytes=2**20,
    )


@pytest.fixture
def api(api_settings: Settings, database: Any) -> Iterator[Api]:
    first = api_keys.bootstrap(database.owner_url)
    assert first is not None
    with ExitStack() as stack:
        url = stack.enter_context(serving(api_settings))
        pool = make_pool(api_settings.database_url, size=2)
        stack.callback(pool.close)
        pool.open()

        def client(token: str) -> httpx.Client:
            headers = {"Authorization": f"Bearer {token}"}
            return stack.enter_context(httpx.Client(base_url=url, headers=headers, timeout=30))

        def with_scopes(*scopes: Scope) -> httpx.Client:
            with pool.connection() as connection:
                return client(api_keys.create(connection, "test", scopes))

        yield Api(url, api_settings, client(first), pool, with_scopes)


@pytest.fixture
def run(api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in a state directory that names the API; (exit code, stdout, stderr)."""
    state = tmp_path / "state"
    (state / "run").mkdir(parents=True)
    (state / "keys").mkdir()
    (state / "run" / "up.json").write_text(json.dumps({"api_url": api.url, "servers": []}))
    token = api.client.headers["Authorization"].removeprefix("Bearer ")
    (state / "keys" / "first-api-key").write_text(token + "\n")

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["expunge", *arguments, "--state", str(state)])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return call
