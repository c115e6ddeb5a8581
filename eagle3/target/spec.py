"""Which model is the target: where it lies, what it computes in, which of its layers are read."""

import hashlib
import json
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.utils import cached_file

from eagle3.config import Model
from eagle3.errors import ConfigError, RunError, first_line
from eagle3.target.layers import engines_default

SAMPLED_BLOCKS = 64  # of each weight file, a mebibyte each


@dataclass(frozen=True)
class TargetSpec:
    """What every way of loading the target needs."""

    path: str
    config: PretrainedConfig  # of its language model
    dtype: str  # the name of what it computes in, such as bfloat16
    aux_layer_ids: list[int]  # zero-based decoder layers, low to high
    revision: str | None = None
    trust_remote_code: bool = False
    embedding_key: str | None = None
    lm_head_key: str | None = None

    def __reduce__(self) -> tuple:
        """For other processes, which may not know a config class that brings its own code."""
        names = [field.name for field in fields(Model)]
        return read_spec, (Model(**{name: getattr(self, name) for name in names}),)

    @property
    def num_layers(self) -> int:
        """Of its decoder; LongCat-Flash's config counts the two attentions that each has."""
        return getattr(self.config, "num_layers", None) or self.config.num_hidden_layers

    @property
    def aux_size(self) -> int:
        """Numbers that a token's auxiliary states have, all layers together."""
        return len(self.aux_layer_ids) * self.config.hidden_size

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What a target is, for fingerprints: a hub id with its commit, or what a folder holds."""
        folder = Path(self.path)
        if not folder.is_dir():
            commit = getattr(self.config, "_commit_hash", None)
            return {"path": self.path, "revision": self.revision, "commit": commit}
        files = {}
        weights = [*folder.glob("*.safetensors")] or [*folder.glob("*.bin")]
        code = folder.glob("*.py") if self.trust_remote_code else ()
        for file in sorted([*weights, *folder.glob("*config.json"), *code]):
            digest, size = hashlib.sha256(), file.stat().st_size
            # Blocks spread over a file: all of a small one, and seconds for 100 GB.
            with file.open("rb") as stream:
                for block in range(SAMPLED_BLOCKS):
                    stream.seek(block * size // SAMPLED_BLOCKS)
                    digest.update(stream.read(1 << 20))
            files[file.name] = [size, digest.hexdigest()]
        return files

    def with_layers(self, aux_layer_ids: list[int]) -> "TargetSpec":
        return replace(self, aux_layer_ids=aux_layer_ids)


def read_spec(model: Model) -> TargetSpec:
    """The section `model`, with what it leaves to be derived. Raises ConfigError."""
    # Of a model that also sees or hears, only the language model is drafted for.
    whole = whole_config(model)
    config, dtype = whole.get_text_config(), model.dtype
    if dtype == "auto":
        dtype = str(whole.dtype or config.dtype or "float32").removeprefix("torch.")
    spec = TargetSpec(**vars(model) | {"config": config, "dtype": dtype})
    if spec.aux_layer_ids is not None:
        return spec
    if (count := spec.num_layers) < 7:  # some of them would coincide
        raise ConfigError(f"a target of {count} layers needs model.aux_layer_ids, such as three")
    return spec.with_layers(engines_default(count))


def whole_config(model: Model | TargetSpec) -> PretrainedConfig:
    """The config, other modalities included; raises ConfigError when there is none."""
    where = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    try:
        return AutoConfig.from_pretrained(model.path, **where)
    except (OSError, ValueError) as error:
        reason = first_line(error)
        if "custom code" in reason:
            reason = "its code runs only with model.trust_remote_code=true"
        raise ConfigError(f"model.path={model.path} is no model: {reason}") from error


def check_supported(config: PretrainedConfig) -> None:
    """Raise ConfigError where softmax(lm_head(last hidden)) is not what the model samples from."""
    # Between the product and the softmax these would scale or bend what the draft learns from.
    caps = dict.fromkeys(("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"))
    for name, harmless in (caps | {"logits_scaling": 1, "logit_scale": 1}).items():
        if (value := getattr(config, name, None)) not in (harmless, None):
            raise ConfigError(f"the target's {name}={value} changes its logits: not supported")


def end_token_ids(spec: TargetSpec) -> set[int]:
    """Tokens that end an answer: those of generation_config.json, if any, else of the config.

    Nothing else of that file enters anywhere. Raises RunError where it is damaged.
    """
    try:
        path = cached_file(spec.path, "generation_config.json", revision=spec.revision)
        eos = json.loads(Path(path).read_text()).get("eos_token_id")
    except OSError:  # many have none
        eos = None
    except (ValueError, AttributeError) as error:
        raise RunError(f"generation_config.json of {spec.path} is damaged; get it again") from error
    if eos is None:
        named = (getattr(c, "eos_token_id", None) for c in (whole_config(spec), spec.config))
        eos = next((ids for ids in named if ids is not None), None)
    return set(eos) if isinstance(eos, list) else {eos} - {None}
