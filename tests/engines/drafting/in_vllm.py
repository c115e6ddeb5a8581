"""By the classes of vLLM 0.32 (see `plain`), which serves DSpark on GPUs only.

vLLM itself reads the folders, shares the target's embedding and head, makes keys and values of the
context, and runs layers and heads.
"""

import sys
from functools import partial

import torch
from plain import draft_blocks, replace_attention
from safetensors.torch import load_file
from torch.nn.functional import rms_norm
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.model_executor.model_loader import get_model
from vllm.v1.worker.cpu_model_runner import _set_torch_accelerator_to_noop
from vllm.v1.worker.gpu.spec_decode.dflash.utils import load_dflash_model
from vllm.v1.worker.gpu.spec_decode.dspark.utils import load_dspark_model


def store(attention, layer, keys, values, cache, slots) -> None:
    attention.keys, attention.values = keys, values


def each_with_its_own(model, keys):
    """Keys [L,n,G,d] in the norms of their layers, as on GPUs: vLLM's kernel for CPUs takes that of
    the first layer for all.
    """
    rows = zip(keys, model._k_norm_weights, strict=True)
    return torch.stack([rms_norm(x, x.shape[-1:], w, model._rms_norm_eps) for x, w in rows])


def load(target: str, folder: str, method: str, steps: int):
    """The draft with the target's embedding and head, and vLLM's configuration."""
    speculative = {"method": method, "model": folder, "num_speculative_tokens": steps}
    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 2048}
    # Its runner for CPUs has no DSpark; what is called here belongs to no runner.
    VllmConfig._get_v1_model_runner_unsupported_features = lambda self: []
    _set_torch_accelerator_to_noop()
    config = EngineArgs(target, speculative_config=speculative, **options).create_engine_config()
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{sys.argv[-1]}.group", 0, "gloo")
        initialize_model_parallel()
        load = load_dspark_model if method == "dspark" else load_dflash_model
        return load(get_model(vllm_config=config), config), config


def main(target: str, folder: str, method: str, given: str, out: str) -> None:
    text = load_file(given)
    model, config = load(target, folder, method, 4)
    hf, inner = config.speculative_config.draft_model_config.hf_config, model.model
    attention = inner.layers[0].self_attn
    attentions = replace_attention(inner.layers, attention.head_dim, attention.scaling)
    for each in attentions:
        each.do_kv_cache_update = partial(store, each)
    inner._attn_layers = attentions
    inner._normalize_context_k = partial(each_with_its_own, inner)
    places = torch.arange(len(text["ids"]))
    model.precompute_and_store_context_kv(model.combine_hidden_states(text["aux"]), places, places)

    def draft(ids, positions, before, drafted):
        with set_forward_context(None, config):
            hidden = model(ids, positions)
        if method == "dflash":
            return {"logits": model.compute_logits(hidden)}
        bias = model.markov_embed(before)
        logits = model.compute_draft_logits(hidden) + model.markov_bias(bias)
        return {"logits": logits, "confidence": model.compute_confidence(hidden, bias)}

    draft_blocks(text, attentions, hf.block_size, inner.mask_token_id, draft, out)


with torch.inference_mode():
    main(*sys.argv[1:])
