"""What a long loop shows, and how it hears that it should end."""

import contextlib
import signal
from collections.abc import Callable, Iterator

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextlib.contextmanager
def note_signals(launched: bool) -> Iterator[dict[str, int]]:
    """Notes the first Ctrl-C or SIGTERM, so that a loop ends after its update; a second acts."""
    received = {"signal": 0}
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number, frame):
        received["signal"] = number
        # A launched process hears of each signal twice: from the terminal and from its launcher.
        for each, handler in before.items() if not launched else ():
            signal.signal(each, handler)

    # An update is whole or not at all: a checkpoint of half of one could not be gone on with.
    for number in before:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
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
