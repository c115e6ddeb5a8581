"""A draft on disk or on the hub, in any known form, read under the portable names; unjudged."""

import json
import pickle
import re
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download

from eagle3.draft.block import ARCHITECTURES, DSparkConfig
from eagle3.draft.model import DraftConfig
from eagle3.errors import ConfigError, RunError
from eagle3.runs.tensors import load_tensors
from eagle3.target.layers import meant_by, numbered_by

SINGLE, PICKLED = "model.safetensors", "pytorch_model.bin"
LAYER_IDS = "eagle_aux_hidden_state_layer_ids"  # in config.json, and in its eagle_config
BLOCK_LAYER_IDS = "target_layer_ids"  # of block drafters, for both engines in our numbers
NEEDED = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
# Names that engines have for them in memory, and some folders on disk.
IN_MEMORY = {
    "^draft_id_to_target_id$": "d2t", r"^aux_norm_low\.": "fc_norm.0.",
    r"^aux_norm_mid\.": "fc_norm.1.", r"^aux_norm_high\.": "fc_norm.2.",
}  # fmt: skip
KINDS = ARCHITECTURES | {"DSparkDraftModel": DSparkConfig}  # which both engines know too
SIZES = {field.name for field in fields(DSparkConfig) if field.type is int} - {"mask_token_id"}
# What transformers' LlamaConfig and Qwen3Config take where a file says nothing.
ABSENT = {
    "llama": {"max_position_embeddings": 2048},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
}


def is_hub_id(path: str) -> bool:
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path)) and not Path(path).exists()


def check_given(path: str, key: str) -> None:
    """Raise ConfigError where `path` is neither a folder nor has the form of a hub id."""
    if not Path(path).is_dir() and not is_hub_id(path):
        raise ConfigError(f"{key}={path} does not exist; give a local folder or a hub id")


def absolute(path: str) -> str:
    """A folder as an absolute path, a hub id as it is."""
    folder = Path(path).expanduser()
    return str(folder.resolve()) if folder.is_dir() else path


@cache
def locate(path: str, key: str = "draft_path") -> Path:
    """A local folder of a draft, else the hub's: config and weights. Raises RunError."""
    if not is_hub_id(path):
        return Path(path)
    try:
        folder = Path(snapshot_download(path, allow_patterns=["config.json", "*.safetensors"]))
        # A pickle is fetched only where there is nothing safer.
        if not any(folder.glob("*.safetensors")):
            snapshot_download(path, allow_patterns=[PICKLED])
        return folder
    except (OSError, ValueError) as error:  # the hub says "not found" of gated ones too
        reason = "cannot be reached, has none or wants a log-in"
        raise RunError(f"{key}={path} is no folder and the hub {reason}") from error


def read_config(folder: Path) -> dict[str, Any]:
    """A draft's config.json as the portable form has it. Raises RunError for none, or no sizes."""
    try:
        config = flatten(dict(json.loads((folder / "config.json").read_text())))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        inside = (folder / "draft" / "config.json").is_file()
        remedy = "; the draft is its folder draft/" if inside else ""
        raise RunError(f"draft at {folder} cannot be read: {error}{remedy}") from error
    for name in sorted(SIZES & config.keys()):
        value = config[name]
        # isinstance would let true pass for 1
        if value is not None and (type(value) is not int or value < 1):
            raise RunError(f"draft at {folder}: {name}={value!r} must be a whole number above 0")
    for name in ("eagle_config", "rope_scaling", "rope_parameters"):
        config[name] = config.get(name) or {}
        if not isinstance(config[name], dict):
            raise RunError(f"draft at {folder}: {name}={config[name]!r} must be an object")
    places = (config, LAYER_IDS), (config["eagle_config"], LAYER_IDS), (config, BLOCK_LAYER_IDS)
    for section, name in places:
        ids = section.get(name) or []
        if not isinstance(ids, list) or not all(type(i) is int for i in ids):
            raise RunError(f"draft at {folder}: {name}={ids} must be a list of whole numbers")
    if kind_of(config).reads_mask_token:
        ids = config.get(BLOCK_LAYER_IDS) or []
        config["eagle_config"] = {LAYER_IDS: ids}
        config[LAYER_IDS] = config.get(LAYER_IDS) or numbered_by("vllm", ids)  # it adds 1 itself
    return config


