"""What a long loop shows."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def progress_bar(total: int, done: int, shown: bool) -> Iterator[Callable[..., None]]:
    """A bar with ETA, the latest loss and acceptance; yields `show(update, loss=, acceptance=)`."""
    text, latest = TextColumn("{task.description}"), {}
    columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), text
    with Progress(*columns, disable=not shown) as progress:
        task = progress.add_task("train", total=total, completed=done)

        def show(update: int, **values: float) -> None:
            latest.update(values)
            text = "  ".join(f"{name} {value:.3f}" for name, value in latest.items())
            progress.update(task, completed=update, description=f"train  {text}")

        yield show
