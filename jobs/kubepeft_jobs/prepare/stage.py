"""The prepare stage: model and data looked up, everything that can be refused refused early, data tokenized and published.

What is published lies under prepared/<digest>/, where the digest follows from the model's commit, the data's content and what the manifest
asks of them; so the same work is found again, and changed data is never mistaken for it.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from kubepeft import digest, storage
from kubepeft.errors import UserError
from kubepeft.stage import ENV_ATTEMPT, PreparedRef, PrepareStage, Result
from kubepeft.storage import publish
from kubepeft.storage.store import Entry, Reader, join
from kubepeft_jobs import base, cpus, imports, progress
from kubepeft_jobs.prepare.estimate import ModelShape, training_flops, training_memory, training_seconds
from kubepeft_jobs.prepare.pipeline import Options, prepare, workers
from kubepeft_jobs.prepare.read import COMPRESSED, SUFFIXES
from kubepeft_jobs.prepare.report import Report
from kubepeft_jobs.supervisor import ENV_WORK

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

log = logging.getLogger("kubepeft.prepare")

A100_PEAK = 312e12
"""Dense bf16 operations per second, from NVIDIA's data sheet: what the estimate of time is for."""

LAYOUT = 1
"""Raised when the same data would be written otherwise, so that older preparations are not taken for new ones."""


@dataclass(frozen=True)
class StoredSource:
    """A data file in storage, as prepare.read.Source."""

    reader: Reader
    entry: Entry
    work: Path

    @property
    def name(self) -> str:
        return self.reader.uri(self.entry.key)

    @property
    def size(self) -> int | None:
        return self.entry.size

    def open(self) -> BinaryIO:
        if not self.name.endswith(".parquet"):
            return self.reader.open(self.entry.key)
        # Parquet is read from its end, and streams from storage only go forward.
        local = Path(tempfile.mkdtemp(dir=self.work)) / "data.parquet"
        self.reader.download({self.entry.key: local})
        return local.open("rb")


