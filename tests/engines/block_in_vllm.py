"""Logits of a block draft by vLLM 0.32's own classes, where none of its servers runs on a CPU.

Usage, in vLLM's environment: python block_in_vllm.py TARGET DRAFT METHOD IN OUT. IN has `ids` [n],
`aux` [n,A] and `rows` [N] of a text; OUT gets `logits` [N,B,V] of all slots and, of DSpark,
`confidence` [N,B] before which the text's tokens are drafted. vLLM itself reads the folders, shares
the target's embedding and head, makes keys and values of the context and runs the layers.
Replaced are two kernels: attention over its paged cache, by plain attention on what it would store,
and a norm that is wrong on CPUs.
"""

import sys
from functools import partial

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import rms_norm, scaled_dot_product_attention
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.model_executor.model_loader import get_model
from vllm.v1.worker.cpu_model_runner import _set_torch_accelerator_to_noop
from vllm.v1.worker.gpu.spec_decode.dflash.utils import load_dflash_model
from vllm.v1.worker.gpu.spec_decode.dspark.utils import load_dspark_model


class Plain(torch.nn.Module):
    """Attention of one layer: `seen` of the context's keys and values [n,G,d], then the block's."""

    def __init__(self, attention):
        super().__init__()
        self.impl, self.kv_cache, self.seen = self, None, 0
        self.head_size, self.scale = attention.head_size, attention.impl.scale

    def do_kv_cache_update(self, layer, keys, values, cache, slots) -> None:
        self.keys, self.values = keys, values

    def forward(self, *qkv):
        q, keys, values = (x.unflatten(-1, (-1, self.head_size)) for x in qkv)
        keys = torch.cat([self.keys[: self.seen], keys])
        values = torch.cat([self.values[: self.seen], values])
        q, keys, values = (x.transpose(0, 1)[None] for x in (q, keys, values))
        given = {"scale": self.scale, "enable_gqa": True}
        return scaled_dot_product_attention(q, keys, values, **given)[0].transpose(0, 1).flatten(1)


def each_with_its_own(model, keys):
    """Keys [L,n,G,d] in the norms of their layers, as on GPUs: vLLM's kernel for CPUs takes the
    first layer's for all.
    """
    rows = zip(keys, model._k_norm_weights, strict=True)
    return torch.stack([rms_norm(x, x.shape[-1:], w, model._rms_norm_eps) for x, w in rows])


def load(target: str, folder: str, method: str):
    speculative = {"method": method, "model": folder, "num_speculative_tokens": 4}
    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 2048}
    # Its runner for CPUs has no DSpark; what is called here belongs to no runner.
    VllmConfig._get_v1_model_runner_unsupported_features = lambda self: []
    _set_torch_accelerator_to_noop()
    config = EngineArgs(model=target, speculative_config=speculative, **options)
    config = config.create_engine_config()
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, "tcp://127.0.0.1:29519", 0, "gloo")
        initialize_model_parallel()
        load = load_dspark_model if method == "dspark" else load_dflash_model
        model = load(get_model(vllm_config=config), config)
    for layer in model.model.layers:
        layer.self_attn.attn = Plain(layer.self_attn.attn)
    model.model._normalize_context_k = partial(each_with_its_own, model.model)
    model.model._attn_layers = [layer.self_attn.attn for layer in model.model.layers]
    return model, config


def main(target: str, folder: str, method: str, given: str, out: str) -> None:
    model, config = load(target, folder, method)
    text, hf = load_file(given), config.speculative_config.draft_model_config.hf_config
    ids, size = text["ids"].long(), hf.block_size
    states = model.combine_hidden_states(text["aux"])
    model.precompute_and_store_context_kv(states, torch.arange(len(ids)), torch.arange(len(ids)))
    mask_token = config.speculative_config.draft_model_config.hf_config.mask_token_id
    logits, sure = [], []
    for row in text["rows"].tolist():
        for layer in model.model.layers:
            layer.self_attn.attn.seen = row + 1
        block = torch.full((size,), mask_token)
        block[0] = ids[row + 1]
        with set_forward_context(None, config):
            hidden = model(block, torch.arange(row + 1, row + 1 + size))
        if method == "dflash":
            logits.append(model.compute_logits(hidden))
            continue
        before = model.markov_embed(ids[row + 1 : row + 1 + size])
        logits.append(model.compute_draft_logits(hidden) + model.markov_bias(before))
        sure.append(model.compute_confidence(hidden, before))
    found = {"logits": torch.stack(logits)}
    save_file(found | ({"confidence": torch.stack(sure)} if sure else {}), out)


with torch.inference_mode():
    main(*sys.argv[1:])
