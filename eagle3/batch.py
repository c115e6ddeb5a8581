"""Documents, packed batches and the target's features: what every room of the package speaks of.

T packed tokens, B documents, H the target's hidden size, K ttt_steps, U teacher rows, M supervised
pairs (row t, step k), V vocabulary. This module imports nothing else of the package.
"""

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only


class Queries(NamedTuple):
    """Documents have queries only from some token on: `counts` on the host, `cu_seqlens` int32
    [B+1]; and where a token lies among the tokens with queries, `of_token` int64 [T].
    """

    cu_seqlens: torch.Tensor
    counts: list[int]
    of_token: torch.Tensor


class DocumentSpans(NamedTuple):
    """Where packed documents lie: `cu_seqlens` int32 [B+1] on the device, `lengths` on the host."""

    cu_seqlens: torch.Tensor
    lengths: list[int]
    queries: Queries | None = None  # of all tokens

    def to(self, device: torch.device) -> "DocumentSpans":
        return tree_map_only(torch.Tensor, lambda x: to_device(x, device), self)

    def with_queries(self, counts: torch.Tensor) -> "DocumentSpans":
        """Queries of the last `counts` int64 [B] tokens of each document alone; on the host."""
        cu_seqlens = F.pad(counts.cumsum(0), (1, 0))
        before = (self.cu_seqlens - cu_seqlens)[1:].repeat_interleave(torch.tensor(self.lengths))
        of_token = torch.arange(len(before)) - before
        return self._replace(queries=Queries(cu_seqlens.int(), counts.tolist(), of_token))


@dataclass
class Features:
    """What a target says about a batch; online, hybrid and offline hand the trainer exactly this.

    `aux_hidden_states` [T,A]: outputs of the auxiliary decoder layers side by side, low to high.
    `last_hidden_states` [U,H]: after the target's final norm, of `Batch.teacher_rows`.
    `argmax` int64 [U] and `logsumexp` fp32 [U]: of the target's logits over its whole vocabulary.
    """

    aux_hidden_states: torch.Tensor
    last_hidden_states: torch.Tensor
    argmax: torch.Tensor
    logsumexp: torch.Tensor

    def to(self, device: torch.device) -> "Features":
        moved = Features(*(to_device(x, device) for x in vars(self).values()))
        if self.argmax.is_cuda and device.type == "cpu":  # which may be read at once
            torch.cuda.current_stream().synchronize()
        return moved

    def select(self, tokens: Any, teachers: Any) -> "Features":
        """Those of some tokens and of some teacher rows, by int64 indices or slices."""

        def pick(x: torch.Tensor, places: Any) -> torch.Tensor:
            if isinstance(places, slice) or not x.is_cpu:
                return x[places]
            out = empty_on_host(len(places), x.shape[1:], x.dtype)
            return torch.index_select(x, 0, places, out=out)

        rows = (self.last_hidden_states, self.argmax, self.logsumexp)
        return Features(pick(self.aux_hidden_states, tokens), *(pick(x, teachers) for x in rows))


@dataclass
class Document:
    """One conversation: `key` is its number in the prepared data.

    `input_ids` int32 [n], `loss_mask` bool [n]: what the model wrote; `features` of n tokens, where
    they are known already.
    """

    key: int
    input_ids: torch.Tensor
    loss_mask: torch.Tensor
    features: Features | None = None
    epoch: int = 0  # that it is read in


