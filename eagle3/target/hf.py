"""A transformers model as the target: packed hidden states, without logits of all rows and without patching it."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

import eagle3.target.packed_attention  # noqa: F401  registers the attention named "packed"
from eagle3.data.packing import Batch
from eagle3.errors import ConfigError, RunError
from eagle3.target.features import Features
from eagle3.target.layers import engines_default


def text_config(path: str, revision: str | None = None, trust_remote_code: bool = False) -> PretrainedConfig:
    """The config of the language model at `path`; raises ConfigError when there is none."""
    try:
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"model.path={path} is not a model that transformers can read: {reason}") from error
    return config.get_text_config()


def default_aux_layer_ids(num_layers: int) -> list[int]:
    """Layers 1, L/2 - 1 and L - 4, zero-based, as EAGLE3 and every engine choose them."""
    if num_layers < 7:
        raise ConfigError(
            f"the target has {num_layers} layers, too few for the default auxiliary layers: "
            f"set model.aux_layer_ids to three of 0..{num_layers - 1}, e.g. model.aux_layer_ids=[0,1,{num_layers - 1}]"
        )
    return engines_default(num_layers)


def check_supported(config: PretrainedConfig) -> None:
    """Raise ConfigError where softmax(lm_head(last hidden)) is not what the model samples from."""
    for name, neutral in (("final_logit_softcapping", None), ("logits_scaling", 1), ("logit_scale", 1)):
        if getattr(config, name, neutral) not in (neutral, None):
            raise ConfigError(f"the target's {name}={getattr(config, name)} changes its logits; it is not supported")


def choose_attention(config: PretrainedConfig) -> str | None:
    """`packed` where it computes what the model means, else None: what transformers chooses itself."""
    special = ("attention_chunk_size", "attn_logit_softcapping")
    if config.model_type == "gpt_oss" or any(getattr(config, name, None) for name in special):
        return None
    return "packed"


def end_token_ids(generation: int | list[int] | None, config: PretrainedConfig) -> set[int]:
    """The tokens that end an answer: those of the generation config, where it names any, else the config's."""
    eos = getattr(config, "eos_token_id", None) if generation is None else generation
    return set(eos) if isinstance(eos, list) else {eos} - {None}


