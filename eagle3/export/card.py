"""The model card of a draft, `draft/README.md`, and its way to the hub."""

import shlex
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, get_token, hf_hub_download

from eagle3.config import last_part
from eagle3.draft.model import DraftConfig
from eagle3.errors import ConfigError, RunError, first_line
from eagle3.export.read import is_hub_id, read_config, read_shape
from eagle3.export.serve import ENGINES, serve_text
from eagle3.runs.disk import read_json, write_atomically
from eagle3.runs.logger import redact
from eagle3.runs.report import benchmark_rows, cell, cells, settings_of, templates

RECIPE = (
    "mode._target_", "model.aux_layer_ids", "draft.init_from", "loss.gamma",
    "loss.pointwise._target_", "loss.mask._target_", "loss.weights._target_",
    "optimizer._target_", "optimizer.lr", "scheduler._target_",
    "train.epochs", "train.tokens_per_step", "train.grad_accum", "train.documents_per_update",
    "data.max_length", "launch.nproc_per_node", "launch.nnodes", "model.dtype", "seed",
)  # fmt: skip
BLOCK = ("draft.layers", "draft.block", "draft.anchors")
LICENCE_KEYS = ("license", "license_name", "license_link")


def write_card(run_dir: Path) -> Path:
    """Write `run_dir`/draft/README.md from the run's files, as far as they are; return its path."""
    folder, run = run_dir / "draft", redact(read_json(run_dir / "run.json"))
    config, made_for = run["config"], read_json(folder / "config.json")["made_for"]
    shown = config["export"].get("push_to_hub") or str(folder.resolve())
    evaluation = read_json(run_dir / "evaluation.json")
    benchmark = redact(read_json(run_dir / "benchmark.json"))
    rows, inputs = benchmark_rows(benchmark), run.get("inputs", {})
    shape = read_shape(folder, read_config(folder))
    values = {"commands": serve_commands(folder, shown), "recipe": recipe(run, evaluation, shape)}
    values |= {"shape": shape}
    values |= {"command": shlex.join(["python", "run.py", *run.get("overrides", [])])}
    protocol = {k: v for k, v in benchmark.get("protocol", {}).items() if v is not None}
    values |= {"protocol": {key.replace("_", " "): cell(key, v) for key, v in protocol.items()}}
    values |= {"target": name_of(made_for["target"]), "made_for": made_for, "config": config}
    values |= {"hub_target": is_hub_id(made_for["target"]) and made_for["target"]}
    values |= {"licence": licence(made_for["target"]), "evaluation": evaluation}
    values |= {"data": data_names(config["data"]), "regenerated": "regenerated" in inputs}
    values |= {"documents": inputs.get("prepared", {}).get("documents")}
    values |= {"rows": [{"cells": cells(row)} for row in rows]}
    card = templates(Path(__file__).parent, autoescape=False).get_template("card.md")
    path = folder / "README.md"
    write_atomically(path, [(card.render(values).strip() + "\n").encode()])
    return path


def recipe(run: dict[str, Any], evaluation: dict[str, Any], shape: DraftConfig) -> dict[str, str]:
    """What was trained how, by key of the config."""
    settings, versions = settings_of(run), run.get("versions", {})
    own = BLOCK if shape.reads_mask_token else ("draft.ttt_steps", "draft.vocab_size")
    found = {key.removesuffix("._target_"): last_name(settings.get(key)) for key in RECIPE + own}
    if settings.get("draft.init_from"):
        found["draft.init_from"] = name_of(settings["draft.init_from"])
    found |= {"update of the checkpoint": evaluation.get("update"), "commit": run.get("git")}
    found |= {name: versions.get(name) for name in ("torch", "transformers")}
    return {key: cell("", value) for key, value in found.items() if value is not None}


def last_name(value: Any) -> Any:
    """eagle3.batch.serving -> serving."""
    named = isinstance(value, str) and value.startswith(("eagle3.", "torch."))
    return value.rpartition(".")[2] if named else value


def name_of(path: str) -> str:
    """A hub id as it is; of a folder its name, as the rest is this machine's."""
    return path if is_hub_id(path) else last_part(path)


def data_names(data: dict[str, Any]) -> list[str]:
    paths = [data["path"]] if data["path"] else []
    return [name_of(path) for path in [*paths, *(s["path"] for s in data["sources"].values())]]


def licence(target: str) -> dict[str, str]:
    """What the target's own model card says of its licence; {} where it says nothing."""
    with suppress(Exception):  # whatever keeps a card from being found or read
        local = Path(target, "README.md")
        path = hf_hub_download(target, "README.md") if is_hub_id(target) else local
        said = ModelCard(Path(path).read_text(encoding="utf-8")).data.to_dict()
        return {key: str(said[key]) for key in LICENCE_KEYS if said.get(key)}
    return {}


def serve_commands(folder: Path, shown: str) -> dict[str, str]:
    """The command of every engine for the draft in `folder`, which is called `shown` in it."""
    commands = {}
    for engine in (*ENGINES, "trtllm"):
        with suppress(RunError):  # a target that is no longer where it was
            text = serve_text(engine, str(folder), None, None, None, [])
            commands[engine] = text.replace(str(folder.resolve()), shown)
    return commands


def check_push(repository: str) -> None:
    """Raise ConfigError, before anything is computed, where an upload could not begin."""
    if not is_hub_id(repository):
        raise ConfigError(f"export.push_to_hub={repository} is no hub id; write it as name/draft")
    if get_token() is None:
        raise ConfigError("export.push_to_hub needs a login: hf auth login, or set HF_TOKEN")


def push(run_dir: Path, report: Path, repository: str, command: str) -> None:
    """Upload `run_dir`/draft and the report in one commit; RunError names what repeats it."""
    folder = run_dir / "draft"
    files = {path.name: path for path in sorted(folder.iterdir())} | {report.name: report}
    operations = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
    try:
        api = HfApi()
        api.create_repo(repository, exist_ok=True)
        made = api.create_commit(repository, operations, commit_message="Draft, card and report")
    except Exception as error:  # of whatever kind: the draft is there
        problem = f"export.push_to_hub={repository} failed ({first_line(error).rstrip('.')})"
        raise RunError(f"{problem}; the draft is in {folder}; go on with: {command}") from error
    print(f"export: {made.repo_url}")
