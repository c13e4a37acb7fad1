"""The infer stage: one shard of the input answered with a published adapter, and the whole published when all shards are.

Answers are kept in storage in small chunks as they come, so a kill at any moment loses only what was not yet kept, and no finished id
is answered again. A shard counts by its manifest; the stable files and summary.json follow from the shards' manifests alone, so
whoever comes last writes them, and writing them twice changes nothing.

    predictions/NAME/part-00000-of-00004.jsonl …  errors.jsonl  summary.json     for people
    predictions/NAME/.shards/00000-of-00004/       published shards               (kubepeft.storage.publish)
    predictions/NAME/.chunks/DIGEST/00000/         answers kept so far
"""

from __future__ import annotations

import io
import json
import logging
import os
import secrets
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kubepeft import digest, storage
from kubepeft.errors import UserError
from kubepeft.stage import ENV_ATTEMPT, ENV_SHARD, InferenceResult, InferStage, Result
from kubepeft.storage import publish
from kubepeft.storage.store import Store, join, relative
from kubepeft_jobs import base, imports, memory, progress
from kubepeft_jobs.infer.requests import (
    BadLine,
    Completion,
    GenerationSettings,
    Request,
    bad_line_row,
    completion_row,
    failure_row,
    read_requests,
)
from kubepeft_jobs.saved import Saved
from kubepeft_jobs.supervisor import ENV_WORK

if TYPE_CHECKING:
    from kubepeft_jobs.infer.engine import Engine

log = logging.getLogger("kubepeft.infer")

WINDOW = 8192
"""Requests that are sorted by length together; bounds the memory, whatever the input's size."""
KEEP_ROWS = 256
KEEP_SECONDS = 15.0
"""A chunk is kept after so many answers or seconds, whichever comes first."""


@dataclass(frozen=True)
class Line:
    """One input line of this shard: its place in the whole input (from 0) and what it asks for."""

    place: int
    found: Request | BadLine


@dataclass(frozen=True)
class Answer:
    """One output line."""

    place: int
    ok: bool
    row: dict[str, Any]

    def dumps(self) -> bytes:
        return json.dumps({"place": self.place, "ok": self.ok, "row": self.row}, ensure_ascii=False).encode() + b"\n"


def run(stage: InferStage) -> Result:
    """Answer this process's shard; what is answered already is left alone.

    Raises:
        UserError: no adapter, another base, no such input, output of another spec.
        TransientError: storage out of reach.
        Saved: SIGTERM came; the answers so far are in storage.
    """
    mounts = {claim: Path(folder) for claim, folder in stage.mounts.items()}
    location = storage.parse_uri(stage.output_uri, where="spec.output")
    store, root = storage.open_store(location, mounts=mounts), location.path
    shard = int(os.environ.get(ENV_SHARD, "0"))
    work = Path(os.environ[ENV_WORK])
    adapter = _adapter(stage, mounts)
    source = storage.parse_uri(stage.input, where="spec.input")
    reader = storage.open_reader(source, mounts=mounts)
    entries = storage.find(reader, source.path)
    wanted = digest.of([stage.spec_digest, adapter.digest, base.content_digest(reader, entries)])
    folder = _shard_folder(root, shard, stage.shards)
    if found := _published_shard(store, folder, wanted, stage.overwrite):
        return _finished(stage, store, root, found, found_published=True)

    files = {entry.key: work / "input" / f"{number:05d}" for number, entry in enumerate(entries)}
    reader.download(files)
    names = {path: reader.uri(key) for key, path in files.items()}
    chunks = Chunks(store, join(root, ".chunks", wanted, f"{shard:05d}"))
    done = chunks.places()
    total = sum(1 for _ in _lines(names, shard, stage.shards))
    if done:
        log.info("going on: %d of %d lines are answered", len(done), total)
    _answer(stage, adapter, names, shard, chunks, done, total, mounts, work)

    local = work / "shard"
    completed, failed = chunks.compact(local)
    attempt = publish.Attempt(
        f"{os.environ.get(ENV_ATTEMPT, 'attempt')}-{secrets.token_hex(4)}",
        wanted,
        datetime.now(UTC),
        {
            "specDigest": stage.spec_digest,
            "adapterDigest": adapter.digest,
            "input": stage.input,
            "total": total,
            "completed": completed,
            "failed": failed,
        },
    )
    published = publish.publish_in_place(store, folder, local, attempt, overwrite=stage.overwrite)
    chunks.remove()
    return _finished(stage, store, root, published.manifest, found_published=not published.won)


