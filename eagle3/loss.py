"""Teacher-major fused soft-target loss: no [tokens, vocabulary] tensor exists, forward or backward.

    l^k_t = W_lm RMS(h^{k+1}_t)                     the draft's logits of (row t, step k)
    j     = t + k + 1                               its teacher's row
    p     = softmax(W_head z_j) on the draft vocabulary S
    loss  = sum_k w_k sum_t M^k_t CE(p, l^k_t) / normaliser         w_k = gamma^k by default

A teacher's row j serves every pair (t, k) with t + k + 1 = j, so the loss waits for the whole
unroll and then walks chunks of teacher rows: their probabilities once, the logits of all pairs that
they teach, loss, accuracy, and the gradients in place. M pairs in order of their teacher, U teacher
rows, Vd draft vocabulary, D and H hidden sizes of draft and target.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch.nn import functional as F

from eagle3.batch import Batch, Features, SupervisedMask, by_step, to_device
from eagle3.config import MAX_STEPS, Within
from eagle3.draft.model import Draft
from eagle3.kernels.eager import TakeRows

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
    acceptance), which is taken pair by pair and a constant to the gradient.
    """
    cross_entropy, kl_gradient = kl(logits, teacher)
    chance, gradient = acceptance(logits, teacher)
    weight = (-eta * chance).exp()
    divergence = cross_entropy - torch.special.entr(teacher).sum(-1)
    value = weight * divergence + (1 - weight) * (1 - chance)
    return value, torch.lerp(-gradient, kl_gradient, weight[:, None])


