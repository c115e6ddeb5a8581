"""What a run leaves behind while it runs: metrics.jsonl always, an experiment tracker if one is
chosen.

A tracker is a class with the five methods of `NoTracker`; conf/logger/ names one.
"""

import contextlib
import importlib.util
import json
import math
import os
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from eagle3.errors import ConfigError

REDACTED = "<redacted>"
# Names that hold a login. A `token` is one alone or after these words only: `eos_token` and
# `bytes_per_token` are about text.
SECRET_KEY = re.compile(
    r"(^|\.)token$|(hf|hub|access|api|auth|bearer)[_-]?token$"
    r"|(secret|password|passwd|passphrase|credentials?|authorization)$"
    r"|(api|access|private|secret)[_-]?key$",
    re.IGNORECASE,
)
URL_LOGIN = re.compile(r"(?<=://)[^/@\s]+(?=@)")
OVERRIDE = re.compile(r"([+~]{0,2}[\w./@-]+)=(.+)", re.DOTALL)
POLL_SECONDS = 0.5


def redact(config: Any) -> Any:
    """A copy of `config` (nested dicts, lists, values) in which the values of keys like `token`,
    `api_key` and `password`, also in overrides (`hub.token=...`), and the login in a URL read
    `<redacted>`; empty ones stay as they are.

    Nothing else is looked for: a secret in free text, or under a name of its own, stays.
    """
    if isinstance(config, dict):
        return {
            key: REDACTED if value and SECRET_KEY.search(str(key)) else redact(value)
            for key, value in config.items()
        }
    if isinstance(config, list | tuple):
        return [redact(value) for value in config]
    if not isinstance(config, str):
        return config
    text = URL_LOGIN.sub(REDACTED, config)
    override = OVERRIDE.fullmatch(text)
    if override is None:
        return text
    key, value = override.groups()
    if SECRET_KEY.search(key):
        return f"{key}={REDACTED}"
    if value[0] in "{[":  # hub={user: me, token: ...}
        with contextlib.suppress(yaml.YAMLError, ValueError):
            given = yaml.safe_load(value)
            if redact(given) != given:
                return f"{key}={json.dumps(redact(given), default=str)}"
    return text


