"""Teacher-major fused soft-target loss: no [tokens, vocabulary] tensor exists, forward or backward.

    l^k_t = W_lm RMS(h^{k+1}_t)                     the draft's logits of (row t, step k)
    j     = t + k + 1                               its teacher's row
    p     = softmax(W_head z_j) on the draft vocabulary S
    loss  = sum_k gamma^k sum_t M^k_t CE(p, l^k_t) / normaliser

A teacher's row j serves every pair (t, k) with t + k + 1 = j, so the loss waits for the whole
unroll and then walks chunks of teacher rows: their probabilities once, the logits of all pairs that
they teach, loss, accuracy, and the gradients in place. M pairs in order of their teacher, U teacher
rows, Vd draft vocabulary, D and H hidden sizes of draft and target.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
from torch.nn import functional as F

from eagle3.batch import Batch, Features, SupervisedMask
from eagle3.config import Within
from eagle3.draft.model import Draft

Pointwise = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass
class FrozenWeights:
    """Of the target: `embedding` [V,D], and `draft_head` [Vd,H], its draft rows."""

    embedding: torch.Tensor
    draft_head: torch.Tensor


@dataclass
class LossOutput:
    """`loss` is the weighted sum over pairs, not yet normalised; it alone carries gradients.

    `step_loss`, `step_correct` fp32 [K]: unweighted sums over the step's pairs. `correct` bool [M]:
    the draft's argmax is the target's argmax over the full vocabulary.
    """

    loss: torch.Tensor
    step_loss: torch.Tensor
    step_correct: torch.Tensor
    correct: torch.Tensor


def kl(logits: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of `logits` [m,Vd] against probabilities `teacher` [m,Vd]: value [m], gradient.

    KL divergence up to the teacher's entropy, which no gradient sees (EAGLE-3, arXiv 2503.01840).
    """
    logsumexp = logits.logsumexp(-1, keepdim=True)
    value = logsumexp[:, 0] - torch.linalg.vecdot(teacher, logits)
    return value, (logits - logsumexp).exp_().sub_(teacher)


def lk(
    logits: torch.Tensor, teacher: torch.Tensor, eta: Annotated[float, Within(0, 1e6)]
) -> tuple[torch.Tensor, torch.Tensor]:
    """LK loss, adaptive (arXiv 2602.23881): w KL + (1 - w) (1 - acceptance), w = exp(-eta
    acceptance).

    acceptance = sum min(p, q) is the probability that rejection sampling keeps the drafted token; w
    is a constant to the gradient, and is taken pair by pair.
    """
    cross_entropy, kl_gradient = kl(logits, teacher)
    student = kl_gradient + teacher
    acceptance = torch.minimum(student, teacher).sum(-1, keepdim=True)
    weight = (-eta * acceptance).exp()
    below = (student < teacher).to(student.dtype)
    rate = (student * below).sum(-1, keepdim=True)
    entropy = torch.special.entr(teacher).sum(-1)
    value = weight[:, 0] * (cross_entropy - entropy) + (1 - weight[:, 0]) * (1 - acceptance[:, 0])
    return value, weight * kl_gradient + (1 - weight) * student * (rate - below)


@dataclass
class Pairs:
    """The M pairs of a batch as the fused loss takes them.

    `teachers` [U+1,H] with a row of zeros behind them, `head` [Vd,H], `argmax` int64 [U+1],
    `weights` [M], `target_ids` int64 [Vd]: the target's id of every draft id.
    """

    batch: Batch
    teachers: torch.Tensor
    head: torch.Tensor
    argmax: torch.Tensor
    weights: torch.Tensor
    target_ids: torch.Tensor
    pointwise: Pointwise
    chunk_rows: int


