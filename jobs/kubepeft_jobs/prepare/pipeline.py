"""From data files to tokenized Arrow files: finds the format, spreads the work over processes, writes in order, counts.

The entry is `prepare`. It gets opened files, a tokenizer folder and numbers; where they come from and where the results are
published is the stage's matter. Does not load the tokenizer itself, nor torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kubepeft.errors import UserError

from .formats import (
    LAST_TURN_ONLY,
    OPEN_PROMPT,
    Format,
    FormatName,
    Loss,
    Task,
    candidate_columns,
    find_format,
)
from .read import CHUNK_BYTES, Chunk, RowError, Source, read_chunks
from .report import LISTED_BAD_ROWS, Report, SplitReport, Tally
from .worker import ChunkResult, Setup, TokenizerFacts, TooLong
from .workers import WorkerPool
from .write import SplitWriter


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The manifest's `spec.data`, as far as it concerns the rows; see api for the meaning of each field.

    `loss` None means completion where the format has one, else all. Either `eval_fraction` or eval files, not both.
    """

    task: Task = "CAUSAL_LM"
    format: Literal["auto"] | FormatName = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    loss: Loss | None = None
    max_length: int = 1024
    too_long: TooLong = "truncate"
    max_bad_rows: int = 0
    eval_fraction: float | None = None
    seed: int = 0
    trust_remote_code: bool = False


def workers(sources: Sequence[Source], most: int, *, trust_remote_code: bool = False) -> WorkerPool:
    """As many processes, up to `most`, as are of use: starting one costs about as much as encoding ten chunks."""
    sizes = [source.size for source in sources]
    if all(size is not None for size in sizes) and not any(
        source.name.endswith((".gz", ".zst", ".parquet")) for source in sources
    ):
        most = max(1, min(most, math.ceil(sum(size or 0 for size in sizes) / CHUNK_BYTES / 4)))
    return WorkerPool(most, trust_remote_code=trust_remote_code)


def prepare(
    train: Sequence[Source],
    eval: Sequence[Source] | None,
    options: Options,
    tokenizer_dir: Path,
    model_vocab_size: int,
    out_dir: Path,
    pool: WorkerPool,
    on_progress: Callable[[int], None] = lambda rows: None,
) -> Report:
    """Reads `train` (and `eval`), writes `train-00000.arrow` …, `eval-00000.arrow` … into `out_dir`, and says what it did.

    `model_vocab_size` is the number of rows of the model's embedding. The processes of `pool`, see `workers`, encode; their number does not
    change a byte of the output. `on_progress` is told the rows read so far. On failure no file is left in `out_dir`.

    Raises UserError (the reasons of read_chunks and find_format; BadRow, RowTooLong, NothingLeft, EvalEmpty, NoTarget,
    NoCompletion, NoChatTemplate, BrokenChatTemplate, TokenizerMismatch) and TransientError WorkerDied.
    """
    columns = candidate_columns(options.columns)
    chunks = read_chunks(train, columns)
    first = next(chunks)
    form, found = _format_of(first, options)
    loss = _loss(form, options)
    setup = Setup(
        tokenizer_dir=str(tokenizer_dir),
        trust_remote_code=options.trust_remote_code,
        form=form,
        task=options.task,
        loss=loss,
        max_length=options.max_length,
        too_long=options.too_long,
        eval_fraction=options.eval_fraction or 0.0,
        seed=options.seed,
    )
    tally = Tally()
    with ExitStack() as stack:
        facts = pool.load(setup)
        _check_vocabulary(facts, model_vocab_size, tokenizer_dir)
        train_writer = stack.enter_context(SplitWriter(out_dir, "train", options.task))
        eval_writer = stack.enter_context(SplitWriter(out_dir, "eval", options.task))
        for _, result in pool.map(chain([first], chunks), samples_from_first=True):
            _take(tally, result, options)
            _write(tally, train_writer, "train", result, ~result.is_eval)
            _write(tally, eval_writer, "eval", result, result.is_eval)
            on_progress(tally.read)
        for _, result in pool.map(_eval_chunks(eval or (), columns, form, options), samples_from_first=False):
            _take(tally, result, options)
            _write(tally, eval_writer, "eval", result, np.ones_like(result.is_eval))
            on_progress(tally.read)
        _refuse_nothing(tally, train_writer.rows, options)
        if (eval or options.eval_fraction) and not eval_writer.rows:
            raise UserError(
                "EvalEmpty",
                f"no row is left to evaluate on, of {tally.read} read",
                where="spec.data.eval" if eval else "spec.data.evalFraction",
                mend="give more rows" if eval else "raise evalFraction, give an eval file, or leave it out",
            )
    return Report(
        format=form.name,
        format_why=form.why,
        columns=dict(form.theirs),
        task=options.task,
        loss=loss,
        max_length=options.max_length,
        rows_read=tally.read,
        rows_kept=train_writer.rows + eval_writer.rows,
        rows_bad=tally.bad,
        rows_dropped_too_long=tally.counts.get("tooLong", 0),
        rows_dropped_no_loss=tally.counts.get("noLossLeft", 0),
        rows_truncated=tally.counts.get("truncated", 0),
        train=_split_report(tally, "train", train_writer),
        eval=_split_report(tally, "eval", eval_writer) if eval_writer.rows else None,
        lengths=tally.lengths(),
        bad_rows=tally.bad_rows,
        samples=tally.samples,
        notes=_notes(tally, form, found, facts, options),
    )


