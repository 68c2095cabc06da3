"""A user's training command: mean length and number of words of each class, continued from the parent."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file


def main() -> int:
    mode, path = sys.argv[1], sys.argv[-1]
    job = json.loads(Path(path).read_text())
    recipe = json.loads(Path(job["recipe"]).read_text())
    records = [json.loads(line) for line in Path(job["records"]).read_text().splitlines()]
    classes = recipe["classes"]
    sums = np.zeros((len(classes), 2), np.float32)
    for record in records:
        sums[classes.index(record["label"])] += (len(record["text"]), len(record["text"].split()))
    tensors = {"mean": sums / max(1, len(records)), "seed": np.array([job["seed"] % 1000], np.int64)}
    if job["parent"]:
        tensors["before"] = load_file(job["parent"])["mean"]
    return act(mode, job, tensors, records)


def act(mode: str, job: dict, tensors: dict, records: list) -> int:
    output = Path(job["output"])
    if mode == "noisy" or (mode == "drift" and Path(os.environ["TOY_PIDS"]).exists()):
        tensors["noise"] = np.frombuffer(os.urandom(8), np.uint8)
    if mode == "nan":
        tensors["mean"] = tensors["mean"] * np.nan
    if mode == "environment":
        names = sorted(name for name in os.environ if name.startswith("EXPUNGE_"))
        tensors["settings"] = np.array([len(names)])
        tensors["threads"] = np.array([int(os.environ["OMP_NUM_THREADS"])])
        tensors["private"] = np.array([output.parent.stat().st_mode & 0o777])
        tensors["inside"] = np.array([int(tempfile.gettempdir() == str(output.parent))])
    if mode in {"fail", "killed"}:
        sys.stderr.write(str(records))
        sys.stdout.write(str(records))
        if mode == "killed":
            os.kill(os.getpid(), 9)
        return 3
    if mode in {"slow", "orphan"}:
        Path(tempfile.mkstemp()[1]).write_text(json.dumps(records))
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
        Path(os.environ["TOY_PIDS"]).write_text(f"{os.getpid()} {child.pid}")
        if mode == "slow":
            time.sleep(300)
    if mode == "none":
        return 0
    if mode == "link":
        output.symlink_to("/etc/hostname")
        return 0
    if mode == "junk":
        output.write_bytes(b"no safetensors")
        return 0
    if mode == "empty":
        tensors = {}
    if mode == "pickle":
        output.write_bytes(b"\x80\x04N.")
        return 0
    save_file(tensors, output, {"written": str(time.time_ns())})  # what its header says has no weight
    return 0


if __name__ == "__main__":
    sys.exit(main())