@dataclass(frozen=True)
class PublishedAdapter:
    """An adapter as its manifest describes it."""

    store: Store
    key: str
    uri: str
    manifest: publish.Manifest
    digest: str


def _adapter(stage: InferStage, mounts: dict[str, Path]) -> PublishedAdapter:
    location = storage.parse_uri(stage.adapter_uri, where="spec.adapter.uri")
    store = storage.open_store(location, mounts=mounts)
    manifest = publish.read_manifest(store, location.path)
    if manifest is None:
        raise UserError(
            "NoAdapter",
            "no adapter is published there",
            where=stage.adapter_uri,
            mend="check the address: it is the folder that holds adapter_config.json and manifest.json",
        )
    found = publish.manifest_digest(store, location.path)
    if stage.adapter_digest is not None and found != stage.adapter_digest:
        raise UserError(
            "AdapterChanged",
            f"the adapter there has digest {found}, expected {stage.adapter_digest}",
            where=stage.adapter_uri,
            mend="another adapter was published there meanwhile; make a new BatchInference for it",
        )
    return PublishedAdapter(store, location.path, stage.adapter_uri, manifest, found)


def _load(stage: InferStage, adapter: PublishedAdapter, mounts: dict[str, Path], work: Path) -> Engine:
    """Fetch adapter and base, check that they belong together, and load them."""
    with imports.quick():
        import torch
        import transformers

        from kubepeft_jobs.infer import engine

    lineage = adapter.manifest.lineage
    uri = stage.model_uri or lineage["baseModelUri"]
    known = base.Base.of_commit(uri, lineage["baseModelCommit"])
    if stage.model_uri is not None:
        known = base.resolve(uri, mounts=stage.mounts, cache_dir=stage.cache_dir)
    base_dir = base.files(known, mounts=stage.mounts, cache_dir=stage.cache_dir, code=stage.trust_remote_code)
    weights = base.weights_digest(base_dir)
    if weights != lineage["baseModelWeights"]:
        raise UserError(
            "WrongBase",
            f"the adapter was trained on {lineage['baseModel']} at {lineage['baseModelCommit']}, and these are other weights",
            where=uri,
            mend="give the base that the adapter names" + (", or leave modelUri out" if stage.model_uri else ""),
        )
    publish.fetch(adapter.store, adapter.key, adapter.manifest, work / "adapter")
    loaded_from = base.with_local_base(work / "adapter", base_dir, work / "load")
    transformers.logging.disable_progress_bar()
    dtype = base.dtype_of(stage.dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return engine.load(
        loaded_from,
        base_dir,
        lineage["task"],
        str(dtype).removeprefix("torch."),
        device,
        trust_remote_code=stage.trust_remote_code,
    )


def _answer(
    stage: InferStage,
    adapter: PublishedAdapter,
    names: dict[Path, str],
    shard: int,
    chunks: Chunks,
    done: set[int],
    total: int,
    mounts: dict[str, Path],
    work: Path,
) -> None:
    """Answer the lines of this shard that are not in `done`, keeping the answers as they come."""
    stopping = _OnSigterm()
    tally = _Tally(total, len(done))
    tally.report()  # before anything is loaded: a rate is seen from the first answer on only if the counter was seen before it
    loaded: Engine | None = None
    for window in _windows((line for line in _lines(names, shard, stage.shards) if line.place not in done), WINDOW):
        requests: dict[str, tuple[int, Request]] = {}
        for line in window:
            if isinstance(line.found, BadLine):
                chunks.add(Answer(line.place, False, bad_line_row(line.found)))
                tally.failed += 1
            else:
                requests[line.found.id] = (line.place, line.found)
        if requests and loaded is None:
            loaded = _load(stage, adapter, mounts, work)
        if loaded is not None:
            for result in loaded.run([request for _, request in requests.values()], _settings(stage)):
                place, request = requests[result.id]
                if isinstance(result, Completion):
                    chunks.add(Answer(place, True, completion_row(request, result, created=int(time.time()))))
                    tally.completed += 1
                    tally.tokens += result.completion_tokens
                else:
                    chunks.add(Answer(place, False, failure_row(request, result)))
                    tally.failed += 1
                tally.report()
                if stopping.asked:
                    chunks.keep()
                    raise Saved(
                        f"saved {tally.completed + tally.failed} of {total} answers; the next attempt goes on from there"
                    )
    chunks.keep()
    tally.report()
    if loaded is not None and loaded.plan is not None:
        log.info("answered: %s", loaded.plan.reason)


class Chunks:
    """The answers of one shard in storage, in small files that are never written again."""

    def __init__(self, store: Store, folder: str) -> None:
        self._store, self._folder = store, folder
        self._attempt = secrets.token_hex(6)
        self._waiting: list[Answer] = []
        self._since = time.monotonic()
        self._count = 0

    def add(self, answer: Answer) -> None:
        self._waiting.append(answer)
        if len(self._waiting) >= KEEP_ROWS or time.monotonic() - self._since >= KEEP_SECONDS:
            self.keep()

    def keep(self) -> None:
        """Write what waits."""
        if self._waiting:
            key = join(self._folder, f"{time.time_ns():020d}-{self._attempt}-{self._count:06d}.jsonl")
            self._store.create(key, b"".join(answer.dumps() for answer in self._waiting))
            self._waiting = []
            self._count += 1
        self._since = time.monotonic()

    def places(self) -> set[int]:
        """The places in the input that are answered."""
        return {json.loads(line)["place"] for _, line in self._stored()}

    def compact(self, into: Path) -> tuple[int, int]:
        """Write rows.jsonl and errors.jsonl in the order of the input; of two answers to one line the first kept counts.

        Returns: how many rows, how many errors. Memory holds one small entry a line, not the answers.
        """
        into.mkdir(parents=True)
        pile = into.parent / "answers"
        index: dict[int, tuple[int, int, bool]] = {}
        with pile.open("wb") as out:
            for _, line in self._stored():
                answer = json.loads(line)
                if answer["place"] not in index:
                    row = json.dumps(answer["row"], ensure_ascii=False).encode() + b"\n"
                    index[answer["place"]] = (out.tell(), len(row), answer["ok"])
                    out.write(row)
        with (
            pile.open("rb") as answers,
            (into / "rows.jsonl").open("wb") as rows,
            (into / "errors.jsonl").open("wb") as errors,
        ):
            for _, (start, length, ok) in sorted(index.items()):
                answers.seek(start)
                (rows if ok else errors).write(answers.read(length))
        pile.unlink()
        completed = sum(ok for _, _, ok in index.values())
        return completed, len(index) - completed

    def remove(self) -> None:
        self._store.delete([entry.key for entry in self._store.entries(self._folder)])

    def _stored(self) -> Iterator[tuple[str, bytes]]:
        for entry in sorted(self._store.entries(self._folder)):
            body = self._store.read(entry.key)
            for line in io.BytesIO(body or b""):
                yield entry.key, line


@dataclass
class _Tally:
    total: int
    completed: int
    failed: int = 0
    tokens: int = 0
    _began: float = field(default_factory=time.monotonic)
    _shown: float = 0.0

    def report(self) -> None:
        now = time.monotonic()
        if now - self._shown < 0.5 and self.completed + self.failed < self.total:
            return
        self._shown = now
        progress.report(
            inference_rows=self.total,
            inference_completed=self.completed,
            inference_failed=self.failed,
            inference_tokens=self.tokens,
            inference_tokens_per_second=self.tokens / max(now - self._began, 1e-3),
            memory_bytes=memory.peak(),
        )


class _OnSigterm:
    def __init__(self) -> None:
        self.asked = False
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_: object) -> None:
        self.asked = True


