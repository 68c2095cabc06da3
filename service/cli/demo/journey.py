"""The demo's way from records to a verified certificate and a rebuilt model, against a real `expunge up`."""

import math
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from service.cli.demo import evidence, show
from service.cli.demo.assets import DemoError
from service.cli.demo.calls import Calls, Deactivation
from service.cli.demo.report import Accuracy, Report, Versions
from service.cli.demo.sample import CLASSES, SUBJECT_TYPE, Review, Sample
from service.cli.demo.stack import Side, Stack
from service.cli.demo.traffic import Traffic

MODEL, TRAINING, HELD_OUT = "reviews-model", "reviews", "reviews-held-out"
TRAIN_WITHIN, ERASE_WITHIN = 900.0, 120.0
AROUND = 20
"""Predictions that are answered before the request leaves, and after `deactivated` was read, at least."""


@dataclass
class Journey:
    """One run; each step needs the ones above it."""

    screen: show.Screen
    stack: Stack
    sample: Sample
    recipe: dict[str, Any]
    monolithic: Side
    home: Path
    seconds: dict[str, float]
    began: float
    trained: int = 0
    """Stages that were trained for an earlier version."""
    calls: Calls = field(init=False)
    traffic: Traffic = field(init=False)

    def __post_init__(self) -> None:
        """Connect."""
        texts = [review.text for review in self.sample.held_out]
        self.calls = Calls(self.stack.api_url, self.stack.api_key)
        self.traffic = Traffic(self.stack.servers, MODEL, self.stack.api_key, texts)

    def run(self) -> Report:
        """All of it. Raises `DemoError` where it cannot go on."""
        try:
            return self._run()
        finally:
            self.traffic.stop()
            self.calls.close()

    def _run(self) -> Report:
        with self._timed("ingestion"):
            self._ingest()
        with self._timed("training"):
            self._train()
        with self._timed("accuracy before"):
            first = self._grid()
            before = self._accuracy("before the deletion", first["version"])
            monolithic = self._wait_monolithic()
        self._show_accuracy(before, monolithic)
        self.screen.title("Deletion, under prediction traffic")
        self.traffic.start()
        preview = self._preview()
        with self._timed("deactivation"):
            done = self._delete()
        after = self._grid()
        self.screen.say(show.grids({"before": first, "deactivated": after}))
        with self._timed("accuracy deactivated"):
            deactivated = self._accuracy("after deactivation", done.version)
        with self._timed("erasure"):
            self._await_erasure(done)
            envelope = self.calls.get(f"/v1/deletion-requests/{done.request_id}/certificate?model={MODEL}")
            proof = evidence.certificate(self.screen, self.stack, envelope, self.home / "certificate.json")
        with self._timed("rebuild"):
            self._await_training(f"rebuilding {preview['stages_to_rebuild']} stages on the records that remain")
        last = self._grid()
        self.screen.say(show.grids({"before": first, "deactivated": after, "rebuilt": last}))
        with self._timed("accuracy rebuilt"):
            rebuilt = self._accuracy("after the rebuild", last["version"])
        stage = last["shards"][preview["cells"][0]["shard"]]["stage"]
        with self._timed("replay"):
            equal = evidence.replay(self.screen, self.stack, MODEL, stage)
        seen = self.traffic.stop()
        for what, count in seen.failures.items():
            self.screen.say(f"[red]{count} predictions failed: {what}")
        held_out = len(self.sample.held_out)
        return Report(
            deactivated_ms=max(done.client_ms, done.server_ms),
            deactivated_ms_client=done.client_ms,
            deactivated_ms_server=done.server_ms,
            versions=Versions(first["version"], done.version, last["version"]),
            predictions_total=seen.total,
            predictions_failed=seen.failed,
            predictions_stale=seen.stale,
            predictions_after_deactivated=seen.after_floor,
            predictions_versions=seen.versions,
            records_deleted=proof.records,
            stages_tainted=proof.stages_tainted,
            artifacts_destroyed=proof.artifacts_destroyed,
            certificate_verified=proof.verified,
            replay_equal=equal,
            replayed_stage=stage,
            depth_before=_depths(first),
            depth_after_deactivation=_depths(after),
            depth_after_rebuild=_depths(last),
            accuracy=Accuracy(monolithic, preview["accuracy_after"], before, deactivated, rebuilt),
            accuracy_stderr=math.sqrt(before * (1 - before) / held_out),
            training_records=len(self.sample.training),
            reviewers=self.sample.reviewers,
            held_out_records=held_out,
            seconds={name: round(value, 1) for name, value in self.seconds.items()},
            seconds_total=round(time.monotonic() - self.began, 1),
        )

    def _ingest(self) -> None:
        self.screen.title("Ingestion")
        grid = {"shards": self.recipe["shards"], "slices": self.recipe["slices"], "classes": list(CLASSES)}
        self.calls.post("/v1/datasets", {"name": TRAINING, **grid})
        self.calls.post("/v1/datasets", {"name": HELD_OUT, **grid, "deletable": False})
        parts: dict[str, tuple[Review, ...]] = {TRAINING: self.sample.training, HELD_OUT: self.sample.held_out}
        for name, reviews in parts.items():
            with self.screen.bar(f"uploading {name}", len(reviews)) as advance:
                done = self.calls.upload(name, reviews, advance)
            self.screen.say(f"{done['accepted']} records of {done['subjects']} stand-in reviewers")
        model = {"name": MODEL, "dataset": TRAINING, "evaluation_dataset": HELD_OUT, "recipe": self.recipe}
        self.calls.post("/v1/models", model)
        self.screen.say(show.cells(self._grid()))

    def _train(self) -> None:
        self.screen.title("Training")
        self.calls.post(f"/v1/models/{MODEL}/rebuild")
        self._await_training("training every stage of every order")

    def _await_training(self, text: str) -> None:
        """Wait until the model is built, showing the jobs that are done since, and the other model beside it."""
        texts = {"stages": text, "monolithic": "one model on everything, in memory, for comparison"}
        if not self.monolithic.running:
            del texts["monolithic"]
        began = time.monotonic()
        with self.screen.bars(texts) as update:
            while True:
                model = self.calls.get(f"/v1/models/{MODEL}")
                jobs, done = model["jobs"], model["jobs"].get("done", 0)
                waiting = jobs.get("queued", 0) + jobs.get("running", 0)
                if jobs.get("failed"):
                    raise DemoError(f"{jobs['failed']} stages could not be trained\n{self.stack.trouble('train-1')}")
                if total := done - self.trained + waiting:
                    update("stages", done - self.trained, total)
                if "monolithic" in texts:
                    update("monolithic", *self.monolithic.progress)
                if model["version"] and not model["building"] and not waiting:
                    self.trained = done
                    return
                self._patience(began, TRAIN_WITHIN, "training")
                time.sleep(0.25)

    def _wait_monolithic(self) -> float:
        if self.monolithic.running:
            with self.screen.bars({"monolithic": "one model on everything, in memory, for comparison"}) as update:
                while self.monolithic.running:
                    update("monolithic", *self.monolithic.progress)
                    time.sleep(0.25)
        return self.monolithic.answer["accuracy"]

    def _accuracy(self, when: str, version: int) -> float:
        reviews = self.sample.held_out
        for late in self.calls.laggards(self.stack.servers, MODEL, version):
            program = f"server-{self.stack.servers.index(late) + 1}"
            raise DemoError(f"{program} does not serve version {version}\n{self.stack.trouble(program)}")
        with self.screen.bar(f"predicting {len(reviews)} held-out records {when}", len(reviews)) as advance:
            found, versions = self.calls.accuracy(self.stack.servers, MODEL, reviews, advance)
        if versions != frozenset({version}):
            raise DemoError(f"measured {when}, but versions {sorted(versions)} answered, not {version} alone")
        return found

    def _show_accuracy(self, before: float, monolithic: float) -> None:
        self.screen.say(
            f"accuracy on held-out stand-in reviewers: {before:.3f}, one model on everything {monolithic:.3f}"
        )

    def _preview(self) -> dict[str, Any]:
        found = self.calls.post("/v1/deletion-requests:preview", {"subject": self._subject})["models"]
        preview = next(each for each in found if each["model"] == MODEL)
        if None in (preview["accuracy_before"], preview["accuracy_after"]):
            raise DemoError("the preview knows no accuracy, though every stage should have been evaluated")
        self.screen.say(
            f"the stand-in reviewer with most records has {preview['records']}; deleting them would take"
            f" {preview['stages_tainted']} stages out of service, accuracy {preview['accuracy_before']:.3f}"
            f" → {preview['accuracy_after']:.3f} until they are rebuilt"
        )
        return preview

    @property
    def _subject(self) -> dict[str, str]:
        return {"type": SUBJECT_TYPE, "value": self.sample.chosen}

    def _delete(self) -> Deactivation:
        self.traffic.wait_for(AROUND)
        done = self.calls.delete(self._subject, MODEL)
        self.traffic.floor = done.version
        self.traffic.wait_for_each(AROUND)
        self.screen.say(
            f"[bold green]deactivated[/] {done.client_ms:.0f} ms after the 202 ({done.server_ms:.0f} ms on the server's"
            f" clock): version {done.version} serves, no answer begins from an older one"
        )
        return done

    def _await_erasure(self, done: Deactivation) -> None:
        path = f"/v1/deletion-requests/{done.request_id}"
        began = time.monotonic()
        with self.screen.bar("erasing and certifying", None):
            while (request := self.calls.get(path, {"wait": "completed", "seconds": "1"}))["state"] != "completed":
                if request["state"] == "failed":
                    raise DemoError(f"erasure failed\n{self.stack.trouble('default')}")
                self._patience(began, ERASE_WITHIN, "erasure")
        if request["outcome"] != "erased":
            raise DemoError(f"the request completed as {request['outcome']}, not as erased")

    def _grid(self) -> dict[str, Any]:
        return self.calls.get(f"/v1/models/{MODEL}/shards")

    def _patience(self, began: float, within: float, what: str) -> None:
        self.stack.check()
        if time.monotonic() - began > within:
            raise DemoError(f"{what} took more than {within:.0f} s; the logs are in {self.stack.state / 'logs'}")

    @contextmanager
    def _timed(self, what: str) -> Generator[None]:
        began = time.monotonic()
        yield
        self.seconds[what] = time.monotonic() - began


def _depths(grid: show.Grid) -> tuple[int, ...]:
    return tuple(shard["depth"] for shard in grid["shards"])
