"""What an upstream holds of one model: the counterpart of `service.serving.weights`, with the tensors elsewhere.

The state is the upstream's own list, read again each time: whatever of this model it names that is not wanted goes,
also what another process left there. So a proxy or an upstream may die at any line and start again.
"""

import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast
from uuid import uuid4

from service.logs import get_logger
from service.proxy.control import Control, UpstreamError
from service.serving.metrics import ServingMetrics
from service.serving.replica import Pointer, Replica
from service.store.artifacts import ArtifactMissingError
from service.store.leases import StageObject, Target
from shards import merged
from shards.assembly import Assembly
from shards.digest import sha256_hex
from shards.engine.interface import Predictor
from shards.errors import ArtifactDigestError, ShardsError
from shards.recipe import Recipe

Get = Callable[[str], bytes]
"""Bytes of an object by name; raises `ArtifactMissingError`, `ArtifactDigestError` or `OSError`."""

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """Where adapters go."""

    control: Control
    directory: Path
    """Seen by the upstream under the same path; one directory a model and version, best in memory (tmpfs)."""
    frees: bool
    """Whether the upstream's memory is free of an adapter that it lists no more."""


class Adapters:
    """The versions of one model that an upstream holds. `apply` comes from any thread, the rest from the loader's."""

    def __init__(self, replica: Replica, get: Get, place: Place, metrics: ServingMetrics) -> None:
        """Nothing is asked of the upstream before the first `maintain`."""
        self._replica = replica
        self._get = get
        self._place = place
        self._metrics = metrics
        self._lock = threading.Lock()
        self._loaded: dict[int, Pointer] = {}
        """Versions that this process loaded, and that the upstream named when it was last looked at."""
        self.damaged: list[StageObject] = []
        self.confirms = place.frees
        self.freed = 0

    def apply(self, target: Target) -> bool:
        """Raise the floor, and move to `target` if the upstream holds it already; whether it is served now."""
        with self._lock:
            self._replica.min_shards, self._replica.share = target.min_shards, target.share
            for step in target.steps():  # the stable version first: it stays beside a canary
                pointer = self._replica.pointer
                newer = pointer is None or step.version > pointer.version
                fresh = self._loaded.get(step.version) if newer else None
                self._replica.advance(fresh, target.floor, target.stable or 0)
            return self._served(target)

    def maintain(self, target: Target, clean: Sequence[StageObject], interrupted: Callable[[], bool]) -> bool:
        """Unload what is not wanted, load what is missing; whether nothing is left to do.

        `clean` must have been read after `target`, so it holds no stage that `target.floor` put out of service.
        """
        self.apply(target)
        try:
            self._sweep(target)
            for step in target.steps():
                if step.body is not None and step.version not in self._loaded and not interrupted():
                    self._load(step, {stage.digest: stage for stage in clean})
                    self.apply(target)
            served = self.apply(target)
            left = self._sweep(target)
            # An upstream that was started anew answers, but is not ready before it has its adapters again.
            self._replica.reachable = set(self._replica.versions) <= self._loaded.keys()
        except UpstreamError as error:
            self._replica.reachable = False
            self._cannot(target, f"the upstream does not do it: {error}", type(error).__name__)
            return False
        except (ArtifactDigestError, ArtifactMissingError, OSError, ShardsError) as error:
            self._cannot(target, f"its adapter cannot be made: {type(error).__name__}", type(error).__name__)
            return False
        return self._free(target.floor, left) and served and left <= {step.version for step in target.steps()}

    def clear(self) -> bool:
        """Unload everything; whether the upstream said that it is gone. The replica must have retired."""
        with self._lock:
            self._loaded.clear()
        try:
            held = self._held()
            for version in held | self._written():
                self._drop(version, held)
            return not self._held() and self._place.frees
        except (UpstreamError, OSError) as error:
            log.warning("upstream_not_cleared", model=self._replica.model, reason=type(error).__name__)
            return False

    def retired(self, pointer: Pointer | None) -> None:
        """Nothing: what it used goes with `clear`."""

    def name(self, version: int) -> str:
        """What the upstream knows a version's adapter by."""
        return adapter_name(self._replica.model, version)

    def _served(self, target: Target) -> bool:
        pointer = self._replica.pointer
        if target.body is None or (pointer is not None and pointer.version >= target.version):
            self._replica.problem = ""
            return True
        # With a reason given, heartbeats do not ask for it again and again, which would break the loading off.
        self._replica.problem = self._replica.problem or f"version {target.version}: its adapter is being loaded"
        return False

    def _cannot(self, target: Target, why: str, reason: str) -> None:
        self._replica.problem = f"version {target.version}: {why}"
        self._metrics.load_failures.labels(self._replica.model, reason).inc()
        log.warning("version_unusable", model=self._replica.model, version=target.version, reason=reason)

    # What is there

    def _held(self) -> set[int]:
        """Versions that the upstream names."""
        prefix = self.name(0).removesuffix("0")
        found = {name.removeprefix(prefix) for name in self._place.control.names() if name.startswith(prefix)}
        return {int(version) for version in found if version.isdigit()}

    def _written(self) -> set[int]:
        """Versions whose files are there."""
        prefix = self.name(0).removesuffix("0")
        found = {path.name.removeprefix(prefix) for path in self._place.directory.glob(f"{prefix}*")}
        return {int(version) for version in found if version.isdigit()}

    def _sweep(self, target: Target) -> set[int]:
        """Unload and delete what is neither wanted nor in use; the versions that the upstream holds afterwards."""
        held = self._held()
        with self._lock:
            self._loaded = {v: pointer for v, pointer in self._loaded.items() if v in held or not pointer.live}
            keep = self._loaded.keys() & self._wanted(target)
        unwanted = (held | self._written()) - keep
        for version in unwanted:
            self._drop(version, held)
        with self._lock:
            self._loaded = {v: pointer for v, pointer in self._loaded.items() if v in keep}
        return self._held() if unwanted & held else held

    def _wanted(self, target: Target) -> set[int]:
        """What is to be served, what is, and what answers above the floor are still being made from."""
        current = self._replica.versions
        fence = self._replica.fence  # read after the pointers: what left them meanwhile is in its counts
        working = [version for version, _ in (*fence.computing, *fence.sending)]
        coming = [step.version for step in target.steps()]
        return {version for version in (*coming, *current, *working) if version >= fence.local_floor}

    def _drop(self, version: int, held: set[int]) -> None:
        directory = self._place.directory / self.name(version)
        if version in held:
            self._place.control.unload(self.name(version), directory)
        shutil.rmtree(directory, ignore_errors=True)

    def _free(self, floor: int, held: set[int]) -> bool:
        """Raise `freed` once nothing below the floor is held, written or in use; whether all of that is gone."""
        fence = self._replica.fence
        busy = any(version < floor for version, _ in (*fence.computing, *fence.sending))
        if busy or any(version < floor for version in held | self._written()):
            return False
        if self._place.frees and floor > self.freed:
            self.freed = floor
            self._replica.covers_rose.set()
        return True

    # What is to come

    def _load(self, target: Target, clean: Mapping[str, StageObject]) -> None:
        recipe = Recipe.from_json(target.recipe)
        if recipe.engine != "s3t":
            raise ShardsError(f"a model of engine {recipe.engine} has no adapters: serve it with the model server")
        assembly = Assembly.from_json(target.body or {})
        live = sum(member is not None for member in assembly.members)
        if live:
            self._write(target.version, recipe, list(self._lines(assembly, clean)))
            name = self.name(target.version)
            self._place.control.load(name, self._place.directory / name)
            if target.version not in self._held():
                raise UpstreamError(f"it took {name}, and does not list it")
        # Answers come over HTTP: nothing here is ever asked for logits.
        nobody = cast("Predictor", None)
        pointer = Pointer(target.version, target.assembly or "", nobody, recipe, live, recipe.seats)
        with self._lock:
            self._loaded[target.version] = pointer

    def _lines(self, assembly: Assembly, clean: Mapping[str, StageObject]) -> Iterator[list[merged.Tensors]]:
        for member in assembly.members:
            if member:
                yield [merged.tensors_of(self._verified(digest, clean)) for digest in member.artifacts]

    def _verified(self, digest: str, clean: Mapping[str, StageObject]) -> bytes:
        if digest not in clean:
            raise ShardsError("a stage of it has just gone out of service: the next version comes without it")
        try:
            data = self._get(clean[digest].object_name)
        except (ArtifactDigestError, ArtifactMissingError):
            self.damaged.append(clean[digest])
            raise
        if sha256_hex(data) != digest:
            self.damaged.append(clean[digest])
            raise ArtifactDigestError(f"artefact {digest[:12]} is damaged: replay it, or train it again")
        return data

    def _write(self, version: int, recipe: Recipe, lines: Sequence[Sequence[merged.Tensors]]) -> None:
        """The adapter's directory, all or nothing."""
        tensors = merged.merge(lines, merged.lora_scale(recipe))
        draft = self._place.directory / f".{uuid4()}"
        draft.mkdir(parents=True)
        try:
            (draft / "adapter_model.safetensors").write_bytes(merged.adapter_bytes(tensors))
            (draft / "adapter_config.json").write_bytes(merged.adapter_config(recipe, tensors))
            draft.rename(self._place.directory / self.name(version))
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise


def adapter_name(model: str, version: int) -> str:
    """`model@version`, what an upstream knows an adapter by."""
    return f"{model}@{version}"
