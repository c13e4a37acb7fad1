"""What prepare found and did, as data for report.json, the report page and the status. No judgement, no I/O."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .worker import ChunkResult, Sample

# fmt: off
HISTOGRAM_EDGES = (
    0, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576,
    32768, 49152, 65536, 98304, 131072, 262144, 524288, 1048576,
)
# fmt: on
EXACT_LENGTHS = 1 << 17
LISTED_BAD_ROWS = 100


@dataclass(frozen=True, slots=True)
class BadRow:
    where: str
    reason: str


@dataclass(frozen=True, slots=True)
class SplitReport:
    """Counts of one split. read = kept + bad + droppedTooLong + droppedNoLoss, summed over the splits that share a source."""

    rows: int
    tokens: int
    loss_tokens: int
    files: list[str]


@dataclass(frozen=True, slots=True)
class LengthReport:
    """Tokens of the readable rows before anything was cut or dropped. `counts[i]` rows have edges[i] <= length < edges[i+1].

    Percentiles are exact up to 131072 tokens and that number beyond.
    """

    edges: list[int]
    counts: list[int]
    mean: float
    p50: int
    p90: int
    p99: int
    longest: int


@dataclass(frozen=True, slots=True)
class Report:
    """The outcome of `pipeline.prepare`; `as_dict` is plain JSON."""

    format: str
    format_why: str
    columns: dict[str, str]
    """ours → theirs"""
    task: str
    loss: str
    max_length: int
    rows_read: int
    rows_kept: int
    rows_bad: int
    rows_dropped_too_long: int
    rows_dropped_no_loss: int
    """Rows whose first max_length tokens are all prompt."""
    rows_truncated: int
    train: SplitReport
    eval: SplitReport | None
    lengths: LengthReport
    bad_rows: list[BadRow]
    """The first LISTED_BAD_ROWS that were tolerated."""
    samples: list[Sample]
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Tally:
    """Sums up chunk results in a fixed amount of memory."""

    def __init__(self) -> None:
        self.read = self.bad = 0
        self.counts: dict[str, int] = {}
        self.bad_rows: list[BadRow] = []
        self.samples: list[Sample] = []
        self.tokens = {"train": 0, "eval": 0}
        self.loss_tokens = {"train": 0, "eval": 0}
        self._lengths = np.zeros(EXACT_LENGTHS + 1, np.int64)
        self._histogram = np.zeros(len(HISTOGRAM_EDGES), np.int64)
        self._sum = self._longest = 0

    def add(self, result: ChunkResult) -> None:
        self.read += result.read
        self.bad += result.bad
        for name, count in result.counts.items():
            self.counts[name] = self.counts.get(name, 0) + count
        for where, reason in result.first_bad[: LISTED_BAD_ROWS - len(self.bad_rows)]:
            self.bad_rows.append(BadRow(where, reason))
        self.samples += result.samples
        if len(result.lengths):
            self._lengths += np.bincount(np.minimum(result.lengths, EXACT_LENGTHS), minlength=EXACT_LENGTHS + 1)
            buckets = np.searchsorted(HISTOGRAM_EDGES, result.lengths, side="right") - 1
            self._histogram += np.bincount(buckets, minlength=len(HISTOGRAM_EDGES))
            self._sum += int(result.lengths.sum())
            self._longest = max(self._longest, int(result.lengths.max()))

    def add_split(self, split: str, id_counts: NDArray[np.int32], loss_tokens: NDArray[np.int32]) -> None:
        self.tokens[split] += int(id_counts.sum())
        self.loss_tokens[split] += int(loss_tokens.sum())

    def lengths(self) -> LengthReport:
        total = int(self._lengths.sum())
        cumulative = np.cumsum(self._lengths)
        p50, p90, p99 = (int(np.searchsorted(cumulative, share * total)) if total else 0 for share in (0.5, 0.9, 0.99))
        last = int(np.flatnonzero(self._histogram)[-1]) + 1 if total else 0
        edges = [*HISTOGRAM_EDGES, 1 << 31][: last + 1]
        mean = self._sum / total if total else 0.0
        return LengthReport(edges, self._histogram[:last].tolist(), mean, p50, p90, p99, self._longest)
