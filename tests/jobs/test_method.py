"""From a manifest's method to PEFT: what is translated, defaulted, refused and told, without and with weights."""

import dataclasses
import logging
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from pydantic import TypeAdapter
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from kubepeft.errors import UserError
from kubepeft_jobs import method, method_table
from tests.tiny import tiny_causal, tiny_seq2seq


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    into = tmp_path_factory.mktemp("models")
    made = {kind: tiny_causal(into / kind, kind) for kind in ("qwen2", "llama", "olmo2", "gpt2")}
    return made | {"t5": tiny_seq2seq(into / "t5")}


@pytest.fixture
def qwen2_outline(folders: dict[str, Path]) -> PreTrainedModel:
    return outline(folders["qwen2"])


def outline(folder: Path, task: str = "CAUSAL_LM") -> PreTrainedModel:
    return method.skeleton(AutoConfig.from_pretrained(folder), task)


def configured(asked: dict[str, Any] | None, model: PreTrainedModel, **more: Any) -> Any:
    return method.peft_config(asked, "CAUSAL_LM", model, **more)


def refusal(asked: dict[str, Any], model: PreTrainedModel, **more: Any) -> UserError:
    with pytest.raises(UserError) as raised:
        method.check_targets(configured(asked, model, **more), model)
    return raised.value


# ---- what is asked for


@pytest.mark.parametrize("asked", [None, {}, {"lora": {}}, {"lora": None, "peft": None}])
def test_no_method_is_lora_with_pefts_defaults_on_every_linear_layer_but_the_head(
    asked: dict[str, Any] | None, qwen2_outline: PreTrainedModel
) -> None:
    config = configured(asked, qwen2_outline)
    assert (config.peft_type, config.task_type, config.inference_mode) == ("LORA", "CAUSAL_LM", False)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 8, 0.0)
    wrapped = peft.get_peft_model(qwen2_outline, config, low_cpu_mem_usage=True)
    adapted = {name.rsplit(".", 1)[-1] for name in wrapped.base_model.targeted_module_names}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_camel_case_becomes_pefts_names(qwen2_outline: PreTrainedModel) -> None:
    asked = {
        "r": 4,
        "loraAlpha": 32,
        "targetModules": ["q_proj", "v_proj"],
        "useRslora": True,
        "initLoraWeights": "gaussian",
    }
    config = configured({"lora": asked}, qwen2_outline)
    assert (config.r, config.lora_alpha, config.use_rslora, config.init_lora_weights) == (4, 32, True, "gaussian")
    assert config.target_modules == {"q_proj", "v_proj"}


@pytest.mark.parametrize(
    ("asked", "field", "value"),
    [
        ({"targetModules": ["all-linear"]}, "target_modules", "all-linear"),
        (
            {"targetModulesRegex": r".*\.1\..*_proj", "targetModules": ["all-linear"]},
            "target_modules",
            r".*\.1\..*_proj",
        ),
        ({"initLoraWeights": "false"}, "init_lora_weights", False),
        ({"initLoraWeights": "true"}, "init_lora_weights", True),
        ({"runtimeConfig": {"ephemeral_gpu_offload": True}}, "runtime_config", peft.LoraRuntimeConfig(True)),
    ],
)
def test_the_forms_a_crd_can_type_become_pefts_own(
    asked: dict[str, Any], field: str, value: Any, qwen2_outline: PreTrainedModel
) -> None:
    assert getattr(configured({"lora": asked}, qwen2_outline), field) == value


@pytest.mark.parametrize(
    ("asked", "where", "suggested"),
    [
        ({"lora": {"loraAlhpa": 8}}, "spec.method.lora", "loraAlpha"),
        ({"lora": {"lora_alpha": 8}}, "spec.method.lora", "loraAlpha"),
        ({"promptTuning": {"numVirtualToken": 8}}, "spec.method.promptTuning", "numVirtualTokens"),
        (
            {"peft": {"type": "IA3", "config": {"targetModules": ["q_proj"]}}},
            "spec.method.peft.config",
            "target_modules",
        ),
        ({"peft": {"type": "IA-3"}}, "spec.method.peft.type", "IA3"),
        ({"peft": {"type": "prefix_tuning"}}, "spec.method.peft.type", "PREFIX_TUNING"),
        ({"Lora": {}}, "spec.method", "lora"),
    ],
)
def test_a_misspelt_name_is_refused_with_the_nearest_right_one(
    asked: dict[str, Any], where: str, suggested: str, qwen2_outline: PreTrainedModel
) -> None:
    error = refusal(asked, qwen2_outline)
    assert error.where == where
    assert error.mend.startswith("did you mean ")
    assert re.search(rf"\b{suggested}\b", error.mend)


