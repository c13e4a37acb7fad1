"""The PEFT methods a manifest can ask for. Field names and defaults are PEFT's own, in camelCase.

Reference of every field: https://huggingface.co/docs/peft/package_reference/lora and .../prompt_tuning.
Whether PEFT can apply them to the model is found out by the prepare stage, which has PEFT at hand.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from kubepeft.types.base import FreeForm, Rule, ShortText, Type

ModuleNames = Annotated[list[ShortText], Field(max_length=256)]
Pattern = Annotated[str, Field(min_length=1, max_length=1024)]

LORA_FIELDS_LEFT_OUT = {
    "task_type": "follows from model.task",
    "peft_type": "follows from the method",
    "auto_mapping": "PEFT fills it in",
    "peft_version": "PEFT fills it in",
    "base_model_name_or_path": "follows from model.uri",
    "revision": "follows from model.uri",
    "inference_mode": "false in training and true in inference",
    "megatron_config": "Megatron is not in the image",
    "megatron_core": "Megatron is not in the image",
    "loftq_config": "LoftQ changes the base's own weights, which are not published with the adapter",
    "eva_config": "EVA needs a pass over the data before training, which kubepeft does not make",
    "corda_config": "CorDA needs a pass over the data before training, which kubepeft does not make",
    "lora_ga_config": "LoRA-GA needs a pass over the data before training, which kubepeft does not make",
    "arrow_config": "Arrow routes between adapters that were trained before, and a FineTune names none",
    "kasa_config": "KaSA needs its own terms in the loss, which PEFT leaves to the training loop",
    "monteclora_config": "MonteCLoRA needs its own terms in the loss, which PEFT leaves to the training loop",
}
"""LoraConfig's fields that a manifest can't say, and why."""


class Lora(Type):
    """Low-rank adaptation (Hu et al. 2021, https://arxiv.org/abs/2106.09685): `peft.LoraConfig`."""

    r: int = Field(8, ge=1, le=4096, description="rank of the two matrices")
    lora_alpha: int = Field(8, ge=1, le=65536, description="the update is scaled by loraAlpha / r")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input, in training only")
    target_modules: Annotated[list[ShortText], Field(min_length=1, max_length=256)] = Field(
        ["all-linear"],
        description="names (or ends of names) of the modules to adapt; the single word all-linear means every linear layer but the head",
    )
    target_modules_regex: Pattern | None = Field(
        None, description="a regular expression over whole module names, in place of targetModules (PEFT's string form)"
    )
    exclude_modules: ModuleNames | None = Field(None, description="names (or ends of names) not to adapt")
    fan_in_fan_out: bool = Field(False, description="weights are stored as (in, out), as in GPT-2's Conv1D")
    bias: Literal["none", "all", "lora_only"] = Field("none", description="which biases are trained")
    use_rslora: bool = Field(False, description="scale by loraAlpha / sqrt(r) (https://arxiv.org/abs/2312.03732)")
    modules_to_save: ModuleNames | None = Field(None, description="modules trained in full and saved with the adapter")
    init_lora_weights: Annotated[
        str, Field(pattern=r"^(true|false|gaussian|olora|pissa|orthogonal|mica)$", max_length=32)
    ] = Field(
        "true", description='how the adapter begins, as a word: "true" is PEFT\'s default (no change at the start)'
    )
    layers_to_transform: Annotated[list[int], Field(max_length=1024)] | None = Field(
        None, description="indexes of the layers to adapt"
    )
    layers_pattern: ModuleNames | None = Field(None, description="name of the layer list, where PEFT can't guess it")
    rank_pattern: Annotated[dict[str, int], Field(max_length=256)] = Field({}, description="module name or regex → r")
    alpha_pattern: Annotated[dict[str, int], Field(max_length=256)] = Field(
        {}, description="module name or regex → loraAlpha"
    )
    trainable_token_indices: Annotated[list[int], Field(max_length=65536)] | None = Field(
        None, description="rows of the embedding that are trained too"
    )
    use_dora: bool = Field(False, description="weight-decomposed LoRA (https://arxiv.org/abs/2402.09353)")
    velora_config: FreeForm | None = Field(None, description="peft.VeloraConfig, in PEFT's own field names")
    alora_invocation_tokens: Annotated[list[int], Field(max_length=1024)] | None = Field(
        None, description="activated LoRA: the adapter acts from these token ids on"
    )
    use_qalora: bool = Field(False, description="quantization-aware LoRA (https://arxiv.org/abs/2309.14717)")
    qalora_group_size: int = Field(16, ge=1, description="group size of useQalora")
    layer_replication: (
        Annotated[list[Annotated[list[int], Field(min_length=2, max_length=2)]], Field(max_length=256)] | None
    ) = Field(None, description="[start, end) ranges of layers to stack anew")
    runtime_config: FreeForm | None = Field(None, description="peft.LoraRuntimeConfig, in PEFT's own field names")
    lora_bias: bool = Field(False, description="a bias on the second matrix")
    target_parameters: ModuleNames | None = Field(
        None, description="names of bare parameters to adapt (mixture-of-experts weights)"
    )
    use_bdlora: FreeForm | None = Field(None, description="peft.BdLoraConfig, in PEFT's own field names")
    ensure_weight_tying: bool = Field(False, description="keep tied weights tied when they are adapted or saved")


class PromptTuning(Type):
    """Trained virtual tokens before the input (Lester et al. 2021, https://arxiv.org/abs/2104.08691): `peft.PromptTuningConfig`."""

    num_virtual_tokens: int = Field(20, ge=1, le=4096, description="how many virtual tokens")
    prompt_tuning_init: Literal["RANDOM", "SAMPLE_VOCAB", "TEXT"] = Field(
        "RANDOM", description="how the virtual tokens begin"
    )
    prompt_tuning_init_text: Annotated[str, Field(min_length=1, max_length=8192)] | None = Field(
        None, description="the text they begin as, with promptTuningInit: TEXT"
    )
    rules: ClassVar = (
        Rule(
            message="promptTuningInit: TEXT and promptTuningInitText go together: give both or neither",
            cel="(self.promptTuningInit == 'TEXT') == has(self.promptTuningInitText)",
            check=lambda self: (self.prompt_tuning_init == "TEXT") == (self.prompt_tuning_init_text is not None),
        ),
    )


class AnyPeft(Type):
    """Any other method PEFT registers, with PEFT's own field names, checked against PEFT's own config class."""

    type: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Z][A-Z0-9_]*$")] = Field(
        description="PEFT's name of the method, such as IA3, ADALORA, LOHA, PREFIX_TUNING"
    )
    config: FreeForm = Field({}, description="fields of that method's PEFT config, in PEFT's own (snake_case) names")


class Method(Type):
    """How the model is adapted: at most one of these; LoRA on all linear layers where none is given."""

    lora: Lora | None = None
    prompt_tuning: PromptTuning | None = None
    peft: AnyPeft | None = None
    rules: ClassVar = (
        Rule(
            message="give at most one of lora, promptTuning and peft",
            cel="[has(self.lora), has(self.promptTuning), has(self.peft)].filter(given, given).size() <= 1",
            check=lambda self: [self.lora, self.prompt_tuning, self.peft].count(None) >= 2,
        ),
    )

    def name(self) -> str:
        """PEFT's name of the method, as people see it in columns: LORA, PROMPT_TUNING, IA3 …"""
        if self.prompt_tuning:
            return "PROMPT_TUNING"
        return self.peft.type if self.peft else "LORA"