@dataclass
class Batch:
    """Packed documents. Nothing is padded: T is the sum of the lengths.

    `rows` int64 [N] lists the rows that any step needs, those needed longest first: step k works on
    the first `row_counts[k]`, so the nested row sets are slices. `pair_*` describe the M supervised
    (row, step) pairs in order of their teacher's row: `pair_index` into the concatenation over
    steps of those slices, `pair_step`, and `pair_teacher` into `teacher_rows`, where U (one past
    its end) stands for "beyond the document", a uniform teacher. `pairs_before[u]`, on the host,
    counts the pairs whose teacher comes before u.

    `features` came with the documents when all of them had some; else `loaded` are the documents.

    Ranks that share a batch (parallel/sequence.py) each have some of its tokens: `own` int64 [O]
    are the places in `input_ids` of the tokens whose features this rank has, and `rows` counts in
    those; `input_ids` then also has the tokens read ahead of them. `num_steps` is how many steps
    any of the ranks has rows for, `exchange` makes their keys and values, `routes` their features.
    """

    input_ids: torch.Tensor
    loss_mask: torch.Tensor
    position_ids: torch.Tensor
    document_ends: torch.Tensor
    documents: DocumentSpans
    document_keys: list[int]
    teacher_rows: torch.Tensor
    own: torch.Tensor
    rows: torch.Tensor
    row_counts: list[int]
    num_steps: int
    pair_index: torch.Tensor
    pair_step: torch.Tensor
    pair_teacher: torch.Tensor
    pairs_before: list[int]
    pair_counts: list[int]
    normaliser: int
    features: Features | None = None
    loaded: list[Document] = field(default_factory=list)
    exchange: Any = None
    routes: Any = None

    def to(self, device: torch.device) -> "Batch":
        moved = {}
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                moved[name] = to_device(value, device)
            elif hasattr(value, "to"):  # the documents, and features and exchange if it has them
                moved[name] = value.to(device)
        return replace(self, **moved)

    @property
    def tokens(self) -> int:
        """Tokens that this process trains on."""
        return len(self.own)

    @property
    def max_length(self) -> int:
        return max(self.documents.lengths)


SupervisedMask = Callable[..., tuple[torch.Tensor, int]]


def pack(
    documents: list[Document], in_draft_vocab: torch.Tensor, ttt_steps: int, mask: SupervisedMask,
    anchors: int | None = None,
) -> Batch:  # fmt: skip
    """Concatenate documents and find their row sets, of each document at most `anchors` rows.

    `in_draft_vocab` bool [V]; `mask` is `serving` or `shifted`, below. Everything here is known
    before the target has run, so a loader's thread does it one update ahead. Documents that all
    have features give them to the batch; else it keeps the documents.
    """
    lengths = [len(document.input_ids) for document in documents]
    input_ids = torch.cat([document.input_ids for document in documents]).long()
    loss_mask = torch.cat([document.loss_mask for document in documents]).bool()
    length = torch.tensor(lengths)
    document_ids = torch.repeat_interleave(length)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.long), length.cumsum(0)])
    starts, ends = cu_seqlens[:-1][document_ids], cu_seqlens[1:][document_ids]
    places = torch.arange(len(input_ids))

    # Row j teaches the token behind it, so an answer needs the row before it too: a_j or a_{j-1}.
    follows_answer = loss_mask.roll(1) & (places > starts)
    teacher_rows = (loss_mask | follows_answer).nonzero()[:, 0]
    supervised_KT, normaliser = mask(loss_mask, in_draft_vocab[input_ids], ends, lengths, ttt_steps)

    if anchors is not None:
        kept_T = draw_anchors(documents, supervised_KT[0], lengths, anchors)
        before = max(1, int(supervised_KT[0].sum()))
        normaliser = normaliser * int((supervised_KT[0] & kept_T).sum()) // before
        supervised_KT = supervised_KT & kept_T

    # A row runs through step k while k or a later step supervises it. Ordered by how many steps
    # that is, every step's rows are a prefix of the rows before: no gather is needed from step to
    # step.
    needed_KT = supervised_KT.flip(0).cummax(0).values.flip(0)
    depth = needed_KT.sum(0)
    order = torch.argsort(depth, descending=True, stable=True)
    rows = order[: int((depth > 0).sum())]
    row_counts = needed_KT.sum(1).tolist()

    # Attention begins with the first row of a document that is needed, or its last token.
    firsts = (cu_seqlens[1:] - 1).scatter_reduce(0, document_ids[rows], rows, "amin")
    spans = DocumentSpans(cu_seqlens.int(), lengths).with_queries(cu_seqlens[1:] - firsts)

    teacher_place = torch.full((len(input_ids) + 1,), -1)
    teacher_place[teacher_rows] = torch.arange(len(teacher_rows))
    step, row_place = supervised_KT[:, rows].nonzero(as_tuple=True)
    row = rows[row_place]
    inside = row + step + 1 < ends[row]
    teacher = torch.where(inside, teacher_place[row + step + 1], len(teacher_rows))
    assert (teacher >= 0).all(), "a pair needs a teacher row that Features does not carry"
    by_teacher = torch.argsort(teacher, stable=True)
    known = [document.features for document in documents if document.features is not None]
    complete = len(known) == len(documents)
    return Batch(
        input_ids=input_ids,
        loss_mask=loss_mask,
        position_ids=places - starts,
        document_ends=ends,
        documents=spans,
        document_keys=[document.key for document in documents],
        teacher_rows=teacher_rows,
        own=places,
        rows=rows,
        row_counts=row_counts,
        num_steps=sum(count > 0 for count in row_counts),
        pair_index=(row_place + starts_of(row_counts)[step])[by_teacher],
        pair_step=step[by_teacher],
        pair_teacher=teacher[by_teacher],
        pairs_before=count_before(teacher, len(teacher_rows)),
        pair_counts=supervised_KT.sum(1).tolist(),
        normaliser=normaliser,
        features=concatenate_features(known) if complete else None,
        loaded=[] if complete else documents,
    )