def _format_of(chunk: Chunk, options: Options) -> tuple[Format, list[str]]:
    """The format and the columns of the first row that has one; as many rows as may be bad are passed over."""
    refusal: UserError | None = None
    for tried, (number, row) in enumerate(chunk.rows()):
        if tried > options.max_bad_rows:
            break
        where = chunk.where(number)
        if isinstance(row, RowError):
            refusal = refusal or _bad_row(where, str(row))
            continue
        try:
            return find_format(options.format, options.columns, row, where), list(row)
        except UserError as error:
            refusal = refusal or error
    assert refusal is not None, "a chunk holds at least one row"
    raise refusal


def _loss(form: Format, options: Options) -> Loss:
    if form.name == "text":
        if options.task == "SEQ_2_SEQ_LM":
            raise UserError(
                "NoTarget",
                "an encoder-decoder learns from a source and a target, but the rows are format text",
                where="spec.data",
                mend="write rows with the columns prompt and completion, or use task CAUSAL_LM",
            )
        if options.loss == "completion":
            raise UserError(
                "NoCompletion",
                "loss: completion was asked for, but rows of format text have none",
                where="spec.data.loss",
                mend="use loss: all, or write rows with the columns prompt and completion",
            )
        return "all"
    return options.loss or "completion"


def _check_vocabulary(facts: TokenizerFacts, model_vocab_size: int, tokenizer_dir: Path) -> None:
    highest = max(facts.size - 1, facts.largest_id)
    if highest >= model_vocab_size:
        raise UserError(
            "TokenizerMismatch",
            f"the tokenizer has ids up to {highest}, but the model's embedding only {model_vocab_size} rows",
            where=str(tokenizer_dir),
            mend="use the tokenizer that belongs to the base, or remove the tokens that were added to it (added_tokens in "
            "tokenizer.json); rows made up for them at load time would be random",
        )


def _eval_chunks(sources: Sequence[Source], columns: Sequence[str], form: Format, options: Options) -> Iterator[Chunk]:
    chunks = read_chunks(sources, columns)
    for number, chunk in enumerate(chunks):
        if number == 0:
            for row_number, row in chunk.rows():
                if not isinstance(row, RowError):
                    find_format(form.name, options.columns, row, chunk.where(row_number))
                break
        yield chunk


def _bad_row(where: str, reason: str, others: str = "") -> UserError:
    return UserError(
        "BadRow",
        reason + others,
        where=where,
        mend="mend or remove the row, or say how many bad rows may be left out: spec.data.maxBadRows",
    )


