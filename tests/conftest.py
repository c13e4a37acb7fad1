"""What several folders of tests share: tiny models, made once a session."""

from pathlib import Path

import pytest

from tests.tiny import tiny_causal, tiny_seq2seq

pytest_plugins = ["tests.cluster.fixtures"]


@pytest.fixture(scope="session")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random Qwen2 with tokenizer and chat template."""
    return tiny_causal(tmp_path_factory.mktemp("models") / "qwen2")


@pytest.fixture(scope="session")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random T5 with tokenizer."""
    return tiny_seq2seq(tmp_path_factory.mktemp("models") / "t5")
