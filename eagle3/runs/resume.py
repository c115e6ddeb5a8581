"""A run's folder: whose it is, what it shows of its config, and going on with it."""

import json
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from eagle3.config import RunConfig, check_targets, compose_flat, flatten
from eagle3.errors import ConfigError, DamageError, RunError
from eagle3.runs.artefact import STATE, fingerprint, read_manifest
from eagle3.runs.disk import instead_of, read_json, step_folders, write_atomically
from eagle3.runs.logger import REDACTED, redact

# Keys and sections that may change when a run is resumed, because no weight depends on them.
FREE = {
    "benchmark", "cache_dir", "check", "data.num_proc", "device", "draft_path", "export",
    "hidden_states.on_damage", "hidden_states.path", "launch", "logger", "name", "parallel", "plan",
    "regenerate", "runs", "stages", "sweep", "target.batch_tokens", "target.dp_size",
    "target.ep_size", "target.mem_fraction_static", "target.port", "target.python",
    "target.ready_seconds", "target.server_args", "target.tp_size", "target.url",
    "train.eval_every", "train.keep_last", "train.log_every", "train.resume",
    "train.save_every", "view",
}  # fmt: skip
# What lets a run start programs, or run code that came with a model: a folder may be a stranger's.
RUNS_CODE = (
    "model.trust_remote_code", "target.python", "target.server_args", "benchmark.python",
    "benchmark.server_args", "benchmark.execute_code", "benchmark.execute_code_unconfined",
)  # fmt: skip
SWEEP = "multirun.yaml"  # what hydra writes into the folder of a sweep
MADE: list[Path] = []  # folders that were not there before this process, an inner one first


def is_run(path: str | Path) -> bool:
    return (Path(path) / "run.json").is_file() and (Path(path) / "checkpoints" / "last").exists()


def check_checkpoints(run_dir: str | Path) -> None:
    """Raise RunError where checkpoints are there, but not what a run is resumed by."""
    folder = Path(run_dir) / "checkpoints"
    last, steps = folder / "last", step_folders(folder)
    if not steps:
        return
    if not last.exists():
        raise RunError(f"{last} is missing or leads nowhere; {instead_of(last)}")
    if "config" not in read_json(Path(run_dir) / "run.json"):
        remedy = "put it back, or start in another hydra.run.dir"
        raise RunError(f"{run_dir} has checkpoints, but no config in run.json: {remedy}")
    try:
        read_manifest(last / STATE)
    except DamageError as damage:
        raise RunError(f"checkpoint {last} is damaged ({damage}); {instead_of(last)}") from damage


def command_to_resume(
    run_dir: Path, overrides: list[str] | None = None, stages: Sequence[str] = ()
) -> str:
    """What goes on with a run, by `stages` or its own: by its checkpoint, if it has one, else the
    command with `overrides` (None: those of run.json), without logins.
    """
    recorded = read_json(run_dir / "run.json")
    listed = [f"stages=[{','.join(stages)}]"] if stages else []
    if is_run(run_dir):
        before = flatten(recorded.get("config", {}))
        given_again = [f"++{key}={json.dumps(before[key])}" for key in RUNS_CODE if before.get(key)]
        shown = [f"train.resume={run_dir}", *listed, *given_again]
    else:
        given = recorded.get("overrides", []) if overrides is None else overrides
        before = [each for each in given if not (listed and each.startswith("stages="))]
        shown = differing([*before, *listed])
    return shlex.join(["python", "run.py", *redact(shown)])


def differing(overrides: list[str]) -> list[str]:
    """A command line without what names a default, where it comes to the same so."""
    # An option may lie where only the whole command line looks.
    with suppress(HydraException, OmegaConfBaseException):
        # Not one by one: a composition takes a fifth of a second, and Ctrl-C waits for the command.
        defaults, needed = compose_flat([]), []
        for each in OverridesParser.create().parse_overrides(overrides):
            named = flatten({each.key_or_group: each.value()})
            if not named.items() <= defaults.items():
                needed.append(each.input_line)
        if needed != overrides and compose_flat(needed) == compose_flat(overrides):
            return needed
    return overrides


