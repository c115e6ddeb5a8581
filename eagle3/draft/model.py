"""The EAGLE3 draft: one decoder layer that reads some layers of the target, three mostly.

Parameters carry the names of the portable format, so `state_dict` is what is exported. Weights are
kept in fp32 and cast to the dtype of the activations by the kernels that use them (free when both
are fp32): the gradients of the K steps then add up in fp32 whatever the model computes in.

EAGLE-3.1 (arXiv 2605.09992) norms each of these layers before fc (`fc_norm`), and what the next
step reads, which then needs no other norm before the head (`norm_output`). Names of the keys and
tensors as in vLLM 0.32 and SGLang 0.5.23.

n tokens, D hidden size, A layers of the target side by side, H query and G key/value heads of size
d, V and Vd the target's and the draft's vocabulary (equations: `ttt.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eagle3.config import DraftSection
from eagle3.draft import ttt
from eagle3.draft.attention import Backend
from eagle3.draft.rope import Rope
from eagle3.kernels.eager import Weights, linear
from eagle3.kernels.fused import Auto


@dataclass
class DraftConfig:
    """Shape of a draft; `target_hidden_size` and `vocab_size` are the target's."""

    architecture: ClassVar[str] = "LlamaForCausalLMEagle3"  # as engines call it
    reads_mask_token: ClassVar[bool] = False
    most_drafts: ClassVar[int | None] = None  # tokens a round; None: as many as are asked for

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    target_hidden_size: int
    max_position_embeddings: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    hidden_act: str = "silu"
    initializer_range: float = 0.02
    num_aux_hidden_states: int = 3  # layers of the target that are read
    fc_norm: bool = False
    norm_output: bool = False

    @property
    def aux_size(self) -> int:
        """A: numbers that a token's auxiliary states have, all layers together."""
        return self.num_aux_hidden_states * self.target_hidden_size

    @staticmethod
    def chosen(section: DraftSection) -> dict[str, Any]:
        """The fields that the config has keys of its own for."""
        return {"fc_norm": section.fc_norm, "norm_output": section.norm_output}

    @classmethod
    def complete(cls, section: DraftSection, target_vocab_size: int) -> DraftSection:
        """The config's section with what follows from its other keys and from the target."""
        return section

    def build(self, attention: type[Backend], t2d: Tensor, d2t: Tensor) -> "Draft":
        """A draft of this shape with drawn weights; arguments as `Draft` takes them."""
        return EAGLE3(self, attention, t2d, d2t)


class Linear(nn.Linear):
    """A linear layer without bias that follows the dtype of its input."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class RMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class NormEach(nn.ModuleList):
    """Norms, each of its own part of the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        parts = zip(self, x.chunk(len(self), dim=-1), strict=True)
        return torch.cat([norm(part) for norm, part in parts], dim=-1)


class MLP(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size)
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)


class SelfAttention(nn.Module):
    """The projections alone: those of q, k and v are joined into one product."""

    def __init__(self, config: DraftConfig):
        super().__init__()
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(2 * config.hidden_size, query_size)
        self.k_proj = Linear(2 * config.hidden_size, key_size)
        self.v_proj = Linear(2 * config.hidden_size, key_size)
        self.o_proj = Linear(query_size, config.hidden_size)


class Layer(nn.Module):
    """A Llama layer that reads [embedding; hidden state], each with a norm of its own."""

    def __init__(self, config: DraftConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)


