"""Writes tokenized rows as Arrow IPC stream files that `datasets.Dataset.from_file` maps into memory.

The bytes follow from the rows alone: batches are cut at fixed row counts and token counts, whatever the number of workers.
Nothing here knows where the rows come from.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

FILE_BYTES = 256 << 20
"""A file is closed after the batch with which it reaches this size."""
BATCH_TOKENS = 1 << 20
BATCH_ROWS = 8192

_IDS = pa.list_(pa.int32())
SCHEMAS = {
    "CAUSAL_LM": pa.schema([("input_ids", _IDS), ("loss_spans", _IDS), ("length", pa.int32())]),
    "SEQ_2_SEQ_LM": pa.schema([("input_ids", _IDS), ("labels", _IDS), ("length", pa.int32())]),
}
"""`loss_spans` is flat: [start, end, start, end, …], positions of `input_ids` that are targets. `length` is that of `input_ids`."""


class SplitWriter:
    """Writes `<split>-00000.arrow` … into a folder; none where no row comes, and none stays when the `with` block fails."""

    def __init__(self, folder: Path, split: str, task: str) -> None:
        self._folder, self._split, self._schema = folder, split, SCHEMAS[task]
        self._held: list[tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]] = []
        self._held_rows = self._held_tokens = 0
        self._file: pa.OSFile | None = None
        self._stream: pa.ipc.RecordBatchStreamWriter | None = None
        self.files: list[Path] = []
        self.rows = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._held_rows:
            self._write_batch()
        self._close_file()
        if kind is not None:
            for path in self.files:
                path.unlink()

    def add(
        self,
        ids: NDArray[np.int32],
        id_counts: NDArray[np.int32],
        target: NDArray[np.int32],
        target_counts: NDArray[np.int32],
    ) -> None:
        """Rows one after another: `id_counts[i]` of `ids` and `target_counts[i]` of `target` belong to row i."""
        if not len(id_counts):
            return
        self._held.append((ids, id_counts, target, target_counts))
        self._held_rows += len(id_counts)
        self._held_tokens += len(ids)
        self.rows += len(id_counts)
        if self._held_tokens >= BATCH_TOKENS or self._held_rows >= BATCH_ROWS:
            self._write_batch()

    def _write_batch(self) -> None:
        ids, id_counts, target, target_counts = (np.concatenate(parts) for parts in zip(*self._held, strict=True))
        self._held, self._held_rows, self._held_tokens = [], 0, 0
        columns = [_lists(ids, id_counts), _lists(target, target_counts), pa.array(id_counts)]
        if self._stream is None:
            path = self._folder / f"{self._split}-{len(self.files):05d}.arrow"
            self.files.append(path)
            self._file = pa.OSFile(str(path), "wb")
            self._stream = pa.ipc.new_stream(self._file, self._schema)
        self._stream.write_batch(pa.record_batch(columns, schema=self._schema))
        assert self._file is not None
        if self._file.tell() >= FILE_BYTES:
            self._close_file()

    def _close_file(self) -> None:
        if self._stream is not None and self._file is not None:
            self._stream.close()
            self._file.close()
            self._stream = self._file = None


def _lists(values: NDArray[np.int32], counts: NDArray[np.int32]) -> pa.ListArray:
    offsets = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values), type=_IDS)
