"""Reading data files: every format, every way in which a file or a row can be broken, with the place named exactly."""

import gzip
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kubepeft.errors import UserError
from kubepeft_jobs.prepare.read import MAX_ROW_BYTES, RowError, read_chunks
from tests.jobs.prepare_parts import LocalFile


def rows_of(path: Path, columns: tuple[str, ...] = (), most: int = sys.maxsize) -> list[tuple[str, object]]:
    """(place, row or reason) of everything in a file."""
    return [
        (chunk.where(number), str(row) if isinstance(row, RowError) else row)
        for chunk in read_chunks([LocalFile(path, most)], columns)
        for number, row in chunk.rows()
    ]


def written(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "ü €", "completion": "line\nbreak"}]


def test_json_lines_with_bom_crlf_and_blank_lines_are_read_with_their_line_numbers(tmp_path: Path) -> None:
    text = "\ufeff\r\n" + json.dumps(ROWS[0]) + "\r\n\r\n  \n" + json.dumps(ROWS[1])
    assert rows_of(written(tmp_path / "a.jsonl", text)) == [("a.jsonl:2", ROWS[0]), ("a.jsonl:5", ROWS[1])]


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array_is_read_item_by_item_with_lines(tmp_path: Path, indent: int | None) -> None:
    found = rows_of(written(tmp_path / "a.json", "\n" + json.dumps(ROWS, indent=indent, ensure_ascii=False)))
    assert [row for _, row in found] == ROWS
    assert found[1][0] == ("a.json:7 (item 2)" if indent else "a.json:2 (item 2)")


def test_json_lines_under_the_name_json_are_read_as_lines(tmp_path: Path) -> None:
    found = rows_of(written(tmp_path / "a.json", "\n".join(map(json.dumps, ROWS))))
    assert found == [("a.json:1", ROWS[0]), ("a.json:2", ROWS[1])]


def test_csv_rows_after_quoted_newlines_keep_their_line_numbers(tmp_path: Path) -> None:
    text = 'prompt,completion\r\n"a ""b""\nsecond, line",x\r\n\r\nc,d\r\n'
    assert rows_of(written(tmp_path / "a.csv", "\ufeff" + text)) == [
        ("a.csv:2", {"prompt": 'a "b"\nsecond, line', "completion": "x"}),
        ("a.csv:5", {"prompt": "c", "completion": "d"}),
    ]


def test_tab_separated_values_are_read(tmp_path: Path) -> None:
    assert rows_of(written(tmp_path / "a.tsv", "prompt\tcompletion\na,b\tc")) == [
        ("a.tsv:2", {"prompt": "a,b", "completion": "c"})
    ]


