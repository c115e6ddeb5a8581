"""What can be followed of a run: metrics.jsonl always, an experiment tracker if one is chosen."""

import contextlib
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
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
# What a tracker may take to begin, for a call while training, and to send the last at the end.
START_SECONDS, CALL_SECONDS, FINISH_SECONDS = 30.0, 60.0, 600.0


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


@dataclass
class NoTracker:
    """metrics.jsonl is all there is; trackers have these methods, and what conf/logger sets."""

    project: str = "eagle3"
    entity: str | None = None
    group: str | None = None
    mode: Annotated[str | None, OneOf(("online", "offline", "disabled"))] = None
    tags: list[str] | None = None

    def start(self, run_dir: Path, name: str, config: dict, run_id: str, resumed: bool) -> None:
        """Begin the run of that id, or go on with it. Raises ConfigError where it never can."""

    def log(self, metrics: dict, step: int) -> None:
        """Numbers as of update `step`."""

    def table(self, name: str, columns: list[str], rows: list[list]) -> None:
        """A table of results, to be shown."""

    def keep(self, path: Path) -> None:
        """The report (.html), or a folder such as the draft, as it is now."""

    def finish(self, exit_code: int = 0) -> None:
        """End the run and whatever the tracker started."""

    def abandon(self) -> None:
        """What hangs is left; nothing of it may keep the process from ending."""


@dataclass
class Trackers(NoTracker):
    """Those of a run, which ends by none of them: one that fails is said once, and one that hangs
    is left.
    """

    wandb: Callable[..., NoTracker] | None = None
    tensorboard: Callable[..., NoTracker] | None = None
    trackio: Callable[..., NoTracker] | None = None

    def __post_init__(self):
        shared = self.project, self.entity, self.group, self.mode, self.tags
        made = {"wandb": self.wandb, "tensorboard": self.tensorboard, "trackio": self.trackio}
        self.used = {name: make(*shared) for name, make in made.items() if make}
        self.failed: set[str] = set()

    def start(self, *given) -> None:
        def begin(tracker: NoTracker) -> None:
            try:
                tracker.start(*given)
            except ImportError as error:
                name = type(tracker).__name__.lower()
                install = f"pip install -e '.[{name}]'"
                raise ConfigError(f"logger={name} needs {error.name}: {install}") from error

        # W&B may need its own limit twice, and loads for seconds.
        for name, error in self.each(begin, 3 * START_SECONDS).items():
            if isinstance(error, ConfigError):
                raise error
            self.used.pop(name, None)

    def log(self, metrics: dict, step: int) -> None:
        self.each(lambda tracker: tracker.log(metrics, step))

    def table(self, name: str, columns: list[str], rows: list[list]) -> None:
        self.each(lambda tracker: tracker.table(name, columns, rows))

    def keep(self, path: Path) -> None:
        self.each(lambda tracker: tracker.keep(path), FINISH_SECONDS)

    def finish(self, exit_code: int = 0) -> None:
        self.each(lambda tracker: tracker.finish(exit_code), FINISH_SECONDS)

    def each(
        self, action: Callable[[NoTracker], None], seconds: float | None = None
    ) -> dict[str, Exception]:
        """`action` on every tracker, for at most `seconds` on each; returns what they raised."""
        limit, raised = seconds or CALL_SECONDS, {}
        for name, tracker in list(self.used.items()):
            given = name, partial(action, tracker), raised
            thread = threading.Thread(target=self.attempt, args=given, daemon=True)
            thread.start()
            thread.join(limit)
            if thread.is_alive():
                self.say(name, f"no answer for {limit:.0f} seconds")
                del self.used[name]
                tracker.abandon()
        return raised

    def attempt(self, name: str, action: Callable[[], None], raised: dict[str, Exception]) -> None:
        try:
            action()
        except Exception as error:  # whatever a tracker raises, training is worth more
            raised[name] = error
            if not isinstance(error, ConfigError):
                self.say(name, first_line(error))

    def say(self, name: str, reason: str) -> None:
        if name not in self.failed:
            kept = "the run goes on, and metrics.jsonl has all of it"
            print(f"logger={name} failed: {reason.rstrip('.')}; {kept}", file=sys.stderr)
        self.failed.add(name)


