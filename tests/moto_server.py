"""A pytest plugin with a server that speaks S3 and KMS, as a process of its own."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def aws(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its URL."""
    log = (tmp_path_factory.mktemp("aws") / "log").open("wb")
    argv = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    with log, subprocess.Popen(argv, stdout=log, stderr=log) as server:
        try:
            deadline = time.monotonic() + 60
            while b"Running on" not in (said := Path(log.name).read_bytes()):
                assert server.poll() is None, said
                assert time.monotonic() < deadline, said
                time.sleep(0.1)
            yield said.split(b"Running on ")[1].split()[0].decode()
        finally:
            server.kill()


@pytest.fixture
def aws_environment(aws: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The server's URL, which our programs find by the environment."""
    for name, value in {
        "ENDPOINT_URL": aws, "ALLOW_HTTP": "true", "REGION": "us-east-1", "DEFAULT_REGION": "us-east-1",
        "ACCESS_KEY_ID": "none", "SECRET_ACCESS_KEY": "none",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"AWS_{name}", value)
    return aws