def draw_anchors(
    documents: list[Document], rows_T: torch.Tensor, lengths: list[int], anchors: int
) -> torch.Tensor:
    """bool [T]: of each document's `rows_T` bool [T] `anchors`, the same in every layout of ranks,
    others in another epoch.
    """
    kept = []
    for document, rows in zip(documents, rows_T.split(lengths), strict=True):
        places, kept_n = rows.nonzero()[:, 0], rows.clone()
        if len(places) > anchors:
            drawn = np.random.default_rng([document.epoch, document.key]).permutation(len(places))
            kept_n[places[torch.from_numpy(drawn[anchors:])]] = False
        kept.append(kept_n)
    return torch.cat(kept)


def starts_of(counts: list[int]) -> torch.Tensor:
    """Where each part begins when parts of these lengths lie one behind the other."""
    counts = torch.tensor(counts)
    return counts.cumsum(0) - counts


def by_step(batch: Batch, values_M: torch.Tensor) -> torch.Tensor:
    """[T,K]: values of the pairs by (row, step); zero or False where there is no pair."""
    starts = to_device(starts_of(batch.row_counts), values_M.device)
    rows = batch.rows[batch.pair_index - starts[batch.pair_step]]
    values_TK = values_M.new_zeros(len(batch.input_ids), len(starts))
    values_TK[rows, batch.pair_step] = values_M
    return values_TK


def count_before(pair_teacher: torch.Tensor, num_teachers: int) -> list[int]:
    """For u = 0 .. U + 1 the number of pairs whose teacher comes before u."""
    counts = torch.bincount(pair_teacher, minlength=num_teachers + 1)
    return F.pad(counts.cumsum(0), (1, 0)).tolist()


# The options of `loss/mask`: which (row t, step k) pairs the loss supervises, bool [K,T], and the
# batch's normaliser. Of T packed tokens: `assistant` bool [T] (a_t: content or end of an assistant
# turn), `in_vocab` bool [T] (x_t lies in the draft vocabulary S), `ends` int64 [T] (where the row's
# document ends), the documents' `lengths`. Whether the teacher's argmax lies in S is not known yet
# and left to the loss.


def serving(assistant, in_vocab, ends, lengths, ttt_steps) -> tuple[torch.Tensor, int]:
    """What drafting reaches when served: a_{t+1} ... a_{t+k+2}, and x_{t+2} ... x_{t+k+1} in S.

    Drafting starts behind an accepted assistant token, and goes on only while the drafted token can
    be right. Normaliser: the number of rows supervised at step 0.
    """
    steps = [ahead(assistant, ends, 1) & ahead(assistant, ends, 2)]
    for k in range(1, ttt_steps):
        steps.append(steps[-1] & ahead(assistant, ends, k + 2) & ahead(in_vocab, ends, k + 1))
    return torch.stack(steps), int(steps[0].sum())