def test_two_methods_at_once_are_refused(qwen2_outline: PreTrainedModel) -> None:
    assert "exclude each other" in refusal({"lora": {}, "promptTuning": {}}, qwen2_outline).what


@pytest.mark.parametrize(
    ("asked", "where", "words"),
    [
        ({"lora": {"r": "eight"}}, "spec.method.lora.r", "valid integer"),
        ({"lora": {"useDora": "yes"}}, "spec.method.lora.useDora", "valid boolean"),
        ({"lora": {"targetModulesRegex": "("}}, "spec.method.lora.targetModulesRegex", "not a regular expression"),
        ({"lora": {"r": 0}}, "spec.method.lora", "positive integer"),
        (
            {"lora": {"targetModules": ["q_proj"], "layersPattern": ["layers"]}},
            "spec.method.lora",
            "must also be specified",
        ),
        (
            {"peft": {"type": "SUPERTUNING", "config": {"sparsity": 2.0}}},
            "spec.method.peft.config",
            "sparsity must be in",
        ),
        ({"peft": {"type": "LOHA", "config": {"r": [8]}}}, "spec.method.peft.config.r", "valid integer"),
        (
            {"peft": {"type": "CPT", "config": {"cpt_token_ids": [9, 9]}}},
            "spec.method.peft.config",
            "needs cpt_tokens_type_mask",
        ),
        ({"peft": {"type": "ADALORA"}}, "spec.method.peft.config", "needs total_step"),
    ],
)
def test_a_value_that_cannot_be_is_refused_at_its_place(
    asked: dict[str, Any], where: str, words: str, qwen2_outline: PreTrainedModel
) -> None:
    error = refusal(asked, qwen2_outline)
    assert error.where == where
    assert words in error.what


def test_a_cpt_type_mask_that_would_learn_nothing_is_refused(qwen2_outline: PreTrainedModel) -> None:
    asked = {"peft": {"type": "CPT", "config": {"cpt_token_ids": [9, 9], "cpt_tokens_type_mask": [1, 1]}}}
    assert "multiple of 4" in refusal(asked, qwen2_outline).what


@pytest.mark.parametrize("init", ["eva", "corda", "loftq", "lora_ga", "pissa_niter_4"])
def test_an_init_that_needs_more_than_the_base_is_refused(init: str, qwen2_outline: PreTrainedModel) -> None:
    error = refusal({"lora": {"initLoraWeights": init}}, qwen2_outline)
    assert (error.reason, error.where) == ("MethodFieldRefused", "spec.method.lora.initLoraWeights")


# ---- PEFT's config classes as they are


def every_field() -> list[tuple[str, dataclasses.Field[Any]]]:
    return [
        (kind.value, field)
        for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()
        if kind.value not in method.METHODS_REFUSED
        for field in dataclasses.fields(config)
        if field.init
    ]


def test_every_field_that_may_name_a_path_a_hub_or_code_is_refused() -> None:
    suspicious = re.compile(
        r"path|file|dir|url|hub|repo|revision|cache|mapping|version|tokenizer|model|core|kwargs|remote"
    )
    harmless = {"shadow_model"}  # held to "mirror"
    harmless |= {
        "target_modules",
        "exclude_modules",
        "feedforward_modules",
        "modules_to_save",
        "num_transformer_submodules",
    }
    harmless |= {"module_dropout", "boft_n_butterfly_factor"}
    found = {field.name for _, field in every_field() if suspicious.search(field.name)}
    assert found - harmless <= set(method.FIELDS_REFUSED)


@pytest.mark.parametrize("field", sorted(method.FIELDS_REFUSED))
def test_a_refused_field_is_refused_wherever_peft_has_it(field: str, qwen2_outline: PreTrainedModel) -> None:
    values = {"bool": True, "dict": {"a": 1}}
    for peft_type, own in every_field():
        if own.name != field:
            continue
        hint = str(typing.get_type_hints(PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(peft_type)])[field])
        value = next((values[key] for key in values if key in hint), {} if "Config" in hint else "/etc/passwd")
        if value == {}:
            value = {"a": 1} if field == "loftq_config" else {}
        if field in ("task_type", "peft_type"):
            value = {"task_type": "CAUSAL_LM", "peft_type": "LORA"}[field]
        asked = {"peft": {"type": peft_type, "config": {field: value or {"beta": 0.1}}}}
        error = refusal(asked, qwen2_outline)
        assert (error.reason, error.where) == ("MethodFieldRefused", f"spec.method.peft.config.{field}"), peft_type


