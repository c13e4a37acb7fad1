"""Reads data files as a stream of chunks: JSON lines, a JSON array, CSV, TSV and Parquet; the text ones also as .gz and .zst.

The reading process only cuts a file into chunks; the rows of a chunk are parsed where `chunk.rows()` is called, in a worker.
A row that cannot be read is a value (`RowError`), not an exception, so that the caller decides how many it bears;
what makes the rest of the file unreadable is a UserError. Memory is bounded by MAX_ROW_BYTES, never by the file.
Nothing here knows what the columns mean, and nothing here opens a network connection.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import itertools
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Protocol

import orjson

from kubepeft.errors import UserError

CHUNK_BYTES = 1 << 20
"""What one worker gets at a time: a few hundred to a few thousand rows, about a quarter of a second of work."""
MAX_ROW_BYTES = 64 << 20
PARQUET_ROWS = 1000

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
COMPRESSED = (".gz", ".zst")


class Source(Protocol):
    """A data file somewhere. `name` is what messages call it; `open` gives a new binary stream from the start each time.

    For Parquet the stream must be seekable. `size` is in bytes, None where unknown.
    """

    @property
    def name(self) -> str: ...
    @property
    def size(self) -> int | None: ...
    def open(self) -> BinaryIO: ...


class RowError(Exception):
    """One row cannot be used; the text is the reason, without the place."""


Row = dict[str, Any]
NumberedRow = tuple[int, Row | RowError]


@dataclass(frozen=True, slots=True)
class LinesChunk:
    """Whole lines of a JSON lines file; `first` is the 1-based number of the first one."""

    source: int
    name: str
    first: int
    payload: bytes

    def where(self, number: int) -> str:
        return f"{self.name}:{number}"

    def rows(self) -> Iterator[NumberedRow]:
        for number, line in enumerate(self.payload.split(b"\n"), self.first):
            if not line or line.isspace():
                continue
            yield number, _parse_object(line, "line")


@dataclass(frozen=True, slots=True)
class ItemsChunk:
    """Items of one JSON array, each as its own text; `first` counts items from 1, `lines` says where each begins."""

    source: int
    name: str
    first: int
    items: list[bytes]
    lines: list[int]

    def where(self, number: int) -> str:
        return f"{self.name}:{self.lines[number - self.first]} (item {number})"

    def rows(self) -> Iterator[NumberedRow]:
        for number, item in enumerate(self.items, self.first):
            yield number, _parse_object(item, "item")


@dataclass(frozen=True, slots=True)
class CsvChunk:
    """Records of a CSV file; `lines` are the 1-based lines on which they begin, `problems` the reasons found while decoding."""

    source: int
    name: str
    header: tuple[str, ...]
    records: list[list[str]]
    lines: list[int]
    problems: dict[int, str] = field(default_factory=dict)

    def where(self, number: int) -> str:
        return f"{self.name}:{number}"

    def rows(self) -> Iterator[NumberedRow]:
        for number, record in zip(self.lines, self.records, strict=True):
            if number in self.problems:
                yield number, RowError(self.problems[number])
            elif len(record) != len(self.header):
                yield number, RowError(f"{len(record)} fields, but the header has {len(self.header)}")
            else:
                yield number, dict(zip(self.header, record, strict=True))


@dataclass(frozen=True, slots=True)
class TableChunk:
    """Rows of a Parquet file as an Arrow IPC stream; `first` counts rows from 1."""

    source: int
    name: str
    first: int
    payload: bytes

    def where(self, number: int) -> str:
        return f"{self.name}, row {number}"

    def rows(self) -> Iterator[NumberedRow]:
        import pyarrow as pa  # 50 MB that a worker should not pay for without Parquet

        table = pa.ipc.open_stream(self.payload).read_all()
        try:
            yield from enumerate(table.to_pylist(), self.first)
        except UnicodeDecodeError:
            for index in range(table.num_rows):
                try:
                    yield self.first + index, table.slice(index, 1).to_pylist()[0]
                except UnicodeDecodeError as error:
                    yield self.first + index, RowError(f"not UTF-8: {error.reason}")


Chunk = LinesChunk | ItemsChunk | CsvChunk | TableChunk


def read_chunks(sources: Sequence[Source], columns: Iterable[str]) -> Iterator[Chunk]:
    """Yields the chunks of all files in order. `columns` are the only ones read where the file allows choosing (Parquet).

    The cutting depends on the content alone, not on how many bytes a stream gives at a time.

    Raises UserError: UnknownFileType, EmptyFile, BadFile, NotUtf8, BadJson, BadCsv, RowTooBig.
    """
    for index, source in enumerate(sources):
        empty = True
        for chunk in _read_source(index, source, tuple(columns)):
            empty = False
            yield chunk
        if empty:
            raise UserError(
                "EmptyFile",
                "the file holds no rows",
                where=source.name,
                mend="remove it from the manifest's data, or fill it",
            )


def _read_source(index: int, source: Source, columns: tuple[str, ...]) -> Iterator[Chunk]:
    suffix, compression = file_type(source.name)
    with source.open() as stream:
        if suffix == ".parquet":
            yield from _parquet_chunks(index, source.name, stream, columns)
            return
        blocks = _blocks(source.name, _decompressed(stream, compression))
        first = next(blocks, b"")
        if first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise UserError(
                "NotUtf8",
                "the file is UTF-16, not UTF-8",
                where=source.name,
                mend=f"convert it: iconv -f UTF-16 -t UTF-8 {source.name}",
            )
        first = first.removeprefix(codecs.BOM_UTF8)
        blocks = itertools.chain([first], blocks)
        if suffix in (".csv", ".tsv"):
            yield from _csv_chunks(index, source.name, blocks, "\t" if suffix == ".tsv" else ",")
        elif suffix == ".json" and first.lstrip()[:1] == b"[":
            yield from _array_chunks(index, source.name, blocks)
        else:
            if suffix == ".json":
                _refuse_other_json(source.name, first)
            yield from _line_chunks(index, source.name, blocks)


def file_type(name: str) -> tuple[str, str]:
    """("data/a.jsonl.gz") → (".jsonl", ".gz"); the second is "" without compression. Raises UserError UnknownFileType."""
    low = name.lower().split("?")[0]
    compression = next((end for end in COMPRESSED if low.endswith(end)), "")
    low = low.removesuffix(compression)
    suffix = next((end for end in SUFFIXES if low.endswith(end)), "")
    if not suffix or (suffix == ".parquet" and compression):
        raise UserError(
            "UnknownFileType",
            "cannot tell the file's type from its name",
            where=name,
            mend=f"name it with one of {', '.join(SUFFIXES)}; all but .parquet may also end in .gz or .zst",
        )
    return suffix, compression


def _decompressed(stream: BinaryIO, compression: str) -> BinaryIO:
    if compression == ".gz":
        return gzip.GzipFile(fileobj=stream)  # type: ignore[return-value]
    if compression == ".zst":
        import pyarrow as pa

        return pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), "zstd")  # type: ignore[no-any-return]
    return stream


def _blocks(name: str, stream: BinaryIO) -> Iterator[bytes]:
    """Blocks of exactly CHUNK_BYTES but for the last, however little the stream gives at a time."""
    while True:
        parts, missing = [], CHUNK_BYTES
        while missing:
            try:
                part = stream.read(missing)
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise _broken_file(name, str(error)) from None
            except OSError as error:
                if error.errno is None:  # Arrow's decompressor; trouble of the system has a number
                    raise _broken_file(name, str(error)) from None
                raise
            if not part:
                break
            parts.append(part)
            missing -= len(part)
        if parts:
            yield b"".join(parts)
        if missing:
            return


def _broken_file(name: str, why: str) -> UserError:
    return UserError("BadFile", f"the file is damaged or cut off: {why}", where=name, mend="write or copy it again")


def _too_big(where: str) -> UserError:
    return UserError(
        "RowTooBig",
        f"one row is longer than {MAX_ROW_BYTES >> 20} MiB",
        where=where,
        mend="this is most often a file without line breaks or with a quote that never closes; write one row a line",
    )


def _parse_object(text: bytes, unit: str) -> Row | RowError:
    try:
        row = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        return RowError(_why_not_json(text, error, unit))
    if type(row) is not dict:
        return RowError(f'the {unit} is {_json_type(row)}, not an object like {{"prompt": …}}')
    return row


def _json_type(value: object) -> str:
    names = {
        list: "a list",
        str: "a string",
        bool: "true or false",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    return names.get(type(value), type(value).__name__)


def _why_not_json(text: bytes, error: json.JSONDecodeError, unit: str) -> str:
    if why := _why_not_text(text):
        return f"{why} of the {unit}"
    line = f"line {error.lineno} of the item, " if unit == "item" and error.lineno > 1 else ""
    words = error.msg.split(": line ")[0]
    return f"broken JSON at {line}column {error.colno}: {words}"


def _why_not_text(text: bytes) -> str:
    """What keeps the bytes from being text, with the 1-based byte; "" where nothing does."""
    if b"\0" in text:
        return f"NUL byte at byte {text.index(0) + 1}"
    try:
        text.decode()
    except UnicodeDecodeError as error:
        return f"not UTF-8: byte 0x{text[error.start]:02x} at byte {error.start + 1}"
    return ""


def _line_chunks(index: int, name: str, blocks: Iterable[bytes]) -> Iterator[LinesChunk]:
    number, parts, size = 1, [], 0
    for block in blocks:
        cut = block.rfind(b"\n") + 1
        parts.append(block[:cut] if cut else block)
        size += len(parts[-1])
        if not cut:
            if size > MAX_ROW_BYTES:
                raise _too_big(f"{name}:{number}")
            continue
        payload = b"".join(parts)
        if not payload.isspace():
            yield LinesChunk(index, name, number, payload)
        number += payload.count(b"\n")
        parts, size = [block[cut:]], len(block) - cut
    payload = b"".join(parts)
    if payload and not payload.isspace():
        yield LinesChunk(index, name, number, payload)


def _refuse_other_json(name: str, first: bytes) -> None:
    """A .json file that does not start with `[` is read as JSON lines; one object around a list or over many lines is told apart."""
    line = first.lstrip().split(b"\n", 1)[0]
    try:
        row = orjson.loads(line)
        words = ""
    except orjson.JSONDecodeError as error:
        row, words = None, _why_not_json(line, error, "line")
    alone = not first.lstrip()[len(line) :].strip()
    if isinstance(row, dict) and alone:
        keys = [key for key, value in row.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    else:
        keys = [key.decode(errors="replace") for key in _LIST_OF_OBJECTS.findall(first[: 64 << 10])]
    wrapped = next((key for key in keys if key not in ROW_LISTS), None)
    if wrapped is not None and (words or alone):
        raise UserError(
            "WrappedList",
            f"the file is one object whose rows lie under {wrapped!r}",
            where=name,
            mend=f"write the list by itself, one object a line: jq -c '.[\"{wrapped}\"][]' {name} > rows.jsonl",
        )
    if words:
        raise UserError(
            "BadJson",
            f"neither a JSON array nor one whole object a line: {words}",
            where=f"{name}:1",
            mend=f"write one object a line: jq -c . {name} > rows.jsonl",
        )


_LIST_OF_OBJECTS = re.compile(rb'"([^"\\]+)"\s*:\s*\[\s*\{')
ROW_LISTS = frozenset({"messages", "conversations", "prompt", "completion", "tools", "tool_calls", "content"})
"""Keys whose value is a list of objects within one row."""

_SPACE_OR_COMMA = re.compile(r"[ \t\r\n]*(,?)[ \t\r\n]*")


class _Text:
    """A growing window on the text of a file: decodes blocks, forgets what was consumed, counts lines."""

    def __init__(self, name: str, blocks: Iterator[bytes]) -> None:
        self._name, self._blocks = name, blocks
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._bytes = 0
        self.window, self.line, self.column, self.ended = "", 1, 1, False

    def grow(self) -> None:
        """Adds as much again as the window holds, at least a block."""
        parts, size = [self.window], 0
        while size < max(len(self.window), 1) and not self.ended:
            block = next(self._blocks, b"")
            self.ended = not block
            held = len(self._decoder.getstate()[0])
            try:
                parts.append(self._decoder.decode(block, self.ended))
            except UnicodeDecodeError as error:
                at = self._bytes - held + error.start
                line = self.line + "".join(parts).count("\n") + error.object[: error.start].count(b"\n")
                raise UserError(
                    "NotUtf8",
                    f"not UTF-8: byte 0x{error.object[error.start]:02x} at byte {at + 1} of the file",
                    where=f"{self._name}:{line}",
                    mend="save the file as UTF-8",
                ) from None
            self._bytes += len(block)
            size += len(parts[-1])
        self.window = "".join(parts)

    def place(self, position: int) -> tuple[int, int]:
        """1-based line and column of a position in the window."""
        lines = self.window.count("\n", 0, position)
        column = position - self.window.rfind("\n", 0, position) if lines else self.column + position
        return self.line + lines, column

    def forget(self, position: int) -> None:
        self.line, self.column = self.place(position)
        self.window = self.window[position:]


def _array_chunks(index: int, name: str, blocks: Iterator[bytes]) -> Iterator[ItemsChunk]:
    """Finds where the items of an array end with the C scanner of `json`; their meaning is orjson's, as for lines."""
    text = _Text(name, blocks)
    text.grow()
    decode = json.JSONDecoder().raw_decode
    position = text.window.index("[") + 1
    first, items, lines, size = 1, list[bytes](), list[int](), 0
    line, line_position = text.place(position)[0], position

    def broken(at: int, words: str) -> UserError:
        row, column = text.place(at)
        done = first + len(items) - 1
        where = f"after item {done}" if done else "in the first item"
        if text.window[at : at + 1] == "\0":
            words = "NUL byte"
        return UserError(
            "BadJson",
            f"broken JSON at column {column}, {where}: {words}",
            where=f"{name}:{row}",
            mend="mend the file, or write one object a line (.jsonl): then single bad rows can be tolerated",
        )

    while True:
        between = _SPACE_OR_COMMA.match(text.window, position)
        assert between is not None  # it also matches nothing
        start = between.end()
        if start == len(text.window) and not text.ended:
            text.forget(position)
            text.grow()
            position = line_position = 0
            line = text.line
            continue
        nothing_yet = first == 1 and not items
        if text.window[start : start + 1] == "]" and (nothing_yet or not between[1]):
            position = start + 1
            break
        if start == len(text.window):
            raise broken(start, "the file ends inside the array; it was cut off")
        if bool(between[1]) == nothing_yet:
            raise broken(start, "a stray comma" if between[1] else "no comma between two items")
        try:
            _, end = decode(text.window, start)
        except (json.JSONDecodeError, RecursionError) as error:
            if text.ended:
                at, words = (
                    (error.pos, error.msg) if isinstance(error, json.JSONDecodeError) else (start, "nested too deeply")
                )
                raise broken(at, words) from None
            if len(text.window) - start > MAX_ROW_BYTES:
                raise _too_big(f"{name}:{text.place(start)[0]}") from None
            text.forget(position)
            text.grow()
            position = line_position = 0
            line = text.line
            continue
        line += text.window.count("\n", line_position, start)
        line_position = start
        items.append(text.window[start:end].encode())
        lines.append(line)
        size += end - start
        position = end
        if size >= CHUNK_BYTES:
            yield ItemsChunk(index, name, first, items, lines)
            first, items, lines, size = first + len(items), [], [], 0
    if items:
        yield ItemsChunk(index, name, first, items, lines)
    while True:
        rest = text.window[position:]
        if rest.strip():
            raise broken(position + len(rest) - len(rest.lstrip()), "something follows after the end of the array")
        if text.ended:
            return
        text.forget(len(text.window))
        text.grow()
        position = 0


