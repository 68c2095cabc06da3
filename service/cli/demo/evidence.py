"""The certificate and a rebuilt stage, checked with separate commands."""

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.cli.demo.show import Screen
from service.cli.demo.stack import Stack, run_json


@dataclass(frozen=True, slots=True)
class Proof:
    """What the certificate says, and whether it verified."""

    records: int
    stages_tainted: int
    artifacts_destroyed: int
    """Files that it says are destroyed: stages, their evaluations, payloads."""
    verified: bool


def certificate(screen: Screen, stack: Stack, envelope: Mapping[str, Any], file: Path) -> Proof:
    """Keep the certificate in `file`, say what it says was destroyed, and have `expunge verify` check it."""
    file.write_text(json.dumps(envelope))
    predicate = json.loads(base64.b64decode(envelope["payload"]))["predicate"]
    records, stages, destroyed = len(predicate["records"]), len(predicate["tainted"]), _destroyed(predicate)
    screen.say(
        f"destroyed: {len(destroyed)} files, of {stages} tainted stages and of the payloads of {records} records"
        " (whose cell was written again without them)"
    )
    artifacts = stack.state / "artifacts"
    arguments = ["verify", str(file), "--key", str(stack.public_key), "--artifacts", str(artifacts)]
    code, found, said = run_json([*arguments, "--json"])
    checks = found.get("checks", [])
    passed = sum(check["passed"] for check in checks)
    screen.say(f"$ expunge {' '.join(arguments)}\n  {passed} of {len(checks)} checks passed")
    if code:
        failed = "\n".join(f"{check['name']}: {check['detail']}" for check in checks if not check["passed"])
        screen.say(f"[red]the certificate did not verify\n{failed or said}")
    return Proof(records, stages, len(destroyed), verified=code == 0 and bool(checks))


def replay(screen: Screen, stack: Stack, model: str, stage: str) -> bool:
    """Whether `expunge replay`, training the stage's whole chain from nothing, gives the served bits."""
    arguments = ["replay", "--state", str(stack.state), "--model", model, "--stage", stage]
    with screen.bar("training a rebuilt stage again, from nothing", None):
        code, found, said = run_json([*arguments, "--json"])
    screen.say(f"$ expunge {' '.join(arguments)}\n  {'the same, bit for bit' if code == 0 else said}")
    return code == 0 and found.get("equal") is True


def _destroyed(predicate: Mapping[str, Any]) -> list[str]:
    objects = [*predicate["payloads"], *(each for stage in predicate["tainted"] for each in stage["artifacts"])]
    return [each["object_name"] for each in objects if each["destroyed_at"]]
