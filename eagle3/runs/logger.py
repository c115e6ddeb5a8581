"""What can be followed of a run: metrics.jsonl always, an experiment tracker if one is chosen."""

import contextlib
import json
import os
import re
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from xxhash import xxh3_128

from eagle3.config import OneOf
from eagle3.errors import ConfigError, first_line
from eagle3.runs.disk import read_json, write_atomically

REDACTED = "<redacted>"
# Names that hold a login. A `token` is one alone or after these words only: `eos_token` and
# `bytes_per_token` are about text.
SECRET_KEY = re.compile(
    r"(?i)(^|\.)token$|(hf|hub|access|api|auth|bearer)[_-]?token$"
    r"|(api|access|private|secret)[_-]?key$"
    r"|(secret|password|passwd|passphrase|credentials?|authorization)$"
    r"|^override_dirname$"  # of hydra.job: all overrides in one string
)
SECRET_VARIABLE = re.compile(r"(?i)(token|secret|passw(or)?d|(api|access|private|secret)_?key)$")
URL_LOGIN = re.compile(r"(?<=://)[^/@\s]+(?=@)")
POLL_SECONDS = 2.0


def redact(config: Any) -> Any:
    """A copy of nested values without logins: what SECRET_KEY names, also in overrides, the values
    of such environment variables, and those in URLs.
    """
    if isinstance(config, dict):
        # An empty one shows that nothing was given, which is no secret.
        secret = {key for key, value in config.items() if value and SECRET_KEY.search(str(key))}
        return {key: REDACTED if key in secret else redact(config[key]) for key in config}
    if isinstance(config, list | tuple):
        return [redact(value) for value in config]
    if not isinstance(config, str):
        return config
    text = URL_LOGIN.sub(REDACTED, config)
    # Longest first, as one may be part of another.
    for name, value in sorted(os.environ.items(), key=lambda item: -len(item[1])):
        # Shorter ones are switches, as HF_HUB_DISABLE_IMPLICIT_TOKEN=1, and parts of many words.
        if len(value) >= 8 and SECRET_VARIABLE.search(name):
            text = text.replace(value, REDACTED)
    key, _, value = text.partition("=")
    if value and SECRET_KEY.search(key):
        return f"{key}={REDACTED}"
    if value.startswith(("{", "[")):  # hub={user: me, token: ...}
        with contextlib.suppress(yaml.YAMLError, ValueError):
            given = yaml.safe_load(value)
            # An override without secrets stays as it was typed, so that it can be typed again.
            if redact(given) != given:
                return f"{key}={json.dumps(redact(given), default=str)}"
    return text


def read_metrics(path: Path) -> list[dict]:
    """The whole lines of a metrics.jsonl; [] where there is none."""
    return parse_lines(path.read_bytes().splitlines()) if path.exists() else []


def parse_lines(lines: list[bytes]) -> list[dict]:
    """Lines of metrics.jsonl, but those that a kill has cut off."""
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]


class JsonLines:
    """metrics.jsonl: one JSON object a `log` call, on disk when the call returns."""

    def __init__(self, path: Path, resume_step: int | None = None, checksum: str | None = None):
        """Starts the file anew, or keeps its lines up to update `resume_step`, and says where they
        are no longer those of the `checksum` that they had then.
        """
        self.path = path
        kept = read_metrics(path) if resume_step is not None else []
        lines = [json.dumps(row) + "\n" for row in kept if row["step"] <= resume_step]
        text = "".join(lines).encode()
        self.checksum = xxh3_128(text)
        if checksum not in (None, self.checksum.hexdigest()):
            print(f"train: {path} was cut or changed: {len(lines)} lines are left of its history")
        write_atomically(self.path, [text])

    def log(self, metrics: dict, step: int) -> None:
        """Append `metrics` (numbers, strings, lists) as of update `step`; NaN becomes null."""
        # Python writes NaN and Infinity as words that are no JSON, and reads them again.
        finite = json.loads(json.dumps(metrics), parse_constant=lambda word: None)
        line = json.dumps({"step": step} | finite) + "\n"
        self.checksum.update(line.encode())
        with self.path.open("a") as file:
            file.write(line)


