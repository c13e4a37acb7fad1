"""The whole of prepare: data files in, Arrow files and a report out, by real worker processes."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from kubepeft.errors import TransientError, UserError
from kubepeft_jobs.prepare.pipeline import Options, prepare
from kubepeft_jobs.prepare.pipeline import workers as start
from kubepeft_jobs.prepare.report import Report
from tests.jobs import prepare_parts as parts
from tests.jobs.prepare_parts import LocalFile


@pytest.fixture(scope="module")
def chat_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return parts.saved(
        tmp_path_factory.mktemp("chat"), parts.tokenizer_of(parts.byte_level(), parts.CHATML, "<|im_end|>")
    )


@pytest.fixture(scope="module")
def plain_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return parts.saved(tmp_path_factory.mktemp("plain"), parts.tokenizer_of(parts.byte_level()))


@pytest.fixture(scope="module")
def t5_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return parts.saved(tmp_path_factory.mktemp("t5"), parts.tokenizer_of(parts.unigram()))


def pair(index: int) -> dict[str, Any]:
    return {
        "prompt": f"question {index}:" + " the fox" * (index % 7),
        "completion": f" answer {index}" + " dog" * (index % 5),
    }


def chat(index: int) -> dict[str, Any]:
    row = pair(index)
    return {
        "messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
    }


def jsonl(path: Path, rows: list[Any]) -> LocalFile:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return LocalFile(path)


def run(
    tmp_path: Path,
    train: LocalFile | list[LocalFile],
    base: Path,
    *,
    workers: int = 1,
    eval: Any = None,
    **options: Any,
) -> Report:
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    sources = train if isinstance(train, list) else [train]
    with start(sources, workers) as pool:
        return prepare(sources, eval, Options(**options), base, 1000, out, pool)


def rows_in(tmp_path: Path, split: str = "train") -> list[dict[str, Any]]:
    files = sorted((tmp_path / "out").glob(f"{split}-*.arrow"))
    return [row for file in files for row in Dataset.from_file(str(file))]


def test_rows_come_out_in_order_as_a_memory_mapped_dataset_with_an_honest_report(
    tmp_path: Path, chat_base: Path
) -> None:
    report = run(tmp_path, jsonl(tmp_path / "a.jsonl", [chat(i) | {"id": i} for i in range(300)]), chat_base)
    tokenizer = AutoTokenizer.from_pretrained(chat_base)
    rows = rows_in(tmp_path)
    assert len(rows) == 300
    for index, row in enumerate(rows):
        messages = chat(index)["messages"]
        assert row["input_ids"] == tokenizer.apply_chat_template(messages)["input_ids"]
        prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
        assert row["loss_spans"] == [len(prompt), len(row["input_ids"])]
        assert row["length"] == len(row["input_ids"])
    assert (report.rows_read, report.rows_kept, report.rows_bad, report.format, report.loss) == (
        300,
        300,
        0,
        "messages",
        "completion",
    )
    assert report.train.tokens == sum(row["length"] for row in rows)
    assert report.train.loss_tokens == sum(end - start for start, end in (row["loss_spans"] for row in rows))
    assert report.train.files == ["train-00000.arrow"]
    lengths = sorted(row["length"] for row in rows)
    assert report.lengths.longest == lengths[-1]
    assert report.lengths.p50 == lengths[149]
    assert sum(report.lengths.counts) == 300
    for (low, high), count in zip(pairwise(report.lengths.edges), report.lengths.counts, strict=True):
        assert count == sum(low <= length < high for length in lengths)
    assert report.samples[0].segments == [
        ("<|im_start|>user\nquestion 0:<|im_end|>\n<|im_start|>assistant\n", False),
        (" answer 0<|im_end|>\n", True),
    ]
    assert report.notes == ["columns that are not used: id"]
    json.dumps(report.as_dict())


def test_all_file_types_give_the_same_tokens(tmp_path: Path, plain_base: Path) -> None:
    rows = [pair(i) for i in range(50)]
    jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "c.csv").write_text(
        "prompt,completion\n" + "".join(f"{row['prompt']},{row['completion']}\n" for row in rows)
    )
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    sources = [LocalFile(tmp_path / name) for name in ("a.jsonl", "b.json", "c.csv", "d.parquet")]
    run(tmp_path, sources, plain_base)
    found = rows_in(tmp_path)
    assert len(found) == 200
    assert found[:50] == found[50:100] == found[100:150] == found[150:]


def test_an_encoder_decoder_gets_input_ids_and_labels(tmp_path: Path, t5_base: Path) -> None:
    report = run(tmp_path, jsonl(tmp_path / "a.jsonl", [pair(i) for i in range(20)]), t5_base, task="SEQ_2_SEQ_LM")
    tokenizer = AutoTokenizer.from_pretrained(t5_base)
    for index, row in enumerate(rows_in(tmp_path)):
        assert row["input_ids"] == tokenizer(pair(index)["prompt"])["input_ids"]
        assert row["labels"] == tokenizer(text_target=pair(index)["completion"])["input_ids"]
    assert report.train.loss_tokens == sum(len(row["labels"]) for row in rows_in(tmp_path))


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.arrow")}


def test_the_bytes_do_not_depend_on_the_number_of_workers(tmp_path: Path, plain_base: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", [pair(i) | {"noise": "x" * 1500} for i in range(9000)])
    found = []
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        folder.mkdir()
        report = run(folder, source, plain_base, workers=workers, eval_fraction=0.1)
        found.append((digests(folder / "out"), report))
    assert found[0] == found[1]
    assert set(found[0][0]) == {"train-00000.arrow", "eval-00000.arrow"}


def test_eval_fraction_splits_by_seed_and_loses_no_row(tmp_path: Path, plain_base: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", [pair(i) for i in range(2000)])
    report = run(tmp_path, source, plain_base, eval_fraction=0.1, seed=1)
    first = rows_in(tmp_path, "eval")
    assert report.eval is not None
    assert report.eval.rows == len(first)
    assert 140 < len(first) < 260
    assert report.train.rows + report.eval.rows == 2000
    run(tmp_path, source, plain_base, eval_fraction=0.1, seed=2)
    assert rows_in(tmp_path, "eval") != first


def test_an_eval_file_is_its_own_split(tmp_path: Path, plain_base: Path) -> None:
    train, held = jsonl(tmp_path / "a.jsonl", [pair(1)]), jsonl(tmp_path / "b.jsonl", [pair(2), pair(3)])
    report = run(tmp_path, train, plain_base, eval=[held])
    assert report.eval is not None
    assert (report.train.rows, report.eval.rows) == (1, 2)
    other = jsonl(tmp_path / "c.jsonl", [{"text": "x"}])
    with pytest.raises(
        UserError, match=r"c\.jsonl:1: format prompt-completion needs the column 'prompt', but the columns are 'text'"
    ):
        run(tmp_path, train, plain_base, eval=[other])


BAD_ROWS: list[tuple[Any, str]] = [
    ('{"prompt": "a", "completion": }\n', "broken JSON at column 31"),
    ('["a"]\n', "the line is a list"),
    ({"prompt": "a"}, "no 'completion'; the row has 'prompt'"),
    ({"prompt": None, "completion": "b"}, "'prompt' is null"),
    ({"prompt": "a", "completion": ""}, "'completion' is empty"),
    ({"prompt": 1, "completion": "b"}, "'prompt' is a number"),
    ({"text": "x"}, "it looks like format text, while this data set is prompt-completion"),
]


def test_tolerated_bad_rows_are_left_out_and_listed_with_file_line_and_reason(tmp_path: Path, plain_base: Path) -> None:
    lines = [line for bad, _ in BAD_ROWS for line in (pair(1), bad)]
    report = run(tmp_path, jsonl(tmp_path / "a.jsonl", lines), plain_base, max_bad_rows=len(BAD_ROWS))
    assert (report.rows_read, report.rows_kept, report.rows_bad) == (14, 7, 7)
    for index, (bad, (_, reason)) in enumerate(zip(report.bad_rows, BAD_ROWS, strict=True)):
        assert bad.where == f"a.jsonl:{2 * index + 2}"
        assert bad.reason.startswith(reason) or bad.reason.endswith(reason)


def test_one_bad_row_too_many_is_refused_naming_them_and_leaves_no_file(tmp_path: Path, plain_base: Path) -> None:
    lines = [line for bad, _ in BAD_ROWS for line in (pair(1), bad)]
    source = jsonl(tmp_path / "a.jsonl", lines)
    with pytest.raises(UserError) as none_tolerated:
        run(tmp_path, source, plain_base)
    assert (none_tolerated.value.reason, none_tolerated.value.where) == ("BadRow", "a.jsonl:2")
    assert "a.jsonl:14: " in none_tolerated.value.what
    with pytest.raises(UserError) as six_tolerated:
        run(tmp_path, source, plain_base, max_bad_rows=6)
    assert "7 rows are bad by here, maxBadRows is 6" in six_tolerated.value.what
    assert list((tmp_path / "out").iterdir()) == []


def test_each_policy_for_rows_that_are_too_long(tmp_path: Path, plain_base: Path) -> None:
    long_answer, long_prompt = (
        {"prompt": "a", "completion": " dog" * 50},
        {"prompt": "the fox " * 50, "completion": "b"},
    )
    source = jsonl(tmp_path / "a.jsonl", [pair(0), long_answer, long_prompt])
    cut = run(tmp_path, source, plain_base, max_length=20)
    assert (cut.rows_truncated, cut.rows_dropped_no_loss, cut.rows_kept) == (1, 1, 2)
    last = rows_in(tmp_path)[-1]
    assert (last["length"], last["loss_spans"]) == (20, [1, 20])
    assert cut.lengths.longest > 50
    dropped = run(tmp_path, source, plain_base, max_length=20, too_long="drop")
    assert (dropped.rows_dropped_too_long, dropped.rows_kept) == (2, 1)
    with pytest.raises(UserError, match=r"a\.jsonl:2: the row has \d+ tokens, more than maxLength 20") as caught:
        run(tmp_path, source, plain_base, max_length=20, too_long="fail")
    assert caught.value.reason == "RowTooLong"


def test_nothing_left_is_an_error_that_counts_what_went(tmp_path: Path, plain_base: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", [pair(i) for i in range(5)])
    with pytest.raises(UserError, match="no row is left to train on, of 5 read: 5 longer than maxLength 3") as caught:
        run(tmp_path, source, plain_base, max_length=3, too_long="drop")
    assert caught.value.reason == "NothingLeft"
    with pytest.raises(UserError, match="no row is left to evaluate on"):
        run(tmp_path, source, plain_base, eval_fraction=0.0001)


def test_a_tokenizer_with_ids_beyond_the_embedding_is_refused(tmp_path: Path, plain_base: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", [pair(0)])
    size = len(AutoTokenizer.from_pretrained(plain_base))
    with start([source], 1) as pool:
        prepare([source], None, Options(), plain_base, size, tmp_path, pool)
    with (
        pytest.raises(
            UserError, match=f"ids up to {size - 1}, but the model's embedding only {size - 1} rows"
        ) as caught,
        start([source], 1) as pool,
    ):
        prepare([source], None, Options(), plain_base, size - 1, tmp_path, pool)
    assert caught.value.reason == "TokenizerMismatch"


REFUSED = {
    "missing column": (
        [{"question": "a", "answer": "b"}],
        {},
        "MissingColumn",
        "a.jsonl:1: no format fits the columns",
    ),
    "format needs": ([{"text": "a"}], {"format": "messages"}, "MissingColumn", "a.jsonl:1: format messages needs"),
    "unknown column": ([pair(0)], {"columns": {"prompt": "promt"}}, "UnknownColumn", "spec.data.columns: "),
    "text without completion": ([{"text": "a"}], {"loss": "completion"}, "NoCompletion", "spec.data.loss: "),
    "text for T5": ([{"text": "a"}], {"task": "SEQ_2_SEQ_LM"}, "NoTarget", "spec.data: "),
    "conversations": ([chat(0)], {}, "NoChatTemplate", "spec.model: "),
    "first row broken": (["{\n", pair(0)], {}, "BadRow", "a.jsonl:1: broken JSON at column 2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_data_that_cannot_be_used_is_refused(tmp_path: Path, plain_base: Path, name: str) -> None:
    rows, options, reason, message = REFUSED[name]
    with pytest.raises(UserError) as caught:
        run(tmp_path, jsonl(tmp_path / "a.jsonl", rows), plain_base, **options)
    assert caught.value.reason == reason
    assert str(caught.value).startswith(message)
    assert caught.value.mend


def children(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def test_a_killed_worker_is_an_error_not_a_wait(tmp_path: Path, plain_base: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", [pair(i) | {"noise": "x" * 1500} for i in range(9000)])

    others = children(os.getpid())  # servers of other tests

    def workers() -> list[psutil.Process]:
        return [child for child in children(os.getpid()) if child not in others]

    def kill_one(rows: int) -> None:
        for child in workers()[:1]:
            child.send_signal(signal.SIGKILL)

    (tmp_path / "out").mkdir()
    with (
        pytest.raises(TransientError, match="a worker process was killed by signal 9") as caught,
        start([source], 2) as pool,
    ):
        prepare([source], None, Options(), plain_base, 1000, tmp_path / "out", pool, kill_one)
    assert caught.value.reason == "WorkerDied"
    assert list((tmp_path / "out").iterdir()) == []
    assert workers() == []


PROGRAM = """
import os
import sys
from pathlib import Path
from kubepeft_jobs.prepare.pipeline import Options, prepare, workers as start

