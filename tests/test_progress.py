"""What stages show while they work, in a terminal and elsewhere, and when a signal ends them."""

import io
import re
import signal
import sys
import threading
from types import SimpleNamespace

import pytest
import rich
from conftest import TRAIN_ONLY, run_command

from eagle3.runs import progress
from eagle3.runs.progress import Progress, duration

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")


@pytest.fixture
def clock(monkeypatch):
    """Seconds that a test sets."""
    now = [100.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(progress, "BETWEEN_LOOKS", 3600.0)
    return now


def show(clock, steps, *given, **named):
    """A stage whose `steps` are (seconds since its start, what `advance` is given)."""
    with Progress(*given, **named) as bar:
        for seconds, arguments in steps:
            clock[0] = 100.0 + seconds
            bar.advance(*arguments)


ROWS = ("prepare", None, "rows")
DOCUMENTS = ("capture", 5000, "documents")


@pytest.mark.parametrize(
    ("steps", "given", "named", "shown"),
    [
        # What takes seconds is one line.
        ([(1, (2000, 9)), (4, (3000, 811))], DOCUMENTS, {},
         ["5,000 documents, 820 tokens, 205 tokens/s, in 0:04"]),
        # The first line comes early, the next ones every 30 seconds.
        ([(6, (500, 3000)), (30, (500, 9000)), (36, (0, 300_000)), (60, (4000, 300_000))],
         DOCUMENTS, {},
         ["500 of 5,000 documents, 3.0k tokens, 500 tokens/s, ETA 0:54",
          "1,000 of 5,000 documents, 312k tokens, 8,667 tokens/s, ETA 2:24",
          "5,000 documents, 612k tokens, 10,200 tokens/s, in 1:00"]),
        # What an earlier call left counts as done, and for no rate.
        ([(10, (500, 12_345_678))], DOCUMENTS, {"done": 4000},
         ["4,500 of 5,000 documents, 12.3M tokens, 1,234,568 tokens/s, ETA 0:10",
          "4,500 documents (4,000 of them before), 12.3M tokens, 1,234,568 tokens/s, in 0:10"]),
        # Long documents come first: the tokens tell how much is left.
        ([(10, (1, 2500))], DOCUMENTS, {"expected": 10_000},
         ["1 of 5,000 documents, 2.5k tokens, 250 tokens/s, ETA 0:30",
          "1 documents, 2.5k tokens, 250 tokens/s, in 0:10"]),
        # Within the first batch nothing is done yet.
        ([(9, (0, 90))], ("generate", 48, "prompts"), {},
         ["0 of 48 prompts, 90 tokens, 10 tokens/s", "0 prompts, 90 tokens, 10 tokens/s, in 0:09"]),
        # Answers are counted beside the rows that they are for.
        ([(2, (1, 500, 3)), (4, (1, 400, 2))], ("regenerate", None, "rows"), {},
         ["2 rows, 900 tokens, 1.2 answers/s, 225 tokens/s, in 0:04"]),
        # Nobody counts tokens, nor knows how many rows there are.
        ([(8, (40,))], ROWS, {}, ["40 rows, 5.0 rows/s", "40 rows, 5.0 rows/s, in 0:08"]),
        ([(8, (40,))], ROWS, {"shown": False}, []),
    ],
)  # fmt: skip
def test_lines_elsewhere_than_in_a_terminal(steps, given, named, shown, clock, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    show(clock, steps, *given, **named)
    assert capsys.readouterr().out.splitlines() == [f"{given[0]}: {line}" for line in shown]


def test_a_line_comes_when_due_though_nothing_advances(clock, monkeypatch):
    printed, shown = threading.Event(), io.StringIO()
    shown.flush = printed.set
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setattr(progress, "BETWEEN_LOOKS", 0.01)
    with Progress(*DOCUMENTS) as bar:
        clock[0] += 6
        assert printed.wait(60)
    assert not bar.watching.is_alive()
    rest = "documents, in 0:06"
    assert shown.getvalue() == f"capture: 0 of 5,000 documents\ncapture: 0 {rest}\n"


def test_rows_of_files_are_counted_by_the_share_that_is_read(clock, capsys):
    with Progress(*ROWS) as bar:
        for row in bar.follow([(0.25, "a"), (0.5, "b")]):
            clock[0] += 10
            bar.advance(loss=2.5 if row == "b" else 1.5, memory="3 GB")
    assert capsys.readouterr().out.splitlines() == [
        "prepare: 1 rows (25%), 0.1 rows/s, ETA 0:30, loss 1.500, memory 3 GB",
        "prepare: 2 rows, 0.1 rows/s, loss 2.500, memory 3 GB, in 0:20",
    ]


def test_units_under_way_count_by_how_far_they_have_come(clock, capsys):
    """All rows of a batch end together, and their number alone would promise hours until then."""
    with Progress("regenerate", 40, "rows") as bar:
        bar.count_tokens(2000)
        clock[0] += 10
        bar.complete(64)
        clock[0] += 31
        bar.advance(38, 100)  # those had less than the first, and no time is left to tell
    line, late, _ = capsys.readouterr().out.splitlines()
    assert line == "regenerate: 1 of 40 rows, 2.0k tokens, 200 tokens/s, ETA 0:03"
    assert late == "regenerate: 39 of 40 rows, 2.1k tokens, 51 tokens/s"


def test_a_terminal_has_a_bar_of_the_same_words(clock, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", terminal)
    for name, value in ("COLUMNS", "200"), ("LINES", "50"), ("TERM", "xterm"):
        monkeypatch.setenv(name, value)
    show(clock, [(1, (1250, 3000))], *DOCUMENTS)
    moving, _, last = terminal.getvalue().rpartition("capture: ")
    assert moving.count("\n") == 1, "one line, which is rewritten until its end"
    assert "1,250 of 5,000 documents, 3.0k tokens, 3,000 tokens/s, ETA 0:03" in moving
    assert last == "1,250 documents, 3.0k tokens, 3,000 tokens/s, in 0:01\n"
    monkeypatch.setattr(rich.get_console(), "_width", 60)
    terminal.seek(0)
    terminal.truncate()
    with Progress(*DOCUMENTS) as bar:
        bar.advance(1250, 3000, loss=18.557, acceptance=1.296)
    moving = terminal.getvalue().rpartition("capture: ")[0]
    assert "1.296" in moving and "…" not in moving, "no word is lost in a narrow one"
    monkeypatch.setenv("TERM", "dumb")
    terminal.seek(0)
    terminal.truncate()
    clock[0] = 100.0
    show(clock, [(1, (1250, 3000))], *DOCUMENTS)
    assert terminal.getvalue() == f"capture: {last}"


def test_durations():
    assert list(map(duration, (0.4, 59.6, 751, 3751))) == ["0:00", "1:00", "12:31", "1:02:31"]


def test_an_interruption_says_what_is_kept_and_an_error_nothing(capsys):
    for given, named, kept in (
        (DOCUMENTS, {}, "capture keeps 1 of 5,000 documents"),
        (ROWS, {"done": 2000, "kept": lambda: 2000}, "prepare keeps 2,000 rows"),
        (ROWS, {"kept": lambda: "9 rows in a file"}, "prepare keeps 9 rows in a file"),
    ):
        with pytest.raises(KeyboardInterrupt) as stopped, Progress(*given, **named) as bar:
            bar.advance()
            raise KeyboardInterrupt
        assert stopped.value.kept == kept
    with pytest.raises(ValueError), Progress(*DOCUMENTS):
        raise ValueError
    assert capsys.readouterr().out == ""


# run.py, whose processes hear a signal, as of Ctrl-C, when {0} has come so far for the {1}th time.
SIGNALLED = """
import os
from eagle3.runs.progress import Progress

calls, advance = [], Progress.advance

def signalled(self, *given, **named):
    advance(self, *given, **named)
    calls.extend([0] if self.stage.startswith("{0}") else [])
    if len(calls) == {1}:
        calls.append(0)
        os.killpg(0, {2})

Progress.advance = signalled
if __name__ == "__main__":
    exec(compile(open("run.py").read(), "run.py", "exec"))
"""


@pytest.mark.runs
@pytest.mark.parametrize(
    ("stage", "at", "number", "overrides", "said"),
    [
        ("prepare", 1, signal.SIGINT, ["stages=[prepare]", "data.num_proc=2"],
         "prepare keeps 0 (of 40 )?rows"),
        ("prepare", 1, signal.SIGTERM, ["stages=[prepare]", "data.num_proc=2"],
         "prepare keeps 0 (of 40 )?rows"),
        ("generate", 2, signal.SIGINT, ["stages=[prepare,generate]", "eval.batch_size=1"],
         "generate keeps [0-2] of 3 prompts"),
        ("capture", 2, signal.SIGTERM,
         ["stages=[prepare,capture]", "mode=offline", "target.batch_tokens=200"],
         r"capture keeps [1-9]\d* of \d+ documents"),
        ("regenerate", 1, signal.SIGINT,
         ["stages=[regenerate]", "regenerate=builtin", "data.num_samples=4",
          "regenerate.batch_size=2", "regenerate.max_new_tokens=4"],
         r"regenerate keeps \d answered rows in \S+\.jsonl"),
        ("train", 3, signal.SIGTERM, [TRAIN_ONLY], "stopped after update 2 of 6, which is kept"),
        ("benchmark", 1, signal.SIGINT, ["stages=[prepare,benchmark]"],
         r"benchmark .*keeps 0 of 4 questions"),
    ],
)  # fmt: skip
def test_every_stage_ends_with_a_signal_and_says_how_to_go_on(
    settings, exported, tmp_path, stage, at, number, overrides, said
):
    """The signal goes to workers too, as Ctrl-C in a terminal does."""
    script = tmp_path / "signalled.py"
    script.write_text(SIGNALLED.format(stage, at, int(number)))
    given = [*settings, *overrides, f"cache_dir={tmp_path / 'cache'}"]
    given += [f"hydra.run.dir={tmp_path / 'run'}", f"draft_path={exported / 'portable'}"]
    done = run_command(*given, script=script, start_new_session=True)
    assert done.returncode == 128 + number, done.stderr[-3000:]
    assert re.search(rf"{said}; go on with: python run\.py \S", done.stdout + done.stderr)
    assert "Traceback" not in done.stderr and "it/s" not in done.stderr
    assert not CONTROL.search(done.stdout + done.stderr)
