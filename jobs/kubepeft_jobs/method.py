"""From a manifest's `method` to a PEFT config, and from that to a model with the adapter on it.

    model = skeleton(AutoConfig.from_pretrained(folder), "CAUSAL_LM")          # no weights: what prepare has
    config = peft_config({"lora": {"r": 16}}, "CAUSAL_LM", model)
    check_targets(config, model)
    peft_model = wrap(base.load(folder, …), config)                             # what train does

Every method that PEFT registers is taken as PEFT defines it. What is refused, and why, is in the tables below; docs/peft-methods.md shows
which of the rest work, and a test goes through all of them. Nothing here reads data or touches the network.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import itertools
import json
import logging
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import torch
import transformers
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
from pydantic import TypeAdapter, ValidationError
from pydantic.alias_generators import to_camel
from transformers.pytorch_utils import Conv1D

from kubepeft.errors import UserError

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PretrainedConfig, PreTrainedModel, TrainerCallback

log = logging.getLogger("kubepeft.method")

ALL_LINEAR = "all-linear"
DEFAULT_VIRTUAL_TOKENS = 20

METHODS_REFUSED = {
    "XLORA": "it mixes LoRA adapters that were trained before, and a FineTune names none",
    "POLY": "it needs the number of the task beside every row, and the data have no such column",
    "MULTITASK_PROMPT_TUNING": "it needs the number of the task beside every row, and the data have no such column; take promptTuning",
}
"""Methods that need more than a model and a data set, and what that is."""

TASKS_REFUSED = {
    ("SHADOW", "SEQ_2_SEQ_LM"): "its second network must see an input and an output of the same length",
}
"""(method, task) that PEFT lets one configure and that then fails at the first row."""

FIELDS_REFUSED = {
    "task_type": "it follows from model.task",
    "peft_type": "it follows from the method",
    "auto_mapping": "PEFT fills it in",
    "peft_version": "PEFT fills it in",
    "base_model_name_or_path": "it follows from model.uri",
    "revision": "it follows from model.uri",
    "inference_mode": "it is false in training and true in inference",
    "tokenizer_name_or_path": "the tokenizer is the base model's",
    "tokenizer_kwargs": "the tokenizer is the base model's",
    "prompt_tuning_init_state_dict_path": "it names a file of the machine that trains",
    "megatron_config": "Megatron is not in the image",
    "megatron_core": "Megatron is not in the image",
    "loftq_config": "LoftQ changes the base's own weights, which are not published with the adapter",
    "eva_config": "EVA needs a pass over the data before training, which kubepeft does not make",
    "corda_config": "CorDA needs a pass over the data before training, which kubepeft does not make",
    "lora_ga_config": "LoRA-GA needs a pass over the data before training, which kubepeft does not make",
    "arrow_config": "Arrow routes between LoRA adapters that were trained before, and a FineTune names none",
    "kasa_config": "KaSA needs its own terms in the loss, which PEFT leaves to the training loop",
    "monteclora_config": "MonteCLoRA needs its own terms in the loss, which PEFT leaves to the training loop",
}
"""Fields that name a path, say what another part of the manifest says, or need what kubepeft does not have."""

INITS_REFUSED = {
    "loftq": FIELDS_REFUSED["loftq_config"],
    "eva": FIELDS_REFUSED["eva_config"],
    "corda": FIELDS_REFUSED["corda_config"],
    "lora_ga": FIELDS_REFUSED["lora_ga_config"],
    "pissa_niter": "its decomposition is random, and loading the adapter would make another one; take pissa",
}
"""Values of LoRA's init_lora_weights (or their beginnings) whose adapter does not follow from the base model and the published files."""

FIELDS_NEEDED = {
    "ADAPTION_PROMPT": ("adapter_len", "adapter_layers"),
    "TRAINABLE_TOKENS": ("token_indices",),
    "CPT": ("cpt_token_ids", "cpt_tokens_type_mask"),
}
"""Fields whose default in PEFT is None although the method can't do without them."""