class Draft(nn.Module):
    """What all drafts share, and what training asks of them.

    It has no forward: training (`unroll`) and serving (`decode`) attend to different keys, so each
    calls the parts of a forward pass, which are the methods of the drafts.
    """

    measures_chances = False  # whether `confidence_loss` asks for them

    def __init__(self, config: DraftConfig, attention: type[Backend], t2d: Tensor, d2t: Tensor):
        """`t2d` bool [V], `d2t` int64 [Vd] of offsets: target id = draft id + d2t[draft id]."""
        super().__init__()
        self.config, self.attention, self.kernels = config, attention, Auto
        self.rope = Rope(config.head_dim, config.rope_theta)
        self.register_buffer("t2d", t2d)
        self.register_buffer("d2t", d2t)

    def draw_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, Linear):
                nn.init.normal_(module.weight, std=self.config.initializer_range)

    @property
    def target_ids(self) -> Tensor:
        """int64 [Vd]: the target's id of every draft id."""
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    def begin(self, initial: Callable[..., None], embedding: Tensor, head: Tensor) -> None:
        """Set first weights: `initial` is an option of draft/initial, [V,D] are the target's."""
        raise NotImplementedError

    def unroll(self, embedding: Tensor, aux_hidden_states: Tensor, batch) -> Tensor:
        """The states behind the batch's rows at all steps, one step behind the other; see `ttt`."""
        raise NotImplementedError

    def head_input(self, hidden: Tensor) -> Tensor:
        """What the head reads of what `unroll` returned: [n,*] -> [n,S]."""
        raise NotImplementedError

    def head_weights(self, target_head: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The head's columns [Vd,S], first those that are the target's and stay as they are, then
        those that are trained; `target_head` [Vd,H] are the target's rows.
        """
        raise NotImplementedError

    def logits(self, hidden: Tensor, target_head: Tensor) -> Tensor:
        """[n,*] -> [n,Vd]; training calls this on no more than a chunk of rows (see `loss`)."""
        x, parts = self.head_input(hidden), self.head_weights(target_head)
        found = [part.to(x.dtype) for part in parts if part is not None]
        return F.linear(x, torch.cat(found, 1) if len(found) > 1 else found[0])

    def confidence_loss(self, students: Tensor, chances: Tensor, weights: Tensor) -> Tensor:
        """A loss beside that of the pairs: `students` [M,S] as `head_input` made them, the chance
        [M] of each to be accepted, `weights` [M].
        """
        raise NotImplementedError


class EAGLE3(Draft):
    """fc, one layer, a norm and a head over the draft vocabulary."""

    unroll = ttt.unroll
    training_flops = staticmethod(ttt.training_flops)

    def __init__(self, config: DraftConfig, attention: type[Backend], t2d: Tensor, d2t: Tensor):
        super().__init__(config, attention, t2d, d2t)
        norm = partial(RMSNorm, config.target_hidden_size, config.rms_norm_eps)
        norms = NormEach(norm() for _ in range(config.num_aux_hidden_states))
        self.fc_norm = norms if config.fc_norm else nn.Identity()
        self.fc = Linear(config.aux_size, config.hidden_size)
        self.midlayer = Layer(config)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.draft_vocab_size)
        self.draw_weights()

    def begin(self, initial: Callable[..., None], embedding: Tensor, head: Tensor) -> None:
        initial(self, embedding, head)

    def weights(self, kernels, dtype: torch.dtype) -> Weights:
        """Those of the layer and of fc for a pass that computes in `dtype`."""
        attention, mlp = self.midlayer.self_attn, self.midlayer.mlp
        qkv = [p.weight for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
        rest = (p.weight for p in (attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        return kernels.weights(self.fc.weight, qkv, *rest, dtype)

    def fuse(self, aux_hidden_states: Tensor, kernels, weights: Weights) -> Tensor:
        """The target's layers [n,A] -> the first hidden state [n,D]."""
        return kernels.linear(self.fc_norm(aux_hidden_states), weights.fc)

    def finish(self, hidden: Tensor, attended: Tensor, kernels, weights: Weights) -> Tensor:
        """Output projection, residual and MLP: hidden [n,D], attended [n,H,d] -> next hidden [n,D].

        The next step reads the residual stream itself, or with `norm_output` its norm.
        """
        hidden = kernels.linear(attended.flatten(1), weights.o, hidden)
        norm = self.midlayer.post_attention_layernorm
        _, hidden, normed = kernels.norm(norm, hidden, len(hidden))
        hidden = kernels.feed_forward(normed, weights, hidden)
        return self.norm(hidden) if self.config.norm_output else hidden

    def head_input(self, hidden: Tensor) -> Tensor:
        """What `finish` returned, with the one norm before the head in any case: [n,D] -> [n,D]."""
        return hidden if self.config.norm_output else self.norm(hidden)

    def head_weights(self, target_head: Tensor | None) -> tuple[None, Tensor]:
        return None, self.lm_head.weight
