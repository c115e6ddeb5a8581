"""What Hydra and OmegaConf raise, as one sentence that names the key and the nearest valid one."""

import shlex
import sys
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError

from eagle3.config import RunConfig, compose_flat, nearest
from eagle3.errors import ConfigError, RunError
from eagle3.runs.disk import FULL, free_bytes, size_text
from eagle3.runs.logger import redact

OPEN = ("data.chat_template_kwargs.", "regenerate.extra_body.", "benchmark.paths.")
# Launchers and sweepers of hydra that come in packages, by the first word of their options.
PLUGINS = {"submitit": "pip install -e '.[slurm]'", "joblib": "pip install -e '.[sweep]'"}
PLUGINS |= {name: f"pip install hydra-{name}-launcher" for name in ("ray", "rq")}
PLUGINS |= {name: f"pip install hydra-{name}-sweeper" for name in ("ax", "nevergrad")}
EXPLAINED = (ConfigError, RunError, HydraException, OmegaConfBaseException, OSError)
NULL_GROUP = "Config group override"  # of hydra's ValueError
NEW_SOURCE = "{0} is no source of data yet: write '+data.sources={{{0}: {{path: ...}}}}'"


@contextmanager
def one_sentence(show_traceback: bool) -> Iterator[None]:
    """A mistake ends the process with a sentence and its exit code, or a traceback if asked for."""
    try:
        yield
    except Exception as error:
        if show_traceback or not is_explained(error):
            raise
        message, exit_code = explain(error)
        print(f"error: {redact(message)}", file=sys.stderr)
        sys.exit(exit_code)


def is_explained(error: Exception) -> bool:
    return isinstance(error, EXPLAINED) or NULL_GROUP in str(error)


def explain(error: BaseException) -> tuple[str, int]:
    """-> (sentence, exit code). Exceptions that wrap one of ours are seen through."""
    cause, seen = error, set()
    # Hydra and the launcher raise errors of their own from ours; OmegaConf's may form a circle.
    while cause is not None and id(cause) not in seen:
        if isinstance(cause, ConfigError | RunError):
            return str(cause), cause.exit_code
        seen.add(id(cause))
        cause = cause.__cause__ or cause.__context__
    if NULL_GROUP in str(error):
        return "a config group is null; name one of its options", 2
    if isinstance(error, MissingConfigException):
        group, _, option = (error.missing_cfg_file or "").rpartition("/")
        allowed = ", ".join(error.options or ()) + nearest(option, error.options or ())
        unknown, plugin = f"{group or '--config-name'}={option} is unknown", option.split("_")[0]
        if group.startswith("hydra/") and plugin in PLUGINS:
            return f"{unknown}, because a package is missing: {PLUGINS[plugin]}", 2
        return f"{unknown}; allowed: {allowed}", 2
    if isinstance(error, OverrideParseException):
        return unreadable(error.override, error.message), 2
    if isinstance(error, HydraException | OmegaConfBaseException):
        return wrong_key_or_value(error), 2
    if isinstance(error, OSError) and error.strerror in FULL:
        # Hydra writes before it says where.
        given = [a for a in sys.argv if a.startswith(("hydra.run.dir=", "hydra.sweep.dir="))]
        where = error.filename or "".join(given[-1:]).partition("=")[2] or Path.cwd()
        free = size_text(free_bytes(where))
        return f"{error.strerror}: {where} has {free} free; make room, or name another folder", 1
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.strerror}: {error.filename}; name another folder or free it", 1
    return " ".join(str(error).split()), 1


def unreadable(override: str, message: str) -> str:
    """An argument that Hydra's grammar refuses, and how to write it where a text was meant."""
    # The reason stands last, or above a line that only points at its place.
    *_, reason = (line for line in message.partition("\nSee ")[0].splitlines() if line.strip(" ^"))
    key, equals, value = override.partition("=")
    quoted = value.replace('"', '\\"')
    text = shlex.quote(f'{key}="{quoted}"')
    remedy = f"quote the text, as {text}" if equals else "write key=value"
    return f"{override} cannot be read ({reason}); {remedy}"


def wrong_key_or_value(error: Exception) -> str:
    """An unknown key, or a value of the wrong type; Hydra wraps what OmegaConf raised."""
    cause = error.__cause__ or error
    key = getattr(cause, "full_key", None)
    if isinstance(cause, ConfigKeyError | AttributeError) and key is not None:
        if key.startswith("data.sources."):
            return NEW_SOURCE.format(cause.key)
        if key.startswith(OPEN):  # these sections take any key
            return f"{key} is new to the config: put + before it, as +{key}=..."
        keys = [each for each in compose_flat([]) if "/" not in each]
        sections = sorted({each.rpartition(".")[0] for each in keys} - {""})
        return f"{key} is no key of the config{nearest(key, keys + sections)}"
    if isinstance(cause, ValidationError) and key is not None:
        wanted = type_of(key)
        if wanted is None:  # of keys that the user adds, only sources have a type
            return NEW_SOURCE.format(key)
        remedy = f", as '{key}=[{cause.value}]'" if wanted == "list" else ""
        return f"{key}={cause.value} must be of type {wanted}{remedy}"
    return " ".join(str(error).split())


def type_of(key: str) -> str | None:
    """What a key of the typed config holds, such as int; None where it has no such key."""
    hint: Any = RunConfig
    name, _, of_a_list = key.partition("[")
    for part in name.split("."):
        hint = getattr(hint, "__annotations__", {}).get(part)
    wrapped = (typing.Annotated, typing.Union, *([list] if of_a_list else []))
    while typing.get_origin(hint) in wrapped:
        hint = typing.get_args(hint)[0]
    return getattr(typing.get_origin(hint) or hint, "__name__", None) if hint else None