def test_parquet_reads_only_the_wanted_columns_across_row_groups(tmp_path: Path) -> None:
    table = pa.table({"prompt": [str(i) for i in range(3000)], "noise": ["x"] * 3000})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=700)
    found = rows_of(tmp_path / "a.parquet", ("prompt", "text"))
    assert len(found) == 3000
    assert found[2500] == ("a.parquet, row 2501", {"prompt": "2500"})


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_compressed_files_give_the_same_rows(tmp_path: Path, ending: str) -> None:
    raw = "\n".join(map(json.dumps, ROWS)).encode()
    packed = gzip.compress(raw) if ending == "gz" else pa.compress(raw, codec="zstd", asbytes=True)
    found = rows_of(written(tmp_path / f"a.jsonl.{ending}", packed))
    assert [row for _, row in found] == ROWS


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_a_compressed_file_that_was_cut_off_is_damaged(tmp_path: Path, ending: str) -> None:
    raw = json.dumps({"text": "abc" * 1000 + str(list(range(3000)))}).encode()
    packed = gzip.compress(raw) if ending == "gz" else pa.compress(raw, codec="zstd", asbytes=True)
    with pytest.raises(UserError, match=r"a\.jsonl\.\w+: the file is damaged or cut off"):
        rows_of(written(tmp_path / f"a.jsonl.{ending}", packed[: len(packed) // 2]))


GOOD = '{"text": "x"}\n'
BAD_LINES = {
    "broken JSON": (b'{"text": "x",}', "broken JSON at column 13: "),
    "cut off": (b'{"text": "x', "broken JSON at column "),
    "not UTF-8": (b'{"text": "caf\xe9"}', "not UTF-8: byte 0xe9 at byte 14 of the line"),
    "NUL": (b'{"text": "a\0b"}', "NUL byte at byte 12 of the line"),
    "a list": (b'["x"]', "the line is a list, not an object"),
    "a string": (b'"x"', "the line is a string, not an object"),
    "null": (b"null", "the line is null, not an object"),
    "lone surrogate": (rb'{"text": "\ud800"}', "broken JSON at column "),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_in_the_middle_is_named_and_the_rest_is_read(tmp_path: Path, name: str) -> None:
    line, reason = BAD_LINES[name]
    found = rows_of(written(tmp_path / "a.jsonl", GOOD.encode() * 2 + line + b"\n" + GOOD.encode()))
    assert [place for place, _ in found] == [f"a.jsonl:{n}" for n in (1, 2, 3, 4)]
    assert str(found[2][1]).startswith(reason)
    assert found[3][1] == {"text": "x"}


BAD_FILES = {
    "empty jsonl": ("a.jsonl", b"", "EmptyFile", "a.jsonl: the file holds no rows"),
    "blank jsonl": ("a.jsonl", b"\n \r\n", "EmptyFile", "a.jsonl: "),
    "empty array": ("a.json", b" [ ]\n", "EmptyFile", "a.json: "),
    "header only": ("a.csv", b"a,b\n", "EmptyFile", "a.csv: "),
    "empty csv": ("a.csv", b"", "EmptyFile", "a.csv: "),
    "utf-16": ("a.jsonl", GOOD.encode("utf-16"), "NotUtf8", "a.jsonl: the file is UTF-16"),
    "unknown suffix": ("a.txt", b"x", "UnknownFileType", "a.txt: "),
    "wrapped list": ("a.json", b'{"version": 1, "data": [{"text": "x"}]}', "WrappedList", "rows lie under 'data'"),
    "wrapped list over lines": ("a.json", b'{\n "data": [\n  {"text": "x"}\n ]\n}', "WrappedList", "under 'data'"),
    "pretty-printed object": ("a.json", b'{\n "text": "x"\n}', "BadJson", "a.json:1: neither a JSON array nor"),
    "broken item": (
        "a.json",
        b'[{"text": "x"},\n {"text": }]',
        "BadJson",
        "a.json:2: broken JSON at column 11, after item 1",
    ),
    "array cut off": (
        "a.json",
        b'[{"text": "x"},\n',
        "BadJson",
        "a.json:2: broken JSON at column 1, after item 1: the file ends",
    ),
    "no comma": ("a.json", b'[{"text": "x"} {"text": "y"}]', "BadJson", "no comma between two items"),
    "stray comma": ("a.json", b'[,{"text": "x"}]', "BadJson", "a stray comma"),
    "trailing comma": ("a.json", b'[{"text": "x"},]', "BadJson", "after item 1"),
    "second array": ("a.json", b'[{"text": "x"}]\n[{"text": "y"}]', "BadJson", "a.json:2: broken JSON at column 1"),
    "array not UTF-8": (
        "a.json",
        b'[{"text": "x"},\n{"text": "\xff"}]',
        "NotUtf8",
        "a.json:2: not UTF-8: byte 0xff at byte 27",
    ),
    "array with NUL": (
        "a.json",
        b'[{"text": "a\0"}]',
        "BadJson",
        "a.json:1: broken JSON at column 13, in the first item: NUL byte",
    ),
    "open quote": ("a.csv", b'text\nx\n"never closed\ny\n', "BadCsv", "a.csv:3: broken CSV: a quoted field"),
    "doubled column": (
        "a.csv",
        b"text,text\nx,y\n",
        "BadCsv",
        "a.csv:1: broken CSV: the header names the column 'text' twice",
    ),
    "not parquet": ("a.parquet", b"PAR1 nonsense", "BadFile", "a.parquet: the file is damaged or cut off"),
    "empty parquet": ("a.parquet", b"", "BadFile", "a.parquet: "),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_cannot_be_read_is_refused_with_its_place(tmp_path: Path, name: str) -> None:
    file_name, content, reason, message = BAD_FILES[name]
    with pytest.raises(UserError) as caught:
        rows_of(written(tmp_path / file_name, content))
    assert caught.value.reason == reason
    assert message in str(caught.value)
    assert caught.value.mend


def test_bad_csv_rows_are_named_by_the_line_they_begin_on(tmp_path: Path) -> None:
    content = b'a,b\n1,2\n"x\ny",2\n1,2,3\n1,caf\xe9\n"m\nn\0",4\n"p"q,5\n6,7\n'
    found = rows_of(written(tmp_path / "a.csv", content))
    assert found == [
        ("a.csv:2", {"a": "1", "b": "2"}),
        ("a.csv:3", {"a": "x\ny", "b": "2"}),
        ("a.csv:5", "3 fields, but the header has 2"),
        ("a.csv:6", "not UTF-8: byte 0xe9 at byte 6 of line 6"),
        ("a.csv:7", "NUL byte at byte 2 of line 8"),
        ("a.csv:9", "broken CSV: ',' expected after '\"'"),
        ("a.csv:10", {"a": "6", "b": "7"}),
    ]


def test_a_parquet_cell_that_is_not_utf8_is_one_bad_row(tmp_path: Path) -> None:
    buffers = pa.array([b"good", b"caf\xe9", b"fine"], pa.binary()).buffers()
    raw = pa.Array.from_buffers(pa.string(), 3, buffers)
    pq.write_table(pa.table({"text": raw}), tmp_path / "a.parquet")
    found = rows_of(tmp_path / "a.parquet")
    assert [row for _, row in found][::2] == [{"text": "good"}, {"text": "fine"}]
    assert found[1][0] == "a.parquet, row 2"
    assert "not UTF-8" in str(found[1][1])


def test_a_cut_off_parquet_file_is_damaged(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [str(i) for i in range(5000)]}), tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    with pytest.raises(UserError, match="damaged or cut off"):
        rows_of(written(tmp_path / "a.parquet", whole[: len(whole) // 2]))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_row_of_absurd_length_is_an_error_at_its_line(tmp_path: Path, name: str) -> None:
    head = {"a.jsonl": GOOD + '{"text": "', "a.json": '[{"text": "x"},\n{"text": "', "a.csv": 'text\n"'}[name]
    with pytest.raises(UserError) as caught:
        rows_of(written(tmp_path / name, head + "x" * (2 * MAX_ROW_BYTES + 100)))
    assert caught.value.reason == "RowTooBig"
    assert caught.value.where == f"{name}:2"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_chunks_are_the_same_however_little_the_stream_gives_at_a_time(tmp_path: Path, name: str) -> None:
    rows = [{"text": f"row {i} " + "é€" * (i % 90)} for i in range(20_000)]
    content = {
        "a.jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
        "a.json": json.dumps(rows, ensure_ascii=False, indent=1),
        "a.csv": "text\n" + "\n".join(row["text"] for row in rows),
    }[name]
    path = written(tmp_path / name, content)
    assert [row for _, row in rows_of(path)] == rows
    whole, trickled = (list(read_chunks([LocalFile(path, most)], ())) for most in (sys.maxsize, 37))
    assert whole == trickled
    assert len(whole) >= 3