class FusedLoss(torch.autograd.Function):
    """Sum of weighted pair losses; makes the gradients of both inputs while going forward."""

    @staticmethod
    def forward(ctx, students_MD, lm_head_VD, pairs: Pairs):
        batch, weights = pairs.batch, pairs.weights
        want_gradients = any(ctx.needs_input_grad)
        losses = weights.new_zeros(len(students_MD))
        correct = torch.zeros(len(students_MD), dtype=torch.bool, device=students_MD.device)
        grad_students = torch.zeros_like(students_MD) if want_gradients else None
        grad_head = torch.zeros_like(lm_head_VD) if want_gradients else None
        head = lm_head_VD.to(students_MD.dtype)
        for start in range(0, len(pairs.teachers), pairs.chunk_rows):
            stop = min(start + pairs.chunk_rows, len(pairs.teachers))
            # Pairs lie in order of their teacher, so those of a chunk of teachers are a slice.
            here = slice(batch.pairs_before[start], batch.pairs_before[stop])
            if here.start == here.stop:
                continue
            teacher_of_pair = batch.pair_teacher[here]
            teacher = (pairs.teachers[start:stop] @ pairs.head.T).to(weights.dtype).softmax(-1)
            logits = (students_MD[here] @ head.T).to(weights.dtype)
            losses[here], grad = pairs.pointwise(logits, teacher[teacher_of_pair - start])
            correct[here] = pairs.target_ids[logits.argmax(-1)] == pairs.argmax[teacher_of_pair]
            if want_gradients:
                grad = grad.mul_(weights[here, None]).to(students_MD.dtype)
                torch.mm(grad, head, out=grad_students[here])
                grad_head += grad.T @ students_MD[here]
        ctx.save_for_backward(grad_students, grad_head)
        ctx.mark_non_differentiable(losses, correct)
        return (losses * weights).sum(), losses, correct

    @staticmethod
    def backward(ctx, grad, *unused):
        grad_students, grad_head = ctx.saved_tensors
        return (
            grad_students * grad.to(grad_students.dtype),
            grad_head * grad.to(grad_head.dtype),
            None,
        )


class SoftTargetLoss:
    """The loss of a batch: what `loss=...` instantiates."""

    def __init__(
        self,
        pointwise: Pointwise,
        gamma: Annotated[float, Within(0, 1)],
        chunk_rows: Annotated[int, Within(1, 1 << 30)],
        mask: SupervisedMask,
    ):
        """`gamma` weights step k by gamma^k; `chunk_rows` teacher rows are in work at a time.

        `mask` says which pairs count; the loader applies it, because it needs no target.
        """
        self.pointwise, self.gamma, self.chunk_rows, self.mask = pointwise, gamma, chunk_rows, mask

    def __call__(
        self,
        draft: Draft,
        hidden_ND: torch.Tensor,
        features: Features,
        batch: Batch,
        draft_head: torch.Tensor,
    ) -> LossOutput:
        """`hidden_ND` is what `unroll` returned; `draft_head` as in `FrozenWeights`.

        A pair counts in the loss only if the target's argmax lies in the draft vocabulary; in the
        accuracy it counts regardless, as a miss.
        """
        wide = torch.promote_types(hidden_ND.dtype, torch.float32)
        # One teacher more, all zeros, is what rows beyond a document's end have: a uniform one.
        teachers = F.pad(features.last_hidden_states.to(hidden_ND.dtype), (0, 0, 0, 1))
        argmax = F.pad(features.argmax, (0, 1))
        num_steps = len(batch.row_counts)
        powers = torch.tensor([self.gamma**k for k in range(num_steps)], dtype=wide)
        counted = draft.t2d[argmax][batch.pair_teacher].to(wide)
        weights = powers.to(argmax.device)[batch.pair_step] * counted
        students = draft.norm(hidden_ND[batch.pair_index])
        pairs = Pairs(
            batch, teachers, draft_head, argmax, weights, draft.target_ids, self.pointwise,
            self.chunk_rows,
        )  # fmt: skip
        loss, losses, correct = FusedLoss.apply(students, draft.lm_head.weight, pairs)
        sums = losses.new_zeros(2, num_steps)
        sums[0].index_add_(0, batch.pair_step, losses * counted)
        sums[1].index_add_(0, batch.pair_step, correct.to(wide))
        return LossOutput(loss, *sums, correct)