def _lines(names: dict[Path, str], shard: int, shards: int) -> Iterator[Line]:
    """The lines of this shard; ids are unique over the whole input, so every shard reads all of it."""
    seen: set[str] = set()
    place = 0
    for number, (path, name) in enumerate(names.items(), 1):
        with path.open("rb") as stream:
            for found in read_requests(
                stream, file=name, seen=seen, prefix=f"file-{number}-" if len(names) > 1 else ""
            ):
                if place % shards == shard:
                    yield Line(place, found)
                place += 1


def _windows(lines: Iterator[Line], size: int) -> Iterator[list[Line]]:
    window: list[Line] = []
    for line in lines:
        window.append(line)
        if len(window) == size:
            yield window
            window = []
    if window:
        yield window


def _settings(stage: InferStage) -> GenerationSettings:
    wish = stage.generation
    return GenerationSettings(
        max_new_tokens=wish.max_new_tokens,
        min_new_tokens=wish.min_new_tokens or 0,
        do_sample=wish.do_sample,
        temperature=wish.temperature,
        top_k=wish.top_k,
        top_p=wish.top_p,
        min_p=wish.min_p,
        repetition_penalty=wish.repetition_penalty,
        no_repeat_ngram_size=wish.no_repeat_ngram_size,
        num_beams=wish.num_beams,
        length_penalty=wish.length_penalty,
        seed=wish.seed,
        stop=tuple(wish.stop_strings),
    )


