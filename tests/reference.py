"""EAGLE3 training written a second time, in the plainest way: padded documents, dense masks, full
logits, autograd.

Tests compare the trainer with it, dev/compare_step.py compares the costs. It shares nothing with
the trainer but the draft's weights.

B documents padded to L tokens, K steps, D hidden, A layers of the target concatenated, H the
target's hidden size, V and S sizes of the target's and the draft's vocabulary, N heads of size d.
Beyond a document's end, `input_ids`, `loss_mask`, `aux` and the target's last hidden states are
zero.
"""

import copy
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.nn import functional as F

from eagle3 import batch as supervision
from eagle3 import loss as trainer_loss
from eagle3.batch import Document, Features, pack
from eagle3.draft.attention import Attend
from eagle3.draft.block import DSparkConfig
from eagle3.draft.model import EAGLE3, DraftConfig
from eagle3.draft.ttt import unroll
from eagle3.kernels.eager import Eager


@dataclass
class DenseOutput:
    """Losses divided by the normaliser, those of steps [K] not weighted; `correct` bool [B,L,K]."""

    loss: torch.Tensor
    step_loss: torch.Tensor
    step_accuracy: torch.Tensor
    correct: torch.Tensor


def dense_teacher(last_hidden: torch.Tensor, head: torch.Tensor, t2d: torch.Tensor):
    """Probabilities [B,L,S] over the draft vocabulary, renormalised, and the argmax [B,L] over the
    whole one.
    """
    logits = last_hidden @ head.T
    restricted = logits.softmax(-1)[..., t2d]
    return restricted / restricted.sum(-1, keepdim=True), logits.argmax(-1)


def ahead(values: torch.Tensor, distance: int) -> torch.Tensor:
    """values[:, t + distance] at t, zero beyond the end."""
    distance = min(distance, values.shape[1])
    return torch.cat([values[:, distance:], torch.zeros_like(values[:, :distance])], dim=1)


def supervised_pairs(loss_mask, in_vocab, ttt_steps: int, mask: str):
    """The gates [B,L] of the K steps, all but that on the teacher's argmax, and the normaliser."""
    gates = []
    for k in range(ttt_steps):
        if mask == "shifted":
            gate = ahead(loss_mask, k)
        else:
            gate = torch.ones_like(loss_mask)
            for i in range(1, k + 3):
                gate = gate & ahead(loss_mask, i)
            for i in range(2, k + 2):
                gate = gate & ahead(in_vocab, i)
        gates.append(gate)
    return gates, loss_mask.numel() if mask == "shifted" else int(gates[0].sum())


def rope_tables(head_dim: int, theta: float, length: int):
    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies.repeat(2))
    return angles.cos().float(), angles.sin().float()


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return torch.cat([-x[..., half:], x[..., :half]], dim=-1)


def pair_losses(logits, teacher, pointwise: str, eta: float = 3.0):
    """[B,L] losses of logits [B,L,S] against probabilities [B,L,S]."""
    log_student = logits.log_softmax(-1)
    cross_entropy = -(teacher * log_student).sum(-1)
    if pointwise == "kl":
        return cross_entropy
    tiny = torch.finfo(teacher.dtype).tiny
    student, log_teacher = log_student.exp(), teacher.clamp(min=tiny).log()
    if pointwise == "reverse_kl":
        return (student * (log_student - log_teacher)).sum(-1)
    if pointwise == "jsd":
        middle = (student + teacher) / 2
        own = student * (log_student - middle.log())
        return (own + teacher * (log_teacher - middle.log())).sum(-1) / 2
    acceptance = torch.minimum(student, teacher).sum(-1)
    if pointwise in ("tv", "nla"):
        return 1 - acceptance if pointwise == "tv" else -acceptance.log()
    if pointwise == "mix":
        return 0.1 * cross_entropy + 1.8 * (1 - acceptance)
    weight = torch.exp(-eta * acceptance.detach())
    kl_divergence = cross_entropy + torch.xlogy(teacher, teacher).sum(-1)
    return weight * kl_divergence + (1 - weight) * (1 - acceptance)