class HFTarget:
    """`target(batch) -> Features`, and the pieces that decoding needs.

    `embedding` [V,D] and `head` [V,H] are the model's own tensors; `eos_token_ids` a set of ints. `batch_tokens` is how
    many tokens a prefill that stores hidden states packs. With `tp_size` > 1 the layers are split over as many
    consecutive ranks of torch.distributed, `group`: every rank of it makes the target and calls it with the same batch,
    and each gets the same result. The embedding and the head stay whole on every rank.
    """

    split_over_ranks = True  # `tp_size` of our processes share one target
    in_process = True  # it has `states`, which decoding needs

    def __init__(
        self,
        path: str,
        device: torch.device,
        aux_layer_ids: list[int] | None = None,
        revision: str | None = None,
        dtype: str = "auto",
        trust_remote_code: bool = False,
        attention: str = "auto",
        tp_size: int = 1,
        batch_tokens: int = 16384,
    ):
        self.config = text_config(path, revision, trust_remote_code)
        self.batch_tokens = batch_tokens
        check_supported(self.config)
        check_tensor_parallel(self.config, tp_size)
        mesh = None if tp_size == 1 else tensor_parallel_mesh(device, tp_size)
        self.group = None if mesh is None else mesh["tp"].get_group()
        try:
            with loading_over(mesh, path, revision, trust_remote_code) as distributed_config:
                self.model = AutoModelForCausalLM.from_pretrained(
                    path,
                    revision=revision,
                    dtype=dtype,
                    trust_remote_code=trust_remote_code,
                    attn_implementation=choose_attention(self.config) if attention == "auto" else attention,
                    distributed_config=distributed_config,
                )
        except (OSError, ValueError) as error:
            raise RunError(f"the target at {path} does not load: {str(error).splitlines()[0]}") from error
        self.model.eval().requires_grad_(False).to(device)
        self.device, self.path = device, path
        decoder = self.model.get_decoder()
        self.decoder = decoder
        self.aux_layer_ids = aux_layer_ids or default_aux_layer_ids(self.config.num_hidden_layers)
        self.captured: dict[int, torch.Tensor] = {}
        layers = find_layers(decoder, self.config.num_hidden_layers)
        for layer_id in self.aux_layer_ids:
            layers[layer_id].register_forward_hook(self.capture(layer_id))
        self.check_head()

    def capture(self, layer_id: int):
        def hook(module, inputs, output):
            self.captured[layer_id] = output[0] if isinstance(output, tuple) else output

        return hook

    @torch.no_grad()
    def check_head(self) -> None:
        """Raise ConfigError where the model's logits are not last hidden states times the head (a bias, a scale)."""
        ids = torch.arange(3, device=self.device)
        theirs = self.model(input_ids=ids[None], use_cache=False).logits[0].double()
        ours = self.lm_head(self.states(ids, ids)[1]).double()
        if (theirs - ours).norm() > 0.02 * theirs.norm():
            raise ConfigError(f"the target at {self.path} changes its logits behind the head; it is not supported")

    @property
    def embedding(self) -> torch.Tensor:
        return self.model.get_input_embeddings().weight

    @property
    def head(self) -> torch.Tensor:
        return self.model.get_output_embeddings().weight

    @property
    def eos_token_ids(self) -> set[int]:
        return end_token_ids(self.model.generation_config.eos_token_id, self.config)

    def lm_head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Last hidden states [n,H] -> logits [n,V]."""
        return hidden @ self.head.T

    @torch.no_grad()
    def states(
        self, input_ids, position_ids, cache=None, documents=None, visible=None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 [T] or [B,T] -> aux_hidden_states [..,T,3H] and last_hidden_states [..,T,H] (after the final norm).

        With `documents` the T tokens are packed documents; with `cache` they continue it. Each token sees all before
        it, or what `visible` bool [B,T,S] says of the S that are cached and new; cached tokens must then lie at the
        slots of their positions.
        """
        rows = input_ids.reshape(-1, input_ids.shape[-1])
        output = self.decoder(
            input_ids=rows,
            attention_mask=None if visible is None else self.masks(visible, position_ids),
            position_ids=position_ids.reshape(rows.shape),
            past_key_values=cache,
            use_cache=cache is not None,
            documents=documents,
        )
        aux = torch.cat([self.captured[layer_id] for layer_id in self.aux_layer_ids], dim=-1)
        self.captured.clear()
        return aux.reshape(*input_ids.shape, -1), output.last_hidden_state.reshape(*input_ids.shape, -1)

    def masks(self, visible: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
        """`visible` as transformers takes it: [B,1,T,S] to be added, by kind of layer where only some have a window."""
        attention = self.decoder.config._attn_implementation
        if attention not in ("packed", "sdpa", "eager") or getattr(self.config, "attention_chunk_size", None):
            raise ConfigError(
                f"{self.config.model_type} with target.attention={attention} decodes chains at batch 1 only; trees and "
                "batches need target.attention=eager, and a target without chunked attention"
            )

        def additive(seen: torch.Tensor) -> torch.Tensor:
            mask = torch.zeros(seen.shape, dtype=self.embedding.dtype, device=seen.device)
            return mask.masked_fill_(~seen, torch.finfo(mask.dtype).min)[:, None]

        window = getattr(self.config, "sliding_window", None)
        if window is None:
            return additive(visible)
        cached = torch.arange(visible.shape[2] - visible.shape[1], device=visible.device)
        places = torch.cat([cached.expand(len(visible), -1), position_ids], dim=1)
        windowed = additive(visible & (position_ids[..., None] - places[:, None] < window))
        if getattr(self.config, "layer_types", None) is None:
            return windowed
        return {"full_attention": additive(visible), "sliding_attention": windowed}

    def generate(self, input_ids: torch.Tensor, **options) -> torch.Tensor:
        """What transformers generates: int64 [B,n] -> [B,n+m]."""
        return self.model.generate(input_ids, **options)

    def close(self) -> None:
        """Nothing is left to end: the memory is free as soon as nobody holds the target."""

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Features:
        aux, last = self.states(batch.input_ids, batch.position_ids, documents=batch.documents)
        last = last[batch.teacher_rows]
        if self.group is None:
            return Features(aux, last, *head_statistics(last, self.head))
        return Features(aux, last, *shared_head_statistics(last, self.head, self.group))


def head_statistics(last: torch.Tensor, head: torch.Tensor, chunk_bytes: int = 1 << 28) -> tuple:
    """argmax int64 [U] and logsumexp [U] (at least fp32) of last @ head.T, a chunk of rows at a time."""
    wide = torch.promote_types(last.dtype, torch.float32)
    argmax, logsumexp = [], []
    for rows in last.split(max(1, chunk_bytes // (4 * len(head)))):
        logits = (rows @ head.T).to(wide)
        argmax.append(logits.argmax(-1))
        logsumexp.append(logits.logsumexp(-1))
    return torch.cat(argmax), torch.cat(logsumexp)


def shared_head_statistics(last: torch.Tensor, head: torch.Tensor, group: dist.ProcessGroup) -> tuple:
    """`head_statistics` of rows that every rank of `group` has: each computes its share of them."""
    rank, ranks, rows = group.rank(), group.size(), len(last)
    mine = slice(rows * rank // ranks, rows * (rank + 1) // ranks)
    gathered = []
    for share in head_statistics(last[mine], head):
        whole = share.new_zeros(rows)
        whole[mine] = share
        dist.all_reduce(whole, group=group)  # the other ranks' rows are zero here
        gathered.append(whole)
    return tuple(gathered)


def check_tensor_parallel(config: PretrainedConfig, tp_size: int) -> None:
    """Raise ConfigError where the target cannot be split over `tp_size` ranks."""
    if tp_size == 1:
        return
    if not config.base_model_tp_plan:
        raise ConfigError(
            f"target.tp_size={tp_size}: transformers has no tensor-parallel plan for {config.model_type}; "
            "set target.tp_size=1"
        )
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "moe_intermediate_size"):
        size = getattr(config, name, None)
        if isinstance(size, int) and size % tp_size:
            raise ConfigError(f"target.tp_size={tp_size} must divide the target's {name}={size}; choose a divisor")


def tensor_parallel_mesh(device: torch.device, tp_size: int) -> DeviceMesh:
    """Groups of `tp_size` consecutive ranks, with the dimensions that transformers asks for. Raises ConfigError."""
    processes = dist.get_world_size() if dist.is_initialized() else 1
    if processes % tp_size:
        raise ConfigError(
            f"target.tp_size={tp_size} must divide the number of processes, which is {processes}; "
            f"set launch.nproc_per_node={tp_size} or a multiple of it"
        )
    shape = (processes // tp_size, 1, 1, tp_size)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replica", "pp", "fsdp", "tp"))


@contextmanager
def loading_over(mesh: DeviceMesh | None, path: str, revision: str | None, trust_remote_code: bool) -> Iterator:
    """What `from_pretrained` takes as distributed_config; inside, transformers splits over `mesh`.

    By itself it takes all processes for one group, the accelerator for the device, and needs `accelerate` for a device
    map. With none, each rank reads its slices into host memory and moves them afterwards. Its plans also shard the head
    (and a tied embedding), which the draft and the statistics need whole.
    """
    if mesh is None:
        yield None
        return
    try:
        from transformers.distributed import DistributedConfig, mixin
        from transformers.distributed.utils import TransformersDeviceMesh
    except ImportError as error:
        raise RunError("target.tp_size > 1 needs a newer transformers; install transformers>=5.19") from error
    config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    whole = (model.get_input_embeddings(), model.get_output_embeddings())
    replicated = {name: "replicated_with_grad_allreduce" for name, module in model.named_modules() if module in whole}
    before = mixin.initialize_distributed_mesh
    mixin.initialize_distributed_mesh = lambda distributed_config: (None, TransformersDeviceMesh(mesh, mesh))
    try:
        yield DistributedConfig(tp_size=mesh["tp"].size(), tp_plan=replicated)
    finally:
        mixin.initialize_distributed_mesh = before


def find_layers(decoder: torch.nn.Module, num_layers: int) -> torch.nn.ModuleList:
    """The list of decoder layers, whatever the model calls it."""
    for module in decoder.children():
        if isinstance(module, torch.nn.ModuleList) and len(module) == num_layers:
            return module
    raise RunError(f"{type(decoder).__name__} has no list of its {num_layers} decoder layers among its children")


def describe(path: str, revision: str | None, trust_remote_code: bool = False) -> dict:
    """What a target is, for fingerprints: a hub id with its commit, or what a folder holds.

    Of weight files the size and 64 blocks of a mebibyte spread over them: all of a small one, seconds for a large one.
    """
    folder = Path(path)
    if not folder.is_dir():
        commit = getattr(text_config(path, revision, trust_remote_code), "_commit_hash", None)
        return {"path": path, "revision": revision, "commit": commit}
    files = {}
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*config.json")]):
        digest, size = hashlib.sha256(), file.stat().st_size
        with file.open("rb") as stream:
            for block in range(64):
                stream.seek(block * size // 64)
                digest.update(stream.read(1 << 20))
        files[file.name] = [size, digest.hexdigest()]
    return files