def _shard_folder(root: str, shard: int, shards: int) -> str:
    return join(root, ".shards", f"{shard:05d}-of-{shards:05d}")


def _published_shard(store: Store, folder: str, wanted: str, overwrite: bool) -> publish.Manifest | None:
    manifest = publish.read_manifest(store, folder)
    if manifest is None or (overwrite and manifest.digest != wanted):
        return None
    if manifest.digest != wanted:
        raise UserError(
            "OutputBelongsToAnotherSpec",
            f"this folder holds answers of another spec, adapter or input (digest {manifest.digest}, this one is {wanted})",
            where=store.uri(folder),
            mend="give another output, or set overwrite: true to replace it",
        )
    return manifest


def _finished(stage: InferStage, store: Store, root: str, mine: publish.Manifest, *, found_published: bool) -> Result:
    """This shard's result, or the whole run's where all shards are published and the summary is written."""
    shards = [
        (folder, publish.read_manifest(store, folder))
        for folder in (_shard_folder(root, shard, stage.shards) for shard in range(stage.shards))
    ]
    counts = mine.lineage
    manifests = [manifest for _, manifest in shards if manifest is not None and manifest.digest == mine.digest]
    if whole := len(manifests) == stage.shards:
        counts = _summarize(stage, store, root, [(folder, manifest) for folder, manifest in shards if manifest])
    return Result(
        stage="infer",
        outcome="Succeeded",
        exit_code=0,
        found_published=found_published,
        inference=InferenceResult(
            total=counts["total"],
            completed=counts["completed"],
            failed=counts["failed"],
            output=stage.output_uri,
            whole=whole,
        ),
    )


def _summarize(
    stage: InferStage, store: Store, root: str, shards: list[tuple[str, publish.Manifest]]
) -> dict[str, Any]:
    """Write part files, errors.jsonl and summary.json from the shards' manifests; the same bytes whoever does it."""
    summary: dict[str, Any] = {
        name: sum(manifest.lineage[name] for _, manifest in shards) for name in ("total", "completed", "failed")
    }
    summary |= {name: shards[0][1].lineage[name] for name in ("specDigest", "adapterDigest", "input")}
    summary |= {"shards": stage.shards, "digest": shards[0][1].digest}
    body = json.dumps(summary, indent=2).encode() + b"\n"
    if store.read(join(root, "summary.json")) == body:
        return summary
    parts, errors = {}, []
    for number, (folder, manifest) in enumerate(shards):
        for file in manifest.files:
            key = manifest.key(folder, file)
            if file.path == "rows.jsonl":
                parts[key] = join(root, f"part-{number:05d}-of-{len(shards):05d}.jsonl")
            else:
                errors.append(store.read(key) or b"")
    stale = [
        entry.key
        for entry in store.entries(root)
        if (name := relative(root, entry.key)).startswith("part-")
        and "/" not in name
        and entry.key not in parts.values()
    ]
    store.delete([join(root, "summary.json"), join(root, "errors.jsonl"), *stale])
    store.copy(parts)
    store.create(join(root, "errors.jsonl"), b"".join(errors))
    store.create(join(root, "summary.json"), body)
    return summary