def dense_loss(
    draft, embedding, aux, teacher, argmax, input_ids, loss_mask,
    gamma: float, ttt_steps: int, mask="serving", pointwise="kl",
) -> DenseOutput:  # fmt: skip
    """`teacher`, `argmax` are those of `dense_teacher`; every row goes through every step."""
    config, t2d, weights = draft.config, draft.t2d, dict(draft.named_parameters())
    batch, length = input_ids.shape

    def linear(x, name):
        return F.linear(x, weights[name + ".weight"])

    def rms(x, name):
        return F.rms_norm(x, (x.shape[-1],), weights[name + ".weight"], config.rms_norm_eps)

    def heads(x):
        return x.view(batch, length, -1, config.head_dim).transpose(1, 2)

    cos, sin = rope_tables(config.head_dim, config.rope_theta, length + ttt_steps)
    causal = torch.full((length, length), float("-inf"), dtype=aux.dtype).triu(1)
    groups, scale = config.num_attention_heads // config.num_key_value_heads, config.head_dim**-0.5
    gates, normaliser = supervised_pairs(loss_mask, t2d[input_ids], ttt_steps, mask)
    teacher = F.pad(teacher, (0, 0, 0, ttt_steps), value=1 / teacher.shape[-1])

    if config.fc_norm:
        parts = enumerate(aux.chunk(config.num_aux_hidden_states, dim=-1))
        aux = torch.cat([rms(part, f"fc_norm.{place}") for place, part in parts], dim=-1)
    hidden = linear(aux, "fc")
    keys, values = [], []
    loss, step_loss, step_accuracy, correct = 0.0, [], [], []
    for k in range(ttt_steps):
        embedded = rms(embedding[ahead(input_ids, k + 1)], "midlayer.input_layernorm")
        both = torch.cat([embedded, rms(hidden, "midlayer.hidden_norm")], dim=-1)
        q, key, value = (heads(linear(both, f"midlayer.self_attn.{name}_proj")) for name in "qkv")
        here = slice(k, k + length)
        turn, across = cos[here].to(q.dtype), sin[here].to(q.dtype)
        q, key = (x * turn + rotate_half(x) * across for x in (q, key))
        keys.append(key.repeat_interleave(groups, dim=1))
        values.append(value.repeat_interleave(groups, dim=1))

        scores = q @ keys[0].transpose(2, 3) * scale + causal
        own = [(q * later).sum(-1, keepdim=True) * scale for later in keys[1:]]
        probabilities = torch.cat([scores, *own], dim=-1).softmax(-1)
        attended = probabilities[..., :length] @ values[0]
        for i in range(k):
            attended = attended + probabilities[..., length + i, None] * values[i + 1]
        hidden = hidden + linear(attended.transpose(1, 2).flatten(2), "midlayer.self_attn.o_proj")

        normed = rms(hidden, "midlayer.post_attention_layernorm")
        gate, up = (linear(normed, f"midlayer.mlp.{name}_proj") for name in ("gate", "up"))
        hidden = hidden + linear(F.silu(gate) * up, "midlayer.mlp.down_proj")
        normed = rms(hidden, "norm")
        logits = linear(normed, "lm_head")
        hidden = normed if config.norm_output else hidden

        losses = pair_losses(logits, teacher[:, k + 1 : k + 1 + length], pointwise)
        truth = ahead(argmax, k + 1)
        step_loss.append((losses * (gates[k] & t2d[truth])).sum() / normaliser)
        loss = loss + gamma**k * step_loss[-1]
        correct.append((t2d.nonzero()[:, 0][logits.argmax(-1)] == truth) & gates[k])
        step_accuracy.append(correct[-1].sum() / gates[k].sum())
    step_loss, step_accuracy = torch.stack(step_loss).detach(), torch.stack(step_accuracy)
    return DenseOutput(loss, step_loss, step_accuracy, torch.stack(correct, -1))


