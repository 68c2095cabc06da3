"""`ledger`: numbering events in batches on a real Postgres, proofs from its tables, and the auditor's full check."""

import random
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from benchmarks.results import BenchmarkError, Measured
from service.cli.demo.show import Screen
from service.evidence.keys import load_signing_key
from service.evidence.ledger_check import check
from service.evidence.merkle import verify_inclusion
from service.settings import Settings
from service.standalone.postgres import APP, Postgres, root_identity
from service.standalone.state import hold
from service.standalone.supervisor import Supervisor
from service.store import ledger, migrate
from service.store.artifacts import open_artifacts
from service.store.database import Pool, make_pool, transaction
from workers.sequencer import Sequencer

LEAVES, LEAVES_FULL = 100_000, 1_000_000
PROOFS = 400
CHECKS = 3
WAIT = 20_000
"""Events recorded at a time, outside the clock: what a burst leaves waiting."""
RECORD = """
INSERT INTO event_pending (kind, request_id, model_id, body)
SELECT 'target.deactivating', gen_random_uuid(), 1,
       jsonb_build_object('version', n, 'records', n %% 7, 'stages', n %% 11)
FROM generate_series(1, %s) n
"""


def measure(screen: Screen, *, full: bool) -> Measured:
    """Number all events, prove some of them, then check the whole log from its files: it must hold."""
    leaves = LEAVES_FULL if full else LEAVES
    with tempfile.TemporaryDirectory(prefix="expunge-bench-") as home, postgres(Path(home)) as url:
        pool = make_pool(url, size=3, checked=False)
        pool.open()
        settings = signing_settings(Path(home), url)
        file_keys = Path(home, "file-keys")
        file_keys.mkdir(mode=0o700)
        artifacts = open_artifacts(Path(home, "artifacts").as_uri(), file_keys.as_uri())
        sequencer = Sequencer(pool, artifacts, settings)
        try:
            with screen.bar(f"numbering {leaves:,} events", leaves) as advance:
                appended = _append(pool, sequencer, leaves, advance)
            began = time.perf_counter()
            sequencer.publish()
            published = time.perf_counter() - began
            with screen.bar(f"proving {PROOFS} of them", PROOFS) as advance:
                proof = _prove(pool, leaves, advance)
        finally:
            pool.close()
        key = load_signing_key(settings.keys_dir / "signing.pem").public_key()
        root, seconds = artifacts.files.root / "ledger", list[float]()
        with screen.bar("checking the whole log", CHECKS) as advance:
            for _ in range(CHECKS):
                began = time.perf_counter()
                report = check(_reader(root), key)
                seconds.append(time.perf_counter() - began)
                if report.head.size != leaves:
                    raise BenchmarkError(f"{report.head.size} leaves were checked instead of {leaves}")
                advance(1)
    return Measured(
        {
            "appends_per_s": leaves / appended,
            "proof_ms": 1e3 * proof,
            "verified_leaves_per_s": leaves / median(seconds),
            "published_leaves_per_s": leaves / published,
        },
        {
            "leaves": leaves,
            "batch": ledger.BATCH,
            "proofs": PROOFS,
            "note": "an append is the event read, its opening and leaf made, hashed and copied, its queue row deleted, "
            "the batch committed with synchronous_commit; a proof is read from Postgres, one at a time, and checked "
            "outside the clock; the full check reads every file, hashes every leaf and node, and checks the signature, "
            "one thread; publishing is the signature, all tiles and bundles, each with fsync",
        },
    )


def _append(pool: Pool, sequencer: Sequencer, leaves: int, advance: Callable[[float], None]) -> float:
    seconds, done = 0.0, 0
    while done < leaves:
        count = min(WAIT, leaves - done)
        with transaction(pool) as connection:
            connection.execute(RECORD, [count])
        began = time.perf_counter()
        if sequencer.sequence() != count:
            raise BenchmarkError("not every event was numbered")
        seconds += time.perf_counter() - began
        done += count
        advance(count)
    return seconds


def _prove(pool: Pool, leaves: int, advance: Callable[[float], None]) -> float:
    """Seconds for one proof, its tree read anew, under the head over all leaves."""
    chosen, seconds = random.Random(0), list[float]()
    with transaction(pool) as connection:
        root = ledger.get_head(connection).range.root
        for _ in range(PROOFS):
            index = chosen.randrange(leaves)
            began = time.perf_counter()
            path = ledger.tree(connection, leaves).inclusion(index)
            seconds.append(time.perf_counter() - began)
            (leaf,) = ledger.list_hashes(connection, index, index + 1)
            if not verify_inclusion(leaf, index, leaves, path, root):
                raise BenchmarkError(f"the proof of leaf {index} does not hold")
            advance(1)
    return median(seconds)


def signing_settings(home: Path, url: str) -> Settings:
    """Settings of programs that sign, with a key of their own in `home`."""
    keys = home / "keys"
    keys.mkdir(mode=0o700)
    pem = keys / "signing.pem"
    pem.touch(mode=0o600)
    pem.write_bytes(Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return Settings(database_url=url, keys_dir=keys)


def _reader(directory: Path) -> Callable[[str], bytes | None]:
    def read(name: str) -> bytes | None:
        path = directory / name
        return path.read_bytes() if path.is_file() else None

    return read


@contextmanager
def postgres(home: Path) -> Generator[str]:
    """The embedded Postgres as `expunge up` runs it, durable, with a migrated database; the programs' URL."""
    with hold(home / "state") as state:
        server = Postgres(state.postgres, state.sockets, root_identity())
        server.initialize()
        supervisor = Supervisor(logs=state.logs, work=state.run, tell=lambda _line: None)
        try:
            supervisor.start([server.program()])
            server.create_database()
            migrate.upgrade(server.url())
            yield server.url(APP)
        finally:
            supervisor.stop()