def _take(tally: Tally, result: ChunkResult, options: Options) -> None:
    tally.add(result)
    if tally.bad > options.max_bad_rows:
        if options.max_bad_rows == 0:
            (where, reason), *others = result.first_bad
            more = "".join(f"\n  {place}: {why}" for place, why in others)
            unlisted = result.bad - len(result.first_bad)
            more += f"\n  and {unlisted} more near there" if unlisted else ""
        else:
            where, reason = tally.bad_rows[0].where, tally.bad_rows[0].reason
            listed = tally.bad_rows[1:10]
            more = f"\n  {tally.bad} rows are bad by here, maxBadRows is {options.max_bad_rows}; the next ones:"
            more += "".join(f"\n  {row.where}: {row.reason}" for row in listed)
        raise _bad_row(where, reason, more)
    if options.too_long == "fail" and result.first_too_long is not None:
        where, length = result.first_too_long
        raise UserError(
            "RowTooLong",
            f"the row has {length} tokens, more than maxLength {options.max_length}",
            where=where,
            mend="raise spec.data.maxLength, or set spec.data.tooLong to truncate or drop",
        )


def _write(tally: Tally, writer: SplitWriter, split: str, result: ChunkResult, chosen: NDArray[np.bool_]) -> None:
    if chosen.all():
        writer.add(result.ids, result.id_counts, result.target, result.target_counts)
    else:
        writer.add(
            result.ids[np.repeat(chosen, result.id_counts)],
            result.id_counts[chosen],
            result.target[np.repeat(chosen, result.target_counts)],
            result.target_counts[chosen],
        )
    tally.add_split(split, result.id_counts[chosen], result.loss_tokens[chosen])


def _refuse_nothing(tally: Tally, rows: int, options: Options) -> None:
    if rows:
        return
    went = {
        "bad": tally.bad,
        f"longer than maxLength {options.max_length}": tally.counts.get("tooLong", 0),
        f"without any completion within maxLength {options.max_length}": tally.counts.get("noLossLeft", 0),
    }
    told = ", ".join(f"{count} {why}" for why, count in went.items() if count) or "all went to the eval split"
    raise UserError(
        "NothingLeft",
        f"no row is left to train on, of {tally.read} read: {told}",
        where="spec.data.train",
        mend="raise spec.data.maxLength, or mend the data",
    )


def _split_report(tally: Tally, split: str, writer: SplitWriter) -> SplitReport:
    return SplitReport(writer.rows, tally.tokens[split], tally.loss_tokens[split], [path.name for path in writer.files])


def _notes(tally: Tally, form: Format, found: Sequence[str], facts: TokenizerFacts, options: Options) -> list[str]:
    notes = []
    unused = [column for column in found if column not in form.theirs.values()]
    if unused:
        notes.append(f"columns that are not used: {', '.join(unused[:20])}")
    if form.name == "prompt-completion" and facts.has_chat_template:
        notes.append(
            "prompts are plain text and do not go through the base's chat template; write messages where the adapter is to chat"
        )
    if form.name == "instruction":
        notes.append(
            "instructions are written as conversations with the base's chat template"
            if facts.has_chat_template
            else "the base has no chat template, so instructions are written as Stanford Alpaca's prompt"
        )
    if not facts.has_eos:
        notes.append("the tokenizer has no EOS token: the adapter does not learn where to stop")
    if count := tally.counts.get(LAST_TURN_ONLY):
        notes.append(
            f"{count} conversations are learned from in their last answer only: the chat template renders earlier turns "
            "differently once later ones follow"
        )
    if count := tally.counts.get(OPEN_PROMPT):
        notes.append(
            f"in {count} conversations the chat template's generation prompt is not how it renders a finished answer "
            "(a thinking block, most often); loss begins where the two part"
        )
    if tally.bad > LISTED_BAD_ROWS:
        notes.append(f"{tally.bad - LISTED_BAD_ROWS} of the bad rows are not listed")
    return notes