def shifted(assistant, in_vocab, ends, lengths, ttt_steps) -> tuple[torch.Tensor, int]:
    """SpecForge's pairs: the gate a_{t+k}. Normaliser: documents times the longest of them."""
    steps = [ahead(assistant, ends, k) for k in range(ttt_steps)]
    return torch.stack(steps), len(lengths) * max(lengths)


def ahead(values: torch.Tensor, ends: torch.Tensor, distance: int) -> torch.Tensor:
    """values[t + distance] at t, False beyond the document's end."""
    places = torch.arange(len(values)) + distance
    return values[places.clamp(max=len(values) - 1)] & (places < ends)


def split_features(batch: Batch, features: Features) -> Iterator[Features]:
    """A batch's features, document by document, on the host."""
    host = features.to(torch.device("cpu"))
    ends = batch.documents.cu_seqlens[1:].cpu()
    document = torch.bucketize(batch.teacher_rows.cpu(), ends, right=True)
    teachers = torch.bincount(document, minlength=len(ends)).tolist()
    aux, *rows = vars(host).values()
    columns = [aux.split(batch.documents.lengths), *(x.split(teachers) for x in rows)]
    yield from map(Features, *columns)


def concatenate_features(parts: list[Features]) -> Features:
    """Features of packed documents, in order."""
    return Features(*map(concatenate, zip(*(vars(part).values() for part in parts), strict=True)))


def concatenate(tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Like torch.cat along rows; of neighbours in memory, as a store reads them, no copy."""
    first, rows = tensors[0], sum(map(len, tensors))
    if not first.is_cpu:
        return torch.cat(tensors)
    alike = all(x.dtype == first.dtype and x.is_contiguous() for x in tensors)
    *begins, end = accumulate((x.nbytes for x in tensors), initial=first.data_ptr())
    memory = first.untyped_storage()
    inside = end <= memory.data_ptr() + memory.nbytes()
    if alike and inside and begins == [x.data_ptr() for x in tensors]:
        return first.as_strided((rows, *first.shape[1:]), first.stride())
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    return torch.cat(tensors, out=empty_on_host(rows, first.shape[1:], dtype))


def empty_on_host(rows: int, columns: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Like torch.empty, for what goes to the device: where this process uses a GPU, in memory that
    the GPU reads by itself, of which torch keeps a pool.
    """
    if torch.cuda.is_initialized():
        return torch.empty(rows, *columns, dtype=dtype, pin_memory=True)
    if rows == 0:  # of which numpy's has no stride to be viewed by
        return torch.empty(rows, *columns, dtype=dtype)
    # numpy asks for huge pages: 10 GB/s against 2.3 on first use.
    size = rows * int(np.prod(columns, dtype=np.int64)) * dtype.itemsize
    return torch.from_numpy(np.empty(size, np.uint8)).view(dtype).view(rows, *columns)


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A copy for which the host does not wait, as it would if the memory were not pinned. torch
    gives pinned memory to nobody else before the copies from it are done.
    """
    if tensor.is_cpu and torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()  # the same where it is
    return tensor.to(device, non_blocking=True)


def split_by_cost(items: np.ndarray, costs: np.ndarray, shares: int) -> list[np.ndarray]:
    """Deal items (indices into `costs`), the costliest first, each to the cheapest share so far."""
    dealt: list[list[int]] = [[] for _ in range(shares)]
    loads = [(0, share) for share in range(shares)]
    for item in sorted(items.tolist(), key=lambda i: (-costs[i], i)):
        load, share = heapq.heappop(loads)
        dealt[share].append(item)
        heapq.heappush(loads, (load + int(costs[item]), share))
    return [np.array(share, dtype=np.int64) for share in dealt]


def fill(items: list, sizes: list[int], limit: int) -> list[list]:
    """Items in their order, in groups of at most `limit` together, or of one."""
    groups, used = [], limit
    for item, size in zip(items, sizes, strict=True):
        if used + size > limit:
            groups.append([])
            used = 0
        groups[-1].append(item)
        used += size
    return groups
