"""A server that answers Vault's one call, `transit/sign`: securesystemslib and hvac speak to it."""

import base64
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from service.evidence.keys import held_pem
from service.evidence.signers import HeldKey

TOKEN = "a-token"


@dataclass
class Vault:
    """Its keys by name, in versions from 1 on, and what it was asked to sign."""

    keys: dict[str, list[Ed25519PrivateKey]] = field(default_factory=dict)
    signed: list[bytes] = field(default_factory=list)
    refusals: list[int] = field(default_factory=list)
    """HTTP codes of the next answers; 200 signs."""
    meanwhile: list[Callable[[], None]] = field(default_factory=list)
    """Called once each, while a caller waits for its signature."""

    def hold(self, key: Ed25519PrivateKey | None = None, name: str = "expunge") -> HeldKey:
        """Take a key in, as the next version."""
        versions = self.keys.setdefault(name, [])
        versions.append(key or Ed25519PrivateKey.generate())
        return HeldKey(f"hv:{name}/{len(versions)}", versions[-1].public_key())

    def answer(self, name: str, asked: dict[str, str]) -> tuple[int, dict[str, object]]:
        code = self.refusals.pop(0) if self.refusals else 200
        if code != 200:
            return code, {"errors": ["not now"]}
        data = base64.b64decode(asked["input"])
        self.signed.append(data)
        if self.meanwhile:
            self.meanwhile.pop(0)()
        version = int(asked["key_version"])
        signature = self.keys[name][version - 1].sign(data)
        return 200, {"data": {"signature": f"vault:v{version}:{base64.b64encode(signature).decode()}"}}


def pem_of(key: HeldKey) -> bytes:
    return held_pem(key.uri, key.public)


@contextmanager
def unsealed() -> Iterator[tuple[Vault, str]]:
    """One, and its address."""
    held = Vault()

    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path.startswith("/v1/transit/sign/")
            known = self.headers["X-Vault-Token"] == TOKEN
            code, body = held.answer(self.path.split("/")[4], asked) if known else (403, {"errors": ["denied"]})
            data = json.dumps(body).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_PUT  # noqa: N815 - its name is the method's

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield held, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
