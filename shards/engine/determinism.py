"""What makes a stage a pure function of recipe and manifests: one thread, keyed orders, keyed seeds."""

import importlib.metadata
import platform
from collections.abc import Iterable, Sequence
from uuid import UUID

import torch
import torch.utils.deterministic

from shards.digest import digest_of, keyed
from shards.recipe import Recipe

LIBRARIES = ("torch", "transformers", "peft", "tokenizers", "numpy", "safetensors", "pillow")
_INSTRUCTIONS = (
    "avx2",
    "avx512_f",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
    "amx_tile",
    "sve",
    "sve2",
    "bf16",
)


def prepare() -> None:
    """Make this process compute the same bits every time: one thread, deterministic kernels. Call it before
    anything else.

    With two threads small matrix products take another path and stages differ (facts/training.md, section 3).
    On CUDA, cuBLAS also wants `CUBLAS_WORKSPACE_CONFIG=:4096:8` in the environment of the process.
    """
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(mode=True)
    # Filling fresh memory with NaN would cost time and hides nothing here: no kernel in use reads memory it
    # did not write.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.matmul.allow_tf32 = False


def stage_seed(recipe: Recipe, shard: int, prefix: Sequence[int]) -> int:
    """63-bit seed of a stage's initialisation, record order and dropout; from the recipe's seed, never from
    data.
    """
    body = {"type": "expunge seed v1", "seed": recipe.seed, "shard": shard, "prefix": list(prefix)}
    return int(digest_of(body)[:16], 16) >> 1


def epoch_order(seed: int, epoch: int, record_ids: Iterable[UUID]) -> list[UUID]:
    """Record ids sorted by a keyed hash of each: taking one out leaves the order of all others as it was."""
    key = seed.to_bytes(8, "big")
    stamp = epoch.to_bytes(8, "big")
    return sorted(record_ids, key=lambda record_id: keyed(key, stamp, record_id.bytes))


def fingerprint(device: str = "cpu", precision: str = "float32") -> dict[str, str]:
    """The platform fingerprint: what must be the same for training again to give the same bits. JSON-able."""
    found = {name: importlib.metadata.version(name) for name in LIBRARIES}
    found |= {"device": device, "dtype": precision, "threads": str(torch.get_num_threads())}
    found |= {"python": platform.python_version(), "machine": platform.machine()}
    if torch.device(device).type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = f"{torch.version.cuda} cudnn {torch.backends.cudnn.version()}"
        return found
    capabilities = torch.cpu.get_capabilities()
    found["isa"] = torch.backends.cpu.get_cpu_capability()
    found["instructions"] = " ".join(name for name in _INSTRUCTIONS if capabilities.get(name))
    # MKL chooses kernels by vendor as well as by instruction set.
    found["cpu"] = str(capabilities.get("cpu_name", ""))
    build = torch.__config__.show().splitlines()
    found["build"] = "; ".join(line.strip(" -") for line in build if "Math Kernel" in line or "MKL-DNN" in line)
    return found
