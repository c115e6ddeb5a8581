"""Drafts as others write them, read under the portable names.

Known are the portable form (this project, SpecForge, the official release), that of speculators and
vLLM (`layers.0.*`, a nested config), and names as engines keep them in memory (`model.*`,
`draft_id_to_target_id`).
"""

import json
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from eagle3.errors import RunError
from eagle3.export.folder import INDEX, PICKLED, SINGLE, flatten, named_layers, read_config

RENAMES = (
    (r"^model\.", ""),
    (r"^layers\.0\.", "midlayer."),
    (r"^draft_id_to_target_id$", "d2t"),
    (r"^aux_norm_(low|mid|high)\.", lambda m: f"fc_norm.{('low', 'mid', 'high').index(m[1])}."),
)


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
        return (self.config.get("rope_parameters") or self.config).get(
            "rope_theta", self.config.get("rope_theta")
        )

    @property
    def rope_scaling(self) -> dict | None:
        """The scaling that engines apply, None where they scale nothing."""
        scaling = self.config.get("rope_scaling") or self.config.get("rope_parameters") or {}
        return (
            None
            if scaling.get("rope_type", scaling.get("type", "default")) == "default"
            else scaling
        )

    @property
    def named_layers(self) -> list[int] | None:
        return named_layers(self.config)


def read_any(folder: Path) -> DraftFiles:
    """A draft of any known format, unjudged. Raises RunError where there is none, or it cannot be
    read safely.
    """
    given = read_config(folder)
    try:
        named, weights = read_tensors(folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise RunError(
            f"draft at {folder} cannot be read: {' '.join(str(error).split())}"
        ) from error
    tensors, renamed = {}, {}
    for name, tensor in named.items():
        portable = portable_name(name)
        if portable in tensors:
            raise RunError(
                f"draft at {folder} has {portable} twice, once as {renamed.get(portable, name)}"
            )
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
        shards = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        return {
            name: t for shard in shards for name, t in load_file(folder / Path(shard).name).items()
        }, INDEX
    if not (folder / PICKLED).is_file():
        raise OSError(f"neither {SINGLE} nor {PICKLED} is there")
    try:
        named = torch.load(folder / PICKLED, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise RunError(
            f"draft at {folder}: {PICKLED} is damaged, or would run code when read; get it as {SINGLE}"
        ) from error
    if not isinstance(named, dict) or not all(isinstance(t, torch.Tensor) for t in named.values()):
        raise RunError(
            f"draft at {folder}: {PICKLED} holds no plain dictionary of tensors; get it as {SINGLE}"
        )
    return named, PICKLED


def portable_name(name: str) -> str:
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name
