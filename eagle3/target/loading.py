"""Whether transformers can load a target here, and what of it can be told without its weights."""

import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.quantizers.auto import get_hf_quantizer

from eagle3.draft.rope import max_positions
from eagle3.errors import ConfigError, first_line
from eagle3.target.spec import TargetSpec, whole_config
from eagle3.target.weights import Checkpoint


def check_loadable(spec: TargetSpec) -> None:
    """Raise ConfigError or RunError for a target that transformers cannot load here."""
    folder, config = Path(spec.path), whole_config(spec)
    if any(folder.glob("*.safetensors*")):
        checkpoint = Checkpoint(spec.path, None)
        for name in sorted({*checkpoint.files.values()}):
            checkpoint.open(name)
    elif folder.is_dir() and not any(folder.glob("*.bin*")):
        raise ConfigError(f"model.path={folder} has no weights (model.safetensors or its index)")
    try:
        # Whether the library of a quantised checkpoint is there, as `from_pretrained` asks it.
        get_hf_quantizer(config, None, None, weights_only=True, user_agent={})
        with torch.device("meta"):
            trust = spec.trust_remote_code
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
    except Exception as error:
        reason = first_line(error)
        sentence = f"model.path={spec.path} cannot be loaded by transformers here: {reason}"
        raise ConfigError(f"{sentence}; see target=sglang") from error
    find_layers(model, spec.num_layers)


def check_croppable(config: PretrainedConfig) -> None:
    """Raise ConfigError where rejected drafts leave something in the cache."""
    try:
        kinds = {type(layer) for layer in DynamicCache(config=config).layers}
    except (AttributeError, KeyError):  # a cache of its own
        kinds = {None}
    if not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
        cache = f"a {config.model_type} target's cache"
        remedy = "only engines decode it (benchmark=sglang or vllm, or stages without benchmark)"
        raise ConfigError(f"a rejected draft cannot be taken back from {cache}: {remedy}")


def find_layers(model: PreTrainedModel, count: int) -> tuple[PreTrainedModel, torch.nn.ModuleList]:
    """The decoder, the innermost model that has the list of its layers, and this list."""
    # Without the towers of other modalities, unless the name `decoder` is given to something else.
    models = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    models += [m for m in model.get_decoder().modules() if isinstance(m, PreTrainedModel)]
    for module in reversed(models):
        for part in module.modules():
            if isinstance(part, torch.nn.ModuleList) and len(part) == count:
                return module, part
    raise ConfigError(f"{type(model).__name__} has no list of its {count} decoder layers")


def context_length(config: PretrainedConfig) -> int:
    """The longest text, in tokens, that the target reads."""
    rope = getattr(config, "rope_parameters", None) or {}
    return max_positions(config.max_position_embeddings, rope)


def rope_limit(config: PretrainedConfig) -> float:
    """The longest text whose RoPE does not change with the longest that shares its pass."""
    given, limits = getattr(config, "rope_parameters", None) or {}, [math.inf]
    for part in (given, *given.values()):
        if isinstance(part, dict) and part.get("rope_type") in ("dynamic", "longrope"):
            original = part.get("original_max_position_embeddings")
            limits.append(original or config.max_position_embeddings)
    return min(limits)
