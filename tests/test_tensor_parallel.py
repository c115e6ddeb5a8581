"""The target split over two processes gives what one process gives, and says so where it cannot be split."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import AutoModelForCausalLM, DynamicCache, GPTNeoConfig, LlamaConfig, Qwen3MoeConfig

from eagle3.data.packing import pack
from eagle3.data.supervision import serving
from eagle3.errors import ConfigError
from eagle3.target.features import Features
from eagle3.target.hf import HFTarget, check_tensor_parallel

SHAPE = {
    "vocab_size": 97,  # odd: the head is not split
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}
MOE = {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES = {
    "llama": LlamaConfig(**SHAPE),
    "llama-tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "qwen3-moe": Qwen3MoeConfig(**SHAPE, **MOE),
}
CPU = torch.device("cpu")


def documents() -> list[tuple[int, torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    return [(i, torch.randint(0, 97, (n,)), torch.arange(n) >= n // 2) for i, n in enumerate([13, 1, 30, 7])]


def features(target: HFTarget) -> Features:
    return target(pack(documents(), torch.ones(97, dtype=torch.bool), 7, serving))


def answers(target: HFTarget) -> torch.Tensor:
    """Greedy answers int64 [2,20] to two prompts, the first padded on the left."""
    prompts = torch.stack([torch.cat([torch.zeros(6, dtype=torch.long), ids[:6]]) for _, ids, _ in documents()[::2]])
    mask = torch.arange(12) >= torch.tensor([[6], [0]])
    return target.generate(prompts, attention_mask=mask.long(), max_new_tokens=8, do_sample=False, pad_token_id=0)


def continued(target: HFTarget) -> torch.Tensor:
    """Last hidden states [10,H] of a document's end, continuing a cache of its first 20 tokens."""
    ids, places, cache = documents()[2][1], torch.arange(30), DynamicCache(config=target.config)
    target.states(ids[:20], places[:20], cache)
    return target.states(ids[20:], places[20:], cache)[1]


def everything(target: HFTarget) -> dict[str, torch.Tensor]:
    return vars(features(target)) | {"continued": continued(target), "answers": answers(target)}


def save_everything(rank: int, ranks: int, tp_size: int, port: int, folders: dict[str, str], out: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    for name, folder in folders.items():
        target = HFTarget(folder, CPU, dtype="float32", tp_size=tp_size)
        split = next(p for n, p in target.model.named_parameters() if n.endswith("layers.0.self_attn.q_proj.weight"))
        assert len(split.to_local()) * tp_size == len(split)
        torch.save(everything(target), f"{out}/{name}-{rank}.pt")
    dist.destroy_process_group()


def spawn(ranks: int, tp_size: int, folders: dict[str, str], out: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(save_everything, (ranks, tp_size, port, folders, out), nprocs=ranks)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    torch.manual_seed(0)
    saved = {name: str(tmp_path_factory.mktemp(name)) for name in FAMILIES}
    for name, config in FAMILIES.items():
        AutoModelForCausalLM.from_config(config).save_pretrained(saved[name])
    return saved


def check_ranks(ranks: int, folders: dict[str, str], out) -> None:
    for name, folder in folders.items():
        alone = everything(HFTarget(folder, CPU, dtype="float32"))
        for rank in range(ranks):
            split = torch.load(out / f"{name}-{rank}.pt")
            for part, ours in split.items():
                distance = (ours - alone[part]).double().norm()
                assert distance <= 1e-5 * alone[part].double().norm() * ours.is_floating_point(), (name, rank, part)


def test_two_processes_equal_one(folders, tmp_path):
    spawn(2, 2, folders, str(tmp_path))
    check_ranks(2, folders, tmp_path)


@pytest.mark.slow  # four interpreters
def test_two_groups_of_two(folders, tmp_path):
    spawn(4, 2, {"qwen3-moe": folders["qwen3-moe"]}, str(tmp_path))
    check_ranks(4, {"qwen3-moe": folders["qwen3-moe"]}, tmp_path)


def test_packed_mixture_of_experts_equals_one_document_at_a_time(folders):
    target = HFTarget(folders["qwen3-moe"], CPU, dtype="float32")
    packed = features(target).aux_hidden_states
    alone = [target.states(ids, torch.arange(len(ids)))[0] for _, ids, _ in documents()]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "tp_size", "message"),
    [
        ("llama", 4, r"target\.tp_size=4 must divide the target's num_key_value_heads=2; choose a divisor"),
        ("qwen3-moe", 3, r"target\.tp_size=3 must divide the target's num_attention_heads=4"),
        ("llama", 2, r"target\.tp_size=2 must divide the number of processes, which is 1; set launch\.nproc_per"),
    ],
)
def test_a_split_that_cannot_be_is_refused(folders, family, tp_size, message):
    with pytest.raises(ConfigError, match=message):
        HFTarget(folders[family], CPU, tp_size=tp_size)


def test_a_model_without_a_plan_is_refused():
    with pytest.raises(ConfigError, match=r"target\.tp_size=2: transformers has no tensor-parallel plan for gpt_neo"):
        check_tensor_parallel(GPTNeoConfig(), 2)
    check_tensor_parallel(GPTNeoConfig(), 1)
