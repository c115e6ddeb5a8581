"""Ctrl-C and SIGTERM: outside of training they end a run, in it they end it after an update."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

NUMBERS = (signal.SIGINT, signal.SIGTERM)


def interrupt_on_signals() -> None:
    """From now on they raise KeyboardInterrupt(number) here, and end workers forked from here."""
    main = os.getpid()

    def interrupt(number: int, frame) -> None:
        if os.getpid() != main:
            end_at_once(number, frame)
        # Ctrl-C ends workers too: torch's loader would raise here that they have ended.
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        raise KeyboardInterrupt(number)

    for number in NUMBERS:
        signal.signal(number, interrupt)


def end_at_once(number: int, frame) -> None:
    os._exit(128 + number)


@contextmanager
def exit_when_interrupted(then: Callable[[str], str]) -> Iterator[None]:
    """An interrupt in the block is said, with `then(what is kept)`; exits as a shell does."""
    try:
        yield
    except KeyboardInterrupt as stopped:
        for number in NUMBERS:
            signal.signal(number, end_at_once)
        kept = getattr(stopped, "kept", "what is finished is kept")
        print(f"interrupted{then(kept)}", file=sys.stderr)
        sys.exit(128 + (*stopped.args, signal.SIGINT)[0])


@contextmanager
def note_signals(launched: bool) -> Iterator[dict[str, int]]:
    """Notes the first Ctrl-C or SIGTERM, so that a loop ends after its update; a second acts."""
    received = {"signal": 0}
    before = {number: signal.getsignal(number) for number in NUMBERS}

    def note(number, frame):
        received["signal"] = number
        # A launched process hears of each signal twice: from the terminal and from its launcher.
        for each, handler in before.items() if not launched else ():
            signal.signal(each, handler)

    # An update is whole or not at all: a checkpoint of half of one could not be gone on with.
    for number in NUMBERS:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
