"""Going on with a run that was stopped: its folder, its config, and what may differ from it."""

import shlex
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from eagle3.config import RunConfig, flatten
from eagle3.errors import ConfigError, DamageError, RunError
from eagle3.runs.artefact import STATE, read_manifest
from eagle3.runs.disk import instead_of, read_json, step_folders

# Keys and sections that may change when a run is resumed, because no weight depends on them.
FREE = {
    "benchmark", "cache_dir", "check", "data.num_proc", "device", "draft_path", "export",
    "hidden_states.on_damage", "hidden_states.path", "launch", "logger", "name", "parallel", "plan",
    "regenerate", "stages", "target.batch_tokens", "target.dp_size", "target.ep_size",
    "target.mem_fraction_static", "target.port", "target.python", "target.ready_seconds",
    "target.server_args", "target.tp_size", "target.url", "train.eval_every", "train.keep_last",
    "train.log_every", "train.resume", "train.save_every", "view",
}  # fmt: skip


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


def read_overrides(run_dir: Path) -> list[str]:
    """The command line that a run was started with; [] before it has written run.json."""
    return read_json(run_dir / "run.json").get("overrides", [])


def command_to_resume(run_dir: Path, overrides: list[str]) -> str:
    given = f"train.resume={run_dir}" if is_run(run_dir) else shlex.join(overrides)
    return f"python run.py {given}"


def run_folder(resume: str, default: str) -> str:
    """Hydra's run dir: the run that `train.resume` names, else a new one."""
    if resume == "auto":
        return default
    check_checkpoints(resume)
    if not is_run(resume):
        raise ConfigError(f"train.resume={resume} is no run folder with a checkpoint; give one")
    return resume


OmegaConf.register_new_resolver("run_dir", run_folder, replace=True)
OmegaConf.register_new_resolver(
    "hydra_folder", lambda resume: ".hydra" if resume == "auto" else ".hydra/resumed", replace=True
)


def load_config(composed: DictConfig, run_dir: Path, overrides: list[str]) -> RunConfig:
    """The composed config, or a resumed run's own. ConfigError if that would be another draft."""
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise ConfigError(f"{missing[0]} has no value; set {missing[0]}=...")
    resume = composed.train.resume
    check_checkpoints(run_dir)
    # Named, only the overrides of this command line count; found in the run dir, all of them do.
    named = resume != "auto"
    if named and (not is_run(resume) or Path(resume).resolve() != Path(run_dir).resolve()):
        raise ConfigError(f"train.resume={resume} must be a run with a checkpoint, not with -m")
    if not is_run(run_dir):
        return OmegaConf.to_object(composed)
    recorded = read_json(run_dir / "run.json", parse_constant=float)["config"]
    saved = OmegaConf.merge(OmegaConf.structured(RunConfig), recorded)
    resumed, keys = OmegaConf.merge(saved) if named else composed, flatten(composed)
    for override in overrides if named else ():
        # +key, ~key and group/name@package=option: what they set lies under the bare name.
        key = override.lstrip("+~").split("=")[0].split("@")[0].replace("/", ".")
        if any(k == key or k.startswith(f"{key}.") for k in keys):
            value = OmegaConf.select(composed, key)
            OmegaConf.update(resumed, key, value, merge=False, force_add=True)
    before, now = flatten(saved), flatten(resumed)
    for key in before | now:
        free = key in FREE or key.split(".")[0] in FREE
        if not free and before.get(key) != now.get(key):
            differs = f"{key}={now.get(key)} differs from the run in {run_dir}, which has"
            raise ConfigError(f"{differs} {before.get(key)}; start a new run instead")
    return OmegaConf.to_object(resumed)