@dataclass
class Case:
    """The same documents for both forms: padded, and as the list that `pack` takes."""

    draft: torch.nn.Module
    embedding: torch.Tensor
    head: torch.Tensor
    lengths: list[int]
    input_ids: torch.Tensor
    loss_mask: torch.Tensor
    aux: torch.Tensor
    last_hidden: torch.Tensor

    def documents(self, order=None) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
        pairs = zip(self.input_ids, self.loss_mask, self.lengths, strict=True)
        documents = [(i, ids[:n], mask[:n]) for i, (ids, mask, n) in enumerate(pairs)]
        return documents if order is None else [documents[i] for i in order]

    def to(self, dtype: torch.dtype) -> "Case":
        """A copy in another dtype."""
        draft = copy.deepcopy(self.draft).to(dtype)
        names = ("embedding", "head", "aux", "last_hidden")
        tensors = {name: getattr(self, name).to(dtype) for name in names}
        return replace(self, draft=draft, **tensors)

    def packed(self, padded: torch.Tensor, order=None) -> torch.Tensor:
        """[B,L,...] -> [T,...]"""
        chosen = range(len(self.lengths)) if order is None else order
        return torch.cat([padded[i, : self.lengths[i]] for i in chosen])

    def dense(self, gamma=0.8, ttt_steps=5, mask="serving", pointwise="kl") -> DenseOutput:
        teacher = dense_teacher(self.last_hidden, self.head, self.draft.t2d)
        inputs = self.aux, *teacher, self.input_ids, self.loss_mask
        return dense_loss(self.draft, self.embedding, *inputs, gamma, ttt_steps, mask, pointwise)

    def features(self, batch, order=None):
        last = self.packed(self.last_hidden, order)[batch.teacher_rows]
        logits = last @ self.head.T
        return Features(self.packed(self.aux, order), last, logits.argmax(-1), logits.logsumexp(-1))

    def fast(
        self, gamma=0.8, ttt_steps=5, mask="serving", pointwise="kl", chunk_rows=4096, order=None,
        scale=None,
    ):  # fmt: skip
        """The trainer's loss (not yet divided) and its batch."""
        documents = [Document(*d) for d in self.documents(order)]
        supervised = getattr(supervision, mask)
        batch = pack(documents, self.draft.t2d, ttt_steps, supervised)
        features = self.features(batch, order)
        hidden = unroll(self.draft, self.embedding, features.aux_hidden_states, batch)
        function = {"kl": trainer_loss.kl, "lk": partial(trainer_loss.lk, eta=3.0)}[pointwise]
        soft_target = trainer_loss.SoftTargetLoss(function, gamma, chunk_rows, supervised)
        rows = self.head[self.draft.t2d]
        return soft_target(self.draft, hidden, features, batch, rows, scale), batch

    def gradients(self, loss: torch.Tensor) -> dict[str, torch.Tensor]:
        names, parameters = zip(*self.draft.named_parameters(), strict=True)
        return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def random_turns(lengths: list[int], generator: torch.Generator) -> torch.Tensor:
    """bool [B,L]: prompts and answers of random lengths in turn."""
    loss_mask = torch.zeros(len(lengths), max(lengths), dtype=torch.bool)
    for row, length in zip(loss_mask, lengths, strict=True):
        place = 0
        while place < length:
            start = place + int(torch.randint(0, 6, (1,), generator=generator))
            place = start + int(torch.randint(1, 14, (1,), generator=generator))
            row[start : min(place, length)] = True
    return loss_mask