def finite(value: Any) -> Any:
    """`value` with NaN and infinities as None, which JSON can hold, also inside lists."""
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def parse_line(line: str | bytes) -> dict | None:
    """A line of metrics.jsonl; None for one that a kill has cut off."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def read_metrics(path: str | Path) -> list[dict]:
    """The lines of a metrics.jsonl; [] where there is none."""
    if not Path(path).exists():
        return []
    rows = [parse_line(line) for line in Path(path).read_bytes().splitlines()]
    return [row for row in rows if row is not None]


class JsonLines:
    """metrics.jsonl: one JSON object a `log` call, on disk when the call returns."""

    def __init__(self, path: str | Path, resume_step: int | None = None):
        """Starts the file anew, or keeps what an earlier part of the run wrote up to and including
        update `resume_step`.
        """
        self.path = Path(path)
        kept = []
        if resume_step is not None:
            kept = [row for row in read_metrics(path) if row["step"] <= resume_step]
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(partial, self.path)
        self.file = self.path.open("a")

    def log(self, metrics: dict, step: int) -> None:
        """Append `metrics` (numbers, strings, lists) as of update `step`; NaN becomes null."""
        row = {"step": step} | {key: finite(value) for key, value in metrics.items()}
        self.file.write(json.dumps(row, allow_nan=False) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class NoTracker:
    """metrics.jsonl is all there is."""

    def start(self, run_dir: str, name: str, config: dict, run_id: str | None = None) -> str | None:
        """Begin a run, or continue the one of which an earlier `start` returned the id; returns
        its id.
        """

    def log(self, metrics: dict, step: int) -> None:
        """Numbers as of update `step`."""

    def table(self, name: str, columns: list[str], rows: list[list]) -> None:
        """A table of plain values."""

    def page(self, path: str | Path) -> None:
        """A page (.html) of the run, to be shown."""

    def finish(self, exit_code: int = 0) -> None:
        """End the run and whatever the tracker started."""


class Wandb:
    """Weights & Biases; `mode` null leaves online or offline to its own settings and environment
    variables.
    """

    def __init__(
        self,
        project: str,
        entity: str | None = None,
        group: str | None = None,
        mode: str | None = None,
        tags: list[str] | None = None,
    ):
        if mode not in (None, "online", "offline", "disabled"):
            raise ConfigError(
                f"logger.mode must be null, online, offline or disabled, not {mode!r}."
            )
        if importlib.util.find_spec("wandb") is None:
            raise ConfigError(
                "logger=wandb needs the wandb package: pip install wandb, or take logger=jsonl."
            )
        self.options = {"project": project, "entity": entity, "group": group}
        self.options |= {"mode": mode, "tags": tags}
        self.run = None

    def start(self, run_dir: str, name: str, config: dict, run_id: str | None = None) -> str | None:
        """Begin or continue a run under `run_dir`/wandb. `config` is redacted; put the overrides
        into it too. Raises ConfigError where W&B cannot start.
        """
        import wandb

        # without these W&B stores the command line, which may hold a token, and a diff of the
        # working tree
        settings = wandb.Settings(
            x_disable_meta=True, disable_git=True, disable_code=True, console="off"
        )
        options = {**self.options, "resume": "allow" if run_id else None, "settings": settings}
        try:
            self.run = wandb.init(
                dir=str(run_dir), name=name, id=run_id, config=redact(config), **options
            )
        except wandb.errors.Error as error:
            message = str(error).splitlines()[0].rstrip(".")
            raise ConfigError(f"logger=wandb: {message}; or set logger.mode=offline.") from error
        # W&B's own step may only grow, and a resumed run logs some updates again: ours is a metric
        # and the x axis
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")
        return self.run.id

    def log(self, metrics: dict, step: int) -> None:
        self.run.log({**metrics, "step": step})

    def table(self, name: str, columns: list[str], rows: list[list]) -> None:
        import wandb

        self.run.log({name: wandb.Table(columns=columns, data=rows, allow_mixed_types=True)})

    def page(self, path: str | Path) -> None:
        import wandb

        path = Path(path)
        self.run.log({path.stem: wandb.Html(path.read_text(), inject=False)})

    def finish(self, exit_code: int = 0) -> None:
        """Upload what is left and end the background service; nothing where no run was started."""
        if self.run is not None:
            import wandb

            self.run.finish(exit_code=exit_code)
            wandb.teardown(exit_code=exit_code)
            self.run = None


@contextlib.contextmanager
def follow_metrics(path: str | Path, tracker: NoTracker | Wandb) -> Iterator[None]:
    """While the block runs, send every line that is added to a metrics.jsonl to the tracker.

    A thread reads the file, so that training never waits for a tracker, and rank 0 may be another
    process. Enter before training begins: lines that are there already were sent by the run that
    this one resumes. A tracker that fails is reported once on stderr and ends nothing.
    """
    sent = max(map(place, read_metrics(path)), default=(-1, False))
    ended = threading.Event()
    thread = threading.Thread(target=forward_metrics, args=(Path(path), tracker, sent, ended))
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def place(row: dict) -> tuple[int, bool]:
    """The order of lines: that of an update's evaluation follows that of its training."""
    return row["step"], "loss" not in row


def forward_metrics(
    path: Path, tracker: NoTracker | Wandb, sent: tuple[int, bool], ended: threading.Event
) -> None:
    """Send the lines after `sent`, until `ended` and the end of the file are reached."""
    file, rest, failed, last = None, b"", False, False
    while not last:
        last = ended.wait(POLL_SECONDS)
        with contextlib.suppress(FileNotFoundError):
            # a resumed run puts a new file in the place of the old one, and begins with a copy of
            # what it keeps
            if file is None or not os.path.samestat(path.stat(), os.fstat(file.fileno())):
                file, rest = path.open("rb"), b""
        if file is None:
            continue
        *lines, rest = (rest + file.read()).split(b"\n")
        for row in filter(None, map(parse_line, lines)):
            if place(row) <= sent:
                continue
            sent = place(row)
            try:
                measured = {key: value for key, value in row.items() if value is not None}
                tracker.log(measured, measured.pop("step"))
            except Exception as error:  # whatever a tracker raises, training is worth more
                if not failed:
                    print(f"the tracker failed at update {sent[0]}: {error}", file=sys.stderr)
                failed = True
