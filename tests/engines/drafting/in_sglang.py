"""By the classes of SGLang 0.5.23 (see `plain`), which drafts no blocks on CPUs.

SGLang itself reads the folders, makes keys and values of the context, and runs layers and heads.
"""

import os
import sys
from types import SimpleNamespace

# Without verifying blocks of several lengths SGLang leaves the confidence out.
os.environ |= {"SGLANG_USE_CPU_ENGINE": "1", "SGLANG_RAGGED_VERIFY_MODE": "compact"}

import torch
from plain import draft_blocks, replace_attention
from safetensors.torch import load_file
from sglang.srt.configs.device_config import DeviceConfig
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed import init_distributed_environment, initialize_model_parallel
from sglang.srt.model_loader import get_model
from sglang.srt.models.dspark import project_through_lm_head
from sglang.srt.runtime_context import SpawnRanks, publish
from sglang.srt.server_args import ServerArgs
from sglang.srt.speculative.dflash_worker_v2 import DFlashWorkerV2


class Pool:
    """SGLang's cache, as far as the context is written into it."""

    get_key_buffer = get_value_buffer = None

    def set_kv_buffer(self, attention, places, keys, values, *scales) -> None:
        attention.keys, attention.values = keys, values


def load(target: str, folder: str):
    """The target and the draft."""
    args = ServerArgs(target, device="cpu", dtype="float32", attention_backend="torch_native")
    args.resolve_once()
    publish(args, role="test", ranks=SpawnRanks(world_rank=0))
    init_distributed_environment(1, 0, f"file://{sys.argv[-1]}.group", 0, "gloo")
    initialize_model_parallel(backend="gloo")
    given = {"load_config": LoadConfig(), "device_config": DeviceConfig("cpu")}
    drafts = {"model_path": folder, "is_draft_model": True}
    configs = [ModelConfig.from_server_args(args, **more) for more in ({}, drafts)]
    return [get_model(model_config=config, **given) for config in configs]


def main(target: str, folder: str, method: str, given: str, out: str) -> None:
    text = load_file(given)
    target, model = load(target, folder)
    attention, places = model.layers[0].self_attn, torch.arange(len(text["ids"]))
    attentions = replace_attention(model.layers, attention.head_dim, attention.scaling)
    if method == "dflash":
        worker = SimpleNamespace(token_to_kv_pool=Pool())
        worker = SimpleNamespace(draft_model=model, draft_model_runner=worker)
        context = model.project_target_hidden(text["aux"])
        DFlashWorkerV2._append_target_hidden_sequential(worker, context, places, places)
    else:
        model.attach_shared_modules(embed_tokens=target.model.embed_tokens, lm_head=target.lm_head)
        where = {"pool": Pool(), "positions": places, "cache_loc": places}
        model.write_target_hidden_kv(target_hidden=text["aux"], **where)

    def draft(ids, positions, before, drafted):
        embedded = target.model.embed_tokens(ids)
        hidden = model(ids, positions, None, input_embeds=embedded).hidden_states
        if method == "dflash":
            return {"logits": project_through_lm_head(hidden, target.lm_head)}
        logits, features = model.compute_base_logits(hidden)
        bias, _ = model.markov_head.step_bias(before, hidden_states=None, state=None)
        asked = {"anchor_tokens": ids[:1], "draft_tokens": drafted[None]}
        sure, _ = model.compute_confidence(confidence_features=features, **asked)
        return {"logits": logits + bias, "confidence": sure[0]}

    draft_blocks(text, attentions, model.block_size, model.draft_config.mask_token_id, draft, out)


with torch.inference_mode():
    main(*sys.argv[1:])
