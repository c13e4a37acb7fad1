"""The estimates against what is known: published sizes, and the terms of which the sums are made."""

import pytest

from kubepeft_jobs.prepare.estimate import ModelShape, training_flops, training_memory, training_seconds

LLAMA_7B = ModelShape(
    parameters=6_738_415_616, embedding_parameters=2 * 32000 * 4096, layers=32, hidden_size=4096, vocab_size=32000
)
LORA = 20_000_000


def test_the_weights_of_a_7b_model_have_their_published_sizes() -> None:
    def gigabytes(**how: str) -> float:
        return training_memory(LLAMA_7B, LORA, 1, **{"dtype": "bfloat16", **how}).weights / 1e9  # type: ignore[arg-type]

    assert gigabytes() == pytest.approx(13.5, abs=0.1)
    assert gigabytes(dtype="float32") == pytest.approx(27.0, abs=0.1)
    assert gigabytes(quantization="int8") == pytest.approx(7.0, abs=0.1)
    assert gigabytes(quantization="nf4") == pytest.approx(3.9, abs=0.1)  # QLoRA's 7B checkpoints


def test_a_7b_qlora_run_fits_a_24_gb_card_as_published_and_a_lora_run_without_checkpointing_does_not() -> None:
    qlora = training_memory(LLAMA_7B, LORA, 512, dtype="bfloat16", quantization="nf4", gradient_checkpointing=True)
    assert qlora.total.high < 24e9
    assert training_memory(LLAMA_7B, LORA, 8192, dtype="bfloat16").total.low > 24e9


def test_memory_grows_with_the_batch_and_less_so_with_checkpointing_and_without_logits() -> None:
    def total(tokens: int, **how: object) -> float:
        return training_memory(LLAMA_7B, LORA, tokens, dtype="bfloat16", **how).total.high  # type: ignore[arg-type]

    assert (
        total(2048)
        > total(1024)
        > total(1024, loss_share=0.3)
        > total(1024, loss_share=0.3, gradient_checkpointing=True)
    )


def test_a_frozen_base_costs_four_operations_a_weight_and_token_and_full_training_six() -> None:
    short = training_flops(LLAMA_7B, 0, 1, 0.0) / 6.6e9
    assert short == pytest.approx(4, rel=0.02)
    everything = training_flops(LLAMA_7B, 6_607_000_000, 1, 0.0) / 6.6e9
    assert everything - short == pytest.approx(6, rel=0.02)
    assert training_flops(LLAMA_7B, 0, 1, 4096.0) > training_flops(LLAMA_7B, 0, 1, 0.0)


def test_time_is_a_range_around_the_devices_peak() -> None:
    seconds = training_seconds(1e15, 1e14)
    assert 10 < seconds.low < seconds.high < 100
