"""What `kubepeft run` shows: a live bar on a terminal, plain lines everywhere else. Output only; it decides nothing."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from kubepeft.stage import Result

LINE_EVERY_SECONDS = 5.0
"""How often a plain line is printed at most where there is no terminal."""


class Display:
    """The screen of one `kubepeft run`."""

    def __init__(self, *, quiet: bool) -> None:
        self.console = Console(stderr=False, highlight=False, soft_wrap=True)
        self.quiet = quiet
        self._live = self.console.is_terminal and not quiet
        self._bar = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(28),
            TextColumn("{task.fields[words]}"),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
        )
        self._task: TaskID | None = None
        self._label = ""
        self._last_line = 0.0
        self._last_words = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, words: str) -> None:
        self.console.print(escape(words))

    def document(self, kind: str, name: str, output: str) -> None:
        if not self.quiet:
            self.console.print(f"[bold]{kind} {escape(name)}[/bold] → {escape(output)}")

    def stage(self, label: str) -> None:
        self._label, self._last_line, self._last_words = label, 0.0, ""
        if self._live:
            self._task = self._bar.add_task(label, total=None, words="starting")
            self._bar.start()

    def progress(self, figures: dict[str, float]) -> None:
        """Show how far the stage is; called often."""
        done, total, words = describe(figures)
        if self._live and self._task is not None:
            self._bar.update(self._task, completed=done, total=total, words=words)
        elif not self.quiet and words != self._last_words and time.monotonic() - self._last_line >= LINE_EVERY_SECONDS:
            self._last_line, self._last_words = time.monotonic(), words
            self.console.print(f"{self._label}: {words}")

    def stage_ended(self, label: str, result: Result, seconds: float) -> None:
        if self._live and self._task is not None:
            self._bar.remove_task(self._task)
            self._bar.stop()
            self._task = None
        if result.outcome == "Succeeded":
            if not self.quiet:
                again = " (found as an earlier run left it)" if result.found_published else ""
                self.console.print(
                    f"[green]✓[/green] {label:<10} {clock(seconds):>7}  {escape(outcome(result))}{again}"
                )
        elif result.outcome == "Saved":
            self.console.print(f"[yellow]■[/yellow] {label:<10} {clock(seconds):>7}  {escape(result.message)}")
        else:
            self.console.print(f"[red]✗[/red] {label:<10} {clock(seconds):>7}  [bold]{escape(result.reason)}[/bold]")
            self.console.print(escape(result.message))
            if result.hint:
                self.console.print(f"  → {escape(result.hint)}")

    def ended(self, results: list[tuple[Result, float]], log_dir: Path) -> None:
        """The closing table: what came out, and where it lies."""
        lines = []
        for result, _ in results:
            if result.adapter:
                lines.append(("adapter", f"{result.adapter.uri}  ({size(result.adapter.size_bytes)})"))
                if result.adapter.report:
                    lines.append(("report", result.adapter.report))
        for output in dict.fromkeys(result.inference.output for result, _ in results if result.inference):
            lines.append(("predictions", output))
        lines.append(("logs", str(log_dir)))
        print_pairs(self.console, lines)


def print_pairs(console: Console, lines: Sequence[tuple[str, str]]) -> None:
    """A name and what it is, a line each. Nothing is folded, so that an address can be copied whole."""
    width = max(len(name) for name, _ in lines)
    for name, words in lines:
        console.print(f"[bold]{name:<{width}}[/bold]  {escape(words)}")


def describe(figures: dict[str, float]) -> tuple[float, float | None, str]:
    """How much is done, of how much, and in words, from the figures of the metrics page."""

    def figure(name: str) -> float | None:
        return figures.get(f"kubepeft_{name}")

    step, steps = figure("training_step"), figure("training_total_steps")
    if step is not None and steps:
        parts = [f"step {step:,.0f}/{steps:,.0f}"]
        for name, words in (
            ("training_loss", "loss {:.4f}"),
            ("training_eval_loss", "eval {:.4f}"),
            ("training_tokens_per_second", "{:,.0f} tok/s"),
        ):
            value = figure(name)
            if value is not None:
                parts.append(words.format(value))
        eta = figure("training_eta_seconds")
        if eta is not None:
            parts.append(f"ETA {clock(eta)}")
        return step, steps, "  ".join(parts)
    rows = figure("inference_rows")
    if rows is not None:
        answered = (figure("inference_completed") or 0) + (figure("inference_failed") or 0)
        speed = figure("inference_tokens_per_second")
        return answered, rows, f"{answered:,.0f}/{rows:,.0f} rows" + (f"  {speed:,.0f} tok/s" if speed else "")
    read = figure("prepare_rows")
    if read is not None:
        return figure("prepare_bytes") or 0, figure("prepare_total_bytes"), f"{read:,.0f} rows read"
    return 0, None, "loading"


def outcome(result: Result) -> str:
    """One line on what a stage that succeeded has done."""
    if result.adapter and result.training:
        training = result.training
        words = [f"{training.step:,} steps"]
        if training.loss is not None:
            words.append(f"loss {training.loss:.4f}")
        if training.eval_loss is not None:
            before = "" if training.base_eval_loss is None else f" (base {training.base_eval_loss:.4f})"
            words.append(f"eval loss {training.eval_loss:.4f}{before}")
        if result.resumed_from_step:
            words.append(f"resumed from step {result.resumed_from_step:,}")
        return ", ".join([*words, f"adapter {size(result.adapter.size_bytes)}"])
    if result.inference:
        counts = result.inference
        return f"{counts.completed:,} of {counts.total:,} rows answered" + (
            f", {counts.failed:,} failed" if counts.failed else ""
        )
    if result.prepared:
        return f"{result.prepared.rows:,} examples, {result.prepared.eval_rows:,} for evaluation, {result.prepared.tokens:,} tokens"
    return "done"


def clock(seconds: float) -> str:
    """3725 → "1:02:05"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def size(count: float) -> str:
    """1536 → "1.5 KB"."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1024 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")
