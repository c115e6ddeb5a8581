"""A draft on disk or on the hub, in any known form, read under the portable names; unjudged.

Known are the portable form (this project, SpecForge, the official release), that of speculators and
vLLM (`layers.0.*`, a nested config), and names as engines keep them in memory (`model.*`,
`draft_id_to_target_id`).
"""

import json
import pickle
import re
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file

from eagle3.draft.model import DraftConfig
from eagle3.errors import ConfigError, RunError
from eagle3.target.layers import meant_by

SINGLE, INDEX, PICKLED = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
SIZES = {field.name for field in fields(DraftConfig) if field.type is int} | {"num_hidden_layers"}
LLAMA_DEFAULTS = {  # of transformers
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
}
RENAMES = (
    (r"^model\.", ""),
    (r"^layers\.0\.", "midlayer."),
    (r"^draft_id_to_target_id$", "d2t"),
    (r"^aux_norm_low\.", "fc_norm.0."),
    (r"^aux_norm_mid\.", "fc_norm.1."),
    (r"^aux_norm_high\.", "fc_norm.2."),
)


def is_hub_id(path: str) -> bool:
    """Whether `path`, which is no folder here, has the form owner/name."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path)) and not Path(path).exists()


def check_given(path: str, key: str) -> None:
    """Raise ConfigError where `path` is neither a folder nor has the form of a hub id."""
    if not Path(path).is_dir() and not is_hub_id(path):
        raise ConfigError(f"{key}={path} does not exist; give a local folder or a hub id")


@cache
def locate(path: str, key: str = "draft_path") -> Path:
    """The folder of a draft: a local one, else what the hub has under this id.

    Only config and weights are fetched, and a pickle only where there is nothing else. Raises
    RunError.
    """
    if Path(path).is_dir() or not is_hub_id(path):
        return Path(path)
    try:
        wanted = ["config.json", "*.safetensors", INDEX]
        folder = Path(snapshot_download(path, allow_patterns=wanted))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(path, allow_patterns=[PICKLED])
        return folder
    except GatedRepoError as error:
        reason = ": the hub wants you to log in; accept its terms there first"
        raise RunError(f"{key}={path}{reason}") from error
    except RepositoryNotFoundError as error:
        reason = " is neither a folder nor on the hub; check the spelling"
        raise RunError(f"{key}={path}{reason}") from error
    except (LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = " is no folder and the hub cannot be reached; give a folder, or connect once"
        raise RunError(f"{key}={path}{reason} to fetch it") from error


def read_config(folder: Path) -> dict[str, Any]:
    """A draft's config.json as it stands. Raises RunError where there is none, or a size in it is
    no number.
    """
    try:
        given = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        inside = (folder / "draft" / "config.json").is_file()
        remedy = "; the draft is its folder draft/" if inside else ""
        raise unreadable(folder, error, remedy) from error
    if not isinstance(given, dict):
        raise unreadable(folder, "config.json is no JSON object")
    config = flatten(given)
    for name in sorted(SIZES & config.keys()):
        value = config[name]
        if value is not None and (type(value) is not int or value < 1):
            wanted = "in config.json must be a whole number above 0"
            raise RunError(f"draft at {folder}: {name}={value!r} {wanted}")
    for section in (config, config.get("eagle_config") or {}):
        ids = section.get("eagle_aux_hidden_state_layer_ids") or []
        if not isinstance(ids, list) or not all(type(i) is int for i in ids):
            wanted = "must be a list of whole numbers"
            raise RunError(f"draft at {folder}: eagle_aux_hidden_state_layer_ids={ids} {wanted}")
    return given


def unreadable(folder: Path, reason: Exception | str, remedy: str = "") -> RunError:
    return RunError(f"draft at {folder} cannot be read: {' '.join(str(reason).split())}{remedy}")


def flatten(given: dict[str, Any]) -> dict[str, Any]:
    """The config of speculators as the portable form has it; any other as it is."""
    if "speculators_model_type" not in given:
        return given
    nested = ("transformer_layer_config", "speculators_config")
    outer = {key: value for key, value in given.items() if key not in nested and value is not None}
    return (given.get("transformer_layer_config") or {}) | outer


def named_layers(config: dict[str, Any]) -> list[int] | None:
    """The layers whose outputs a draft reads, by its flat config; None where that names none.

    `eagle_config` counts as this project does; the top-level key counts one more, as vLLM does.
    """
    ids = (config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    above = config.get("eagle_aux_hidden_state_layer_ids")
    return ids if ids or not above else meant_by("vllm", above)


@dataclass
class DraftFiles:
    """A draft as found: `config` flat, as the portable form has it, `tensors` under the portable
    names.

    `given` is config.json itself; `renamed` maps portable names to those in the file, where they
    differ; `weights` is the name of the file that the tensors come from.
    """

    folder: Path
    config: dict[str, Any]
    given: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    renamed: dict[str, str]
    weights: str

    @property
    def is_speculators(self) -> bool:
        return "speculators_model_type" in self.given

    @property
    def rope_theta(self) -> float | None:
        """None where config.json names none; engines then take 10000."""
        parameters = self.config.get("rope_parameters") or {}
        return parameters.get("rope_theta", self.config.get("rope_theta"))

    @property
    def rope_scaling(self) -> dict | None:
        """The scaling that engines apply, None where they scale nothing."""
        scaling = self.config.get("rope_scaling") or self.config.get("rope_parameters") or {}
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        return None if kind == "default" else scaling

    @property
    def shape(self) -> DraftConfig:
        """With what engines take for keys that config.json leaves out.

        Raises KeyError for one that has no default.
        """
        given = {key: value for key, value in self.config.items() if value is not None}
        heads = given["num_attention_heads"]
        values = LLAMA_DEFAULTS | {
            "num_key_value_heads": heads,
            "head_dim": given["hidden_size"] // heads,
            "target_hidden_size": given["hidden_size"],
            "draft_vocab_size": given["vocab_size"],
        }
        values |= given | {"rope_theta": self.rope_theta or 10000.0}
        names = [field.name for field in fields(DraftConfig)]
        return DraftConfig(**{name: values[name] for name in names if name in values})


def read_any(folder: Path) -> DraftFiles:
    """A draft of any known form. Raises RunError where none is there or safe to read."""
    given = read_config(folder)
    try:
        named, weights = read_tensors(folder)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise unreadable(folder, error) from error
    tensors, renamed = {}, {}
    for name, tensor in named.items():
        portable = name
        for pattern, replacement in RENAMES:
            portable = re.sub(pattern, replacement, portable)
        if portable in tensors:
            other = renamed.get(portable, name)
            raise RunError(f"draft at {folder} has {portable} twice, once as {other}")
        tensors[portable] = tensor
        if portable != name:
            renamed[portable] = name
    return DraftFiles(folder, flatten(given), given, tensors, renamed, weights)


def read_tensors(folder: Path) -> tuple[dict[str, torch.Tensor], str]:
    """Every tensor by its name in the file, and that file's name; a pickle only as far as it runs
    no code.
    """
    if (folder / SINGLE).is_file():
        return load_file(folder / SINGLE), SINGLE
    if (folder / INDEX).is_file():
        shards = json.loads((folder / INDEX).read_text())["weight_map"].values()
        named = {}
        for shard in sorted(set(shards)):
            named |= load_file(folder / Path(shard).name)  # the name alone: no path leads outside
        return named, INDEX
    if not (folder / PICKLED).is_file():
        raise OSError(f"neither {SINGLE} nor {PICKLED} is there")
    try:
        named = torch.load(folder / PICKLED, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        reason = "is damaged, or would run code when read; get it as"
        raise RunError(f"draft at {folder}: {PICKLED} {reason} {SINGLE}") from error
    if not isinstance(named, dict) or not all(isinstance(t, torch.Tensor) for t in named.values()):
        reason = "holds no plain dictionary of tensors; get it as"
        raise RunError(f"draft at {folder}: {PICKLED} {reason} {SINGLE}")
    return named, PICKLED
