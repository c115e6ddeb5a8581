"""What a run leaves behind while it runs: metrics.jsonl always, an experiment tracker if one is chosen.

A tracker is a class with the five methods of `NoTracker`; conf/logger/ names one.
"""

import importlib.util
import json
import math
import os
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

from eagle3.errors import ConfigError

REDACTED = "<redacted>"
SECRET_WORDS = {
    "apikey", "authorization", "authtoken", "accesstoken", "bearer", "credential", "credentials", "hftoken",
    "passphrase", "passwd", "password", "passwords", "secret", "secrets",
}  # fmt: skip
SECRET_PAIRS = {
    ("api", "key"),
    ("api", "keys"),
    ("access", "key"),
    ("private", "key"),
    ("wandb", "key"),
    ("ssh", "key"),
}
LOGIN_WORDS = {"access", "api", "auth", "bearer", "hf", "hub", "login", "refresh", "session", "wandb"}
# A token of text rather than of a login: `eos_token`, `bytes_per_token`, `token_id`.
TEXT_TOKEN_BEFORE = {
    "additional", "assistant", "audio", "begin", "bos", "cls", "each", "end", "eos", "first", "image", "last", "mask",
    "max", "min", "next", "num", "pad", "per", "sep", "special", "start", "stop", "turn", "unk", "user", "video",
}  # fmt: skip
TEXT_TOKEN_AFTER = {"budget", "count", "counts", "dtype", "id", "ids", "index", "ratio", "type", "types"}
KNOWN_SECRETS = re.compile(r"\b(hf_|gh[pousr]_|github_pat_|sk-|wandb_v1_)[A-Za-z0-9_-]{16,}")
URL_LOGIN = re.compile(r"(?<=://)[^/@\s]+(?=@)")
OVERRIDE = re.compile(r"[+~]{0,2}[\w./@-]+=")
ASSIGNMENT = re.compile(r"([\w.@/-]+)(\s*[=:]\s*)(\"[^\"]*\"|'[^']*'|[^\s,&}\])]+)")


def is_secret(key: str) -> bool:
    """Whether a config key names something to hide: a login's token, not the tokens of a text."""
    words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", key.rsplit(".", 1)[-1])]
    if SECRET_WORDS.intersection(words) or SECRET_PAIRS.intersection(pairwise(words)):
        return True
    if "tokens" in words:
        return not LOGIN_WORDS.isdisjoint(words)
    if "token" not in words:
        return False
    place = words.index("token")
    before, after = words[:place][-1:], words[place + 1 :][:1]
    return TEXT_TOKEN_BEFORE.isdisjoint(before) and TEXT_TOKEN_AFTER.isdisjoint(after)


