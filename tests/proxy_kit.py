"""A proxy, the server behind it and a model of adapters that are numbers, for tests of the proxy."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import safetensors.numpy
from conftest import Database
from serving_kit import Client, Toy, free_port, wait_until
from serving_talk import TALK

from shards.stages import Stage

HERE = Path(__file__).parent
TTL_MS = 1500
"""For tests that wait for a lease's end."""
ROOT = "0" * 64


def make_toy(database: Database, directory: Path) -> Toy:
    """Version 1 says 1.5, without its second shard 1, without its first 2."""
    toy = Toy(database.owner_url, database.app_url, directory / "artifacts", recipe=TALK)
    toy.create()
    for shard, (name, number) in enumerate({"a": 1.0, "b": 2.0}.items()):
        key = Stage(TALK.digest, shard, (0,), (ROOT,), None).key  # as the planner derives it
        toy.add_stage(name, shard=shard, data=artifact(number), key=key)
    with toy.connect() as connection:
        connection.execute("update stage set roots = %s", ([ROOT],))
    toy.publish("a", "b", cause="train")
    return toy


def artifact(number: float) -> bytes:
    """A stage of one LoRA layer whose exported factor sums to `number`."""
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    rank = TALK.lora.rank
    scale = TALK.lora.alpha / (rank**0.5 if TALK.lora.rslora else rank)
    down, up = np.ones((rank, 2), np.float32), np.full((1, rank), number / rank / scale, np.float32)
    return safetensors.numpy.save({f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up})


class Upstream(httpx.Client):
    """The stand-in, which may be killed and started again."""

    def __init__(self, directory: Path, backbone: str = "") -> None:
        self.port = free_port()
        self.directory = directory
        self.backbone = backbone
        super().__init__(base_url=f"http://127.0.0.1:{self.port}", timeout=20, trust_env=False)
        self.start()

    def start(self) -> None:
        script = str(HERE / "stand_in.py")
        self.process = subprocess.Popen([sys.executable, script, str(self.port), str(self.directory), self.backbone])

    def listens(self) -> bool:
        try:
            return self.get("/v1/models").status_code == 200
        except httpx.TransportError:
            return False

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def names(self) -> set[str]:
        return {entry["id"] for entry in self.get("/v1/models").json()["data"]} - {"base"}

    def fault(self, **faults: Any) -> None:
        self.post("/fault", json=faults).raise_for_status()

    def seen(self) -> dict[str, Any]:
        return self.get("/seen").json()


@contextmanager
def upstream(directory: Path, backbone: str = "") -> Iterator[Upstream]:
    directory.mkdir(exist_ok=True)
    with Upstream(directory, backbone) as found:
        try:
            wait_until(found.listens, seconds=120)
            yield found
        finally:
            found.kill()


@contextmanager
def proxy(
    toy: Toy, behind: Upstream, *options: str, ready: bool = True, **changes: Any
) -> Iterator[tuple[Client, subprocess.Popen[bytes]]]:
    """`expunge proxy` as a process of its own."""
    port = free_port()
    command = [sys.executable, "-c", "from service.cli.main import main; main()", "proxy", toy.name]
    command += ["--upstream", str(behind.base_url), "--adapters", str(behind.directory), "--port", str(port), *options]
    environment = {**os.environ, **toy.environment(**{"lease_ttl_ms": 4000} | changes)}
    with log_of(behind).open("ab") as log:
        process = subprocess.Popen(command, env=environment, cwd=HERE.parent, stderr=log)
    try:
        with Client(port, toy) as client:
            if ready:
                wait_until(client.ready, seconds=60)
                wait_until(lambda: client.get("/readyz").json()["models"], seconds=60)
                wait_until(client.ready, seconds=60)
            yield client, process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.kill()
        process.wait()


def log_of(behind: Upstream) -> Path:
    """What proxies in front of it wrote."""
    return behind.directory.with_name("proxy.log")


def stop(process: subprocess.Popen[bytes]) -> int:
    process.send_signal(signal.SIGTERM)
    return process.wait(20)
