"""A transformers model as the target: packed hidden states, without logits of all rows and without
patching it.
"""

from typing import Annotated, Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

import eagle3.target.packed_attention  # noqa: F401  registers the attention named "packed"
from eagle3.batch import Batch, Features
from eagle3.config import Within
from eagle3.errors import ConfigError, RunError
from eagle3.target.spec import TargetSpec, check_supported, end_token_ids


def choose_attention(config: PretrainedConfig) -> str | None:
    """`packed` where it computes what the model means, else None: what transformers chooses itself."""
    special = ("attention_chunk_size", "attn_logit_softcapping")
    if config.model_type == "gpt_oss" or any(getattr(config, name, None) for name in special):
        return None
    return "packed"


class HFTarget:
    """`target(batch) -> Features`, and the pieces that decoding needs.

    `embedding` [V,D] and `head` [V,H] are the model's own tensors; `eos_token_ids` a set of ints.
    `batch_tokens` is how many tokens a prefill that stores hidden states packs. With `tp_size` > 1
    the layers are split over as many consecutive ranks of torch.distributed, `group`: every rank of
    it makes the target and calls it with the same batch, and each gets the same result. The
    embedding and the head stay whole on every rank.
    """

    in_process = True  # it has `states`, which decoding needs

    @staticmethod
    def check_settings(section: dict[str, Any], spec: TargetSpec) -> None:
        """Raises ConfigError where the section asks for several processes."""
        if section.get("tp_size", 1) > 1:
            raise ConfigError(
                f"target.tp_size={section['tp_size']}: target=hf does not split a model over GPUs; "
                "set target=sglang"
            )

    def __init__(
        self,
        spec: TargetSpec,
        device: torch.device,
        attention: str = "auto",
        batch_tokens: Annotated[int, Within(1)] = 16384,
        tp_size: int = 1,
    ):
        assert tp_size == 1
        self.spec, self.config, self.device = spec, spec.config, device
        self.batch_tokens, self.aux_layer_ids = batch_tokens, spec.aux_layer_ids
        check_supported(self.config)
        chosen = choose_attention(self.config) if attention == "auto" else attention
        try:
            self.model = AutoModelForCausalLM.from_pretrained(
                spec.path,
                revision=spec.revision,
                dtype=spec.dtype,
                trust_remote_code=spec.trust_remote_code,
                attn_implementation=chosen,
            )
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise RunError(f"the target at {spec.path} does not load: {reason}") from error
        self.model.eval().requires_grad_(False).to(device)
        decoder = self.model.get_decoder()
        self.decoder = decoder
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
        """Raise ConfigError where the model's logits are not last hidden states times the head (a
        bias, a scale).
        """
        ids = torch.arange(3, device=self.device)
        theirs = self.model(input_ids=ids[None], use_cache=False).logits[0].double()
        ours = self.lm_head(self.states(ids, ids)[1]).double()
        if (theirs - ours).norm() > 0.02 * theirs.norm():
            raise ConfigError(
                f"the target at {self.spec.path} changes its logits behind the head; it is not supported"
            )

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
        """int64 [T] or [B,T] -> aux_hidden_states [..,T,3H] and last_hidden_states [..,T,H] (after
        the final norm).

        With `documents` the T tokens are packed documents; with `cache` they continue it. Each
        token sees all before it, or what `visible` bool [B,T,S] says of the S that are cached and
        new; cached tokens must then lie at the slots of their positions.
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
        return aux.reshape(*input_ids.shape, -1), output.last_hidden_state.reshape(
            *input_ids.shape, -1
        )

    def masks(
        self, visible: torch.Tensor, position_ids: torch.Tensor
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """`visible` as transformers takes it: [B,1,T,S] to be added, by kind of layer where only
        some have a window.
        """
        attention = self.decoder.config._attn_implementation
        if attention not in ("packed", "sdpa", "eager") or getattr(
            self.config, "attention_chunk_size", None
        ):
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
        return Features(aux, last, *head_statistics(last, self.head))


def head_statistics(last: torch.Tensor, head: torch.Tensor, chunk_bytes: int = 1 << 28) -> tuple:
    """argmax int64 [U] and logsumexp [U] (at least fp32) of last @ head.T, a chunk of rows at a
    time.
    """
    wide = torch.promote_types(last.dtype, torch.float32)
    argmax, logsumexp = [], []
    for rows in last.split(max(1, chunk_bytes // (4 * len(head)))):
        logits = (rows @ head.T).to(wide)
        argmax.append(logits.argmax(-1))
        logsumexp.append(logits.logsumexp(-1))
    return torch.cat(argmax), torch.cat(logsumexp)


def find_layers(decoder: torch.nn.Module, num_layers: int) -> torch.nn.ModuleList:
    """The list of decoder layers, whatever the model calls it."""
    for module in decoder.children():
        if isinstance(module, torch.nn.ModuleList) and len(module) == num_layers:
            return module
    raise RunError(
        f"{type(decoder).__name__} has no list of its {num_layers} decoder layers among its children"
    )
