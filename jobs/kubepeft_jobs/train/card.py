"""The model card beside an adapter: README.md with the hub's metadata, what it was made from, how to load and serve it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from kubepeft.stage import TrainingResult, TrainStage
from kubepeft_jobs.base import Base
from kubepeft_jobs.method import Serving

AUTO_CLASS = {"CAUSAL_LM": "AutoPeftModelForCausalLM", "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM"}


def write(
    folder: Path, stage: TrainStage, model_base: Base, result: TrainingResult, vllm: Serving, lineage: Mapping[str, Any]
) -> None:
    """Write README.md into an adapter folder."""
    (folder / "README.md").write_text(text(stage, model_base, result, vllm, lineage), encoding="utf-8")


def text(stage: TrainStage, model_base: Base, result: TrainingResult, vllm: Serving, lineage: Mapping[str, Any]) -> str:
    """The model card, Markdown."""
    pipeline = "text-generation" if stage.model.task == "CAUSAL_LM" else "text2text-generation"
    header: dict[str, Any] = {
        "library_name": "peft",
        "tags": ["kubepeft", stage.method.name().lower()],
        "pipeline_tag": pipeline,
    }
    if model_base.on_hub:
        header = {"base_model": model_base.logical_id, **header}
    losses = ""
    if result.eval_loss is not None:
        losses = f"| eval loss of the base | {result.base_eval_loss:.4f} |\n| eval loss with the adapter | {result.eval_loss:.4f} |\n"
    serve = f"Yes.\n\n```sh\n{vllm.command}\n```" if vllm.command else f"No: {vllm.reason}."
    packages = "\n".join(f"| {name} | {found} |" for name, found in lineage["packages"].items())
    return f"""---
{yaml.safe_dump(header, sort_keys=False).strip()}
---

# {stage.name}

A {stage.method.name()} adapter for `{model_base.logical_id}` (commit `{model_base.commit}`), made by kubepeft.

| | |
| --- | --- |
| task | {stage.model.task} |
| trainable parameters | {result.trainable_parameters:,} of {result.total_parameters:,} |
| optimizer steps | {result.step:,} |
{losses}
## Load it

```python
from peft import {AUTO_CLASS[stage.model.task]}
from transformers import AutoTokenizer

model = {AUTO_CLASS[stage.model.task]}.from_pretrained("PATH/TO/THIS/FOLDER")
tokenizer = AutoTokenizer.from_pretrained("PATH/TO/THIS/FOLDER")
inputs = tokenizer("…", return_tensors="pt")
print(tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=100), skip_special_tokens=True)[0])
```

## Serve it with vLLM

{serve}

## Lineage

| | |
| --- | --- |
| spec | `{lineage["specDigest"]}` |
| prepared data | `{lineage["preparedDigest"]}` |
| image | {lineage["image"] or "none"} |
{packages}
"""