def kind_of(config: dict[str, Any]) -> type[DraftConfig]:
    """By the architecture that a config names; of speculators only EAGLE3 is read."""
    [name, *_] = config.get("architectures") or [None]
    return DraftConfig if "speculators_model_type" in config else KINDS.get(name, DraftConfig)


def flatten(given: dict[str, Any]) -> dict[str, Any]:
    """The config of speculators, or one with a section for block drafters, as the portable form has
    it; any other as it is.
    """
    if "speculators_model_type" not in given:
        return given | (given.get("dflash_config") or {})  # which engines prefer
    section = given.get("speculators_config") or {}
    [method, *_] = section.get("proposal_methods") or [{}]
    target = (section.get("verifier") or {}).get("name_or_path")
    made_for = {"target": target, "draft_length": method.get("speculative_tokens")}
    outer = {key: value for key, value in given.items() if value is not None}
    return (given.get("transformer_layer_config") or {}) | outer | {"made_for": made_for}


def named_layers(config: dict[str, Any]) -> list[int] | None:
    """The layers whose outputs a draft reads, by its config; None where that names none."""
    ids, above = config["eagle_config"].get(LAYER_IDS), config.get(LAYER_IDS)
    # Each is in the numbers of the engine that reads it: SGLang's are ours, vLLM's one more.
    return ids if ids or not above else meant_by("vllm", above)


def read_shape(folder: Path, config: dict[str, Any]) -> DraftConfig:
    """The shape in a config, filled up as vLLM 0.32 and SGLang 0.5.23 do, of which the latter reads
    `use_aux_norm` as another name of `fc_norm`. Raises RunError without sizes.
    """
    given = {key: value for key, value in config.items() if value is not None}
    kind = kind_of(config)
    known = {field.name for field in fields(kind)}
    own = known - {field.name for field in fields(DraftConfig)}
    for name in (*NEEDED, *sorted(own), *([BLOCK_LAYER_IDS] if own else [])):
        if name not in given:
            raise RunError(f"draft at {folder}: config.json lacks {name}")
    values = {
        "num_key_value_heads": given["num_attention_heads"],
        "head_dim": given["hidden_size"] // given["num_attention_heads"],
        "target_hidden_size": given["hidden_size"],
        "draft_vocab_size": given["vocab_size"],
        "rms_norm_eps": 1e-6,  # of both, and not that of DraftConfig
        "fc_norm": given.get("use_aux_norm", False),
    }
    if named := named_layers(config):
        values["num_aux_hidden_states"] = len(named)
    values |= ABSENT[kind.model_type] | given | config["rope_parameters"]
    return kind(**{name: value for name, value in values.items() if name in known})


@dataclass
class DraftFiles:
    """A draft as found, in the terms of the portable form."""

    folder: Path
    config: dict[str, Any]
    is_speculators: bool
    shape: DraftConfig
    tensors: dict[str, torch.Tensor]
    names: list[str]  # as they stand in the file `weights`
    weights: str


def read_any(folder: Path) -> DraftFiles:
    """A draft of any known form. Raises RunError where none is there or safe to read."""
    config = read_config(folder)
    shape = read_shape(folder, config)
    # Beside the whole there may be what is no shard of it, such as an optimizer's state.
    single = folder / SINGLE
    shards = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    named, weights = {}, shards[0].name if shards else PICKLED
    for shard in shards:
        named |= load_tensors(shard)
    try:
        if not shards:  # a pickle may name any function; weights_only calls none but torch's own
            named = torch.load(folder / PICKLED, map_location="cpu", weights_only=True)
            named = {name: tensor.detach() for name, tensor in named.items()}
    except OSError as error:
        raise RunError(f"draft at {folder}: {weights} cannot be read: {error}") from error
    except (RuntimeError, pickle.UnpicklingError, EOFError, AttributeError) as error:
        reason = "is damaged, no dictionary of tensors, or would run code when read; get it as"
        raise RunError(f"draft at {folder}: {PICKLED} {reason} {SINGLE}") from error
    is_speculators, tensors = "speculators_model_type" in config, {}
    for name, tensor in named.items():
        portable = name.removeprefix("model.")
        if not shape.reads_mask_token:
            portable = portable.replace("layers.0.", "midlayer.")
        for pattern, replacement in IN_MEMORY.items():
            portable = re.sub(pattern, replacement, portable)
        if portable in tensors:
            raise RunError(f"draft at {folder} has {portable} twice, once as {name}")
        tensors[portable] = tensor
    return DraftFiles(folder, config, is_speculators, shape, tensors, sorted(named), weights)