def acceptance(logits: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The chance [m] that rejection sampling keeps a drafted token, sum min(p, q); gradient."""
    student = logits.softmax(-1)
    below = (student < teacher).to(student.dtype)
    slope = below - (student * below).sum(-1, keepdim=True)
    return torch.minimum(student, teacher).sum(-1), student * slope


def tv(logits: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Total variation: 1 - acceptance."""
    chance, gradient = acceptance(logits, teacher)
    return 1 - chance, -gradient


def nla(logits: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-log(acceptance), whose gradient does not fade where draft and target hardly meet."""
    chance, gradient = acceptance(logits, teacher)
    chance = chance.clamp_min(torch.finfo(logits.dtype).tiny)
    return -chance.log(), -gradient / chance[:, None]


def reverse_kl(logits: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(q | p): seeks one of the teacher's modes where cross-entropy covers them all."""
    log_student = logits.log_softmax(-1)
    # A teacher whose probability rounds to 0 would make the loss infinite.
    log_teacher = teacher.clamp_min(torch.finfo(teacher.dtype).tiny).log()
    student, ratio = log_student.exp(), log_student - log_teacher
    value = (student * ratio).sum(-1)
    return value, student * (ratio - value[:, None])


def jsd(logits: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Jensen-Shannon divergence: (KL(p | m) + KL(q | m)) / 2 with m = (p + q) / 2."""
    log_student = logits.log_softmax(-1)
    student = log_student.exp()
    middle = ((student + teacher) / 2).clamp_min(torch.finfo(teacher.dtype).tiny).log()
    ratio = (log_student - middle) / 2
    own = (student * ratio).sum(-1)
    entropies = torch.xlogy(teacher, teacher) - teacher * middle
    return entropies.sum(-1) / 2 + own, student * (ratio - own[:, None])


Share = Annotated[float, Within(0, 1e6)]


def mix(
    logits: torch.Tensor, teacher: torch.Tensor, kl: Share, tv: Share, nla: Share,
    reverse_kl: Share, jsd: Share,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The sum of the losses of these names, each times its share; those of share 0 cost nothing."""
    value, gradient = torch.zeros_like(logits[:, 0]), torch.zeros_like(logits)
    for pointwise, share in zip(MIXED, (kl, tv, nla, reverse_kl, jsd), strict=True):
        if share:
            value_of_one, gradient_of_one = pointwise(logits, teacher)
            value = value + share * value_of_one
            gradient = gradient + share * gradient_of_one
    return value, gradient


MIXED = (kl, tv, nla, reverse_kl, jsd)


class Powers:
    """Weights of the steps: step k weighs gamma^k, whatever is measured."""

    def __init__(self, gamma: float):
        self.gamma = gamma

    def __call__(self, num_steps: int) -> torch.Tensor:
        """float64 [K]."""
        return torch.tensor([self.gamma**k for k in range(num_steps)], dtype=torch.float64)

    def measure(self, batch: Batch, correct: torch.Tensor) -> None:
        """Note which pairs of a micro-step were `correct` [M]."""

    def advance(self, ranks: Any, device: torch.device) -> None:
        """Behind an update: take up what all ranks have measured in it."""

    def state(self) -> dict[str, list]:
        """What a checkpoint keeps."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint, whose plain values `state` are."""


class Reached(Powers):
    """Step k weighs the chance that drafting gets there: that it was right at all steps before.

    The running mean of what was seen: each update counts `decay` times as much as the one behind
    it. Before anything was measured, a step is taken to be right in a share gamma.
    """

    def __init__(self, gamma: float, decay: Annotated[float, Within(0, 1)]):
        self.decay = decay
        # By step: rows that were right there and at all steps before; those that had got there.
        self.sums = torch.tensor([[gamma], [1.0]], dtype=torch.float64).repeat(1, MAX_STEPS)
        self.new = torch.zeros_like(self.sums)

    def __call__(self, num_steps: int) -> torch.Tensor:
        right, reached = self.sums[:, : num_steps - 1]
        # What no row has got to for long has decayed to 0 of 0.
        chances = right / reached.clamp(min=torch.finfo(reached.dtype).tiny)
        return F.pad(chances.cumprod(0), (1, 0), value=1.0)

    def measure(self, batch: Batch, correct: torch.Tensor) -> None:
        right_TK = by_step(batch, correct).long().cumprod(1)
        reached_TK = by_step(batch, torch.ones_like(correct)) * F.pad(right_TK, (1, -1), value=1)
        sums = torch.stack([right_TK.sum(0), reached_TK.sum(0)])
        self.new = self.new.to(sums.device)
        self.new[:, : sums.shape[1]] += sums

    def advance(self, ranks: Any, device: torch.device) -> None:
        # Whole numbers add up to the same in any order, so that ranks stay equal.
        new = ranks.all_reduce_tensor(self.new.to(device))
        self.sums = self.decay * self.sums.to(device) + new
        self.new = torch.zeros_like(new)

    def state(self) -> dict[str, list]:
        return {"reached": self.sums.tolist()}

    def restore(self, state: dict[str, Any]) -> None:
        self.sums = torch.tensor(state["reached"], dtype=torch.float64)


@dataclass
class Pairs:
    """The M pairs of a batch as the fused loss takes them.

    `teachers` [U+1,H] with a row of zeros behind them, `head` [Vd,H], `argmax` int64 [U+1],
    `weights` [M], `target_ids` int64 [Vd]: the target's id of every draft id. `frozen` [Vd,*] are
    the first columns of the draft's head, where those are not trained. `scale` is what backward
    will begin with, if that is known. `chances` [M], where asked for: that of each pair's draft to
    be accepted, which the loss fills in.
    """

    batch: Batch
    teachers: torch.Tensor
    head: torch.Tensor
    argmax: torch.Tensor
    weights: torch.Tensor
    target_ids: torch.Tensor
    pointwise: Pointwise
    chunk_rows: int
    kernels: Any
    scale: float | None
    frozen: torch.Tensor | None = None
    chances: torch.Tensor | None = None


class FusedLoss(torch.autograd.Function):
    """Sum of weighted pair losses; makes the gradients of both inputs, the students and what is
    trained of the head, while going forward.
    """

    @staticmethod
    def forward(ctx, students_MD, trained_VD, pairs: Pairs):
        batch, weights = pairs.batch, pairs.weights
        grad_weights = weights if pairs.scale is None else weights * pairs.scale
        want_gradients = any(ctx.needs_input_grad)
        losses = weights.new_zeros(len(students_MD))
        correct = torch.zeros(len(students_MD), dtype=torch.bool, device=students_MD.device)
        grad_students = torch.empty_like(students_MD) if want_gradients else None
        grad_head = None
        parts = [x.to(students_MD.dtype) for x in (pairs.frozen, trained_VD) if x is not None]
        head = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        first = 0 if pairs.frozen is None else pairs.frozen.shape[1]
        for start in range(0, len(pairs.teachers), pairs.chunk_rows):
            stop = min(start + pairs.chunk_rows, len(pairs.teachers))
            # Pairs lie in order of their teacher, so those of a chunk of teachers are a slice.
            here = slice(batch.pairs_before[start], batch.pairs_before[stop])
            if here.start == here.stop:
                continue
            teacher_of_pair = batch.pair_teacher[here]
            logits = [students_MD[here] @ head.T, pairs.teachers[start:stop] @ pairs.head.T]
            rows, weights_here = teacher_of_pair - start, grad_weights[here]
            if pairs.chances is not None:
                distance = pairs.kernels.loss_chunk(tv, *logits, rows, weights_here)[0]
                pairs.chances[here] = 1 - distance
            # Handed over, so that nobody else keeps them in memory.
            losses[here], best, grad = pairs.kernels.loss_chunk(
                pairs.pointwise, logits.pop(0), logits.pop(0), rows, weights_here
            )
            correct[here] = pairs.target_ids[best] == pairs.argmax[teacher_of_pair]
            if want_gradients:
                torch.mm(grad, head, out=grad_students[here])
                if trained_VD is not None:
                    product = grad.T, students_MD[here, first:]
                    grad_head = pairs.kernels.add_product(grad_head, *product, trained_VD.dtype)
        if want_gradients and grad_head is None and trained_VD is not None:
            grad_head = torch.zeros_like(trained_VD)
        ctx.save_for_backward(grad_students, grad_head)
        ctx.scale = pairs.scale
        ctx.mark_non_differentiable(losses, correct)
        return (losses * weights).sum(), losses, correct

    @staticmethod
    def backward(ctx, grad, *unused):
        grad_students, grad_head = ctx.saved_tensors
        if ctx.scale is None:
            # In place: backward runs once, and these are as large as the activations of a step.
            grads = [x if x is None else x.mul_(grad) for x in (grad_students, grad_head)]
            return *grads, None
        torch._assert_async((grad / ctx.scale - 1).abs() < 1e-5)  # the host does not wait
        return grad_students, grad_head, None


class SoftTargetLoss:
    """The loss of a batch: what `loss=...` instantiates."""

    def __init__(
        self,
        pointwise: Pointwise,
        gamma: Annotated[float, Within(0, 1)],
        chunk_rows: Annotated[int, Within(1, 1 << 30)],
        mask: SupervisedMask,
        weights: Callable[[float], Powers] = Powers,
    ):
        """`weights` makes those of the steps of `gamma`; `chunk_rows` teacher rows are in work at a
        time.

        `mask` says which pairs count; the loader applies it, because it needs no target.
        """
        self.pointwise, self.chunk_rows, self.mask = pointwise, chunk_rows, mask
        self.weights = weights(gamma)

    def __call__(
        self,
        draft: Draft,
        hidden_ND: torch.Tensor,
        features: Features,
        batch: Batch,
        draft_head: torch.Tensor,
        scale: float | None = None,
    ) -> LossOutput:
        """`hidden_ND` is what `unroll` returned; `draft_head` as in `FrozenWeights`. With fused
        kernels the loss must be multiplied by `scale` before backward, if that is given.

        A pair counts in the loss only if the target's argmax lies in the draft vocabulary; in the
        accuracy it counts regardless, as a miss.
        """
        wide = torch.promote_types(hidden_ND.dtype, torch.float32)
        # One teacher more, all zeros, is what rows beyond a document's end have: a uniform one.
        teachers = F.pad(features.last_hidden_states.to(hidden_ND.dtype), (0, 0, 0, 1))
        argmax = F.pad(features.argmax, (0, 1))
        num_steps = len(batch.row_counts)
        counted = draft.t2d[argmax][batch.pair_teacher].to(wide)
        weights_K = to_device(self.weights(num_steps).to(wide), argmax.device)
        weights = weights_K[batch.pair_step] * counted
        students = draft.head_input(TakeRows.apply(hidden_ND, batch.pair_index))
        kernels = draft.kernels.pick(hidden_ND)
        frozen, trained = draft.head_weights(draft_head)
        chances = torch.empty_like(weights) if draft.measures_chances else None
        pairs = Pairs(
            batch, teachers, draft_head, argmax, weights, draft.target_ids, self.pointwise,
            self.chunk_rows, kernels, scale if kernels.scales_first else None, frozen, chances,
        )  # fmt: skip
        loss, losses, correct = FusedLoss.apply(students, trained, pairs)
        if draft.measures_chances:
            loss = loss + draft.confidence_loss(students, chances, weights)
        sums = losses.new_zeros(2, num_steps)
        sums[0].index_add_(0, batch.pair_step, losses * counted)
        sums[1].index_add_(0, batch.pair_step, correct.to(wide))
        return LossOutput(loss, *sums, correct)