def missing(folder: Path) -> list[Path]:
    return [path for path in (folder, *folder.parents) if not path.exists()]


@contextmanager
def remove_unused(arguments: list[str]) -> Iterator[None]:
    """At the block's end, remove the folders made in it in which no run has begun, as for a plan
    or a refused config; the command line's `arguments` may name one that hydra will make.
    """
    for argument in arguments:
        if argument.startswith(("hydra.run.dir=", "hydra.sweep.dir=")):
            MADE.extend(missing(Path(argument.partition("=")[2])))
    try:
        yield
    finally:
        for folder in MADE:
            with suppress(OSError):  # it is not empty, or gone
                if [path.name for path in folder.iterdir()] == [SWEEP]:
                    (folder / SWEEP).unlink()
                folder.rmdir()


def run_folder(resume: str, default: str) -> str:
    """Hydra's run dir: the run that `train.resume` names, else a new one, made here.

    Where another run has its name, as one begun in the same second, it is `default`-2, -3, ...
    """
    if resume != "auto":
        check_checkpoints(resume)
        if not is_run(resume):
            raise ConfigError(f"train.resume={resume} is no run folder with a checkpoint; give one")
        return resume
    for number in count(1):
        folder = Path(default if number == 1 else f"{default}-{number}")
        new = missing(folder)
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
            MADE.extend(new)
            return str(folder)


def sweep_folder(resume: str | None, default: str) -> str:
    """Hydra's sweep dir: the sweep that `sweep.resume` names, else a new one, made here."""
    if resume is None:
        return run_folder("auto", default)
    if not (Path(resume) / SWEEP).is_file():
        raise ConfigError(f"sweep.resume={resume} is no folder of a sweep ({SWEEP}); give one")
    return resume


# Cached: hydra asks once for each job of a sweep.
OmegaConf.register_new_resolver("run_dir", run_folder, use_cache=True, replace=True)
OmegaConf.register_new_resolver("sweep_dir", sweep_folder, use_cache=True, replace=True)


@contextmanager
def claim(run_dir: Path) -> Iterator[None]:
    """Makes the folder this process's in the block. ConfigError where it is another's.

    If no run has begun there by its end, the folder is left as it was.
    """
    try:
        held = FileLock(run_dir / ".lock").acquire(timeout=0)
    except Timeout as error:
        raise ConfigError(f"{run_dir} is in use by a run; set another hydra.run.dir") from error
    with held:
        try:
            yield
        finally:
            if not (run_dir / "run.json").exists():
                (run_dir / ".lock").unlink(missing_ok=True)
                if any((folder / SWEEP).exists() for folder in run_dir.parents):
                    with suppress(OSError):
                        os.removedirs(run_dir)  # as far as the sweep's, for a job's is hydra's


def write_hydra_folder(composed: DictConfig, settings: DictConfig, run_dir: Path) -> None:
    """`.hydra` as hydra would write it, but for logins."""
    folder = run_dir / (".hydra/resumed" if is_run(run_dir) else ".hydra")
    folder.mkdir(parents=True, exist_ok=True)
    overrides = settings.overrides.task
    shown = {"config": composed, "hydra": {"hydra": settings}, "overrides": overrides}
    for name, each in shown.items():
        write_redacted(folder / f"{name}.yaml", OmegaConf.to_yaml(each))


def redact_sweep(settings: DictConfig) -> None:
    """Take logins out of the multirun.yaml that hydra has written, as not every sweeper does."""
    if settings.mode == RunMode.MULTIRUN:
        for path in Path(settings.sweep.dir).glob(SWEEP):
            write_redacted(path, path.read_text())


