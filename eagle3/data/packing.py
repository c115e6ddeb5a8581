"""Documents to packed batches, with everything the unroll and the loss need to know before the target has run.

T packed tokens, B documents, K ttt_steps, U teacher rows, M supervised pairs (row t, step k).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.nn import functional as F

from eagle3.draft.attention import Alone, Documents
from eagle3.target.features import Features

SupervisedMask = Callable[..., tuple[torch.Tensor, int]]


@dataclass
class Batch:
    """Packed documents. Nothing is padded: T is the sum of the lengths.

    `rows` int64 [N] lists the rows that any step needs, those needed longest first: step k works on the first
    `row_counts[k]`, so nested row sets are slices. `pair_*` describe the M supervised (row, step) pairs in order of
    their teacher's row: `pair_index` into the concatenation over steps of those slices, `pair_step`, and
    `pair_teacher` into `teacher_rows`, where U (one past its end) stands for "beyond the document", a uniform teacher.
    `pairs_before[u]` on the host counts the pairs whose teacher comes before u.

    `held` int64 [O] are the tokens whose features this process has, all of them unless ranks share the batch; `rows`
    count in those. `exchange` is what moves between such ranks, `routes` how features come to them.

    `features` came with the documents when all of them had some; else `loaded` are the documents as they came.
    """

    input_ids: torch.Tensor
    loss_mask: torch.Tensor
    position_ids: torch.Tensor
    document_ends: torch.Tensor
    documents: Documents
    document_keys: list[int]
    teacher_rows: torch.Tensor
    held: torch.Tensor
    rows: torch.Tensor
    row_counts: list[int]
    pair_index: torch.Tensor
    pair_step: torch.Tensor
    pair_teacher: torch.Tensor
    pairs_before: torch.Tensor
    pair_counts: list[int]
    normaliser: int
    features: Features | None = None
    loaded: list = field(default_factory=list)
    exchange: Any = field(default_factory=Alone)
    routes: Any = None

    def to(self, device: torch.device) -> "Batch":
        ahead = device.type == "cuda"  # what goes to the host may be read at once
        moved = {
            name: value.to(device, non_blocking=ahead)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor) and name != "pairs_before"
        }
        documents = self.documents._replace(cu_seqlens=self.documents.cu_seqlens.to(device, non_blocking=ahead))
        features = self.features.to(device) if self.features is not None else None
        exchange = self.exchange.to(device)
        return replace(self, documents=documents, features=features, exchange=exchange, **moved)

    def for_target(self) -> "Batch":
        """On the host and without what a target has no use for, to be sent to another process."""
        bare = replace(self, loaded=[], features=None, routes=None, exchange=Alone())
        return bare.to(torch.device("cpu"))

    @property
    def tokens(self) -> int:
        """Tokens that are this process' to train on."""
        return len(self.held)

    @property
    def max_length(self) -> int:
        return max(self.documents.lengths)


def pack(
    documents: list[tuple[int, torch.Tensor, torch.Tensor]],
    in_draft_vocab: torch.Tensor,
    ttt_steps: int,
    mask: SupervisedMask,
) -> Batch:
    """Concatenate documents (key, input_ids int [n], loss_mask bool [n]) and find their row sets.

    `in_draft_vocab` bool [V]; `mask` is a function of `eagle3.data.supervision`.
    """
    lengths = [len(ids) for _, ids, _ in documents]
    input_ids = torch.cat([ids for _, ids, _ in documents]).long()
    loss_mask = torch.cat([m for _, _, m in documents]).bool()
    length = torch.tensor(lengths)
    document_ids = torch.repeat_interleave(length)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.long), length.cumsum(0)])
    ends = cu_seqlens[1:][document_ids]
    places = torch.arange(len(input_ids))

    before = loss_mask.roll(1) & (places > cu_seqlens[:-1][document_ids])
    teacher_rows = (loss_mask | before).nonzero()[:, 0]
    supervised_KT, normaliser = mask(loss_mask, in_draft_vocab[input_ids], ends, lengths, ttt_steps)

    needed = supervised_KT.flip(0).cummax(0).values.flip(0)
    depth = needed.sum(0)
    order = torch.argsort(depth, descending=True, stable=True)
    rows = order[: int((depth > 0).sum())]
    row_counts = needed.sum(1).tolist()

    teacher_place = torch.full((len(input_ids) + 1,), -1).index_put_((teacher_rows,), torch.arange(len(teacher_rows)))
    index, step, teacher = [], [], []
    offset = 0
    for k, count in enumerate(row_counts):
        here = supervised_KT[k, rows[:count]].nonzero()[:, 0]
        row = rows[here] + k + 1
        index.append(here + offset)
        step.append(torch.full_like(here, k))
        teacher.append(torch.where(row < ends[rows[here]], teacher_place[row], len(teacher_rows)))
        offset += count
    index, step, teacher = torch.cat(index), torch.cat(step), torch.cat(teacher)
    by_teacher = torch.argsort(teacher, stable=True)
    assert (teacher >= 0).all(), "a supervised pair needs a teacher row that Features does not carry"
    return Batch(
        input_ids=input_ids,
        loss_mask=loss_mask,
        position_ids=places - cu_seqlens[:-1][document_ids],
        document_ends=ends,
        documents=Documents(cu_seqlens.int(), lengths),
        document_keys=[key for key, _, _ in documents],
        teacher_rows=teacher_rows,
        held=places,
        rows=rows,
        row_counts=row_counts,
        pair_index=index[by_teacher],
        pair_step=step[by_teacher],
        pair_teacher=teacher[by_teacher],
        pairs_before=F.pad(torch.bincount(teacher, minlength=len(teacher_rows) + 1).cumsum(0), (1, 0)),
        pair_counts=supervised_KT.sum(1).tolist(),
        normaliser=normaliser,
    )