def _csv_chunks(index: int, name: str, blocks: Iterable[bytes], delimiter: str) -> Iterator[CsvChunk]:
    csv.field_size_limit(MAX_ROW_BYTES)
    problems: dict[int, str] = {}
    taken = 0

    def lines() -> Iterator[str]:
        nonlocal taken
        number, rest = 0, b""
        for block in itertools.chain(blocks, [b""]):
            pieces = (rest + block).split(b"\n")
            rest = pieces.pop()
            if len(rest) > MAX_ROW_BYTES:
                raise _too_big(f"{name}:{number + 1}")
            if not block and rest:
                pieces.append(rest)
            for piece in pieces:
                number += 1
                taken += len(piece) + 1
                try:
                    text = piece.decode()
                    if "\0" in text:
                        problems[number] = f"{_why_not_text(piece)} of line {number}"
                except UnicodeDecodeError:
                    problems[number] = f"{_why_not_text(piece)} of line {number}"
                    text = piece.decode(errors="replace")
                yield text + "\n"

    def broken(line: int, words: str) -> UserError:
        return UserError(
            "BadCsv",
            f"broken CSV: {words}",
            where=f"{name}:{line}",
            mend='quote fields as RFC 4180 does: "a ""quoted"" word"',
        )

    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    header: tuple[str, ...] = ()
    records, starts, bad = list[list[str]](), list[int](), dict[int, str]()
    while True:
        start = reader.line_num + 1
        try:
            record = next(reader, None)
        except csv.Error as error:
            words = str(error)
            if words.startswith("field larger"):
                raise _too_big(f"{name}:{start}") from None
            if words.startswith("unexpected end") or not header:
                raise broken(start, "a quoted field that begins in this row never ends" if header else words) from None
            record, bad[start] = [""], f"broken CSV: {words}"
        if record is None:
            break
        if not record:
            continue
        for number in [number for number in problems if start <= number <= reader.line_num]:
            bad[start] = problems.pop(number)
        if not header:
            if start in bad:
                raise UserError("NotUtf8", bad[start], where=f"{name}:{start}", mend="save the file as UTF-8 text")
            header = tuple(record)
            doubled = next((column for column in header if header.count(column) > 1), None)
            if doubled is not None:
                raise broken(start, f"the header names the column {doubled!r} twice")
            continue
        records.append(record)
        starts.append(start)
        if taken >= CHUNK_BYTES:
            yield CsvChunk(index, name, header, records, starts, bad)
            records, starts, bad, taken = [], [], {}, 0
    if records:
        yield CsvChunk(index, name, header, records, starts, bad)


def _parquet_chunks(index: int, name: str, stream: BinaryIO, columns: tuple[str, ...]) -> Iterator[TableChunk]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(stream, buffer_size=CHUNK_BYTES, pre_buffer=False)
        wanted = [column for column in file.schema_arrow.names if column in columns] or file.schema_arrow.names
        first = 1
        for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=wanted, use_threads=False):
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, batch.schema) as writer:
                writer.write_batch(batch)
            yield TableChunk(index, name, first, sink.getvalue().to_pybytes())
            first += batch.num_rows
    except pa.ArrowInvalid as error:
        raise _broken_file(name, str(error)) from None
    except OSError as error:
        if error.errno is None:  # Arrow's words on damaged pages; trouble of the system has a number
            raise _broken_file(name, str(error)) from None
        raise
