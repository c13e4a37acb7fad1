"""Tiny random models and a tiny tokenizer for tests: real architectures, made here in well under a second.

    model_dir = tiny_causal(tmp_path / "qwen2")                   # a folder as from the hub: config, safetensors, tokenizer
    model_dir = tiny_causal(tmp_path / "llama", kind="llama", chat_template=False)
    model_dir = tiny_seq2seq(tmp_path / "t5")
    tokenizer = tiny_tokenizer()

Every maker is deterministic: the same arguments give the same weights and the same token ids. The folders are never
written again after they are made, so make them once a session (`tmp_path_factory`). Nothing here reads the network.
"""

from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    T5Config,
)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML without `{% generation %}` marks, as most hub models have it."""

SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
"""`<|endoftext|>` because Qwen2's tokenizer class would add it, one id beyond the embedding's rows."""
PAD, BOS, EOS = 0, 1, 2
_CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "user system assistant question answer hello world please thank you",
    "What is the capital of France? The capital of France is Paris.",
    '{"name": "value", "numbers": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]}',
]


@cache
def _byte_level_bpe(bos: bool) -> str:
    """A BPE tokenizer over bytes as JSON: it can encode any text and decodes it back unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        _CORPUS,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=SPECIAL_TOKENS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
        )
    return tokenizer.to_str()


def tiny_tokenizer(
    *, chat_template: bool = True, adds_bos: bool = False, adds_eos: bool = False
) -> PreTrainedTokenizerFast:
    """320 tokens, every byte among them; `<pad>`=0, `<s>`=1, `</s>`=2.

    `adds_bos` puts `<s>` in front of each text as Llama's does; `adds_eos` puts `</s>` behind it as T5's does.
    """
    backend = Tokenizer.from_str(_byte_level_bpe(bos=adds_bos))
    if adds_eos:
        backend.post_processor = processors.TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", EOS)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=SPECIAL_TOKENS[3:],
        model_max_length=512,
    )
    if chat_template:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


_SPECIAL_IDS = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}


def _llama_like(config_class: type[PreTrainedConfig], hidden: int, layers: int, vocab: int) -> PreTrainedConfig:
    return config_class(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        **_SPECIAL_IDS,
    )


def _gpt2(hidden: int, layers: int, vocab: int) -> PreTrainedConfig:
    return GPT2Config(vocab_size=vocab, n_embd=hidden, n_layer=layers, n_head=4, n_positions=512, **_SPECIAL_IDS)


def _t5(hidden: int, layers: int, vocab: int) -> PreTrainedConfig:
    return T5Config(
        vocab_size=vocab,
        d_model=hidden,
        d_kv=hidden // 4,
        d_ff=2 * hidden,
        num_layers=layers,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=PAD,
        **_SPECIAL_IDS,
    )


def _bart(hidden: int, layers: int, vocab: int) -> PreTrainedConfig:
    return BartConfig(
        vocab_size=vocab,
        d_model=hidden,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=2 * hidden,
        decoder_ffn_dim=2 * hidden,
        max_position_embeddings=512,
        dropout=0.0,
        decoder_start_token_id=EOS,
        forced_eos_token_id=None,
        **_SPECIAL_IDS,
    )


_CAUSAL = {
    "qwen2": lambda *size: _llama_like(Qwen2Config, *size),
    "llama": lambda *size: _llama_like(LlamaConfig, *size),
    "mistral": lambda *size: _llama_like(MistralConfig, *size),
    "olmo2": lambda *size: _llama_like(Olmo2Config, *size),  # an architecture that PEFT has no default targets for
    "gpt2": _gpt2,
}
_SEQ2SEQ = {"t5": _t5, "bart": _bart}


def tiny_causal(
    dir: Path,
    kind: str = "qwen2",
    *,
    chat_template: bool = True,
    hidden_size: int = 32,
    layers: int = 2,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Path:
    """Writes a decoder of about 40,000 random weights with its tokenizer to `dir` and returns `dir`.

    `kind`: qwen2, llama, mistral, olmo2 or gpt2. 4 attention heads, 2 key-value heads, 512 positions.
    """
    tokenizer = tiny_tokenizer(chat_template=chat_template, adds_bos=kind in ("llama", "mistral"))
    return _write(dir, AutoModelForCausalLM, _CAUSAL[kind](hidden_size, layers, len(tokenizer)), tokenizer, dtype, seed)


def tiny_seq2seq(
    dir: Path,
    kind: str = "t5",
    *,
    chat_template: bool = False,
    hidden_size: int = 32,
    layers: int = 2,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Path:
    """Writes an encoder-decoder with its tokenizer to `dir` and returns `dir`. `kind`: t5 or bart."""
    tokenizer = tiny_tokenizer(chat_template=chat_template, adds_eos=True)
    return _write(
        dir, AutoModelForSeq2SeqLM, _SEQ2SEQ[kind](hidden_size, layers, len(tokenizer)), tokenizer, dtype, seed
    )


def _write(
    dir: Path,
    auto_class: type[AutoModelForCausalLM] | type[AutoModelForSeq2SeqLM],
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerFast,
    dtype: torch.dtype,
    seed: int,
) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Their own 0.02 leaves logits so flat that greedy decoding would hang on rounding.
        config.initializer_range = config.init_std = 0.2
        model = auto_class.from_config(config, dtype=dtype)
    model.save_pretrained(dir)
    tokenizer.save_pretrained(dir)
    return dir
