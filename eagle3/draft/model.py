"""The EAGLE3 draft: one decoder layer that reads some layers of the target, three mostly.

Parameters carry the names of the portable format, so `state_dict` is what is exported. Weights are
kept in fp32 and cast to the dtype of the activations where they are used (free when both are fp32):
the gradients of the K steps then add up in fp32 whatever the model computes in.

EAGLE-3.1 (arXiv 2605.09992) norms each of these layers before fc (`fc_norm`), and what the next
step reads, which then needs no other norm before the head (`norm_output`). Names of the keys and
tensors as in vLLM 0.32 and SGLang 0.5.23.

n tokens, D hidden size, A layers of the target side by side, H query and G key/value heads of size
d, V and Vd the target's and the draft's vocabulary (equations: `ttt.py`).
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eagle3.draft.attention import Backend
from eagle3.draft.rope import Rope


@dataclass
class DraftConfig:
    """Shape of a draft; `target_hidden_size` and `vocab_size` are the target's."""

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


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight^T in the dtype of x; the gradient of the weight has the weight's own dtype."""
    return F.linear(x, weight.to(x.dtype))


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


class GatedDown(torch.autograd.Function):
    """(silu(gate) * up) @ down^T that keeps only gate and up for backward.

    Autograd would also keep silu(gate) and the product: [n, intermediate_size] each, at every step.
    """

    @staticmethod
    def forward(ctx, gate, up, down):
        ctx.save_for_backward(gate, up, down)
        return F.linear(F.silu(gate).mul_(up), down)

    @staticmethod
    def backward(ctx, grad):
        gate, up, down = ctx.saved_tensors
        activated = F.silu(gate)  # computed again: cheap beside the three products
        grad_down = grad.flatten(0, -2).T @ (activated * up).flatten(0, -2)
        grad_product = grad @ down
        grad_gate = torch.ops.aten.silu_backward(grad_product * up, gate)
        return grad_gate, grad_product.mul_(activated), grad_down


class MLP(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size)
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        down = self.down_proj.weight.to(x.dtype)
        return GatedDown.apply(self.gate_proj(x), self.up_proj(x), down)


class SelfAttention(nn.Module):
    """The projections alone: `Draft.qkv_weight` joins those of q, k and v into one product."""

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
    """fc, one layer, a norm and a head over the draft vocabulary.

    It has no forward: training (`ttt.unroll`) and serving (`decode`) attend to different keys, so
    each calls the parts of a forward pass, which are the methods here.
    """

    def __init__(self, config: DraftConfig, attention: type[Backend], t2d: Tensor, d2t: Tensor):
        """`t2d` bool [V], `d2t` int64 [Vd] of offsets: target id = draft id + d2t[draft id]."""
        super().__init__()
        self.config, self.attention = config, attention
        norm = partial(RMSNorm, config.target_hidden_size, config.rms_norm_eps)
        norms = NormEach(norm() for _ in range(config.num_aux_hidden_states))
        self.fc_norm = norms if config.fc_norm else nn.Identity()
        self.fc = Linear(config.aux_size, config.hidden_size)
        self.midlayer = Layer(config)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.draft_vocab_size)
        self.rope = Rope(config.head_dim, config.rope_theta)
        self.register_buffer("t2d", t2d)
        self.register_buffer("d2t", d2t)
        for module in self.modules():
            if isinstance(module, Linear):
                nn.init.normal_(module.weight, std=config.initializer_range)

    @property
    def target_ids(self) -> Tensor:
        """int64 [Vd]: the target's id of every draft id."""
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    def qkv_weight(self, half: int) -> Tensor:
        """[(H+2G)d,D]: the columns of q, k, v for the embedding (half 0) or state (half 1)."""
        attention, size = self.midlayer.self_attn, self.config.hidden_size
        columns = slice(half * size, (half + 1) * size)
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        return torch.cat([p.weight[:, columns] for p in projections])

    def split_heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[n,(H+2G)d] -> q [n,H,d], k [n,G,d], v [n,G,d], views of it."""
        heads, kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        qkv = qkv.unflatten(-1, (-1, self.config.head_dim))
        return qkv.split((heads, kv_heads, kv_heads), dim=-2)

    def fuse(self, aux_hidden_states: Tensor) -> Tensor:
        """The target's layers [n,A] -> the first hidden state [n,D]."""
        return self.fc(self.fc_norm(aux_hidden_states))

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Output projection, residual and MLP: hidden [n,D], attended [n,H,d] -> next hidden [n,D].

        The next step reads the residual stream itself, or with `norm_output` its norm.
        """
        hidden = hidden + self.midlayer.self_attn.o_proj(attended.flatten(1))
        hidden = hidden + self.midlayer.mlp(self.midlayer.post_attention_layernorm(hidden))
        return self.norm(hidden) if self.config.norm_output else hidden

    def head_input(self, hidden: Tensor) -> Tensor:
        """What `finish` returned, with the one norm before the head in any case: [n,D] -> [n,D]."""
        return hidden if self.config.norm_output else self.norm(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """[n,D] -> [n,Vd]; training calls this on no more than a chunk of rows (see `loss`)."""
        return self.lm_head(self.head_input(hidden))
