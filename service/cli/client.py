"""The control API and the model servers as the command line sees them."""

import json
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

import httpx

from service.cli.output import CommandError
from service.settings import Settings

TIMEOUT = httpx.Timeout(600.0, connect=5.0)
"""Long, since a large upload is answered when all of it is stored."""


@dataclass(frozen=True, slots=True)
class Saved:
    """A file that was answered."""

    size: int
    digest: str
    headers: Mapping[str, str]


class Client:
    """Calls with an API key; every answer that is not a success is a `CommandError`."""

    def __init__(self, url: str, key: str, *, what: str = "the API") -> None:
        """Connects at the first call; `what` names the other side in errors."""
        self._url = url
        self._what = what
        self._http = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=TIMEOUT)

    @classmethod
    def of_state(cls, state: Path) -> Self:
        """The API that EXPUNGE_API_URL names, else the one that runs in the state directory."""
        settings = Settings()
        url = settings.api_url
        if "api_url" not in settings.model_fields_set:
            url = _running(state).get("api_url", url)
        return cls(url, _key(settings, state))

    @classmethod
    def of_server(cls, state: Path, server: str | None) -> Self:
        """A model server: the one given, else the first of the state directory."""
        servers = [server] if server else _running(state).get("servers", [])
        if not servers:
            raise CommandError(
                f"no model server runs in {state}: start it with `expunge up`, or name one with --server"
            )
        return cls(servers[0], _key(Settings(), state), what="the model server")

    def __enter__(self) -> Self:
        """Keeps connections until the end of the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connections."""
        self._http.close()

    def get(self, path: str, params: Mapping[str, str] | None = None) -> dict[str, Any]:
        """GET."""
        with self._errors():
            return _answer(self._http.get(path, params=dict(params or {})))

    def post(
        self, path: str, body: Mapping[str, Any] | None = None, headers: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """POST JSON."""
        with self._errors():
            return _answer(self._http.post(path, json=body, headers=dict(headers or {})))

    def download(self, path: str, body: Mapping[str, Any]) -> bytes:
        """POST JSON; the file that is answered."""
        with self._errors():
            response = self._http.post(path, json=body)
            if not response.is_success:
                _answer(response)
            return response.content

    def save(self, path: str, params: Mapping[str, str], target: Path) -> Saved:
        """GET a file of any size into `target`, whole or not at all."""
        if target.is_dir():
            raise CommandError(f"{target} is a directory: name the file to write")
        aside = target.with_name(f"{target.name}.part")
        digest = sha256()
        try:
            with self._errors(), self._http.stream("GET", path, params=dict(params)) as response:
                if not response.is_success:
                    response.read()
                    _answer(response)
                with aside.open("wb") as file:
                    for chunk in response.iter_bytes():
                        file.write(chunk)
                        digest.update(chunk)
                    size = file.tell()
            aside.replace(target)
        except OSError as error:
            raise CommandError(f"{target} cannot be written ({error.strerror})") from None
        finally:
            with suppress(OSError):
                aside.unlink()
        return Saved(size, digest.hexdigest(), response.headers)

    def patch(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """PATCH JSON."""
        with self._errors():
            return _answer(self._http.patch(path, json=body))

    def send(self, path: str, chunks: Iterator[bytes], size: int) -> dict[str, Any]:
        """POST an NDJSON body of a known size."""
        headers = {"Content-Type": "application/x-ndjson", "Content-Length": str(size)}
        with self._errors():
            return _answer(self._http.post(path, content=chunks, headers=headers))

    @contextmanager
    def _errors(self) -> Generator[None]:
        try:
            yield
        except httpx.TimeoutException:
            raise CommandError(f"{self._what} at {self._url} took too long: look at its log") from None
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise CommandError(
                f"{self._what} at {self._url} does not answer ({type(error).__name__}): start it with"
                " `expunge up`, or set EXPUNGE_API_URL"
            ) from None


def _answer(response: httpx.Response) -> dict[str, Any]:
    try:
        body = response.json()
    except ValueError:
        body = {}
    if response.is_success and isinstance(body, dict):
        return body
    detail = body.get("detail") if isinstance(body, dict) else None
    raise CommandError(detail or f"the answer was HTTP {response.status_code}: is the URL the right one?")


def _running(state: Path) -> dict[str, Any]:
    """What `expunge up` wrote about itself; nothing where it does not run."""
    try:
        return json.loads((state / "run" / "up.json").read_text())
    except (OSError, ValueError):
        return {}


def _key(settings: Settings, state: Path) -> str:
    if settings.api_key:
        if not settings.api_key.isascii():
            raise CommandError("EXPUNGE_API_KEY is not an API key: those begin with xp_ and are plain ASCII")
        return settings.api_key
    try:
        return (state / "keys" / "first-api-key").read_text().strip()
    except OSError:
        raise CommandError(
            f"no API key: set EXPUNGE_API_KEY, or name the state directory of `expunge up` with --state"
            f" ({state} has no keys/first-api-key)"
        ) from None