def run(stage: PrepareStage) -> Result:
    """Prepare the data, or report what was prepared from the same before.

    Raises:
        UserError, TransientError: see kubepeft.errors.
    """
    mounts = {claim: Path(folder) for claim, folder in stage.mounts.items()}
    work = Path(os.environ[ENV_WORK])
    location = storage.parse_uri(stage.output_uri, where="spec.output.uri")
    store, root = storage.open_store(location, mounts=mounts), location.path

    model_base = base.resolve(stage.model.uri, mounts=stage.mounts, cache_dir=stage.cache_dir)
    train = _sources(stage.data.train, "spec.data.train", mounts, work)
    eval_ = _sources(stage.data.eval, "spec.data.eval", mounts, work) if stage.data.eval else None
    wanted = _digest(stage, model_base, train, eval_)
    publish.recover(
        store, join(root, "adapter"), digest.of([stage.spec_digest, wanted]), overwrite=stage.output.overwrite
    )
    folder = join(root, "prepared", wanted)
    if found := publish.read_manifest(store, folder):
        log.info("prepared before: %s", store.uri(folder))
        return _result(found, found_published=True)

    code = stage.model.trust_remote_code
    with workers(train, cpus.available(), trust_remote_code=code) as pool:  # they import while this process does
        texts = base.texts(model_base, mounts=stage.mounts, work=work / "base", code=code)
        model_config, shape, trainable = _checked_model(stage, texts)
        out = Path(tempfile.mkdtemp(prefix="prepared-", dir=work))
        total = sum(source.size or 0 for source in [*train, *(eval_ or [])])
        progress.report(prepare_rows=0, prepare_total_bytes=total)
        report = prepare(
            train,
            eval_,
            _options(stage),
            texts,
            model_config.get_text_config().vocab_size,
            out,
            pool,
            lambda rows: progress.report(prepare_rows=rows),
        )
    described = report.as_dict() | {
        "base": {"id": model_base.logical_id, "uri": model_base.uri, "commit": model_base.commit},
        "digest": wanted,
        "estimate": _estimate(stage, shape, trainable, report),
    }
    (out / "report.json").write_text(json.dumps(described, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for note in report.notes:
        log.info("%s", note)
    prepared = PreparedRef(
        digest=wanted,
        model_commit=model_base.commit,
        rows=report.train.rows,
        eval_rows=report.eval.rows if report.eval else 0,
        tokens=report.train.tokens,
    )
    attempt = publish.Attempt(
        f"{os.environ.get(ENV_ATTEMPT, 'attempt')}-{secrets.token_hex(4)}",
        wanted,
        datetime.now(UTC),
        {
            "prepared": prepared.model_dump(by_alias=True),
            "specDigest": stage.spec_digest,
            "baseModel": model_base.logical_id,
        },
    )
    published = publish.publish_in_place(store, folder, out, attempt)
    return _result(published.manifest, found_published=not published.won)


def _checked_model(stage: PrepareStage, texts: Path) -> tuple[PretrainedConfig, ModelShape, int]:
    """The base's configuration and shape, and how many parameters will be trained, once it is clear that they can be."""
    with imports.quick():
        from kubepeft_jobs import method  # torch and PEFT take seconds to import, and what is prepared needs neither

    code = stage.model.trust_remote_code
    config = base.config(texts, trust_remote_code=code)
    base.check_tokenizer(texts, stage.model.uri)
    base.check_task(config, stage.model.task, stage.model.uri)
    skeleton = method.skeleton(config, stage.model.task, trust_remote_code=code)
    peft_config = method.peft_config(
        stage.method.to_json(defaults=False), stage.model.task, skeleton, tokenizer_dir=texts, total_steps=1_000_000
    )
    shape = _shape(skeleton, config)
    method.check_targets(peft_config, skeleton, quantization=stage.model.quantization)
    return config, shape, sum(one.numel() for one in skeleton.parameters() if one.requires_grad)


def _result(manifest: publish.Manifest, *, found_published: bool) -> Result:
    return Result(
        stage="prepare",
        outcome="Succeeded",
        exit_code=0,
        found_published=found_published,
        prepared=PreparedRef.model_validate(manifest.lineage["prepared"]),
    )


def _shape(model: PreTrainedModel, config: PretrainedConfig) -> ModelShape:
    """The model's size, from its modules without weights."""
    text = config.get_text_config()
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    embeddings = {id(table.weight): table.weight for table in tables if table is not None}
    return ModelShape(
        parameters=sum(one.numel() for one in model.parameters()),
        embedding_parameters=sum(weight.numel() for weight in embeddings.values()),
        layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
    )


def _estimate(stage: PrepareStage, shape: ModelShape, trainable: int, report: Report) -> dict[str, Any]:
    """What training will take: bytes on one GPU, operations in all, and seconds on a GPU of A100_PEAK. For people; nothing relies on it."""
    training = stage.training
    dtype = "bfloat16" if stage.model.dtype == "auto" else stage.model.dtype
    longest = min(report.lengths.longest, stage.data.max_length)
    memory = training_memory(
        shape,
        trainable,
        training.per_device_train_batch_size * longest,
        dtype=dtype,
        quantization=stage.model.quantization,
        gradient_checkpointing=training.gradient_checkpointing,
    )
    epochs = training.num_train_epochs
    if training.max_steps is not None:
        batch = training.per_device_train_batch_size * training.gradient_accumulation_steps
        epochs = training.max_steps * batch / report.train.rows
    flops = training_flops(
        shape,
        trainable,
        round(report.train.tokens * epochs),
        report.lengths.mean,
        gradient_checkpointing=training.gradient_checkpointing,
    )
    seconds = training_seconds(flops, A100_PEAK)
    log.info(
        "estimate: %.1f to %.1f GB on one GPU, %.0f to %.0f s of training on an A100",
        memory.total.low / 1e9, memory.total.high / 1e9, seconds.low, seconds.high,
    )  # fmt: skip
    return {"memory_bytes": asdict(memory), "flops": flops, "a100_seconds": asdict(seconds)}


def _sources(uri: str, where: str, mounts: dict[str, Path], work: Path) -> list[StoredSource]:
    """The data files that a URI names, in the order of their names.

    Raises:
        UserError: nothing is there, or nothing that can be read as data.
    """
    location = storage.parse_uri(uri, where=where)
    reader = storage.open_reader(location, mounts=mounts)
    entries = storage.find(reader, location.path)
    if len(entries) > 1 or entries[0].key != location.path:
        suffixes = tuple(SUFFIXES) + tuple(f"{suffix}{packed}" for suffix in SUFFIXES for packed in COMPRESSED)
        data = [entry for entry in entries if entry.key.endswith(suffixes)]
        if not data:
            raise UserError(
                "NothingFound",
                f"none of its {len(entries)} files is a data file, such as {entries[0].key.rpartition('/')[2]}",
                where=f"{where}: {uri}",
                mend=f"name files that end in {', '.join(SUFFIXES)}",
            )
        entries = data
    return [StoredSource(reader, entry, work) for entry in sorted(entries)]


def _digest(
    stage: PrepareStage, model_base: base.Base, train: Sequence[StoredSource], eval_: Sequence[StoredSource] | None
) -> str:
    """What the prepared data follows from; not packing, which is decided in training."""
    data = stage.data.to_json()
    for name in ("train", "eval", "packing"):
        data.pop(name, None)
    return digest.of(
        {
            "layout": LAYOUT,
            "model": model_base.logical_id,
            "commit": model_base.commit,
            "task": stage.model.task,
            "data": data,
            "seed": stage.training.seed,
            "train": _content(train),
            "eval": None if eval_ is None else _content(eval_),
        }
    )


def _content(sources: Sequence[StoredSource]) -> str:
    folder = sources[0].entry.key.rpartition("/")[0]
    return base.content_digest(sources[0].reader, [source.entry for source in sources], folder)


def _options(stage: PrepareStage) -> Options:
    data = stage.data
    return Options(
        task=stage.model.task,
        format=data.format,
        columns=data.columns,
        loss=data.loss,
        max_length=data.max_length,
        too_long=data.too_long,
        max_bad_rows=data.max_bad_rows,
        eval_fraction=data.eval_fraction,
        seed=stage.training.seed,
        trust_remote_code=stage.model.trust_remote_code,
    )