class Wandb(NoTracker):
    """Weights & Biases; `mode` null leaves it to W&B's own settings and environment variables."""

    run = None  # W&B's, once it was started

    def start(self, run_dir: Path, name: str, config: dict, run_id: str, resumed: bool) -> None:
        """Files lie under `run_dir`/wandb. Without a network the run is kept there alone."""
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb  # a second that only runs with this tracker pay

        self.wandb = wandb
        # Else W&B stores the command line, which may hold a token, and a diff of the code.
        settings = {"x_disable_meta": True, "disable_git": True, "disable_code": True}
        settings |= {"console": "off", "init_timeout": START_SECONDS}
        given = {"project": self.project, "entity": self.entity, "group": self.group}
        given |= {"mode": self.mode, "tags": self.tags, "name": name, "id": run_id}
        given |= {"resume": "allow" if resumed else None, "settings": settings}
        given |= {"config": redact(config), "dir": str(run_dir)}
        try:
            self.run = wandb.init(**given)
        except wandb.errors.CommError as error:
            print(f"logger=wandb: {first_line(error).rstrip('.')}: this run is kept offline")
            wandb.teardown()  # whose service has the id, as of a run that is still to begin
            self.run = wandb.init(**given | {"mode": "offline"})
        except wandb.errors.Error as error:
            message = first_line(error).rstrip(".")
            raise ConfigError(f"logger=wandb: {message}; or set logger.mode=offline.") from error
        folder = Path(self.run.dir).parent
        offline = f"offline; to send it: wandb sync {folder}" if self.run.offline else "disabled"
        print(f"logger=wandb: {self.run.url or offline}")
        # W&B's own step may only grow, and a resumed run logs some updates again: ours is an axis.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def log(self, metrics: dict, step: int) -> None:
        self.run.log({**metrics, "step": step})  # W&B queues it: nothing waits for the network

    def table(self, name: str, columns: list[str], rows: list[list]) -> None:
        self.run.log({name: self.wandb.Table(columns=columns, data=rows)})

    def keep(self, path: Path) -> None:
        # Not copied first: a draft may be gigabytes.
        artifact = self.wandb.Artifact(f"{path.stem}-{self.run.id}", path.stem)
        if path.is_dir():
            artifact.add_dir(str(path), policy="immutable", skip_cache=True)
        else:
            self.run.log({path.stem: self.wandb.Html(path.read_text(), inject=False)})
            artifact.add_file(str(path), skip_cache=True)
        self.run.log_artifact(artifact)

    def finish(self, exit_code: int = 0) -> None:
        try:
            if self.run is not None:
                self.run.finish(exit_code=exit_code)
                self.wandb.teardown(exit_code=exit_code)
                self.run = None
        except Exception:
            self.abandon()
            raise

    def abandon(self) -> None:
        # Else W&B waits for its service at the end of the process, however long that takes.
        with contextlib.suppress(Exception):
            service = self.wandb.setup().ensure_service()
            service._cleanup()
            service._proc._process.kill()


class TensorBoard(NoTracker):
    """Event files under `run_dir`/tensorboard: `tensorboard --logdir outputs` shows all runs."""

    writer = None

    def start(self, run_dir: Path, name: str, config: dict, run_id: str, resumed: bool) -> None:
        from torch.utils.tensorboard import SummaryWriter

        text = yaml.safe_dump(redact(config), sort_keys=False)
        self.open, self.text = partial(SummaryWriter, str(run_dir / "tensorboard")), text

    def log(self, metrics: dict, step: int) -> None:
        if self.writer is None:  # what a resumed run logs again is no longer shown as it was
            self.writer = self.open(purge_step=step)
            self.writer.add_text("config", f"```\n{self.text}```")
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def table(self, name: str, columns: list[str], rows: list[list]) -> None:
        lines = [columns, ["---"] * len(columns), *rows]
        text = "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
        self.writer = self.writer or self.open()
        self.writer.add_text(name, text)

    def finish(self, exit_code: int = 0) -> None:
        if self.writer is not None:
            self.writer.close()


class Trackio(NoTracker):
    """trackio, on this machine, or where its environment variables say (TRACKIO_SPACE_ID)."""

    run = None

    def start(self, run_dir: Path, name: str, config: dict, run_id: str, resumed: bool) -> None:
        import trackio

        self.trackio = trackio
        # Its runs have no other id than their name.
        given = {"name": f"{name} {run_id}", "group": self.group, "resume": "allow"}
        # They advertise. Were stdout redirected, all would lose it where a call hangs.
        for module in (trackio, trackio.run, trackio.utils):
            module.print = lambda *text, **named: None
        self.run = trackio.init(self.project, config=redact(config), embed=False, **given)
        trackio.context_vars.current_run.set(None)  # which it would end, aloud, once more

    def log(self, metrics: dict, step: int) -> None:
        self.run.log(metrics, step=step)

    def table(self, name: str, columns: list[str], rows: list[list]) -> None:
        self.run.log({name: self.trackio.Table(columns=columns, data=rows)})

    def finish(self, exit_code: int = 0) -> None:
        if self.run is not None:
            self.run.finish()


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
    thread.daemon = True
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(FINISH_SECONDS)


def place(row: dict) -> tuple[int, bool]:
    # The order of lines: that of an update's evaluation follows that of its training.
    return row["step"], "loss" not in row


def forward_metrics(path: Path, tracker: NoTracker, sent: tuple, ended: threading.Event) -> None:
    """Send the lines after the place `sent`, until the block has ended and none is left."""
    file, rest, last = None, b"", False
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
            measured = {key: value for key, value in row.items() if value is not None}
            tracker.log(measured, measured.pop("step"))
