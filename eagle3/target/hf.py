"""A transformers model as the target: hidden states of packed documents, without patching it.

T packed tokens, U teacher rows, H the hidden size, D the embedding's width, V the vocabulary.
"""

from functools import partial
from typing import Annotated, Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

import eagle3.target.packed_attention  # noqa: F401  registers the attention named "packed"
from eagle3.batch import Batch, Features
from eagle3.config import Within
from eagle3.errors import ConfigError, RunError
from eagle3.target.spec import TargetSpec, check_supported, end_token_ids


class HFTarget:
    """`target(batch) -> Features`, and the pieces that decoding needs.

    `embedding` [V,D] and `head` [V,H] are the model's own tensors; `eos_token_ids` a set of ints.
    `batch_tokens`: the size of a prefill that stores hidden states. Raises ConfigError, RunError.
    """

    in_process = True  # it has `states`, which decoding needs

    def __init__(
        self, spec: TargetSpec, device: torch.device, attention: str = "auto",
        batch_tokens: Annotated[int, Within(1)] = 16384, tp_size: int = 1,
    ):  # fmt: skip
        self.spec, self.config, self.device = spec, spec.config, device
        self.batch_tokens, self.aux_layer_ids = batch_tokens, spec.aux_layer_ids
        assert tp_size == 1, "check_settings says what to do instead"
        check_supported(self.config)
        if attention == "auto":
            # Ours has no chunks, soft caps or sinks; None: transformers chooses itself.
            special = ("attention_chunk_size", "attn_logit_softcapping")
            other = any(getattr(self.config, name, None) for name in special)
            attention = None if other or self.config.model_type == "gpt_oss" else "packed"
        options = {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code}
        options |= {"dtype": spec.dtype, "attn_implementation": attention}
        # Penalties, banned words or top_p of its own would bend what the draft learns.
        options |= {"generation_config": GenerationConfig()}
        try:
            self.model = AutoModelForCausalLM.from_pretrained(spec.path, **options)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise RunError(f"the target at {spec.path} does not load: {reason}") from error
        self.model.eval().requires_grad_(False).to(device)
        self.decoder = self.model.get_decoder()
        self.embedding = self.model.get_input_embeddings().weight
        self.head = self.model.get_output_embeddings().weight
        self.eos_token_ids = end_token_ids(spec)
        # Hooks on three layers: `output_hidden_states=True` would keep the outputs of all.
        self.captured: dict[int, torch.Tensor] = {}
        # Models call their list of layers `layers`, `h`, `blocks`.
        lists = [x for x in self.decoder.children() if isinstance(x, torch.nn.ModuleList)]
        layers = next((x for x in lists if len(x) == self.config.num_hidden_layers), None)
        if layers is None:
            raise RunError(f"{type(self.decoder).__name__} has no list of its decoder layers")
        for layer_id in self.aux_layer_ids:
            layers[layer_id].register_forward_hook(partial(self.capture, layer_id))
        self.check_head()

    def capture(self, layer_id: int, module, inputs, output) -> None:
        self.captured[layer_id] = output[0] if isinstance(output, tuple) else output

    @staticmethod
    def check_settings(section: dict[str, Any], spec: TargetSpec) -> None:
        """Raise ConfigError for what the section `target` asks for and this class cannot do."""
        if (size := section.get("tp_size", 1)) > 1:
            remedy = "target=hf cannot split it; use target=sglang"
            raise ConfigError(f"target.tp_size={size}: {remedy}")

    @torch.no_grad()
    def check_head(self) -> None:
        """Raise ConfigError where the logits are not last hidden states times the head.

        The teacher's distribution is computed as that product. A bias or a scale that no key of the
        config names would train the draft towards another model, and no loss would show it.
        """
        ids = torch.arange(3, device=self.device)
        logits = self.model(input_ids=ids[None], use_cache=False).logits[0].double()
        product = self.lm_head(self.states(ids, ids)[1]).double()
        if (logits - product).norm() > 0.02 * logits.norm():  # bf16 rounds by 0.004
            reason = "changes its logits behind the head; it is not supported"
            raise ConfigError(f"{self.spec.path} {reason}")

    def lm_head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Last hidden states [n,H] -> logits [n,V]."""
        return hidden @ self.head.T

    @torch.no_grad()
    def states(self, input_ids, position_ids, cache=None, documents=None, visible=None) -> tuple:
        """int64 [T] or [B,T] -> aux_hidden_states [..,T,3H] and, after the final norm,
        last_hidden_states [..,T,H].

        With `documents` the T tokens are packed documents; with `cache` they continue it. Each
        token sees all before it, or what `visible` bool [B,T,S] says of the S that are cached and
        new; cached tokens must then lie at the slots of their positions.
        """
        rows = input_ids.reshape(-1, input_ids.shape[-1])
        mask = None if visible is None else self.additive_mask(visible, position_ids)
        options = {"past_key_values": cache, "use_cache": cache is not None, "documents": documents}
        places = position_ids.reshape(rows.shape)
        output = self.decoder(input_ids=rows, attention_mask=mask, position_ids=places, **options)
        aux = torch.cat([self.captured[layer_id] for layer_id in self.aux_layer_ids], dim=-1)
        self.captured.clear()  # or they would live until the next pass
        last = output.last_hidden_state
        return aux.reshape(*input_ids.shape, -1), last.reshape(*input_ids.shape, -1)

    def additive_mask(self, visible: torch.Tensor, position_ids: torch.Tensor) -> Any:
        """`visible` as transformers takes it ready-made: [B,1,T,S], 0 where a token is seen; two,
        by kind of layer, where only some have a window. Raises ConfigError where the attention
        ignores such masks or cuts the text into chunks.
        """
        # Flash kernels take no masks; chunks start at slots, and the slots of a batch differ.
        attention = self.decoder.config._attn_implementation
        chunked = getattr(self.config, "attention_chunk_size", None)
        if attention not in ("packed", "sdpa", "eager") or chunked:
            raise ConfigError(
                f"target.attention={attention} decodes only chains at batch 1; set it to eager, or "
                "benchmark=sglang where the model has chunks"
            )

        def additive(seen: torch.Tensor) -> torch.Tensor:
            mask = torch.zeros(seen.shape, dtype=self.embedding.dtype, device=seen.device)
            return mask.masked_fill_(~seen, torch.finfo(mask.dtype).min)[:, None]

        window = getattr(self.config, "sliding_window", None)
        if window is None:
            return additive(visible)
        # A window counts positions, not slots: the nodes of a tree share positions.
        cached = torch.arange(visible.shape[2] - visible.shape[1], device=visible.device)
        places = torch.cat([cached.expand(len(visible), -1), position_ids], dim=1)
        windowed = additive(visible & (position_ids[..., None] - places[:, None] < window))
        if getattr(self.config, "layer_types", None) is None:
            return windowed
        return {"full_attention": additive(visible), "sliding_attention": windowed}

    @torch.no_grad()
    def generate(self, prompts: list, max_new_tokens: int, sampling: dict | None = None) -> list:
        """Answers to prompts, lists of ids both; the end-of-turn token is kept where generated.

        `sampling` has temperature, top_p and top_k (0: all tokens); None is greedy.
        """
        width, eos = max(map(len, prompts)), sorted(self.eos_token_ids)
        pad = eos[0] if eos else 0
        padded = [[pad] * (width - len(p)) + p for p in prompts]  # left, so that all end together
        attended = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
        options = {} if sampling is None else sampling | {"do_sample": True}
        options |= {"max_new_tokens": max_new_tokens, "pad_token_id": pad}
        options |= {"eos_token_id": eos or None}
        ids, mask = torch.tensor([padded, attended], device=self.device)
        output = self.model.generate(ids, attention_mask=mask, **options)
        answers = output[:, width:].tolist()
        for answer in answers:
            ends = (place for place, token in enumerate(answer) if token in self.eos_token_ids)
            del answer[next(ends, len(answer)) + 1 :]  # padding
        return answers

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Features:
        aux, last = self.states(batch.input_ids, batch.position_ids, documents=batch.documents)
        last = last[batch.teacher_rows]
        return Features(aux, last, *head_statistics(last, self.head))


def head_statistics(last: torch.Tensor, head: torch.Tensor, chunk_bytes: int = 1 << 28) -> tuple:
    """argmax int64 [U] and logsumexp [U] (at least fp32) of last @ head.T, in chunks of rows."""
    # All logits at once would be 8 GB for 16,384 rows of a vocabulary of 128k.
    wide = torch.promote_types(last.dtype, torch.float32)
    argmax, logsumexp = [], []
    for rows in last.split(max(1, chunk_bytes // (4 * len(head)))):
        logits = (rows @ head.T).to(wide)
        argmax.append(logits.argmax(-1))
        logsumexp.append(logits.logsumexp(-1))
    return torch.cat(argmax), torch.cat(logsumexp)