class LocalFile:
    def __init__(self, path):
        self.path, self.name, self.size = path, path.name, path.stat().st_size

    def open(self):
        return self.path.open("rb")

def peak(pid):  # KiB; getrusage would also count what the parent held before exec
    return int(next(line for line in open(f"/proc/{pid}/status") if line.startswith("VmHWM")).split()[1])

workers = 0

def progress(rows):
    global workers
    workers = max([workers, *(peak(pid) for pid in open("/proc/self/task/{0}/children".format(os.getpid())).read().split())])
    print(rows, flush=True)

files = [LocalFile(Path(sys.argv[1]))]
with start(files, 2) as pool:
    prepare(files, None, Options(), Path(sys.argv[2]), 1000, Path(sys.argv[3]), pool, progress)
print("torch" in sys.modules, "transformers" in sys.modules, peak("self"), workers)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_the_process_however_it_ends(tmp_path: Path, plain_base: Path, how: signal.Signals) -> None:
    source = jsonl(tmp_path / "a.jsonl", [pair(i) | {"noise": "x" * 2000} for i in range(20_000)])
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(source.path), str(plain_base), str(tmp_path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=Path(__file__).parents[2]
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        workers = children(process.pid)
        assert len(workers) == 2
        process.send_signal(how)
        process.wait(20)
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert alive == []


def test_memory_is_flat_in_the_number_of_rows_and_torch_is_never_loaded(tmp_path: Path, plain_base: Path) -> None:
    peaks = []
    for rows in (10_000, 60_000):
        source = jsonl(tmp_path / f"{rows}.jsonl", [pair(i) | {"noise": "x" * 700} for i in range(rows)])
        command = [sys.executable, "-c", PROGRAM, str(source.path), str(plain_base), str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
        torch_loaded, transformers_loaded, own, worker = done.stdout.splitlines()[-1].split()
        assert (torch_loaded, transformers_loaded) == ("False", "False")
        peaks.append((int(own), int(worker)))
    (small_own, small_worker), (large_own, large_worker) = peaks
    assert large_own < small_own + 25_000  # KiB; the larger file is 39 MB more
    assert large_worker < small_worker + 25_000
    assert large_worker < 250_000
