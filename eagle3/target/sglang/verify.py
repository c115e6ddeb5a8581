"""What the engine must show before its hidden states are believed.

A wrong layer or model would train a draft without any error; only its acceptance would be poor.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel
from transformers.utils import logging

from eagle3.batch import Features
from eagle3.errors import RunError
from eagle3.target.hf import head_statistics
from eagle3.target.layers import engines_default, meant_by
from eagle3.target.sglang.hook import HOOK
from eagle3.target.spec import TargetSpec, whole_config


def verify_server(info: dict[str, Any], url: str, spec: TargetSpec) -> None:
    """Raise RunError where the server, by its /server_info, does not capture this target."""
    captured = engines_default(spec.num_layers)
    if info.get("return_aux_hidden_state_layer_ids") is not None:
        captured = meant_by("sglang", info["return_aux_hidden_state_layer_ids"])
    if not any(hook.get("hook_factory") == HOOK for hook in info.get("forward_hooks") or []):
        reason = "it was not started to leave hidden states"
    elif captured != spec.aux_layer_ids:
        reason = f"it captures layers {captured}, not {spec.aux_layer_ids}"
    elif Path(info.get("model_path", spec.path)).name != Path(spec.path).name:
        reason = f"it serves {info['model_path']}, not {spec.path}"
    else:
        return
    remedy = "start it with python -m eagle3.target.sglang.serve"
    raise RunError(f"the SGLang server at {url} cannot be used: {reason}; {remedy}")


def verify_head(features: Features, head: torch.Tensor, ends: list, sampled: list) -> None:
    """Raise RunError unless last hidden states x `head` [V,H] are what the engine samples from;
    `sampled` are its greedy next tokens after the rows `ends`.
    """
    last = features.last_hidden_states
    if not (last.isfinite().all() and features.aux_hidden_states.isfinite().all()):
        raise RunError("SGLang's hidden states are not finite; set model.dtype=bfloat16")
    _, logsumexp = head_statistics(last, head)
    logits = (last[ends] @ head.T).float()
    # The engine's kernels round otherwise, so its best token may be a near tie of ours.
    rounding = 0.02 * logits.abs().amax() + 0.05
    missed = (logits.amax(-1) - logits[torch.arange(len(ends)), sampled]).amax()
    apart = (logsumexp - features.logsumexp).abs().amax()
    if max(missed, apart) > rounding:
        problem = "SGLang's last hidden states times the head are not its logits"
        reason = "it has another model, or one that changes its logits behind the head"
        raise RunError(f"{problem}: {reason}; use target=hf")


@torch.no_grad()
def verify_layers(prompt: list[int], aux_hidden_states: torch.Tensor, spec: TargetSpec) -> None:
    """Raise RunError where the first of the auxiliary states [n,A] is nearer to the layer before or
    behind it, as transformers computes them.
    """
    # The engine numbers all by one rule, and the others would need half of the model.
    first, config = spec.aux_layer_ids[0], whole_config(spec)
    text = config.get_text_config()
    text.num_hidden_layers = first + 3  # the last one's output is given after the final norm
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: first + 3]
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # else it lists every tensor of the other layers
    try:
        options = {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code}
        model = AutoModel.from_pretrained(spec.path, config=config, dtype=spec.dtype, **options)
        decoder = model.get_decoder() if text is not config else model
        ids = torch.tensor([prompt])
        outputs = decoder(ids, use_cache=False, output_hidden_states=True).hidden_states[1:]
        # Neighbours differ by one layer's output, far more than kernels round apart.
        candidates = range(max(0, first - 1), first + 2)
        found = aux_hidden_states[:, : text.hidden_size].cpu().float()
        apart = {i: (found - outputs[i][0].float()).norm(dim=-1).median() for i in candidates}
    except Exception as error:
        # A model may need kernels or packages that are not here; the head was verified.
        print(f"target=sglang: cannot check which layers are read ({error!r})", file=sys.stderr)
        return
    finally:
        logging.set_verbosity(level)
    nearest = min(apart, key=apart.get)
    if nearest != first:
        problem = f"SGLang captured the output of layer {nearest} where layer {first} was asked for"
        raise RunError(f"{problem}: use its default model.aux_layer_ids, or target=hf")