def random_case(
    attention, lengths=(23, 1, 9, 40, 2, 3, 17), seed=0, dtype=torch.float64, draft_vocab_size=30,
    layers=3, **variant,
) -> Case:  # fmt: skip
    """Noise, but most tokens lie in the draft vocabulary; the third document has no answer. The
    draft reads `layers` layers of the target; `variant`: other fields of its config.
    """
    generator, vocab_size = torch.Generator().manual_seed(seed), 50

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    lengths = list(lengths)
    target_ids = torch.randperm(vocab_size, generator=generator)[:draft_vocab_size].sort().values
    t2d = torch.zeros(vocab_size, dtype=torch.bool)
    t2d[target_ids] = True
    config = DraftConfig(
        hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=vocab_size, draft_vocab_size=draft_vocab_size,
        target_hidden_size=24, max_position_embeddings=64, rms_norm_eps=1e-5,
        num_aux_hidden_states=layers, **variant,
    )  # fmt: skip
    draft = EAGLE3(config, attention, t2d, target_ids - torch.arange(draft_vocab_size))
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.copy_(normal(*parameter.shape) * 0.2 + (parameter.dim() == 1))

    within = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    common = target_ids[torch.randint(0, draft_vocab_size, within.shape, generator=generator)]
    rare = torch.randint(0, vocab_size, within.shape, generator=generator)
    is_common = torch.rand(within.shape, generator=generator) < 0.9
    input_ids = torch.where(is_common, common, rare) * within
    loss_mask = random_turns(lengths, generator)
    loss_mask[2:3] = False
    aux, last_hidden = (
        normal(*within.shape, size) * within[..., None] for size in (layers * 24, 24)
    )
    head = normal(vocab_size, 24)
    head[target_ids] *= 1.3
    embedding = normal(vocab_size, 32)
    case = Case(draft, embedding, head, lengths, input_ids, loss_mask, aux, last_hidden)
    return case.to(dtype)


def block_case(kind, attention, dtype=torch.float64, **sizes):
    """`random_case` with another draft: its target has the draft's hidden size."""
    case = random_case(attention, draft_vocab_size=50, dtype=dtype)
    shape = {
        "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 50, "draft_vocab_size": 50,
        "target_hidden_size": 24, "max_position_embeddings": 64, "num_hidden_layers": 2,
        "block_size": 5, "mask_token_id": 7,
    }  # fmt: skip
    if kind is DSparkConfig:
        shape["markov_rank"] = 6
    t2d = torch.ones(50, dtype=torch.bool)
    draft = kind(**shape | sizes).build(attention, t2d, torch.zeros(50, dtype=torch.int64))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in draft.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3 + (p.dim() == 1 and len(p) > 1))
    case.draft, case.embedding = draft.to(dtype), case.embedding[:, :24].contiguous()
    return case


def block_loss(case, gamma=0.8, chunk_rows=7, anchors=None, scale=None):
    """The trainer's loss of a block drafter (not yet divided) and its batch."""
    steps = case.draft.config.block_size - case.draft.config.drafts_from
    documents = [Document(*d) for d in case.documents()]
    batch = pack(documents, case.draft.t2d, steps, supervision.serving, anchors)
    features = case.features(batch)
    shares = {"kl": 0.1, "tv": 0.9, "nla": 0.0, "reverse_kl": 0.0, "jsd": 0.0}
    pointwise = partial(trainer_loss.mix, **shares)
    loss = trainer_loss.SoftTargetLoss(pointwise, gamma, chunk_rows, supervision.serving)
    hidden = case.draft.unroll(case.embedding, features.aux_hidden_states, batch)
    return loss(case.draft, hidden, features, batch, case.head, scale), batch


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    difference = torch.linalg.vector_norm(value.double() - expected.double())
    return float(difference / torch.linalg.vector_norm(expected.double()))


def attend(backend, documents, rows, q, k, v, later):
    """The fast attention on plain tensors: `later` is a list of (k^i, v^i)."""
    own = [x for pair in later for x in pair]
    return Attend.apply(Eager, backend, documents, rows, own, q, k, v, *own)
