"""From prepared examples to the tensors of one micro-batch.

Three collators: examples laid end to end (packed), examples padded to the longest one, and pairs of sequences for
encoder-decoder models. Nothing here touches a model or a device. A micro-batch is always the examples it was given,
so packed and padded training take the same optimizer steps.

Every collator leaves, beside the model's own inputs:

- `shift_labels`: (rows, positions) int64, aligned with the logits: what position t must predict, or -100;
- `logits_to_keep`: (kept,) int64, the positions where any row carries loss (not for encoder-decoder models);
- `num_tokens`: int, the tokens that are not padding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

IGNORE_INDEX = -100
"""The label of a position without loss, as in torch.nn.functional.cross_entropy."""

Example = Mapping[str, Any]
Batch = dict[str, Any]


def target_labels(example: Example) -> np.ndarray:
    """The labels of one example, (length,) int64: its token where `loss_spans` says so, else -100.

    The first token is never a target, because nothing precedes it. That also keeps a packed row apart: no
    example's last token predicts the next example's first.
    """
    tokens = np.asarray(example["input_ids"], dtype=np.int64)
    labels = np.full_like(tokens, IGNORE_INDEX)
    for start, end in np.asarray(example["loss_spans"], dtype=np.int64).reshape(-1, 2):
        labels[start:end] = tokens[start:end]
    labels[:1] = IGNORE_INDEX
    return labels


def shifted(labels: torch.Tensor) -> torch.Tensor:
    """Labels moved one position to the left, so that position t holds the token that t predicts."""
    return torch.nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:]


def positions_with_loss(shift_labels: torch.Tensor) -> torch.Tensor:
    """The positions at which any row of (rows, positions) has a target, ascending."""
    return (shift_labels != IGNORE_INDEX).any(dim=0).nonzero().flatten()


@dataclass(frozen=True)
class PackedCollator:
    """Lays a micro-batch's examples end to end in one row, without padding.

    `position_ids` start again with each example; `cu_seq_lens_q` and `cu_seq_lens_k` (int32, one more than there are
    examples) and `max_length_q`, `max_length_k` say where each ends, under the names of transformers'
    FlashAttentionKwargs. Only for a model whose attention keeps to them: see `attention.packing_is_exact`.
    """

    def __call__(self, examples: Sequence[Example]) -> Batch:
        tokens = [np.asarray(example["input_ids"], dtype=np.int64) for example in examples]
        lengths = [len(row) for row in tokens]
        boundaries = torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32))
        labels = torch.from_numpy(np.concatenate([target_labels(example) for example in examples]))[None]
        shift_labels = shifted(labels)
        return {
            "input_ids": torch.from_numpy(np.concatenate(tokens))[None],
            "position_ids": torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]))[None],
            "cu_seq_lens_q": boundaries,
            "cu_seq_lens_k": boundaries,
            "max_length_q": max(lengths),
            "max_length_k": max(lengths),
            "labels": labels,
            "shift_labels": shift_labels,
            "logits_to_keep": positions_with_loss(shift_labels),
            "num_tokens": sum(lengths),
        }


def _pad(rows: Sequence[np.ndarray], value: int) -> torch.Tensor:
    """Rows of int64 padded on the right to the longest: (rows, longest)."""
    padded = np.full((len(rows), max(len(row) for row in rows)), value, dtype=np.int64)
    for padded_row, row in zip(padded, rows, strict=True):
        padded_row[: len(row)] = row
    return torch.from_numpy(padded)


def _attention_mask(lengths: Sequence[int]) -> torch.Tensor:
    return (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long()


@dataclass(frozen=True)
class PaddedCollator:
    """Pads a micro-batch's examples on the right to its longest one."""

    pad_token_id: int

    def __call__(self, examples: Sequence[Example]) -> Batch:
        tokens = [np.asarray(example["input_ids"], dtype=np.int64) for example in examples]
        lengths = [len(row) for row in tokens]
        labels = _pad([target_labels(example) for example in examples], IGNORE_INDEX)
        shift_labels = shifted(labels)
        return {
            "input_ids": _pad(tokens, self.pad_token_id),
            "attention_mask": _attention_mask(lengths),
            "labels": labels,
            "shift_labels": shift_labels,
            "logits_to_keep": positions_with_loss(shift_labels),
            "num_tokens": sum(lengths),
        }


@dataclass(frozen=True)
class Seq2SeqCollator:
    """Pads inputs and labels on the right; the model makes its decoder's inputs from the labels.

    `num_tokens` counts the tokens of both sides.
    """

    pad_token_id: int

    def __call__(self, examples: Sequence[Example]) -> Batch:
        tokens = [np.asarray(example["input_ids"], dtype=np.int64) for example in examples]
        targets = [np.asarray(example["labels"], dtype=np.int64) for example in examples]
        lengths = [len(row) for row in tokens]
        labels = _pad(targets, IGNORE_INDEX)
        return {
            "input_ids": _pad(tokens, self.pad_token_id),
            "attention_mask": _attention_mask(lengths),
            "labels": labels,
            "shift_labels": labels,
            "num_tokens": sum(lengths) + sum(len(row) for row in targets),
        }
