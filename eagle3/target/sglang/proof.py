"""What the engine must show before its hidden states are believed."""

import logging
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoConfig, AutoModel

from eagle3.batch import Features
from eagle3.errors import RunError
from eagle3.target.hf import find_layers, head_statistics
from eagle3.target.layers import engines_default, meant_by
from eagle3.target.sglang.serve import HOOK

console = Console(stderr=True, markup=False, highlight=False)


def check_server(
    info: dict[str, Any], url: str, path: str, aux_layer_ids: list[int], num_layers: int
) -> None:
    """Raise RunError where the server, by what /server_info says, was not started to capture this
    target.
    """
    why = None
    explicit = info.get("return_aux_hidden_state_layer_ids")
    captured = engines_default(num_layers) if explicit is None else meant_by("sglang", explicit)
    if not any(hook.get("hook_factory") == HOOK for hook in info.get("forward_hooks") or []):
        why = "it was not started to leave hidden states"
    elif not info.get("disable_radix_cache"):
        why = "its prefix cache is on, and cached positions never come"
    elif captured != aux_layer_ids:
        why = f"it captures layers {captured}, not {aux_layer_ids}"
    elif Path(info.get("model_path", path)).name != Path(path).name:
        why = f"it serves {info['model_path']}, not {path}"
    if why:
        raise RunError(
            f"the SGLang server at {url} cannot be used: {why}; start it with python -m eagle3.target.sglang.serve"
        )


def check_head(features: Features, head: torch.Tensor, ends: list[int], sampled: list[int]) -> None:
    """Raise RunError unless last hidden states x `head` [V,H] are the logits that the engine
    samples from.

    `sampled` are its greedy next tokens after the rows `ends`.
    """
    last = features.last_hidden_states
    if not (last.isfinite().all() and features.aux_hidden_states.isfinite().all()):
        raise RunError(
            "SGLang gives hidden states that are not finite; set model.dtype=bfloat16 or another quantization"
        )
    _, logsumexp = head_statistics(last, head)
    logits = (last[ends] @ head.T).float()
    rounding = 0.02 * logits.abs().amax() + 0.05
    missed = (logits.amax(-1) - logits[torch.arange(len(ends)), sampled]).amax()
    apart = (logsumexp - features.logsumexp).abs().amax()
    if max(missed, apart) > rounding:
        raise RunError(
            "SGLang's last hidden states times the head of model.path are not its logits (its best token is "
            f"{missed:.2g} below ours, log-sum-exp {apart:.2g} apart): the server has another model than model.path, "
            "or one that changes its logits behind the head"
        )


@torch.no_grad()
def check_layers(
    prompt: list[int],
    aux_hidden_states: torch.Tensor,
    aux_layer_ids: list[int],
    path: str,
    revision: str | None,
    dtype: str,
    trust_remote_code: bool,
) -> None:
    """Raise RunError unless the first of the auxiliary states [n,3H] is nearest to that layer in
    transformers.

    Compared with the layers before and behind it, which takes a model of only so many layers. The
    engine shifts all three by the same rule, so that the first tells.
    """
    first = aux_layer_ids[0]
    config = AutoConfig.from_pretrained(
        path, revision=revision, trust_remote_code=trust_remote_code
    )
    text = config.get_text_config()
    text.num_hidden_layers = first + 2
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: first + 2]
    library = logging.getLogger("transformers")
    level = library.level
    library.setLevel(logging.ERROR)  # else it lists every tensor of the other layers
    try:
        model = AutoModel.from_pretrained(
            path, config=config, revision=revision, dtype=dtype, trust_remote_code=trust_remote_code
        ).eval()
        decoder = model.get_decoder() if text is not config else model
        outputs: list[torch.Tensor] = []
        for layer in find_layers(decoder, first + 2)[max(0, first - 1) :]:
            layer.register_forward_hook(
                lambda module, inputs, output: outputs.append(
                    output[0] if isinstance(output, tuple) else output
                )
            )
        decoder(input_ids=torch.tensor([prompt]), use_cache=False)
    except (
        Exception
    ) as error:  # what needs kernels or packages that are not here, such as quantised weights
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        console.print(
            f"target=sglang: transformers cannot show that the layers are the right ones ({reason})"
        )
        return
    finally:
        library.setLevel(level)
    ours = aux_hidden_states.chunk(3, -1)[0].cpu().float()
    apart = [
        ((ours - output.view_as(ours).float()).norm(dim=-1) / ours.norm(dim=-1)).median()
        for output in outputs
    ]
    nearest = max(0, first - 1) + min(range(len(apart)), key=apart.__getitem__)
    if nearest != first:
        raise RunError(
            f"SGLang captured the output of layer {nearest} where layer {first} was asked for: it numbers the layers "
            "of this model in another way; use target=hf, or set model.aux_layer_ids to SGLang's default"
        )