def test_every_annotation_of_peft_can_be_held() -> None:
    for peft_type, field in every_field():
        TypeAdapter(typing.get_type_hints(PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(peft_type)])[field.name])


def test_a_shadow_model_that_names_a_checkpoint_is_refused(qwen2_outline: PreTrainedModel) -> None:
    asked = {"peft": {"type": "SHADOW", "config": {"shadow_model": "somebody/model"}}}
    assert refusal(asked, qwen2_outline).where == "spec.method.peft.config.shadow_model"


# ---- what the model offers


@pytest.mark.parametrize(
    ("asked", "where", "suggested"),
    [
        ({"lora": {"targetModules": ["q_porj"]}}, "spec.method.lora.targetModules", "q_proj"),
        ({"lora": {"targetModules": ["q_proj", "v_prj"]}}, "spec.method.lora.targetModules", "v_proj"),
        ({"lora": {"excludeModules": ["lm_haed"]}}, "spec.method.lora.excludeModules", "lm_head"),
        ({"lora": {"modulesToSave": ["embed_token"]}}, "spec.method.lora.modulesToSave", "embed_tokens"),
        ({"lora": {"rankPattern": {"k_proj1": 4}}}, "spec.method.lora.rankPattern", "k_proj"),
        (
            {"peft": {"type": "LOHA", "config": {"target_modules": ["up_prj"]}}},
            "spec.method.peft.config.target_modules",
            "up_proj",
        ),
    ],
)
def test_a_module_that_is_not_there_is_refused_with_the_nearest_and_the_candidates(
    asked: dict[str, Any], where: str, suggested: str, qwen2_outline: PreTrainedModel
) -> None:
    error = refusal(asked, qwen2_outline)
    assert (error.reason, error.where) == ("NoSuchModule", where)
    assert re.search(rf"did you mean .*\b{suggested}\b.*\? Its linear layers are q_proj, k_proj", error.mend)


