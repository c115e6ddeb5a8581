"""What a run leaves behind while it runs: metrics.jsonl always, an experiment tracker if one is
chosen.

A tracker is a class with the five methods of `NoTracker`; conf/logger/ names one.
"""

import importlib.util
import json
import math
import os
import re
from pathlib import Path
from typing import Any

from eagle3.errors import ConfigError

REDACTED = "<redacted>"
# A key that holds a login; a token of text (`eos_token`, `bytes_per_token`) is none, nor are
# `tokens_per_step`.
TEXT_TOKENS = r"(?<!bos_|eos_|pad_|unk_|sep_|cls_)(?<!mask_|_per_)(?<!image_)"
SECRET = (
    r"(?:secret|passw|passphrase|credential|authorization|(?:api|access|private)[_-]?key|auth_?token)\w*"
    rf"|{TEXT_TOKENS}token\b"
)
VALUE = r"\{[^}]*\}|\[[^\]]*\]|\"[^\"]*\"|'[^']*'|[^\s,&}\])]+"
ASSIGNED = re.compile(rf"((?:{SECRET})['\"]?\s*[=:]\s*)({VALUE})", re.I)
SECRET_KEY = re.compile(SECRET, re.I)
# Access tokens by their look, and the login in `https://user:password@host`.
KNOWN_SECRETS = re.compile(
    r"\b(?:hf_|gh[pousr]_|github_pat_|sk-|wandb_v1_)[\w-]{16,}|(?<=://)[^/@\s]+(?=@)"
)


def redact(config: Any) -> Any:
    """A copy of `config` (nested dicts, lists, values) whose secrets read `<redacted>`; empty ones
    stay as they are.

    Also inside overrides (`hub.token=...`) and URLs, and wherever a string looks like a known
    access token.
    """
    if isinstance(config, dict):
        return {
            k: REDACTED if value and SECRET_KEY.search(str(k)) else redact(value)
            for k, value in config.items()
        }
    if isinstance(config, list | tuple):
        return [redact(value) for value in config]
    if not isinstance(config, str):
        return config
    text = KNOWN_SECRETS.sub(REDACTED, config)
    key, assigns, _ = text.partition("=")
    if assigns and re.fullmatch(r"[+~]{0,2}[\w./@-]+", key) and SECRET_KEY.search(key):
        return f"{key}={REDACTED}"
    return ASSIGNED.sub(rf"\1{REDACTED}", text) if assigns else text


def finite(value: Any) -> Any:
    """`value` with NaN and infinities as None, which JSON can hold; lists and dicts are gone
    through.
    """
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
        """Starts the file anew, or keeps what an earlier part of the run wrote up to and including
        `resume_step`.
        """
        self.path = Path(path)
        kept = (
            []
            if resume_step is None
            else [row for row in read_metrics(path) if row["step"] <= resume_step]
        )
        fresh = self.path.with_name(self.path.name + ".partial")
        fresh.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(fresh, self.path)
        self.file = self.path.open("a")

    def log(self, metrics: dict, step: int) -> None:
        """Appends `metrics` (numbers, strings, lists of them) as of update `step`; NaN becomes
        null.
        """
        self.file.write(json.dumps(finite({"step": step, **metrics}), allow_nan=False) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class NoTracker:
    """metrics.jsonl is all there is."""

    def start(self, run_dir: str, name: str, config: dict, run_id: str | None = None) -> str | None:
        """Begins or, given the id that an earlier `start` returned, continues a run; returns its
        id.
        """

    def log(self, metrics: dict, step: int) -> None:
        """Numbers as of update `step`."""

    def table(self, name: str, columns: list[str], rows: list[list]) -> None:
        """A table of plain values."""

    def file(self, path: str | Path) -> None:
        """A file of the run; a page (.html) is shown."""

    def finish(self, exit_code: int = 0) -> None:
        """Ends the run and whatever the tracker started."""


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
        self.options = {
            "project": project,
            "entity": entity,
            "group": group,
            "mode": mode,
            "tags": tags,
        }
        self.run = None

    def start(self, run_dir: str, name: str, config: dict, run_id: str | None = None) -> str | None:
        """Begins or continues a run under `run_dir`/wandb. `config` is redacted; put the overrides
        into it too.
        """
        import wandb

        # Without these W&B stores the command line, which may hold a token, and a diff of the
        # working tree.
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
        # Its own step may only grow, and a resumed run logs some updates again: ours is a metric
        # and the x axis.
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
            self.run.log_artifact(
                str(path), name=re.sub(r"[^\w.-]", "_", f"{path.name}-{self.run.id}"), type="file"
            )

    def finish(self, exit_code: int = 0) -> None:
        """Uploads what is left and ends the background service; does nothing when no run was
        started.
        """
        if self.run is not None:
            import wandb

            self.run.finish(exit_code=exit_code)
            wandb.teardown(exit_code=exit_code)
            self.run = None