ON_QUANTIZED_BASES = frozenset(
    [
        "ADALORA",
        "ADAPTION_PROMPT",
        "BOFT",
        "CARTRIDGE",
        "CPT",
        "HIRA",
        "IA3",
        "LN_TUNING",
        "LORA",
        "MISS",
        "OFT",
        "PREFIX_TUNING",
        "PROMPT_TUNING",
        "PVERA",
        "P_TUNING",
        "RANDLORA",
        "ROAD",
        "TRAINABLE_TOKENS",
        "VERA",
    ]
)
"""Methods that PEFT gives layers for int8 and nf4, or that leave linear layers alone. Some others compute with the packed
codes as if they were weights, without an error."""

NOT_MERGEABLE = {
    "ADAPTION_PROMPT": "its prompts enter the attention and are no change of a weight",
    "BEFT": "it can be merged only where every adapted layer has a bias",
    "LILY": "its layers share matrices through a router that depends on the input",
    "SHADOW": "it is a second network beside the base",
}
"""Methods whose adapter can't become part of the weights, beside the ones that learn prompts."""

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank accepts (vllm/config/lora.py; its default is 16)."""

VLLM_LORA_MODEL_TYPES = frozenset(
    [
        "apertus", "arcee", "cohere", "cohere2", "cwm", "deepseek_v2", "deepseek_v3", "ernie4_5", "ernie4_5_moe", "exaone4", "falcon_h1",
        "gemma", "gemma2", "gemma3_text", "glm", "glm4", "glm4_moe", "gpt_bigcode", "gpt_oss", "granite", "granitemoe", "granitemoehybrid",
        "granitemoeshared", "hunyuan_v1_dense", "hunyuan_v1_moe", "jamba", "lfm2", "lfm2_moe", "llama", "mistral", "mixtral", "nemotron",
        "nemotron_h", "olmo", "olmo2", "olmo3", "opt", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "seed_oss",
        "smollm3", "starcoder2", "vaultgemma",
    ]
)  # fmt: skip
"""Decoders with LoRA in vLLM's table of supported models (docs/models/supported_models.md), by transformers' model_type."""


def peft_config(
    method: Mapping[str, Any] | None,
    task: str,
    model: PreTrainedModel,
    *,
    tokenizer_dir: Path | None = None,
    total_steps: int | None = None,
) -> PeftConfig:
    """PEFT's config of what `spec.method` asks for; LoRA on all linear layers where it is None or empty.

    method: the manifest's part as plain data, `{"lora": {…camelCase}}`, `{"promptTuning": {…camelCase}}` or
    `{"peft": {"type": "IA3", "config": {…PEFT's own names}}}`. model: the base or its `skeleton`; only its shapes are read.
    tokenizer_dir: the base's folder, needed for promptTuningInit: TEXT. total_steps: optimizer steps of the whole training, which AdaLoRA
    plans its ranks over. What the manifest leaves out is PEFT's default, and the targets are PEFT's for the architecture where it has any,
    else every linear layer (LoRA: always every linear layer, but the head).

    Raises:
        UserError: unknown method or field (with the nearest right one), a value of the wrong type or refused by PEFT.
    """
    peft_type, fields, names = _asked_for(method)
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(peft_type)]
    for field, value in fields.items():
        _check_type(config_class, field, value, names[field])
    fields = _without_refused(fields, names)
    known = {field.name for field in dataclasses.fields(config_class)}
    if (peft_type, task) in TASKS_REFUSED:
        raise UserError(
            "MethodRefused",
            f"{peft_type} can't be used for {task}: {TASKS_REFUSED[peft_type, task]}",
            where="spec.method.peft.type",
            mend="take another method (lora fits nearly all)",
        )
    missing = [field for field in FIELDS_NEEDED.get(peft_type, ()) if fields.get(field) is None]
    if missing:
        raise UserError(
            "MissingMethodField",
            f"{peft_type} needs {' and '.join(missing)}",
            where="spec.method.peft.config",
            mend="give it",
        )
    if peft_type == "ADALORA" and fields.get("total_step") is None:
        if total_steps is None:
            raise UserError(
                "MissingMethodField",
                "ADALORA needs total_step",
                where="spec.method.peft.config",
                mend="give the number of optimizer steps",
            )
        fields["total_step"] = total_steps
    if peft_type == "CPT" and max(fields["cpt_tokens_type_mask"], default=1) % 4:
        # PeftModelForCausalLM._cpt_forward adds the largest type to the rows' own (4) and takes multiples of 4 for labels.
        raise UserError(
            "BadMethodField",
            "the largest type must be a multiple of 4 (an answer), or nothing of a row is learned",
            where=names["cpt_tokens_type_mask"],
            mend="number each example's tokens 1 to 4: input marker, input, answer marker, answer",
        )
    if "num_virtual_tokens" in known and peft_type != "CPT":
        fields.setdefault("num_virtual_tokens", DEFAULT_VIRTUAL_TOKENS)
    if "tokenizer_name_or_path" in known and (
        peft_type == "CPT" or str(fields.get("prompt_tuning_init")).endswith("TEXT")
    ):
        if tokenizer_dir is None and peft_type != "CPT":
            raise ValueError("promptTuningInit: TEXT needs tokenizer_dir")
        fields["tokenizer_name_or_path"] = None if tokenizer_dir is None else str(tokenizer_dir)
    if "fan_in_fan_out" in known and _has_conv1d(model):
        fields["fan_in_fan_out"] = True
    if "target_modules" in known and fields.get("target_modules") is None and not fields.get("target_parameters"):
        fields |= _default_targets(peft_type, model)
    if isinstance(fields.get("runtime_config"), dict):
        fields["runtime_config"] = peft.LoraRuntimeConfig(**fields["runtime_config"])
    try:
        return config_class(task_type=task, inference_mode=False, **fields)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(
            "BadMethodField",
            f"PEFT refuses it: {_words(error)}",
            where=_where(method),
            mend="see PEFT's documentation of that method",
        ) from error


def skeleton(model_config: PretrainedConfig, task: str, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The base model without weights (on PyTorch's meta device): every module with its shapes, at next to no memory, in about a second.

    Raises:
        UserError: the architecture can't do the task.
    """
    auto = {"CAUSAL_LM": transformers.AutoModelForCausalLM, "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM}[task]
    try:
        with torch.device("meta"):
            model: PreTrainedModel = auto.from_config(model_config, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise UserError(
            "WrongTask",
            f"a {model_config.model_type} model can't do {task}",
            where="spec.model.task",
            mend="set model.task to what the model is made for: CAUSAL_LM or SEQ_2_SEQ_LM",
        ) from error
    return model


def check_targets(config: PeftConfig, model: PreTrainedModel, *, quantization: str = "none") -> None:
    """Refuse what can't be applied: a name, pattern, layer or token that the model has not, a layer that the method can't adapt.

    quantization: the manifest's model.quantization. model: a `skeleton`. It is changed by this; take a new one for another call. PEFT itself is content when one name of several matches;
    here each must, because the one that doesn't is a slip of the pen.

    Raises:
        UserError: with the nearest names, and the model's linear layers.
    """
    _check_quantized(config, quantization != "none")
    _check_names(config, model)
    try:
        wrapped = peft.get_peft_model(model, _without_weights(config, model), low_cpu_mem_usage=True)
    except _WHAT_PEFT_RAISES as error:
        raise _cannot_apply(error, config, model) from error
    _trainable_parameters(wrapped, config)


def wrap(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """The model with the adapter on it: the base's weights frozen, the adapter's trainable and in float32.

    The model is changed in place, the config is left as it is.

    Raises:
        UserError: PEFT can't apply the config to this model.
    """
    _check_quantized(config, getattr(model, "is_quantized", False))
    _check_names(config, model)
    try:
        wrapped = peft.get_peft_model(model, copy.deepcopy(config), autocast_adapter_dtype=True)
    except _WHAT_PEFT_RAISES as error:
        raise _cannot_apply(error, config, model) from error
    trainable, total = _trainable_parameters(wrapped, config)
    percent = 100 * trainable / total
    # The words of PeftModel.print_trainable_parameters, which prints.
    log.info(
        "trainable params: %s || all params: %s || trainable%%: %.4f",
        f"{trainable:,}",
        f"{total:,}",
        percent,
        extra={
            "trainable": trainable,
            "all": total,
            "percent": round(percent, 4),
            "method": str(config.peft_type.value),
        },
    )
    return wrapped


def _trainable_parameters(model: PeftModel, config: PeftConfig) -> tuple[int, int]:
    """How many parameters are trained, and how many there are."""
    trainable, total = model.get_nb_trainable_parameters()
    if trainable == 0:
        kind = model.base_model.config.model_type
        raise UserError(
            "MethodDoesNotFit",
            f"{config.peft_type.value} finds nothing to train in this {kind} model",
            where=_place(config),
            mend="name the modules it should adapt, or take another method (lora fits nearly all)",
        )
    return trainable, total


class _AllocateRanks(transformers.TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Lets the method move its budget between layers: after the optimizer's step, while the gradients are still there."""

    def on_optimizer_step(
        self,
        args: Any,
        state: transformers.TrainerState,
        control: Any,
        model: torch.nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        tuned: Any = getattr(model, "module", model)
        tuned.base_model.update_and_allocate(state.global_step)


def callbacks(config: PeftConfig) -> list[TrainerCallback]:
    """What the Trainer must call for the method to be itself: AdaLoRA, and AdaMSS with use_asa, allocate ranks after each step."""
    if config.peft_type == "ADALORA" or getattr(config, "use_asa", False):
        return [_AllocateRanks()]
    return []


def own_loss(config: PeftConfig) -> str | None:
    """Why the loss must be the PEFT model's own and not a cross entropy computed from its logits, or None where both are the same."""
    return {
        "ADALORA": "it adds an orthogonal regularization",
        "CPT": "it weighs the tokens",
        "SHADOW": "it adds the shadow network's own loss",
    }.get(config.peft_type.value)


def why_not_mergeable(config: PeftConfig) -> str | None:
    """Why the adapter can't become part of the base's weights, or None where `merge_and_unload` does it."""
    if config.is_prompt_learning:
        return "virtual tokens are no change of a weight"
    if getattr(config, "alora_invocation_tokens", None):
        return "an activated LoRA acts from its invocation tokens on only"
    if getattr(config, "layer_replication", None):
        return "replicated layers share their weights"
    if getattr(config, "lora_bias", False):
        return "its bias has no place in layers that have none"
    return NOT_MERGEABLE.get(config.peft_type.value)


@dataclass(frozen=True)
class Serving:
    """Whether vLLM can serve an adapter: `reason` says why not, or what it takes; `command` is a shell line, empty where it can't."""

    servable: bool
    reason: str
    command: str = ""


def vllm_serving(
    config: PeftConfig,
    model_config: PretrainedConfig,
    *,
    base: str,
    revision: str | None = None,
    name: str = "adapter",
    path: str = "./adapter",
) -> Serving:
    """Whether and how vLLM serves this adapter on this base.

    base, revision: the base's id and commit. name: what requests call the adapter. path: its folder.
    The rules are those of vllm/lora/peft_helper.py and vllm/config/lora.py; where releases differ, the stricter one.
    """
    obstacles = _vllm_obstacles(config, model_config)
    if obstacles:
        return Serving(False, "; ".join(obstacles))
    rank = next(rank for rank in VLLM_RANKS if rank >= config.r)
    command = ["vllm", "serve", base, *(["--revision", revision] if revision else []), "--enable-lora"]
    command += ["--max-lora-rank", str(rank), "--lora-modules", f"{name}={path}"]
    return Serving(
        True, f"a plain LoRA of rank {config.r}: needs --enable-lora and --max-lora-rank {rank}", " ".join(command)
    )


def _vllm_obstacles(config: PeftConfig, model_config: PretrainedConfig) -> list[str]:
    if config.peft_type != "LORA":
        return [f"vLLM serves LoRA adapters only, not {config.peft_type.value}"]
    found = []
    if config.task_type != "CAUSAL_LM":
        found.append("vLLM serves no encoder-decoder models with adapters")
    elif model_config.model_type not in VLLM_LORA_MODEL_TYPES:
        found.append(f"vLLM's table of supported models has no LoRA for {model_config.model_type}")
    if config.r > VLLM_RANKS[-1]:
        found.append(f"its rank is {config.r}, and vLLM's --max-lora-rank ends at {VLLM_RANKS[-1]}")
    if config.bias != "none" or config.lora_bias:
        found.append("it trains biases")
    if config.rank_pattern or config.alpha_pattern:
        found.append(
            "rankPattern and alphaPattern are read by the newest vLLM only; others scale the adapter wrongly without a word"
        )
    if isinstance(config.init_lora_weights, str) and config.init_lora_weights.startswith(("pissa", "olora")):
        found.append(f"its start ({config.init_lora_weights}) changes the base's weights")
    targets = {config.target_modules} if isinstance(config.target_modules, str) else config.target_modules or set()
    if any(target.rsplit(".", 1)[-1] in ("lm_head", "embed_tokens") for target in targets):
        found.append("it adapts the embedding or the head, which vLLM takes in some architectures only")
    features = {
        "use_dora": "it uses DoRA",
        "modules_to_save": "it trains whole modules (modulesToSave)",
        "trainable_token_indices": "it trains rows of the embedding",
        "layer_replication": "it replicates layers",
        "alora_invocation_tokens": "it is an activated LoRA",
        "use_qalora": "it uses QALoRA",
        "use_bdlora": "it is block-diagonal",
        "target_parameters": "it adapts bare parameters",
    }
    return found + [words for field, words in features.items() if getattr(config, field)]


def linear_names(model: torch.nn.Module) -> list[str]:
    """The last parts of the names of the model's linear layers, in their order: q_proj, k_proj, …"""
    names = (
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D))
    )
    return list(dict.fromkeys(names))


# ---- what the manifest asks for


def _asked_for(method: Mapping[str, Any] | None) -> tuple[str, dict[str, Any], dict[str, str]]:
    """PEFT's type, the fields given under PEFT's names, and for each the place in the manifest."""
    given = {key: value for key, value in (method or {}).items() if value is not None}
    if unknown := [key for key in given if key not in ("lora", "promptTuning", "peft")]:
        raise _unknown(unknown[0], ["lora", "promptTuning", "peft"], "spec.method", "UnknownMethod")
    if len(given) > 1:
        raise UserError(
            "BadMethod", f"{' and '.join(given)} exclude each other", where="spec.method", mend="keep one of them"
        )
    key: str = next(iter(given), "lora")
    settings: Mapping[str, Any] = given.get(key, {})
    where = _where(method)
    if key == "peft":
        peft_type = str(settings.get("type", ""))
        types = [kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING]
        if peft_type not in types:
            raise _unknown(peft_type, types, "spec.method.peft.type", "UnknownMethod")
        if peft_type in METHODS_REFUSED:
            raise UserError(
                "MethodRefused",
                f"{peft_type} can't be used: {METHODS_REFUSED[peft_type]}",
                where="spec.method.peft.type",
                mend="take another method (lora fits nearly all)",
            )
        fields = dict(settings.get("config") or {})
        own = {name: name for name in _own_fields(peft_type)}
    else:
        peft_type = {"lora": "LORA", "promptTuning": "PROMPT_TUNING"}[key]
        fields = dict(settings)
        own = {to_camel(name): name for name in _own_fields(peft_type)}
    if key == "lora":
        _translate_lora(fields, where)
    for field in fields:
        if field not in own:
            raise _unknown(
                field, [name for name in own if own[name] not in FIELDS_REFUSED], where, "UnknownMethodField"
            )
    return (
        peft_type,
        {own[field]: value for field, value in fields.items()},
        {own[field]: f"{where}.{field}" for field in own},
    )


def _translate_lora(fields: dict[str, Any], where: str) -> None:
    """From the manifest's forms, which a CRD can type, to PEFT's: a regular expression, the word all-linear, true and false."""
    regex = fields.pop("targetModulesRegex", None)
    if regex is not None:
        try:
            re.compile(regex)
        except re.error as error:
            raise UserError(
                "BadMethodField", f"not a regular expression: {error}", where=f"{where}.targetModulesRegex"
            ) from error
        fields["targetModules"] = regex
    elif fields.get("targetModules") == [ALL_LINEAR]:
        fields["targetModules"] = ALL_LINEAR
    if fields.get("initLoraWeights") in ("true", "false"):
        fields["initLoraWeights"] = fields["initLoraWeights"] == "true"


def _where(method: Mapping[str, Any] | None) -> str:
    key = next((key for key, value in (method or {}).items() if value is not None), "lora")
    return "spec.method.peft.config" if key == "peft" else f"spec.method.{key}"


def _own_fields(peft_type: str) -> list[str]:
    return [
        field.name for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(peft_type)]) if field.init
    ]


def _check_type(config_class: type[PeftConfig], field: str, value: Any, where: str) -> None:
    """Hold a value against PEFT's annotation: PEFT's dataclasses hold none, and would fail somewhere within."""
    if value is None or field == "init_lora_weights":  # its Literal holds "pissa_niter_[number of iters]"
        return
    try:
        TypeAdapter(typing.get_type_hints(config_class)[field]).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        words = dict.fromkeys(problem["msg"] for problem in error.errors())
        raise UserError(
            "BadMethodField",
            f"{json.dumps(value)[:80]} does not fit: {'; or '.join(words)}",
            where=where,
            mend="see PEFT's documentation of that field",
        ) from error


def _without_refused(fields: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The fields that say something, once none of them is refused."""
    given = {field: value for field, value in fields.items() if value is not None}
    for field, value in given.items():
        if field in FIELDS_REFUSED and value not in ({}, ""):
            raise UserError(
                "MethodFieldRefused",
                f"it can't be set: {FIELDS_REFUSED[field]}",
                where=names[field],
                mend="leave it out",
            )
        if field == "init_lora_weights":
            for init, reason in INITS_REFUSED.items():
                if str(value).startswith(init):
                    raise UserError(
                        "MethodFieldRefused",
                        f"{value} can't be used: {reason}",
                        where=names[field],
                        mend="take true, gaussian, orthogonal, mica, olora or pissa",
                    )
        if field == "shadow_model" and value != "mirror":
            raise UserError(
                "MethodFieldRefused", "it may not name a model", where=names[field], mend="leave it out, or say mirror"
            )
    return {field: value for field, value in given.items() if field not in FIELDS_REFUSED}


def _unknown(given: str, known: Iterable[str], where: str, reason: str) -> UserError:
    known = list(known)
    folded = {name.lower().replace("_", ""): name for name in known}
    near = [folded[name] for name in difflib.get_close_matches(given.lower().replace("_", ""), folded, n=3, cutoff=0.5)]
    kind = "method" if reason == "UnknownMethod" else "field"
    mend = f"did you mean {_either(near)}?" if near else f"there are {', '.join(sorted(known))}"
    return UserError(reason, f"there is no {kind} {given!r}", where=where, mend=mend)


# ---- what the model offers


def _has_conv1d(model: torch.nn.Module) -> bool:
    return any(isinstance(module, Conv1D) for module in model.modules())


def _default_targets(peft_type: str, model: PreTrainedModel) -> dict[str, Any]:
    """Targets where the manifest gives none; empty where PEFT has its own for this architecture or needs none."""
    if peft_type == "LORA":
        return {"target_modules": ALL_LINEAR}
    known = getattr(PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType(peft_type)], "target_module_mapping", None)
    if peft_type == "IA3":
        known = TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    if not known or model.config.model_type in known:
        return {}
    if peft_type == "LN_TUNING":
        norms = {
            name.rsplit(".", 1)[-1] for name, module in model.named_modules() if type(module).__name__.endswith("Norm")
        }
        return {"target_modules": sorted(norms)}
    if peft_type == "IA3":
        # (IA)³ scales the input of the layers that end a feed-forward block and the output of all others.
        hidden = model.get_input_embeddings().embedding_dim
        ends = {
            name.rsplit(".", 1)[-1]
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and module.out_features == hidden < module.in_features
        }
        output = model.get_output_embeddings()
        head = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if module is output}
        return {"target_modules": sorted(set(linear_names(model)) - head), "feedforward_modules": sorted(ends)}
    return {"target_modules": ALL_LINEAR}


def _check_quantized(config: PeftConfig, quantized: bool) -> None:
    if quantized and config.peft_type.value not in ON_QUANTIZED_BASES:
        raise UserError(
            "MethodDoesNotFit",
            f"{config.peft_type.value} can't adapt a quantized base",
            where="spec.model.quantization",
            mend=f"set it to none, or take one of {', '.join(sorted(ON_QUANTIZED_BASES))}",
        )


def _check_names(config: PeftConfig, model: PreTrainedModel) -> None:
    """Each name in the config must be there in the model."""
    place = _place(config)
    modules = [name for name, _ in model.named_modules() if name]
    for field in ("target_modules", "exclude_modules", "feedforward_modules", "modules_to_save"):
        wanted = getattr(config, field, None)
        if not wanted or config.peft_type == "ADAPTION_PROMPT":
            continue
        if isinstance(wanted, str):
            if wanted.lower() == ALL_LINEAR or any(re.fullmatch(wanted, name) for name in modules):
                continue
            wanted = [wanted]
        for name in sorted(wanted):
            if not any(module == name or module.endswith(f".{name}") for module in modules):
                raise _no_such_module(name, f"{place}.{_shown(field, place)}", model)
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, field, None) or ():
            if not any(
                re.match(rf"(.*\.)?({pattern})$", module) for module in modules
            ):  # peft.utils.get_pattern_key's rule
                raise _no_such_module(pattern, f"{place}.{_shown(field, place)}", model)
    layers = getattr(config, "layers_to_transform", None)
    if layers is not None and layers != []:
        _check_layers(
            [layers] if isinstance(layers, int) else layers, model, f"{place}.{_shown('layers_to_transform', place)}"
        )
    rows = model.get_input_embeddings().num_embeddings
    for field in ("trainable_token_indices", "token_indices", "cpt_token_ids"):
        tokens = getattr(config, field, None) or []
        for token in tokens if isinstance(tokens, list) else itertools.chain.from_iterable(tokens.values()):
            if not 0 <= token < rows:
                raise UserError(
                    "NoSuchToken",
                    f"there is no token {token}: the embedding has {rows} rows",
                    where=f"{place}.{_shown(field, place)}",
                    mend=f"take token ids from 0 to {rows - 1}",
                )


def _check_layers(layers: list[int], model: PreTrainedModel, where: str) -> None:
    count = max((len(module) for module in model.modules() if isinstance(module, torch.nn.ModuleList)), default=0)
    for layer in layers:
        if not 0 <= layer < count:
            raise UserError(
                "NoSuchLayer",
                f"there is no layer {layer}: the model has {count}",
                where=where,
                mend=f"take layers from 0 to {count - 1}",
            )


def _no_such_module(name: str, where: str, model: PreTrainedModel) -> UserError:
    everything = list(
        dict.fromkeys(full.rsplit(".", 1)[-1] for full, _ in model.named_modules() if full and not full[-1].isdigit())
    )
    linear = linear_names(model)
    near = difflib.get_close_matches(name.rsplit(".", 1)[-1], everything, n=2, cutoff=0.6)
    mend = (f"did you mean {_either(near)}? " if near else "") + f"Its linear layers are {', '.join(linear[:20])}"
    if len(linear) > 20:
        mend += f" and {len(linear) - 20} more"
    return UserError(
        "NoSuchModule", f"no module of this {model.config.model_type} model is named {name!r}", where=where, mend=mend
    )


def _place(config: PeftConfig) -> str:
    """The part of the manifest that a config comes from."""
    return {"LORA": "spec.method.lora", "PROMPT_TUNING": "spec.method.promptTuning"}.get(
        config.peft_type.value, "spec.method.peft.config"
    )


def _shown(field: str, place: str) -> str:
    """The field as that part of the manifest writes it."""
    return field if place.endswith(".config") else to_camel(field)


# ---- PEFT's own refusals

_WHAT_PEFT_RAISES = (
    ValueError,
    TypeError,
    NotImplementedError,
    AttributeError,
    ImportError,
    AssertionError,
    RuntimeError,
    KeyError,
)


_READS_WEIGHTS = ("ADAMSS", "FROD", "SHIRA")
"""Methods whose layers can't be made on the meta device."""


def _without_weights(config: PeftConfig, model: PreTrainedModel) -> PeftConfig:
    """A config with the same targets that can be applied where there are no weights to decompose."""
    config = copy.deepcopy(config)
    if config.peft_type == "LORA":
        config.init_lora_weights = False
        return config
    if config.peft_type.value in _READS_WEIGHTS:
        same = {
            field: getattr(config, field)
            for field in ("layers_to_transform", "layers_pattern")
            if hasattr(config, field)
        }
        targets = config.target_modules
        if targets is None:
            targets = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type].target_module_mapping[model.config.model_type]
        return peft.LoraConfig(
            task_type=config.task_type, target_modules=targets, modules_to_save=config.modules_to_save, **same
        )
    return config


def _cannot_apply(error: Exception, config: PeftConfig, model: PreTrainedModel) -> UserError:
    return UserError(
        "MethodDoesNotFit",
        f"PEFT can't apply {config.peft_type.value} to this {model.config.model_type} model: {_words(error)}",
        where=_place(config),
        mend="change the method's fields, or take another method (lora fits nearly all)",
    )


def _words(error: Exception) -> str:
    """What PEFT says, on one line and not for ever."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= 400 else words[:400] + " …"


def _either(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