def redact(config: Any) -> Any:
    """A copy of `config` (nested dicts, lists, values) whose secrets read `<redacted>`; empty ones stay as they are.

    Also inside overrides (`hub.token=...`), URLs with a login, and wherever a string looks like a known access token.
    """
    if isinstance(config, dict):
        hidden = {key for key, value in config.items() if is_secret(str(key)) and value not in (None, "", True, False)}
        return {key: REDACTED if key in hidden else redact(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [redact(value) for value in config]
    if not isinstance(config, str):
        return config
    text = URL_LOGIN.sub(REDACTED, KNOWN_SECRETS.sub(REDACTED, config))
    if OVERRIDE.match(text) or "://" in text:
        text = hide_assigned(text)
    return text


def hide_assigned(text: str) -> str:
    """`text` without the values that are assigned to secret keys in it: `a.token=x`, `a={token:x}`, `?token=x`."""
    whole = OVERRIDE.match(text)
    if whole and is_secret(whole[0].rstrip("=")):
        return whole[0] + REDACTED
    return ASSIGNMENT.sub(lambda match: match[1] + match[2] + REDACTED if is_secret(match[1]) else match[0], text)


def finite(value: Any) -> Any:
    """`value` with NaN and infinities as None, which JSON can hold; lists and dicts are gone through."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return value


def read_metrics(path: str | Path) -> list[dict]:
    """The lines of a metrics.jsonl; [] where there is none. A line cut off by a kill is left out."""
    rows = []
    if Path(path).exists():
        for line in Path(path).read_text(errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows


class JsonLines:
    """metrics.jsonl: one JSON object a `log` call, on disk when the call returns."""

    def __init__(self, path: str | Path, resume_step: int | None = None):
        """Starts the file anew, or keeps what an earlier part of the run wrote up to and including `resume_step`."""
        self.path = Path(path)
        kept = [] if resume_step is None else [row for row in read_metrics(path) if row["step"] <= resume_step]
        fresh = self.path.with_name(self.path.name + ".partial")
        fresh.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(fresh, self.path)
        self.file = self.path.open("a")

    def log(self, metrics: dict, step: int) -> None:
        """Appends `metrics` (numbers, strings, lists of them) as of update `step`; NaN becomes null."""
        self.file.write(json.dumps(finite({"step": step, **metrics}), allow_nan=False) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class NoTracker:
    """metrics.jsonl is all there is."""

    def start(self, run_dir: str, name: str, config: dict, run_id: str | None = None) -> str | None:
        """Begins or, given the id that an earlier `start` returned, continues a run; returns its id."""

    def log(self, metrics: dict, step: int) -> None:
        """Numbers as of update `step`."""

    def table(self, name: str, columns: list[str], rows: list[list]) -> None:
        """A table of plain values."""

    def file(self, path: str | Path) -> None:
        """A file of the run; a page (.html) is shown."""

    def finish(self, exit_code: int = 0) -> None:
        """Ends the run and whatever the tracker started."""


class Wandb:
    """Weights & Biases; `mode` null leaves online or offline to its own settings and environment variables."""

    def __init__(
        self,
        project: str,
        entity: str | None = None,
        group: str | None = None,
        mode: str | None = None,
        tags: list[str] | None = None,
    ):
        if mode not in (None, "online", "offline", "disabled"):
            raise ConfigError(f"logger.mode must be null, online, offline or disabled, not {mode!r}.")
        if importlib.util.find_spec("wandb") is None:
            raise ConfigError("logger=wandb needs the wandb package: pip install wandb, or take logger=jsonl.")
        self.options = {"project": project, "entity": entity, "group": group, "mode": mode, "tags": tags}
        self.run = None

    def start(self, run_dir: str, name: str, config: dict, run_id: str | None = None) -> str | None:
        """Begins or continues a run under `run_dir`/wandb. `config` is redacted; put the overrides into it too."""
        import wandb

        # Without these W&B stores the command line, which may hold a token, and a diff of the working tree.
        settings = wandb.Settings(x_disable_meta=True, disable_git=True, disable_code=True, console="off")
        options = {**self.options, "resume": "allow" if run_id else None, "settings": settings}
        try:
            self.run = wandb.init(dir=str(run_dir), name=name, id=run_id, config=redact(config), **options)
        except wandb.errors.Error as error:
            message = str(error).splitlines()[0].rstrip(".")
            raise ConfigError(f"logger=wandb: {message}; or set logger.mode=offline.") from error
        # Its own step may only grow, and a resumed run logs some updates again: ours is a metric and the x axis.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")
        return self.run.id

    def log(self, metrics: dict, step: int) -> None:
        self.run.log({**metrics, "step": step})

    def table(self, name: str, columns: list[str], rows: list[list]) -> None:
        import wandb

        self.run.log({name: wandb.Table(columns=columns, data=rows, allow_mixed_types=True)})

    def file(self, path: str | Path) -> None:
        import wandb

        path = Path(path)
        if path.suffix == ".html":
            self.run.log({path.stem: wandb.Html(path.read_text(), inject=False)})
        else:
            self.run.log_artifact(str(path), name=re.sub(r"[^\w.-]", "_", f"{path.name}-{self.run.id}"), type="file")

    def finish(self, exit_code: int = 0) -> None:
        """Uploads what is left and ends the background service; does nothing when no run was started."""
        if self.run is not None:
            import wandb

            self.run.finish(exit_code=exit_code)
            wandb.teardown(exit_code=exit_code)
            self.run = None
