"""What every stage shows of itself: a bar in a terminal, lines elsewhere, with the same words."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import rich.progress
from rich.filesize import pick_unit_and_suffix
from rich.table import Column

# What ends before its first line is due shows only its end.
FIRST_LINE, BETWEEN_LINES, BETWEEN_LOOKS = 5.0, 30.0, 1.0  # seconds


class Progress(AbstractContextManager):
    """How many of `total` units (None: not known) are `done`, and the tokens this call took.

    `done` begins with what an earlier call left. `kept()` is how many, or what in words, survives
    an interruption, if not all that are done; `expected`, where known, how many tokens this call
    will take. Where it is not `shown`, it only counts.
    """

    def __init__(
        self, stage: str, total: int | None, units: str, done: int = 0, shown: bool = True,
        kept: Callable[[], int | str] | None = None, expected: int | None = None,
    ):  # fmt: skip
        self.stage, self.total, self.units, self.shown = stage, total, units, shown
        self.done = self.before = done
        self.expected, self.values, self.share = expected, {}, 0.0
        self.tokens = self.answers = 0
        self.completed = 0  # tokens of units that `complete` heard of
        self.printing, self.ended = threading.Lock(), threading.Event()
        self.watching = threading.Thread(target=self.watch, daemon=True)
        self.kept, self.began = kept or (lambda: self.done), time.monotonic()
        self.due, self.bar = self.began + FIRST_LINE, None
        if shown and sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
            # Words that a narrow terminal has no room for go on in a second line.
            words = {"markup": False, "table_column": Column()}
            text = rich.progress.TextColumn("{task.description}", **words)
            bar = rich.progress.BarColumn(bar_width=10)
            self.bar = rich.progress.Progress(text, bar, transient=True)
            self.task = self.bar.add_task(self.line(), total=1.0)

    def __enter__(self) -> "Progress":
        if self.bar:
            self.bar.start()
        elif self.shown:
            self.watching.start()
        return self

    def watch(self) -> None:
        """Lines that come due while nothing advances, as in one long pass."""
        while not self.ended.wait(BETWEEN_LOOKS):
            self.print_due()

    def advance(
        self, count: int = 1, tokens: int = 0, answers: int = 0, **values: float | str
    ) -> None:
        """So many more are done, and took so many tokens; `values` are shown until replaced."""
        self.done += count
        self.tokens += tokens
        self.answers += answers
        self.values = self.values | values  # never changed under the thread that shows them
        if self.bar:
            self.bar.update(self.task, completed=self.fraction, description=self.line())
        elif self.shown:
            self.print_due()

    def print_due(self) -> None:
        with self.printing:
            if time.monotonic() >= self.due and self.done != self.total:
                self.due = time.monotonic() + BETWEEN_LINES
                print(self.line(), flush=True)

    def complete(self, tokens: int, answers: int = 0) -> None:
        """One more is done, whose tokens were counted as they came."""
        self.completed += tokens
        self.advance(answers=answers)

    def skip(self) -> None:
        """One more that was done before this call."""
        self.done += 1
        self.before += 1

    def count_tokens(self, tokens: int) -> None:
        """So many more tokens, of what is not done yet."""
        self.advance(0, tokens)

    def follow(self, rows: Iterable[tuple[float, Any]]) -> Iterator[Any]:
        """The rows of (share of all that was read so far, row), whose number shows at their end."""
        number = 0
        for self.share, row in rows:
            number += 1
            yield row
        self.total, self.share = number, 0.0

    @property
    def fraction(self) -> float:
        return self.share or (self.done / self.total if self.total else 0.0)

    def of_total(self, number: int) -> str:
        return f"{number:,}" + (f" of {self.total:,}" if self.total else "") + f" {self.units}"

    def line(self) -> str:
        """Such as `capture: 1,200 of 5,000 documents, 210k tokens, 3,410 tokens/s, ETA 12:31`."""
        share = f" ({self.share:.0%})" if self.share and not self.total else ""
        parts = [f"{self.of_total(self.done)}{share}", *self.rates()]
        now = self.done - self.before
        expected = self.expected
        if self.completed and self.total:  # those under way count by how far they have come
            expected = self.completed / now * (self.total - self.before)
        left = 0.0  # how often what this call has done
        if expected and self.tokens:
            left = expected / self.tokens - 1
        elif now and self.fraction:
            left = (self.done / self.fraction - self.done) / now
        if left > 0:
            parts.append(f"ETA {duration(left * (time.monotonic() - self.began))}")
        return f"{self.stage}: {', '.join(parts + self.named_values())}"

    def end(self) -> str:
        """Such as `capture: 5,000 documents (1,200 of them before), 720k tokens, ..., in 4:10`."""
        before = f" ({self.before:,} of them before)" if self.before else ""
        parts = [f"{self.done:,} {self.units}{before}", *self.rates(), *self.named_values()]
        return f"{self.stage}: {', '.join(parts)}, in {duration(time.monotonic() - self.began)}"

    def rates(self) -> list[str]:
        """The tokens of this call, and the rates of answers and tokens; without, that of units."""
        seconds = max(time.monotonic() - self.began, 1e-9)
        if self.tokens:
            unit, suffix = pick_unit_and_suffix(self.tokens, ["", "k", "M", "B"], 1000)
            digits = int(unit > 1 and self.tokens < 100 * unit)  # 850, 3.4k, 210k
            counted = f"{self.tokens / unit:.{digits}f}{suffix} tokens"
            answers = [f"{self.answers / seconds:,.1f} answers/s"] if self.answers else []
            return [counted, *answers, f"{self.tokens / seconds:,.0f} tokens/s"]
        now = self.done - self.before
        return [f"{now / seconds:,.1f} {self.units}/s"] if now else []

    def named_values(self) -> list[str]:
        shown = {k: v if isinstance(v, str) else f"{v:.3f}" for k, v in self.values.items()}
        return [f"{name} {value}" for name, value in shown.items()]

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: Any) -> None:
        if self.bar:
            self.bar.stop()
        elif self.shown:
            self.ended.set()
            self.watching.join()
        if error is None and self.shown:
            print(self.end(), flush=True)
        if isinstance(error, KeyboardInterrupt):  # which runs/signals.py tells
            kept = self.kept()
            words = kept if isinstance(kept, str) else self.of_total(kept)
            error.kept = f"{self.stage} keeps {words}"


def duration(seconds: float) -> str:
    """12:31, with hours 1:02:31."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
