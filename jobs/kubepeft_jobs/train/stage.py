"""The train stage: prepared data in, published adapter out.

configure (method.peft_config) → wrap (peft.get_peft_model) → train (transformers.Trainer) → save (save_pretrained) → upload → parity gate →
claim. Here stand the order of these steps and what passes between them; how each is done stands in the modules beside this one.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import secrets
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from peft import PeftModel
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, PrinterCallback, TrainingArguments, set_seed

from kubepeft import __version__, digest
from kubepeft.errors import UserError
from kubepeft.stage import ENV_ATTEMPT, Result, TrainingResult, TrainStage
from kubepeft.storage import publish
from kubepeft.types.training import OURS
from kubepeft_jobs import base, method, progress
from kubepeft_jobs.report.data import Attempt as ReportAttempt
from kubepeft_jobs.report.data import ReportData, Sample
from kubepeft_jobs.report.page import render
from kubepeft_jobs.saved import Saved
from kubepeft_jobs.supervisor import ENV_MICRO_BATCH, ENV_WORK
from kubepeft_jobs.train import card, gate, published
from kubepeft_jobs.train.attention import packing_is_exact, use_packed_attention
from kubepeft_jobs.train.batching import PackedCollator, PaddedCollator, Seq2SeqCollator
from kubepeft_jobs.train.callbacks import CheckpointUpload, Figures, Finite, StopOnSigterm
from kubepeft_jobs.train.checkpoints import Checkpoints
from kubepeft_jobs.train.linear import onednn_is_faster, stop_using_onednn, use_onednn
from kubepeft_jobs.train.published import Place
from kubepeft_jobs.train.trainer import PeftTrainer

log = logging.getLogger("kubepeft.train")

SAMPLES = 4
SAMPLE_TOKENS = 64
PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets")


@dataclass(frozen=True)
class Trained:
    """What training leaves for publication."""

    model: PeftModel
    result: TrainingResult
    history: list[dict[str, float]]
    resumed_from: int
    seconds: float
    packing: str


def run(stage: TrainStage) -> Result:
    """Train and publish. What an earlier attempt has published is found by `published.find`, before this is imported.

    Raises:
        UserError, TransientError: see kubepeft.errors.
        Saved: SIGTERM came, and a checkpoint is in storage.
    """
    place = Place.of(stage)
    wanted = published.digest_of(stage)
    work = Path(os.environ[ENV_WORK])
    attempt = publish.Attempt(
        f"{os.environ.get(ENV_ATTEMPT, 'attempt')}-{secrets.token_hex(4)}", wanted, datetime.now(UTC)
    )
    arguments = training_arguments(stage, work / "run")
    with arguments.main_process_first(desc="fetching"):
        prepared = _fetch_prepared(place, stage, work / "prepared")
        model_base = base.Base.of_commit(stage.model.uri, stage.prepared.model_commit)
        base_dir = base.files(
            model_base, mounts=stage.mounts, cache_dir=stage.cache_dir, code=stage.model.trust_remote_code
        )
    tokenizer = base.tokenizer(base_dir, trust_remote_code=stage.model.trust_remote_code)
    train_data, eval_data = _datasets(work / "prepared")
    dtype = base.dtype_of(stage.model.dtype)
    log.info(
        "training %s on %s",
        stage.name,
        arguments.device,
        extra={
            "base": model_base.logical_id,
            "commit": model_base.commit,
            "dtype": str(dtype),
            "examples": len(train_data),
        },
    )
    started = datetime.now(UTC)
    trained = _train(stage, arguments, base_dir, tokenizer, train_data, eval_data, dtype, place, attempt, work)
    if arguments.process_index != 0:
        return Result(stage="train", outcome="Succeeded", exit_code=0)
    return _publish(
        stage,
        place,
        attempt,
        arguments,
        model_base,
        base_dir,
        tokenizer,
        train_data,
        eval_data,
        prepared,
        dtype,
        trained,
        work,
        started,
    )


def training_arguments(stage: TrainStage, run_dir: Path) -> TrainingArguments:
    """The manifest's training section as transformers.TrainingArguments, for this machine."""
    ours = stage.training
    cuda = torch.cuda.is_available()
    effective = ours.per_device_train_batch_size * ours.gradient_accumulation_steps
    micro_batch = int(os.environ.get(ENV_MICRO_BATCH, ours.per_device_train_batch_size))
    given = {name: value for name, value in ours.model_dump().items() if name not in OURS and value is not None}
    evaluates = stage.data.eval is not None or stage.data.eval_fraction is not None
    given["eval_strategy"] = (ours.eval_strategy or "steps") if evaluates else "no"
    given["load_best_model_at_end"] = ours.keeps_best()
    if ours.keeps_best():
        # The best checkpoint can only be kept where there is one for every evaluation.
        given |= {
            "save_strategy": given["eval_strategy"],
            "save_steps": given["eval_steps"],
            "metric_for_best_model": "eval_loss",
        }
    if given["gradient_checkpointing"]:
        given["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    dtype = base.dtype_of(stage.model.dtype)
    return TrainingArguments(
        **(
            given
            | {
                "output_dir": str(run_dir),
                "per_device_train_batch_size": micro_batch,
                "gradient_accumulation_steps": effective // micro_batch,
                "report_to": given["report_to"] or "none",
                "run_name": ours.run_name or stage.name,
                "use_cpu": not cuda,
                "bf16": cuda and dtype == torch.bfloat16,
                "fp16": cuda and dtype == torch.float16,
                "ddp_backend": ("nccl" if cuda else "gloo") if "WORLD_SIZE" in os.environ else None,
                "ddp_find_unused_parameters": False,
                "ddp_timeout": 7200,
                "dataloader_pin_memory": cuda,
                "disable_tqdm": True,
                "logging_nan_inf_filter": False,
                "restore_callback_states_from_checkpoint": True,
                "remove_unused_columns": False,
            }
        )
    )


def _fetch_prepared(place: Place, stage: TrainStage, into: Path) -> dict[str, Any]:
    """Fetch prepared/<digest>/ and return its report.json."""
    folder = place.key("prepared", stage.prepared.digest)
    manifest = publish.read_manifest(place.store, folder)
    if manifest is None:
        raise UserError(
            "NotPrepared",
            "the prepared data is not there",
            where=place.store.uri(folder),
            mend="run the prepare stage again",
        )
    publish.fetch(place.store, folder, manifest, into)
    found: dict[str, Any] = json.loads((into / "report.json").read_text())
    return found


def _datasets(folder: Path) -> tuple[Dataset, Dataset | None]:
    def split(name: str) -> Dataset | None:
        parts = [Dataset.from_file(str(path)) for path in sorted(folder.glob(f"{name}-*.arrow"))]
        return concatenate_datasets(parts) if parts else None

    train = split("train")
    assert train is not None, "prepare publishes no empty training data"
    return train, split("eval")


def _train(
    stage: TrainStage,
    arguments: TrainingArguments,
    base_dir: Path,
    tokenizer: PreTrainedTokenizerBase,
    train_data: Dataset,
    eval_data: Dataset | None,
    dtype: torch.dtype,
    place: Place,
    attempt: publish.Attempt,
    work: Path,
) -> Trained:
    set_seed(stage.training.seed)
    model = base.load(
        base_dir,
        stage.model.task,
        dtype,
        quantization=stage.model.quantization,
        trust_remote_code=stage.model.trust_remote_code,
        device=arguments.device,
    )
    if stage.model.quantization != "none":
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=stage.training.gradient_checkpointing)
    total_steps = _total_steps(arguments, len(train_data))
    _make_absolute(arguments, total_steps)
    config = method.peft_config(
        stage.method.to_json(defaults=False),
        stage.model.task,
        model,
        tokenizer_dir=base_dir,
        total_steps=total_steps,
    )
    peft_model = method.wrap(model, config)
    trainable, total = peft_model.get_nb_trainable_parameters()
    with torch.autocast(arguments.device.type, dtype, enabled=arguments.bf16 or arguments.fp16):
        collator, packing, strategy = _layout(stage, peft_model, tokenizer)
    log.info("micro-batches: %s", packing)
    arguments.train_sampling_strategy = strategy
    if onednn_is_faster():
        use_onednn(peft_model)

    key = place.key("checkpoints", digest.of([stage.spec_digest, stage.prepared.digest]))
    checkpoints = Checkpoints(
        place.store, key, digest=attempt.digest, attempt=attempt.id, keep=stage.training.save_total_limit
    )
    run_dir = Path(arguments.output_dir)
    with arguments.main_process_first(desc="restoring"):
        local = sorted(run_dir.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        resume = local[-1] if local and arguments.process_index else checkpoints.restore(run_dir)
    resumed_from = int(resume.name.rpartition("-")[2]) if resume else 0
    progress.report(
        training_trainable_parameters=trainable, training_parameters=total, training_resumed_from_step=resumed_from
    )
    sigterm = StopOnSigterm()
    figures = Figures()
    callbacks: list[Any] = [sigterm, figures, Finite(), *method.callbacks(config)]
    if stage.training.early_stopping_patience is not None:
        callbacks.append(
            EarlyStoppingCallback(stage.training.early_stopping_patience, stage.training.early_stopping_threshold)
        )
    if arguments.process_index == 0:
        callbacks.append(CheckpointUpload(checkpoints))
    trainer = PeftTrainer(
        model=peft_model,
        args=arguments,
        train_dataset=train_data,
        eval_dataset=eval_data,
        data_collator=collator,
        callbacks=callbacks,
    )
    figures.trainer = trainer
    trainer.remove_callback(PrinterCallback)  # it prints what Figures logs
    began = time.monotonic()
    if resume:
        log.info("going on from the checkpoint of step %d", resumed_from)
    outcome = trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    seconds = time.monotonic() - began
    result = TrainingResult(
        step=trainer.state.global_step,
        total_steps=trainer.state.max_steps,
        trainable_parameters=trainable,
        total_parameters=total,
        loss=_last(trainer.state.log_history, "loss") or outcome.training_loss,
        tokens_per_second=figures.tokens_per_second,
    )
    if arguments.process_index == 0:
        checkpoints.finish()
    if sigterm.asked and trainer.state.global_step < trainer.state.max_steps:
        raise Saved(
            f"saved at step {result.step} of {result.total_steps}; the next attempt goes on from there",
            training=result.model_dump(by_alias=True, exclude_none=True),
            resumedFromStep=resumed_from or None,
        )
    if eval_data is not None:
        result = result.model_copy(update=_eval_losses(trainer, peft_model))
    stop_using_onednn(peft_model)
    trainer.leave_autocast()
    return Trained(peft_model, result, list(trainer.state.log_history), resumed_from, seconds, packing)


def _total_steps(arguments: TrainingArguments, examples: int) -> int:
    """Optimizer steps of the whole run, counted as Trainer counts them."""
    if arguments.max_steps > 0:
        return int(arguments.max_steps)
    batches = math.ceil(examples / arguments.world_size / arguments.train_batch_size)
    return math.ceil(arguments.num_train_epochs * max(1, math.ceil(batches / arguments.gradient_accumulation_steps)))


def _make_absolute(arguments: TrainingArguments, total_steps: int) -> None:
    """Turns shares of the run into steps, which is what checkpoints keep: Trainer compares the two when it resumes."""
    for name in ("eval_steps", "logging_steps", "save_steps"):
        share = getattr(arguments, name)
        if share is not None and 0 < share < 1:
            setattr(arguments, name, math.ceil(total_steps * share))


def _eval_losses(trainer: PeftTrainer, model: PeftModel) -> dict[str, float]:
    """Eval loss of the adapter to be published, and of the bare base."""

    def loss() -> float:
        metrics = trainer.evaluation_loop(trainer.get_eval_dataloader(), "Evaluation").metrics
        assert metrics is not None
        return float(metrics["eval_loss"])

    ours = loss()
    with model.disable_adapter():
        bare = loss()
    progress.report(training_eval_loss=ours)
    return {"eval_loss": ours, "base_eval_loss": bare}


def _layout(stage: TrainStage, model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> tuple[Any, str, str]:
    """How micro-batches are laid out: the collator, in words why, and the sampling strategy that fits it."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    if stage.model.task == "SEQ_2_SEQ_LM":
        return (
            Seq2SeqCollator(pad),
            "padded, similar lengths together: encoder-decoder examples don't pack",
            "group_by_length",
        )
    if stage.data.packing == "never":
        return PaddedCollator(pad), "padded, in random order: packing is never", "random"
    exact, why = packing_is_exact(model, model.config.get_text_config().vocab_size)
    if exact:
        use_packed_attention(model)
        return PackedCollator(), "packed end to end without padding", "random"
    if stage.data.packing == "always":
        raise UserError(
            "PackingNotExact",
            f"packing would change what the model learns: {why}",
            where="spec.data.packing",
            mend="set packing: auto",
        )
    return (
        PaddedCollator(pad),
        f"padded, similar lengths together: packing is not exact here ({why})",
        "group_by_length",
    )


def _publish(
    stage: TrainStage,
    place: Place,
    attempt: publish.Attempt,
    arguments: TrainingArguments,
    model_base: base.Base,
    base_dir: Path,
    tokenizer: PreTrainedTokenizerBase,
    train_data: Dataset,
    eval_data: Dataset | None,
    prepared: dict[str, Any],
    dtype: torch.dtype,
    trained: Trained,
    work: Path,
    started: datetime,
) -> Result:
    """Save, upload, load again and compare, claim; then the report, the merged model and the checkpoints' rest."""
    model, result = trained.model, trained.result
    if _packs(model):
        model.set_attn_implementation("sdpa")
    compared = gate.examples_of(
        train_data if eval_data is None else eval_data,
        stage.model.task,
        getattr(model.config, "decoder_start_token_id", None),
    )
    known = gate.reference(model, compared)
    samples = [] if eval_data is None else _samples(model, tokenizer, eval_data, stage.model.task)
    folder = work / "adapter"
    _save(model, tokenizer, model_base, folder)
    peft_config, base_config = model.peft_config["default"], model.config
    serving = method.vllm_serving(
        peft_config,
        base_config,
        base=model_base.logical_id,
        revision=model_base.commit if model_base.on_hub else None,
        name=stage.name,
    )
    lineage = _lineage(stage, model_base, base.weights_digest(base_dir), result, trained.resumed_from)
    card.write(folder, stage, model_base, result, serving, lineage)
    trained_history, packing, seconds = trained.history, trained.packing, trained.seconds
    del model, trained
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

    adapter_key = place.key("adapter")
    where = place.store.uri(adapter_key)
    staged = publish.stage(
        place.store, adapter_key, folder, publish.Attempt(attempt.id, attempt.digest, attempt.created_at, lineage)
    )
    publish.fetch_staged(place.store, adapter_key, staged, work / "fetched")
    try:
        gate.check(
            work / "fetched",
            base_dir,
            known,
            task=stage.model.task,
            dtype=dtype,
            quantization=stage.model.quantization,
            trust_remote_code=stage.model.trust_remote_code,
            device=arguments.device,
            work=work,
            where=where,
        )
    except UserError:
        publish.discard(place.store, staged)
        raise
    report = ReportData(
        name=stage.name,
        created_at=attempt.created_at.strftime("%Y-%m-%dT%H:%M:%SZ"),
        task=stage.model.task,
        method=stage.method.name(),
        method_config=json.loads((folder / "adapter_config.json").read_text()),
        base=model_base.logical_id,
        base_commit=model_base.commit,
        base_bytes=sum(path.stat().st_size for path in base_dir.glob("*.safetensors")),
        adapter_uri=where,
        adapter_bytes=sum(file.size for file in staged.files),
        trainable_parameters=result.trainable_parameters,
        total_parameters=result.total_parameters,
        history=trained_history,
        base_eval_loss=result.base_eval_loss,
        eval_loss=result.eval_loss,
        seconds=seconds,
        prepared=prepared,
        samples=samples,
        attempts=_attempts(trained_history, started, lineage["resumedFromStep"], result.step),
        lineage=lineage,
        packing=packing,
        vllm=serving.reason,
        vllm_command=serving.command or None,
    )
    # The report lies under the attempt's own name until the attempt has won, so no other attempt's is overwritten.
    page = work / "report.html"
    page.write_text(render(report), encoding="utf-8")
    place.store.upload({published.report_of(place, attempt.id): page})
    if stage.output.merged:
        _publish_merged(stage, place, attempt, base_dir, work, lineage)
    won = publish.claim_and_finish(place.store, adapter_key, staged, overwrite=stage.output.overwrite)
    if not won.won:
        place.store.delete([published.report_of(place, attempt.id)])
    key = place.key("checkpoints", digest.of([stage.spec_digest, stage.prepared.digest]))
    Checkpoints(place.store, key, digest=attempt.digest, attempt=attempt.id, keep=0).remove_but(
        stage.output.keep_checkpoints
    )
    return published.result(stage, place, won.manifest, found_published=not won.won)


def _save(model: PeftModel, tokenizer: PreTrainedTokenizerBase, model_base: base.Base, folder: Path) -> None:
    """save_pretrained, with the base's logical id in place of this machine's path, and the tokenizer beside it."""
    model.save_pretrained(str(folder), safe_serialization=True)
    tokenizer.save_pretrained(str(folder))
    file = folder / "adapter_config.json"
    settings = json.loads(file.read_text())
    settings |= {
        "base_model_name_or_path": model_base.logical_id,
        "revision": model_base.commit if model_base.on_hub else None,
    }
    if settings.get("tokenizer_name_or_path"):
        settings["tokenizer_name_or_path"] = model_base.logical_id
    file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    (folder / "README.md").unlink(missing_ok=True)


def _publish_merged(
    stage: TrainStage, place: Place, attempt: publish.Attempt, base_dir: Path, work: Path, lineage: Mapping[str, Any]
) -> None:
    """The base with the adapter merged into it, in the base's unquantized type, under merged/."""
    dtype = base.dtype_of(stage.model.dtype)
    loaded_from = base.with_local_base(work / "fetched", base_dir, work / "merge")
    model = gate.AUTO_PEFT[stage.model.task].from_pretrained(
        str(loaded_from), dtype=dtype, trust_remote_code=stage.model.trust_remote_code
    )
    folder = work / "merged"
    model.merge_and_unload().save_pretrained(str(folder), safe_serialization=True)
    base.tokenizer(base_dir, trust_remote_code=stage.model.trust_remote_code).save_pretrained(str(folder))
    publish.publish_in_place(
        place.store,
        place.key("merged"),
        folder,
        publish.Attempt(attempt.id, attempt.digest, attempt.created_at, lineage),
        overwrite=stage.output.overwrite,
    )
    shutil.rmtree(folder)


def _lineage(
    stage: TrainStage, model_base: base.Base, weights: str, result: TrainingResult, resumed_from: int
) -> dict[str, Any]:
    return {
        "specDigest": stage.spec_digest,
        "preparedDigest": stage.prepared.digest,
        "baseModel": model_base.logical_id,
        "baseModelUri": model_base.uri,
        "baseModelCommit": model_base.commit,
        "baseModelWeights": weights,
        "task": stage.model.task,
        "method": stage.method.name(),
        "image": stage.image,
        "packages": {"kubepeft": __version__} | {name: version(name) for name in PACKAGES},
        "training": result.model_dump(by_alias=True, exclude_none=True),
        "resumedFromStep": resumed_from or None,
    }


def _samples(model: PeftModel, tokenizer: PreTrainedTokenizerBase, eval_data: Dataset, task: str) -> list[Sample]:
    """What the model answers to the first few evaluation prompts, without and with the adapter, greedily."""
    found = []
    for row in eval_data.select(range(min(SAMPLES, len(eval_data)))):
        ids = row["input_ids"]
        if task == "SEQ_2_SEQ_LM":
            prompt, expected = ids, row["labels"]
        else:
            start, end = row["loss_spans"][-2:]
            prompt, expected = ids[:start], ids[start:end]
        if not prompt:
            continue
        with model.disable_adapter():
            before = _answer(model, tokenizer, prompt, task)
        after = _answer(model, tokenizer, prompt, task)
        texts = [tokenizer.decode(part, skip_special_tokens=True) for part in (prompt, expected)]
        found.append(Sample(texts[0], texts[1], before, after))
    return found


def _answer(model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompt: list[int], task: str) -> str:
    inputs = torch.tensor([prompt], device=model.device)
    out = model.generate(
        input_ids=inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=SAMPLE_TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )[0]
    new = out if task == "SEQ_2_SEQ_LM" else out[len(prompt) :]
    return str(tokenizer.decode(new, skip_special_tokens=True))


def _attempts(
    history: list[dict[str, float]], started: datetime, resumed_from: int | None, step: int
) -> list[ReportAttempt]:
    return [ReportAttempt(started.strftime("%Y-%m-%dT%H:%M:%SZ"), resumed_from or 0, step)]


def _packs(model: PeftModel) -> bool:
    return str(getattr(model.config, "_attn_implementation", "")).startswith("kubepeft")


def _last(history: list[dict[str, float]], name: str) -> float | None:
    return next((entry[name] for entry in reversed(history) if name in entry), None)
