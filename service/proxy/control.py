"""What an upstream holds, and how it is told to hold something else. Blocking; for the loader's thread."""

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

import httpx

LOOK_TIMEOUT = 5.0
LOAD_TIMEOUT = 300.0
"""Seconds: a large adapter, or a server that a hook starts again."""
ABSENT = {"", "UNAVAILABLE"}
"""States of the model repository extension in which nothing is in memory."""


class UpstreamError(Exception):
    """The upstream does not answer, or refuses; the message says which call failed and how."""


class Control(Protocol):
    """One upstream's adapters, by name."""

    def names(self) -> frozenset[str]:
        """All that it holds; raises `UpstreamError`, as the others do."""
        ...

    def load(self, name: str, directory: Path) -> None:
        """Take an adapter from a directory that both see."""
        ...

    def unload(self, name: str, directory: Path) -> None:
        """Let one go. That it is gone is for `names` to say."""
        ...


@dataclass(frozen=True, slots=True)
class OpenAI:
    """vLLM's addresses for adapters at run time (VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, --enable-lora)."""

    client: httpx.Client

    def names(self) -> frozenset[str]:
        """The models that it lists."""
        listed = _call(self.client, "GET", "/v1/models")
        data: list[Any] = listed.get("data") or [] if isinstance(listed, dict) else []
        return frozenset(str(entry["id"]) for entry in data if isinstance(entry, dict) and "id" in entry)

    def load(self, name: str, directory: Path) -> None:
        """POST /v1/load_lora_adapter."""
        body = {"lora_name": name, "lora_path": str(directory)}
        _call(self.client, "POST", "/v1/load_lora_adapter", body, seconds=LOAD_TIMEOUT)

    def unload(self, name: str, directory: Path) -> None:  # noqa: ARG002 - it knows the name
        """POST /v1/unload_lora_adapter."""
        _call(self.client, "POST", "/v1/unload_lora_adapter", {"lora_name": name}, seconds=LOAD_TIMEOUT)


@dataclass(frozen=True, slots=True)
class Repository:
    """The model repository extension of the Open Inference Protocol; its repository is the adapters' directory."""

    client: httpx.Client

    def names(self) -> frozenset[str]:
        """The models of its index that are in memory, or on their way in or out."""
        listed = _call(self.client, "POST", "/v2/repository/index", {})
        entries = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
        return frozenset(str(each["name"]) for each in entries if each.get("state", "") not in ABSENT)

    def load(self, name: str, directory: Path) -> None:  # noqa: ARG002 - the repository has it by its name
        """POST /v2/repository/models/{name}/load."""
        _call(self.client, "POST", f"/v2/repository/models/{quote(name)}/load", {}, seconds=LOAD_TIMEOUT)

    def unload(self, name: str, directory: Path) -> None:  # noqa: ARG002 - it knows the name
        """POST /v2/repository/models/{name}/unload."""
        _call(self.client, "POST", f"/v2/repository/models/{quote(name)}/unload", {}, seconds=LOAD_TIMEOUT)


@dataclass(frozen=True, slots=True)
class Hook:
    """A program of the operator's, for servers that take adapters in another way: `PROGRAM list|load|unload`."""

    program: Sequence[str]

    def names(self) -> frozenset[str]:
        """The lines that `list` prints."""
        return frozenset(self._run("list", seconds=LOOK_TIMEOUT).split())

    def load(self, name: str, directory: Path) -> None:
        """`load NAME DIRECTORY`."""
        self._run("load", name, str(directory), seconds=LOAD_TIMEOUT)

    def unload(self, name: str, directory: Path) -> None:
        """`unload NAME DIRECTORY`."""
        self._run("unload", name, str(directory), seconds=LOAD_TIMEOUT)

    def _run(self, verb: str, *arguments: str, seconds: float) -> str:
        try:
            done = subprocess.run(
                [*self.program, verb, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                timeout=seconds,
                check=True,
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise UpstreamError(f"the hook failed at {verb}: {type(error).__name__}") from None
        return done.stdout.decode(errors="replace")


def _call(
    client: httpx.Client,
    method: str,
    path: str,
    body: Mapping[str, Any] | None = None,
    *,
    seconds: float = LOOK_TIMEOUT,
) -> Any:
    """The JSON of a 2xx answer, None where it is no JSON."""
    try:
        answer = client.request(method, path, json=body, timeout=seconds)
    except httpx.HTTPError as error:
        raise UpstreamError(f"{method} {path}: {type(error).__name__}") from None
    if not answer.is_success:
        raise UpstreamError(f"{method} {path}: status {answer.status_code}")
    try:
        return answer.json()
    except ValueError:
        return None
