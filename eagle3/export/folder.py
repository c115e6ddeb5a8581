"""Where a draft lies, here or on the hub, and what its config.json says; light enough for a command
line.
"""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from eagle3.errors import ConfigError, RunError
from eagle3.target.layers import meant_by

SINGLE, INDEX, PICKLED = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
NUMBERS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "draft_vocab_size", "target_hidden_size", "max_position_embeddings",
)  # fmt: skip
LLAMA_DEFAULTS = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
}  # of transformers


def is_hub_id(path: str) -> bool:
    """Whether `path`, which is no folder here, has the form owner/name."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path)) and not Path(path).exists()


@cache
def locate(path: str, key: str = "draft_path") -> Path:
    """The folder of a draft: a local one, else what the hub has under this id (config and weights
    only).
    """
    if Path(path).is_dir() or not is_hub_id(path):
        return Path(path)
    try:
        folder = Path(
            snapshot_download(path, allow_patterns=["config.json", "*.safetensors", INDEX])
        )
        if not any(folder.glob("*.safetensors")):
            snapshot_download(path, allow_patterns=[PICKLED])
        return folder
    except GatedRepoError as error:
        raise RunError(
            f"{key}={path}: the hub wants you to log in; accept its terms there first"
        ) from error
    except RepositoryNotFoundError as error:
        raise RunError(
            f"{key}={path} is neither a folder nor on the hub; check the spelling"
        ) from error
    except (LocalEntryNotFoundError, OSError, ValueError) as error:
        raise RunError(
            f"{key}={path} is no folder and the hub cannot be reached; give a folder, or connect once to fetch it"
        ) from error


def check_given(path: str, key: str) -> None:
    """Raise ConfigError where `path` is neither a folder nor has the form of a hub id."""
    if not Path(path).is_dir() and not is_hub_id(path):
        raise ConfigError(f"{key}={path} does not exist; give a local folder or a hub id")


def read_config(folder: Path) -> dict[str, Any]:
    """A draft's config.json as it stands. Raises RunError where there is none, or a size in it is
    no number.
    """
    inside = (
        "; the draft is its folder draft/" if (folder / "draft" / "config.json").is_file() else ""
    )
    try:
        given = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise RunError(
            f"draft at {folder} cannot be read: {' '.join(str(error).split())}{inside}"
        ) from error
    if not isinstance(given, dict):
        raise RunError(f"draft at {folder} cannot be read: config.json is no JSON object")
    config = flatten(given)
    for name in NUMBERS:
        value = config.get(name)
        if value is not None and (type(value) is not int or value < 1):
            raise RunError(
                f"draft at {folder}: {name}={value!r} in config.json must be a whole number above 0"
            )
    for section in (config, config.get("eagle_config") or {}):
        ids = section.get("eagle_aux_hidden_state_layer_ids") or []
        if not isinstance(ids, list) or not all(type(i) is int for i in ids):
            raise RunError(
                f"draft at {folder}: eagle_aux_hidden_state_layer_ids={ids} must be a list of whole numbers"
            )
    return given


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


def with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """What engines take for keys that config.json leaves out. Raises KeyError for one that has no
    default.
    """
    heads = config["num_attention_heads"]
    derived = {
        "num_key_value_heads": heads,
        "head_dim": config["hidden_size"] // heads,
        "target_hidden_size": config["hidden_size"],
    }
    return (
        LLAMA_DEFAULTS
        | derived
        | {key: value for key, value in config.items() if value is not None}
    )
