"""What an earlier attempt at training has published, found without torch, so that a stage run again answers in a second.

Nothing here trains or loads a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kubepeft import digest, storage
from kubepeft.errors import UserError
from kubepeft.stage import AdapterResult, Result, TrainingResult, TrainStage, adapter_uri
from kubepeft.storage import publish
from kubepeft.storage.store import Store, join


@dataclass(frozen=True)
class Place:
    """Where this run reads and publishes."""

    store: Store
    root: str
    """The key of output.uri."""

    def key(self, *parts: str) -> str:
        return join(self.root, *parts)

    @classmethod
    def of(cls, stage: TrainStage) -> Place:
        location = storage.parse_uri(stage.output_uri, where="spec.output.uri")
        mounts = {claim: Path(folder) for claim, folder in stage.mounts.items()}
        return cls(storage.open_store(location, mounts=mounts), location.path)


def digest_of(stage: TrainStage) -> str:
    """The digest of the adapter that this stage makes: it follows from the spec and from the prepared data."""
    return digest.of([stage.spec_digest, stage.prepared.digest])


def find(stage: TrainStage) -> Result | None:
    """The result of an attempt that has published already, or None; a winner that died is finished here.

    Raises:
        UserError: reason OutputBelongsToAnotherSpec.
    """
    place = Place.of(stage)
    found = publish.recover(place.store, place.key("adapter"), digest_of(stage), overwrite=stage.output.overwrite)
    return None if found is None else result(stage, place, found, found_published=True)


def result(stage: TrainStage, place: Place, manifest: publish.Manifest, *, found_published: bool) -> Result:
    """The result that a published adapter stands for; puts its report in place where a killed winner had not."""
    report = report_of(place, manifest.attempt)
    if place.store.stat(report) is not None:
        try:
            place.store.copy({report: place.key("report.html")})
        except UserError as error:
            if error.reason != "NoSuchKey":  # that one means that the winner has just put it in place itself
                raise
        place.store.delete([report])
    return Result(
        stage="train",
        outcome="Succeeded",
        exit_code=0,
        found_published=found_published,
        training=TrainingResult.model_validate(manifest.lineage["training"]),
        resumed_from_step=manifest.lineage.get("resumedFromStep"),
        adapter=AdapterResult(
            uri=adapter_uri(stage.output_uri),
            digest=publish.manifest_digest(place.store, place.key("adapter")),
            size_bytes=sum(file.size for file in manifest.files),
            report=f"{stage.output_uri.rstrip('/')}/report.html",
        ),
    )


def report_of(place: Place, attempt: str) -> str:
    return place.key(".attempts", "report", f"{attempt}.html")