def write_redacted(path: Path, text: str) -> None:
    shown = yaml.safe_dump(redact(yaml.safe_load(text)), sort_keys=False)
    write_atomically(path, [shown.encode()])  # jobs of a sweep write its file together


def private_copy(cache_dir: str, run_dir: Path) -> Path:
    """Where a run's config is kept whole, for its user alone, if run.json must not show it all."""
    name = fingerprint({"run_dir": str(run_dir.resolve())})
    return Path(cache_dir).expanduser() / "private" / f"{name}.json"


def keep_private(settings: dict[str, Any], run_dir: Path) -> None:
    path = private_copy(settings["cache_dir"], run_dir)
    if redact(settings) == settings:
        if path.exists():  # a cache whose folder is a file is said later, by its key
            path.unlink()
        return
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.touch(mode=0o600)
    path.write_text(json.dumps(settings))


def literal(value: Any) -> Any:
    """Nested values in which OmegaConf finds no interpolation."""
    if isinstance(value, dict):
        return {key: literal(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [literal(inner) for inner in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def load_config(composed: DictConfig, run_dir: Path, overrides: list[str]) -> RunConfig:
    """The composed config, or a resumed run's own. ConfigError if that would be another draft, or
    if it has a `_target_` that is not offered.
    """
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise ConfigError(f"{missing[0]} has no value; set {missing[0]}=...")
    resume = composed.train.resume
    check_checkpoints(run_dir)
    # Named, only the overrides of this command line count; found in the run dir, all of them do.
    named = resume != "auto"
    if named and (not is_run(resume) or Path(resume).resolve() != Path(run_dir).resolve()):
        raise ConfigError(f"train.resume={resume} must be a run with a checkpoint, not with -m")
    config = take_up(composed, run_dir, overrides if named else None)
    config = OmegaConf.to_object(config)
    check_targets("", asdict(config))
    return config


def is_within(key: str, name: str) -> bool:
    return f"{key}.".startswith(f"{name}.")


def take_up(composed: DictConfig, run_dir: Path, overrides: list[str] | None) -> DictConfig:
    """The config of the run in a folder, with `overrides` of it (None: all) as composed."""
    if not is_run(run_dir):
        return composed
    recorded = read_json(run_dir / "run.json", parse_constant=float)["config"]
    whole = read_json(private_copy(recorded["cache_dir"], run_dir)) or recorded
    saved = OmegaConf.merge(OmegaConf.structured(RunConfig), literal(whole))
    for key in OmegaConf.missing_keys(saved):  # which are newer than the run
        OmegaConf.update(saved, key, OmegaConf.select(composed, key))
    before, keys = flatten(saved), flatten(composed)
    resumed = composed if overrides is None else OmegaConf.merge(saved)
    # +key, ~key and group/name@package=option: what they set lies under the bare name.
    given = [re.split("[=@]", each.lstrip("+~"))[0].replace("/", ".") for each in overrides or ()]
    for name in given:
        if any(is_within(key, name) for key in keys):
            value = OmegaConf.select(composed, name)
            OmegaConf.update(resumed, name, value, merge=False, force_add=True)
    now = flatten(resumed)
    for key in before | now:
        free = any(is_within(key, name) for name in FREE)
        # Two logins are no two drafts.
        if not free and redact({key: before.get(key)}) != redact({key: now.get(key)}):
            differs = f"{key}={now.get(key)} differs from the run in {run_dir}, which has"
            raise ConfigError(f"{differs} {before.get(key)}; start a new run instead")
        given_again = overrides is None or any(is_within(key, name) for name in given)
        if not given_again and key in RUNS_CODE and now.get(key):
            problem = f"{key}={now[key]} of the run in {run_dir} lets it run code"
            argument = shlex.quote(f"++{key}={json.dumps(now[key])}")
            raise ConfigError(f"{problem}; where you trust it, give it again: {argument}")
        if REDACTED in str(now.get(key)):
            raise ConfigError(f"{key} of the run in {run_dir} holds a login; give {key}=... again")
    return resumed