class NoTracker:
    """metrics.jsonl is all there is; trackers, which conf/logger names, have these methods."""

    def start(self, run_dir: str, name: str, config: dict, run_id: str | None = None) -> str | None:
        """Begin a run, or go on with the one of that id; returns its id."""

    def log(self, metrics: dict, step: int) -> None:
        """Numbers as of update `step`."""

    def page(self, path: Path) -> None:
        """A page (.html) of the run, to be shown."""

    def finish(self, exit_code: int = 0) -> None:
        """End the run and whatever the tracker started."""


@dataclass
class Wandb(NoTracker):
    """Weights & Biases; `mode` null leaves it to W&B's own settings and environment variables."""

    project: str
    entity: str | None = None
    group: str | None = None
    mode: Annotated[str | None, OneOf(("online", "offline", "disabled"))] = None
    tags: list[str] | None = None
    run = None  # W&B's, once it was started

    def start(self, run_dir: str, name: str, config: dict, run_id: str | None = None) -> str | None:
        """Files lie under `run_dir`/wandb. Raises ConfigError where W&B cannot start."""
        import wandb  # a second that only runs with this tracker pay

        self.wandb = wandb
        # Else W&B stores the command line, which may hold a token, and a diff of the code.
        private = {"x_disable_meta": True, "disable_git": True, "disable_code": True}
        given = asdict(self) | {"name": name, "id": run_id, "resume": "allow" if run_id else None}
        given |= {"settings": private | {"console": "off"}, "config": redact(config)}
        try:
            self.run = wandb.init(dir=str(run_dir), **given)
        except wandb.errors.Error as error:
            message = first_line(error).rstrip(".")
            raise ConfigError(f"logger=wandb: {message}; or set logger.mode=offline.") from error
        # W&B's own step may only grow, and a resumed run logs some updates again: ours is an axis.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")
        return self.run.id

    def log(self, metrics: dict, step: int) -> None:
        self.run.log({**metrics, "step": step})  # W&B queues it: nothing waits for the network

    def page(self, path: Path) -> None:
        self.run.log({path.stem: self.wandb.Html(path.read_text(), inject=False)})

    def finish(self, exit_code: int = 0) -> None:
        if self.run is not None:
            self.run.finish(exit_code=exit_code)
            self.wandb.teardown(exit_code=exit_code)
            self.run = None


@contextlib.contextmanager
def follow_metrics(path: Path, tracker: NoTracker) -> Iterator[None]:
    """While the block runs, send every line that is added to a metrics.jsonl to the tracker."""
    # Lines up to the checkpoint were sent by the run that this one resumes; what was behind it, or
    # all of a run that starts anew, is computed and sent again.
    update = read_json(path.parent / "checkpoints" / "last" / "state.json").get("update")
    JsonLines(path, update)
    sent = (-1 if update is None else update, True)
    ended = threading.Event()
    # A thread that reads the file: training waits for no tracker, and may be other processes.
    thread = threading.Thread(target=forward_metrics, args=(path, tracker, sent, ended))
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def place(row: dict) -> tuple[int, bool]:
    # The order of lines: that of an update's evaluation follows that of its training.
    return row["step"], "loss" not in row


def forward_metrics(path: Path, tracker: NoTracker, sent: tuple, ended: threading.Event) -> None:
    """Send the lines after the place `sent`, until the block has ended and none is left."""
    file, rest, failed, last = None, b"", False, False
    while not last:
        last = ended.wait(POLL_SECONDS)
        with contextlib.suppress(FileNotFoundError):
            # A resumed run puts a new file in the place of the old one, with what it keeps of it.
            if file is None or not os.path.samestat(path.stat(), os.fstat(file.fileno())):
                file, rest = path.open("rb"), b""
        *lines, rest = (rest + file.read() if file else b"").split(b"\n")
        for row in parse_lines(lines):
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
