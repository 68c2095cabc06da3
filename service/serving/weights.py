"""The weights of one model in one process: which are loaded, which version they make, and when old ones are gone.

All live clean stages stay in memory, so a deactivation needs no load: the prefix that survives it is already there.
"""

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from service.domain.answers import Answers
from service.logs import get_logger
from service.serving.metrics import ServingMetrics
from service.serving.replica import Pointer, Replica
from service.store.artifacts import ArtifactMissingError
from service.store.leases import StageObject, Target
from shards.assembly import Assembly
from shards.engine.interface import Reader, ReaderFactory
from shards.errors import ArtifactDigestError, ShardsError
from shards.recipe import Recipe

Get = Callable[[str], bytes]
"""Bytes of an object by name; raises `ArtifactMissingError` or `OSError`."""
COLLECT_AFTER = 1.0
"""Seconds after which weights that are out of service but alive are taken for a reference cycle."""

log = get_logger(__name__)


class Weights:
    """The reader of one model and what it holds. `apply` comes from any thread, `maintain` from the loader's only."""

    def __init__(self, replica: Replica, get: Get, factory: ReaderFactory, metrics: ServingMetrics) -> None:
        """Nothing is loaded before the first `maintain`."""
        self._replica = replica
        self._get = get
        self._factory = factory
        self._metrics = metrics
        self._reader: Reader | None = None
        self._recipe: Recipe | None = None
        self._lock = threading.Lock()
        self._dying: list[weakref.ref[Any]] = []
        self._dying_since = 0.0
        self._built: list[weakref.ref[Any]] = []
        self._kept = 0
        self._complete = False
        """Whether all that was clean was in memory once."""
        self._unusable: dict[str, str] = {}
        """Why an artefact could not be loaded when it was last tried, by digest."""
        self.damaged: list[StageObject] = []
        """Stages whose object turned out missing or altered; for the caller to report."""
        self.confirms = True
        self.freed = 0
        """Below this version no weights are in memory any more."""

    def apply(self, target: Target) -> bool:
        """Move to `target` with what is in memory; whether it is served now.

        The floor rises in any case, before anything is loaded. Where the new version cannot be built, the old one
        stays if the floor allows it; else nothing is answered, which also covers the floor (rule 6).
        """
        with self._lock:
            self._replica.min_shards, self._replica.share = target.min_shards, target.share
            self._replica.answers = Answers(target.answers)
            went: list[Pointer] = []
            for step in target.steps():  # the stable version first: it stays beside a canary where it was there before
                pointer = self._replica.pointer
                newer = step.body is not None and (pointer is None or step.version > pointer.version)
                fresh = self._build(step) if newer else None
                went += self._replica.advance(fresh, target.floor, target.stable or 0)
            kept = [each.predictor for each in self._pointers()]
            self._dying += [weakref.ref(each.predictor) for each in went if each.predictor not in kept]
            return self._served(target)

    def maintain(self, target: Target, clean: Sequence[StageObject], interrupted: Callable[[], bool]) -> bool:
        """Drop what is no longer clean, load what is missing; whether nothing is left to do.

        `clean` must have been read after `target`, so it holds no stage that `target.floor` put out of service.
        """
        reader = self._opened(target)
        self.apply(target)
        stale = reader.held() - {stage.digest for stage in clean}
        if stale:
            self._watch(reader.drop(stale))
        gone = self._gone(target.floor)
        wanted, spare = _parted(target, clean)
        loaded = self._load(reader, wanted, interrupted)
        if self._complete:  # a server that starts is ready only when it needs no load for any deactivation
            self.apply(target)
        self._complete |= (loaded := self._load(reader, spare, interrupted) and loaded)
        return self.apply(target) and loaded and gone

    def clear(self) -> bool:
        """Let go of everything; whether nothing is in memory any more. The replica must have retired."""
        reader, self._reader = self._reader, None
        if reader is not None:
            self._watch(reader.drop(reader.held()))
        return not self._alive()

    def retired(self, pointer: Pointer | None) -> None:
        """Watch over the end of a pointer that the replica gave up, and of what stood beside it."""
        if pointer is not None:
            self._watch(self._built)

    def _watch(self, references: Iterable[weakref.ref[Any]]) -> None:
        with self._lock:
            self._dying.extend(references)

    def _opened(self, target: Target) -> Reader:
        if self._reader is None:
            self._recipe = Recipe.from_json(target.recipe)
            self._reader = self._factory(self._recipe)
        return self._reader

    def _served(self, target: Target) -> bool:
        pointer = self._replica.pointer
        if target.body is None or (pointer is not None and pointer.version >= target.version):
            self._replica.problem = ""
            return True
        return False

    def _pointers(self) -> list[Pointer]:
        return [each for each in (self._replica.pointer, self._replica.stable) if each]

    def _build(self, target: Target) -> Pointer | None:
        reader, recipe = self._reader, self._recipe
        if reader is None or recipe is None or target.body is None or target.assembly is None:
            return None
        same = [each for each in self._pointers() if each.assembly == target.assembly]
        if same:
            predictor, live = same[0].predictor, same[0].live
        else:
            assembly = Assembly.from_json(target.body)
            if missing := _digests(assembly) - reader.held():
                known = [self._unusable[digest] for digest in sorted(missing & self._unusable.keys())]
                why = known[0] if known else "its artefacts are still being loaded"
                return self._cannot(target, why, failed=bool(known))
            try:
                predictor = reader.build(assembly)
            except ShardsError as error:
                log.warning(
                    "version_unusable",
                    model=self._replica.model,
                    version=target.version,
                    reason=type(error).__name__,
                )
                return self._cannot(target, "the newest version's artefacts do not fit together", failed=True)
            live = sum(member is not None for member in assembly.members)
            self._built.append(weakref.ref(predictor))
        return Pointer(target.version, target.assembly, predictor, recipe, live, recipe.seats)

    def _cannot(self, target: Target, why: str, *, failed: bool) -> None:
        if not self._replica.problem:
            self._replica.problem = f"version {target.version}: {why}"
        pointer = self._replica.pointer
        if failed and pointer is not None and pointer.version >= target.floor and self._kept < target.version:
            self._kept = target.version
            self._metrics.swaps.labels(self._replica.model, "kept_old").inc()

    def _load(self, reader: Reader, stages: Iterable[StageObject], interrupted: Callable[[], bool]) -> bool:
        """Load what is missing, until all is there or something newer is known."""
        complete = True
        for stage in stages:
            if stage.digest in reader.held():
                continue
            if interrupted():
                return False
            try:
                reader.load(stage.digest, self._get(stage.object_name))
                self._unusable.pop(stage.digest, None)
            except (ArtifactDigestError, ArtifactMissingError, OSError) as error:
                complete = False
                if not isinstance(error, OSError):  # a store that is away has lost nothing
                    self.damaged.append(stage)
                reason = type(error).__name__
                self._unusable[stage.digest] = self._replica.problem = (
                    f"artefact {stage.digest[:12]} of stage {stage.stage_key[:12]} cannot be loaded: {reason}"
                )
                self._metrics.load_failures.labels(self._replica.model, reason).inc()
                log.warning(
                    "artifact_unusable",
                    model=self._replica.model,
                    stage=stage.stage_key,
                    digest=stage.digest,
                    reason=reason,
                )
        return complete

    def _gone(self, floor: int) -> bool:
        """Raise `freed` once every weight that went out of service has really left the memory."""
        if self._alive():
            return False
        if floor > self.freed:
            self.freed = floor
            self._replica.covers_rose.set()
        return True

    def _alive(self) -> bool:
        with self._lock:
            self._dying = [reference for reference in self._dying if reference() is not None]
            self._built = [reference for reference in self._built if reference() is not None]
            now = time.monotonic()
            if not self._dying:
                self._dying_since = now
            elif now - self._dying_since > COLLECT_AFTER:
                self._dying_since = now
                gc.collect()
            return bool(self._dying)


def _digests(assembly: Assembly) -> frozenset[str]:
    return frozenset(digest for member in assembly.members if member for digest in member.artifacts)


def _parted(target: Target, clean: Sequence[StageObject]) -> tuple[list[StageObject], list[StageObject]]:
    """What the target needs, the stable version's first, and what a later deactivation may need."""
    needed = [_digests(Assembly.from_json(step.body)) for step in target.steps() if step.body]
    wanted = [stage for digests in needed for stage in clean if stage.digest in digests]
    return wanted, [stage for stage in clean if not any(stage.digest in digests for digests in needed)]
