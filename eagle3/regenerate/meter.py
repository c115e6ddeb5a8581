"""How far the stage is, how fast it goes and when it will be through."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 60


class Meter:
    """A progress bar over rows, used as a context, or a line a minute in a log; `say` prints a line of its own."""

    def __init__(self, total: int | None, done: int):
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        console = Console(markup=False, highlight=False)
        self.bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.task = self.bar.add_task("regenerate", total=total, completed=done)
        self.total, self.done, self.turns, self.tokens = total, done, 0, 0
        self.started = self.last_line = time.monotonic()

    def __enter__(self) -> "Meter":
        self.bar.start()
        return self

    def __exit__(self, *error) -> None:
        self.bar.stop()

    def row(self, turns: int = 0, tokens: int = 0) -> None:
        """One more row is finished, with so many answers and tokens."""
        self.done, self.turns, self.tokens = self.done + 1, self.turns + turns, self.tokens + tokens
        now = time.monotonic()
        seconds = max(now - self.started, 1e-3)
        speed = f"regenerate: {self.turns / seconds:.1f} answers/s"
        if self.tokens:
            speed += f", {self.tokens / seconds:,.0f} tokens/s"
        self.bar.update(self.task, completed=self.done, description=speed)
        if self.bar.disable and now - self.last_line > SECONDS_BETWEEN_LINES:
            self.last_line = now
            self.say(f"{speed}, {self.done} of {self.total if self.total is not None else '?'} rows")

    def say(self, line: str) -> None:
        self.bar.console.print(line, soft_wrap=True)