@pytest.mark.parametrize(
    ("asked", "reason", "words"),
    [
        ({"lora": {"targetModulesRegex": "decoder.*"}}, "NoSuchModule", "'decoder.*'"),
        (
            {"lora": {"targetModules": ["q_proj"], "layersToTransform": [0, 2]}},
            "NoSuchLayer",
            "no layer 2: the model has 2",
        ),
        ({"lora": {"trainableTokenIndices": [5, 320]}}, "NoSuchToken", "no token 320: the embedding has 320 rows"),
        (
            {"peft": {"type": "ADAPTION_PROMPT", "config": {"adapter_len": 4, "adapter_layers": 2}}},
            "MethodDoesNotFit",
            "Unsupported model type",
        ),
        ({"peft": {"type": "C3A"}}, "MethodDoesNotFit", "block size should be a factor"),
        (
            {"peft": {"type": "IA3", "config": {"target_modules": ["q_proj"], "feedforward_modules": ["down_proj"]}}},
            "BadMethodField",
            "subset of `target_modules`",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_refused_without_its_weights(
    asked: dict[str, Any], reason: str, words: str, qwen2_outline: PreTrainedModel
) -> None:
    error = refusal(asked, qwen2_outline)
    assert error.reason == reason
    assert words in error.what


def test_a_task_that_the_model_cannot_do_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="a t5 model can't do CAUSAL_LM"):
        outline(folders["t5"])


def test_a_model_of_seventy_billion_is_checked_without_its_memory() -> None:
    giant = LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8
    )
    model = method.skeleton(giant, "CAUSAL_LM")
    method.check_targets(configured({"lora": {"initLoraWeights": "pissa"}}, model), model)
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
@pytest.mark.parametrize(
    ("peft_type", "adapted"),
    [
        ("OFT", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("IA3", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("LN_TUNING", {"norm", "q_norm", "k_norm", "post_attention_layernorm", "post_feedforward_layernorm"}),
    ],
)
def test_an_architecture_that_peft_does_not_know_has_targets_all_the_same(
    peft_type: str, adapted: set[str], folders: dict[str, Path]
) -> None:
    model = outline(folders["olmo2"])
    config = configured({"peft": {"type": peft_type}}, model)
    wrapped = peft.get_peft_model(model, config, low_cpu_mem_usage=True)
    assert {name.rsplit(".", 1)[-1] for name in wrapped.base_model.targeted_module_names} == adapted
    if peft_type == "IA3":
        assert config.feedforward_modules == {"down_proj"}


def test_conv1d_needs_no_fan_in_fan_out_from_the_user_and_raises_no_warning(folders: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders["gpt2"])
    config = configured({"lora": {"fanInFanOut": False}}, model)
    assert config.fan_in_fan_out
    assert method.wrap(model, config).get_nb_trainable_parameters()[0] > 0


# ---- with weights


def test_wrapping_logs_what_is_trained_and_leaves_the_config_alone(
    folders: dict[str, Path], caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders["qwen2"], dtype=torch.bfloat16)
    config = configured({"lora": {"targetModules": ["q_proj"]}}, model)
    as_it_was = config.to_dict()
    with caplog.at_level(logging.INFO, logger="kubepeft.method"):
        wrapped = method.wrap(model, config)
    assert config.to_dict() == as_it_was
    trained = {name: value for name, value in wrapped.named_parameters() if value.requires_grad}
    assert all("lora_" in name and value.dtype == torch.float32 for name, value in trained.items())
    assert wrapped.base_model.model.lm_head.weight.dtype == torch.bfloat16
    record = caplog.records[-1]
    assert (record.trainable, record.all) == (2 * 2 * 8 * 32, sum(value.numel() for value in wrapped.parameters()))
    wrapped.print_trainable_parameters()
    assert record.getMessage() == capsys.readouterr().out.strip()


def test_a_method_that_finds_nothing_to_train_is_refused(folders: dict[str, Path]) -> None:
    asked = {"peft": {"type": "OSF"}}  # which passes over GPT-2's Conv1D without a word
    assert "finds nothing to train" in refusal(asked, outline(folders["gpt2"])).what
    model = AutoModelForCausalLM.from_pretrained(folders["gpt2"])
    with pytest.raises(UserError, match="finds nothing to train"):
        method.wrap(model, configured(asked, model))


def test_what_peft_cannot_apply_is_told_in_its_words_with_weights_too(folders: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders["gpt2"])
    with pytest.raises(UserError, match=r"PEFT can't apply LOHA to this gpt2 model: .*Conv1D"):
        method.wrap(model, configured({"peft": {"type": "LOHA"}}, model))


def test_virtual_tokens_can_begin_as_a_text(folders: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders["qwen2"])
    ids = AutoTokenizer.from_pretrained(folders["qwen2"])("Answer politely:").input_ids
    asked = {
        "promptTuning": {
            "numVirtualTokens": len(ids),
            "promptTuningInit": "TEXT",
            "promptTuningInitText": "Answer politely:",
        }
    }
    config = configured(asked, model, tokenizer_dir=folders["qwen2"])
    assert config.num_virtual_tokens == len(ids)
    learned = method.wrap(model, config).prompt_encoder["default"].embedding.weight
    torch.testing.assert_close(learned, model.get_input_embeddings()(torch.tensor(ids)))


@pytest.mark.parametrize("init", ["true", "false", "gaussian", "orthogonal", "mica", "olora", "pissa"])
def test_an_adapter_answers_the_same_after_loading_whatever_it_began_as(
    init: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    ids = torch.tensor([[5, 90, 91, 92]])
    model = AutoModelForCausalLM.from_pretrained(folders["qwen2"])
    wrapped = method.wrap(model, configured({"lora": {"initLoraWeights": init}}, model))
    with torch.no_grad():
        for name, value in wrapped.named_parameters():
            if "lora_" in name:
                value.add_(torch.randn_like(value), alpha=0.05)
        trained = wrapped(input_ids=ids).logits
    wrapped.save_pretrained(tmp_path)
    with torch.no_grad():
        again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path)(input_ids=ids).logits
    torch.testing.assert_close(again, trained, rtol=0, atol=1e-4)


def test_adalora_gives_up_ranks_in_a_trainer(folders: dict[str, Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders["qwen2"])
    config = configured({"peft": {"type": "ADALORA", "config": {"init_r": 6, "target_r": 2}}}, model, total_steps=8)
    assert config.total_step == 8
    wrapped = method.wrap(model, config)
    rows = Dataset.from_list([{"input_ids": [5, 6, 7 + row, 8], "labels": [5, 6, 7 + row, 8]} for row in range(8)])
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=8, per_device_train_batch_size=1, report_to="none", save_strategy="no", use_cpu=True,
        disable_tqdm=True, learning_rate=1e-2, dataloader_pin_memory=False,
    )  # fmt: skip
    Trainer(model=wrapped, args=arguments, train_dataset=rows, callbacks=method.callbacks(config)).train()
    kept = sum(sum(flags) for flags in wrapped.peft_config["default"].rank_pattern.values())
    assert kept == 2 * 4  # target_r on each of q and v in two layers


def test_methods_with_a_loss_of_their_own_are_named(qwen2_outline: PreTrainedModel) -> None:
    assert method.own_loss(configured(None, qwen2_outline)) is None
    assert method.own_loss(configured({"peft": {"type": "ADALORA"}}, qwen2_outline, total_steps=8)) is not None


# ---- merging and serving


@pytest.mark.parametrize(
    ("lora", "mergeable"),
    [
        ({}, True),
        ({"useDora": True}, True),
        ({"layerReplication": [[0, 2], [1, 2]]}, False),
        ({"aloraInvocationTokens": [4]}, False),
    ],
)
def test_what_cannot_be_merged_is_known_beforehand(
    lora: dict[str, Any], mergeable: bool, qwen2_outline: PreTrainedModel
) -> None:
    assert (method.why_not_mergeable(configured({"lora": lora}, qwen2_outline)) is None) == mergeable


@pytest.mark.parametrize(("rank", "flag"), [(1, 8), (8, 8), (9, 16), (64, 64), (257, 320), (512, 512)])
def test_vllm_is_given_the_smallest_rank_it_takes(rank: int, flag: int, qwen2_outline: PreTrainedModel) -> None:
    serving = method.vllm_serving(
        configured({"lora": {"r": rank}}, qwen2_outline),
        qwen2_outline.config,
        base="Qwen/Qwen2-0.5B",
        revision="abc",
        name="bot",
        path="/adapters/bot",
    )
    assert serving.servable
    assert serving.command == (
        f"vllm serve Qwen/Qwen2-0.5B --revision abc --enable-lora --max-lora-rank {flag} --lora-modules bot=/adapters/bot"
    )


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"lora": {"r": 513}}, "rank is 513"),
        ({"lora": {"useDora": True}}, "DoRA"),
        ({"lora": {"modulesToSave": ["lm_head"]}}, "modulesToSave"),
        ({"lora": {"bias": "all"}}, "biases"),
        ({"lora": {"rankPattern": {"q_proj": 4}}}, "rankPattern"),
        ({"lora": {"initLoraWeights": "pissa"}}, "changes the base's weights"),
        ({"lora": {"targetModules": ["lm_head", "q_proj"]}}, "the head"),
        ({"lora": {"trainableTokenIndices": [5]}}, "rows of the embedding"),
        ({"peft": {"type": "IA3"}}, "LoRA adapters only"),
        ({"promptTuning": {}}, "LoRA adapters only"),
    ],
)
def test_vllm_does_not_serve(asked: dict[str, Any], words: str, qwen2_outline: PreTrainedModel) -> None:
    serving = method.vllm_serving(configured(asked, qwen2_outline), qwen2_outline.config, base="b")
    assert not serving.servable
    assert words in serving.reason
    assert serving.command == ""


def test_vllm_serves_lora_on_some_architectures_only(folders: dict[str, Path]) -> None:
    model = outline(folders["gpt2"])
    assert "no LoRA for gpt2" in method.vllm_serving(configured(None, model), model.config, base="gpt2").reason
    encoder_decoder = outline(folders["t5"], "SEQ_2_SEQ_LM")
    config = method.peft_config(None, "SEQ_2_SEQ_LM", encoder_decoder)
    assert "encoder-decoder" in method.vllm_serving(config, encoder_decoder.config, base="t5").reason


# ---- the page


def test_the_page_of_methods_is_what_the_code_says() -> None:
    page = Path(__file__).parents[2] / "docs/peft-methods.md"
    assert page.read_text() == method_table.page(), "python -m kubepeft_jobs.method_table > docs/peft-methods.md"
