"""Sequence parallelism (USP): `ulysses` x `ring` ranks share every micro-batch.

Rows meet only through k^0 and v^0, so each rank takes some of the tokens and their rows through all
steps. One exchange brings every rank the keys and values of all tokens, for its share of the heads,
and returns their gradients once. With `ring` alone later steps send nothing; `ulysses` ranks swap
rows for heads and back around each step's attention (arXiv 2405.07719 has the same layout for whole
models, where k and v go round in every layer).

The only collective is torch's all-to-all with uneven splits and gradients, which gloo and nccl
have: row sets differ from rank to rank, and yunchang's all-to-all takes equal ones.

T packed tokens, O of them held here, N rows, H query and G key/value heads of size d, P = ulysses x
ring ranks.
"""

from copy import copy
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import all_to_all_single_autograd, wait_tensor

from eagle3.batch import (
    Batch,
    Document,
    DocumentSpans,
    Features,
    count_before,
    pack,
    serving,
    split_by_cost,
)
from eagle3.draft.attention import Attend, Backend
from eagle3.draft.flash import scatter
from eagle3.draft.model import DraftConfig
from eagle3.hidden_states.supply import Supply
from eagle3.parallel.ranks import PATIENCE

BLOCKS_PER_RANK = 8  # more of them balance better, fewer share more teacher rows
SMALLEST_BLOCK = 16


class Segment(NamedTuple):
    """Neighbouring tokens of one document: their `queries` among those of the group, the `keys`
    they may see.
    """

    queries: slice
    keys: slice
    rows: torch.Tensor
    documents: DocumentSpans


class Segments(NamedTuple):
    parts: list[Segment]
    length: int


@dataclass
class Segmented:
    """A backend over segments, each against its document's keys up to its own end."""

    backend: Backend

    def forward(self, q, rows, k, v, segments: Segments, scale):
        q = scatter(q, rows, segments.length)
        out, lse = (
            torch.empty_like(q),
            q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32)),
        )
        for part in segments.parts:
            here, keys = part.queries, part.keys
            out[here], lse[here] = self.backend.forward(
                q[here], part.rows, k[keys], v[keys], part.documents, scale
            )
        return out[rows], lse[rows]

    def backward(self, grad_out, q, rows, k, v, out, lse, segments: Segments, scale):
        grad_out, q, out, lse = (scatter(x, rows, segments.length) for x in (grad_out, q, out, lse))
        grad_q, wide = torch.empty_like(q), torch.promote_types(k.dtype, torch.float32)
        grad_k, grad_v = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        for part in segments.parts:
            here, keys = part.queries, part.keys
            grads = self.backend.backward(
                grad_out[here],
                q[here],
                part.rows,
                k[keys],
                v[keys],
                out[here],
                lse[here],
                part.documents,
                scale,
            )
            grad_q[here] = grads[0]
            grad_k[keys] += grads[1]
            grad_v[keys] += grads[2]
        return grad_q[rows], grad_k.to(k.dtype), grad_v.to(v.dtype)


def swap(
    x: torch.Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup
) -> torch.Tensor:
    """All-to-all along the first dimension, differentiable."""
    return wait_tensor(all_to_all_single_autograd(x.contiguous(), received, sent, group))


@dataclass
class Exchange:
    """What a dealt batch moves between ranks; made on the host with the batch.

    `held` [P] counts each rank's tokens, `order` [T] finds each packed token among them, rank by
    rank. Of the ulysses group: `counts` [u][K], the rows of each rank at each step; `rows` [N], all
    of them, needed longest first, as places among the queries of `segments`; `grouped[k]` finds the
    group's order in the rows that come rank by rank, and `back[k]` the reverse.
    """

    sequence: "Sequence"
    held: list[int]
    order: torch.Tensor
    counts: list[list[int]]
    rows: torch.Tensor
    segments: Segments
    grouped: list[torch.Tensor]
    back: list[torch.Tensor]

    def to(self, device: torch.device) -> "Exchange":
        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=True)

        parts = [
            part._replace(
                rows=move(part.rows),
                documents=part.documents._replace(cu_seqlens=move(part.documents.cu_seqlens)),
            )
            for part in self.segments.parts
        ]
        return replace(
            self,
            order=move(self.order),
            rows=move(self.rows),
            segments=self.segments._replace(parts=parts),
            grouped=[move(places) for places in self.grouped],
            back=[move(places) for places in self.back],
        )

    def __call__(
        self, backend: Backend, batch: Batch, k0: torch.Tensor, v0: torch.Tensor
    ) -> "SharedKeysValues":
        return SharedKeysValues(self, backend, *self.keys(k0, v0))

    def keys(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of the tokens held here, [O,G,d], to those of all tokens for this rank's heads,
        [T,G/u,d].
        """
        ulysses, ring = self.sequence.ulysses, self.sequence.ring
        both = torch.cat(
            [k.unflatten(1, (ulysses, -1)), v.unflatten(1, (ulysses, -1))], dim=2
        ).transpose(0, 1)
        everyone = both[None].expand(ring, -1, -1, -1, -1).flatten(0, 2)
        here = self.held[self.sequence.rank]
        arrived = swap(everyone, self.held, [here] * len(self.held), self.sequence.group)
        k, v = arrived.index_select(0, self.order).chunk(2, dim=1)
        return k.contiguous(), v.contiguous()

    def to_heads(self, x: torch.Tensor, step: int) -> torch.Tensor:
        """This rank's rows with all heads [n,H,d] to the group's rows, in its order, with this
        rank's [N,H/u,d].
        """
        ulysses = self.sequence.ulysses
        if ulysses == 1:
            return x
        parts = x.unflatten(1, (ulysses, -1)).transpose(0, 1).flatten(0, 1)
        arrived = swap(
            parts,
            [counts[step] for counts in self.counts],
            [len(x)] * ulysses,
            self.sequence.heads_group,
        )
        return arrived.index_select(0, self.grouped[step])

    def to_rows(self, x: torch.Tensor, step: int) -> torch.Tensor:
        """The reverse: [N,H/u,d] to [n,H,d]."""
        ulysses = self.sequence.ulysses
        if ulysses == 1:
            return x
        sent = [counts[step] for counts in self.counts]
        here = sent[self.sequence.rank % ulysses]
        arrived = swap(
            x.index_select(0, self.back[step]), [here] * ulysses, sent, self.sequence.heads_group
        )
        return arrived.unflatten(0, (ulysses, here)).transpose(0, 1).flatten(1, 2)


class SharedKeysValues:
    """As `KeysValues`, of rows that an ulysses group shares; `later` holds the group's, for this
    rank's heads.
    """

    def __init__(self, exchange: Exchange, backend: Backend, k0: torch.Tensor, v0: torch.Tensor):
        self.exchange, self.backend, self.k0, self.v0 = exchange, Segmented(backend), k0, v0
        self.step, self.later = 0, []

    def attend(
        self, q: torch.Tensor, k: torch.Tensor | None, v: torch.Tensor | None
    ) -> torch.Tensor:
        exchange, ulysses = self.exchange, self.exchange.sequence.ulysses
        if k is None:
            q = exchange.to_heads(q, self.step)
        else:
            parts = torch.cat([x.unflatten(1, (ulysses, -1)) for x in (q, k, v)], dim=2)
            heads = [x.shape[1] // ulysses for x in (q, k, v)]
            q, k, v = exchange.to_heads(parts.flatten(1, 2), self.step).split(heads, dim=1)
            q = q.contiguous()
            self.later += [k.contiguous(), v.contiguous()]
        rows = exchange.rows[: len(q)]
        out = Attend.apply(self.backend, exchange.segments, rows, q, self.k0, self.v0, *self.later)
        out = exchange.to_rows(out, self.step)
        self.step += 1
        return out


@dataclass
class Routes:
    """How features come from the ranks that prefilled the documents: of my documents' tokens and
    teacher rows, those sent to each rank (`send`, counts) and how what arrives is put in order.
    """

    batch: Batch | None
    tokens: tuple[torch.Tensor, list[int], list[int], torch.Tensor]
    teachers: tuple[torch.Tensor, list[int], list[int], torch.Tensor]


class Sequence:
    """The ranks side by side that share a replica's micro-batches; rank p has ring place p // u and
    heads p % u.
    """

    def __init__(self, ulysses: int, ring: int, rank: int, world_size: int, config: DraftConfig):
        """`rank` and `world_size` are those of the run. Every rank of the run makes its Sequence
        together.
        """
        size = ulysses * ring
        self.ulysses, self.ring, self.rank, self.size = ulysses, ring, rank % size, size
        self.config = config
        for members, name in ((size, "group"), (ulysses, "heads_group")):
            starts = range(0, world_size, members)
            made = [
                dist.new_group(range(start, start + members), timeout=PATIENCE) for start in starts
            ]
            setattr(self, name, made[rank // members])

    def owners(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 [T], the rank that holds each token, and [T], how many steps need its row.

        Documents are cut into blocks, and these dealt by what their rows cost, so that causal
        attention, prompts and answers come out even.
        """
        length, shape = len(batch.input_ids), self.config
        size = max(SMALLEST_BLOCK, -(-length // (BLOCKS_PER_RANK * self.size)))
        depth = torch.zeros(length, dtype=torch.long)
        for count in batch.row_counts:
            depth[batch.rows[:count]] += 1
        heads, key_heads = (
            shape.num_attention_heads * shape.head_dim,
            shape.num_key_value_heads * shape.head_dim,
        )
        fixed = shape.hidden_size * (3 * shape.target_hidden_size + 2 * key_heads)
        each = shape.hidden_size * (
            2 * heads + 2 * key_heads + 3 * shape.intermediate_size + shape.draft_vocab_size
        )
        cost = fixed + depth * (each + 2 * heads * (batch.position_ids + 1))
        first = (batch.position_ids % size == 0).cumsum(0) - 1
        costs = (
            torch.zeros(int(first[-1]) + 1, dtype=torch.double)
            .index_add_(0, first, cost.double())
            .long()
        )
        owner_of_block = torch.empty(len(costs), dtype=torch.long)
        for rank, blocks in enumerate(
            split_by_cost(np.arange(len(costs)), costs.numpy(), self.size)
        ):
            owner_of_block[torch.from_numpy(blocks)] = rank
        return owner_of_block[first], depth

    def deal(self, batch: Batch) -> Batch:
        """What of a packed batch is this rank's: its tokens, their rows and pairs, and the teacher
        rows of those.
        """
        owner, depth = self.owners(batch)
        steps = len(batch.row_counts)
        places = with_reach(owner == self.rank, batch.document_ends, steps)
        held = (owner[places] == self.rank).nonzero()[:, 0]
        here = torch.full((len(owner),), -1)
        here[places[held]] = torch.arange(len(held))

        row_owner = owner[batch.rows]
        own_row = row_owner == self.rank
        rank_of_row = own_row.cumsum(0) - 1
        counts = [int(own_row[:count].sum()) for count in batch.row_counts]
        offset, own_offset = starts_of(batch.row_counts), starts_of(counts)
        row = batch.pair_index - offset[batch.pair_step]
        kept = own_row[row]
        step, teacher = batch.pair_step[kept], batch.pair_teacher[kept]
        beyond = len(batch.teacher_rows)
        teachers = teacher[teacher < beyond].unique()
        teacher = torch.where(
            teacher < beyond, torch.searchsorted(teachers, teacher), len(teachers)
        )
        exchange = self.exchange(batch, owner, depth)
        features = batch.features and Features(
            batch.features.aux_hidden_states[places[held]],
            *(getattr(batch.features, f.name)[teachers] for f in fields(Features)[1:]),
        )
        return replace(
            batch,
            input_ids=batch.input_ids[places],
            loss_mask=batch.loss_mask[places],
            position_ids=batch.position_ids[places],
            document_ends=torch.searchsorted(places, batch.document_ends[places]),
            teacher_rows=batch.teacher_rows[teachers],
            own=held,
            rows=here[batch.rows[own_row]],
            row_counts=counts,
            pair_index=rank_of_row[row[kept]] + own_offset[step],
            pair_step=step,
            pair_teacher=teacher,
            pairs_before=count_before(teacher, len(teachers)),
            pair_counts=torch.bincount(step, minlength=steps).tolist(),
            normaliser=batch.normaliser if self.rank == 0 else 0,
            features=features,
            loaded=[],
            num_steps=sum(any(step) for step in zip(*exchange.counts, strict=True)),
            exchange=exchange,
            routes=self.routes(batch, owner, row_owner[row]) if features is None else None,
        )

    def exchange(self, batch: Batch, owner: torch.Tensor, depth: torch.Tensor) -> Exchange:
        first = self.rank - self.rank % self.ulysses
        rows = [
            batch.rows[owner[batch.rows] == rank] for rank in range(first, first + self.ulysses)
        ]
        counts = [
            [int((depth[mine] > step).sum()) for step in range(len(batch.row_counts))]
            for mine in rows
        ]
        everyone, starts = torch.cat(rows), starts_of([len(mine) for mine in rows])
        by_depth = torch.argsort(depth[everyone], descending=True, stable=True)
        place = torch.argsort(by_depth)
        back = [
            torch.cat(
                [
                    place[start : start + count[step]]
                    for start, count in zip(starts.tolist(), counts, strict=True)
                ]
            )
            for step in range(len(batch.row_counts))
        ]
        tokens = ((owner >= first) & (owner < first + self.ulysses)).nonzero()[:, 0]
        return Exchange(
            self,
            torch.bincount(owner, minlength=self.size).tolist(),
            torch.argsort(torch.argsort(owner, stable=True)),
            counts,
            torch.searchsorted(tokens, everyone[by_depth]),
            segments_of(tokens, batch),
            [torch.argsort(places) for places in back],
            back,
        )

    def routes(self, batch: Batch, owner: torch.Tensor, pair_owner: torch.Tensor) -> Routes:
        """The ranks prefill whole documents, and each then sends every rank what that one needs of
        them.
        """
        lengths = np.array(batch.documents.lengths)
        shares = split_by_cost(np.arange(len(lengths)), lengths, self.size)
        source_of_document = torch.empty(len(lengths), dtype=torch.long)
        for rank, share in enumerate(shares):
            source_of_document[torch.from_numpy(share)] = rank
        source = source_of_document.repeat_interleave(torch.from_numpy(lengths))
        known = batch.pair_teacher < len(batch.teacher_rows)
        tokens = [(owner == rank).nonzero()[:, 0] for rank in range(self.size)]
        teachers = [
            batch.pair_teacher[known & (pair_owner == rank)].unique() for rank in range(self.size)
        ]
        return Routes(
            part_of(batch, np.sort(shares[self.rank])),
            route(tokens, source, self.rank),
            route(teachers, source[batch.teacher_rows], self.rank),
        )

    def spread(self, supply: Supply, embedding: torch.Tensor) -> Supply:
        """The supply of dealt batches: every rank prefills some of a batch's documents, in the
        dtype of `embedding`.
        """

        def features(batch: Batch) -> Features:
            mine = batch.routes.batch
            if mine is not None:
                seen = supply.features(mine.to(embedding.device))
            else:
                width = self.config.target_hidden_size
                empty = embedding.new_empty
                seen = Features(
                    empty(0, 3 * width), empty(0, width), empty(0, dtype=torch.long), empty(0)
                )
            tokens, teachers = batch.routes.tokens, batch.routes.teachers
            return Features(
                self.send(seen.aux_hidden_states.to(embedding.dtype), *tokens),
                self.send(seen.last_hidden_states.to(embedding.dtype), *teachers),
                self.send(seen.argmax, *teachers),
                self.send(seen.logsumexp.float(), *teachers),
            )

        spread = copy(supply)
        spread.features = features
        return spread

    def send(self, tensor, picked, sent, received, order) -> torch.Tensor:
        out = tensor.new_empty(sum(received), *tensor.shape[1:])
        dist.all_to_all_single(
            out, tensor[picked.to(tensor.device)].contiguous(), received, sent, self.group
        )
        return out[order.to(tensor.device)]


def starts_of(counts: list[int]) -> torch.Tensor:
    """Where each part begins when parts of these lengths lie one behind the other."""
    counts = torch.tensor(counts)
    return counts.cumsum(0) - counts


def with_reach(own: torch.Tensor, ends: torch.Tensor, steps: int) -> torch.Tensor:
    """Places of one's own tokens and of up to `steps` tokens behind each in its document, whose
    embeddings it reads.
    """
    inside, places = own.clone(), own.nonzero()[:, 0]
    for distance in range(1, steps + 1):
        ahead = places + distance
        inside[ahead[ahead < ends[places]]] = True
    return inside.nonzero()[:, 0]


def segments_of(tokens: torch.Tensor, batch: Batch) -> Segments:
    """Runs of neighbours in the sorted places `tokens`, each within one document."""
    starts = tokens - batch.position_ids[tokens]
    new = torch.ones(len(tokens), dtype=torch.bool)
    new[1:] = (tokens[1:] != tokens[:-1] + 1) | (starts[1:] != starts[:-1])
    firsts = [*new.nonzero()[:, 0].tolist(), len(tokens)]
    parts = []
    for first, last in pairwise(firsts):
        start, end = int(starts[first]), int(tokens[last - 1]) + 1
        length, before = end - start, end - start - (last - first)
        documents = DocumentSpans(torch.tensor([0, length], dtype=torch.int32), [length], before)
        parts.append(
            Segment(slice(first, last), slice(start, end), torch.arange(before, length), documents)
        )
    return Segments(parts, len(tokens))


def part_of(batch: Batch, numbers: np.ndarray) -> Batch | None:
    """Some documents of a batch, packed for the target; None for none."""
    if not len(numbers):
        return None
    spans = [slice(*batch.documents.cu_seqlens[number : number + 2].tolist()) for number in numbers]
    documents = [
        Document(batch.document_keys[number], batch.input_ids[span], batch.loss_mask[span])
        for number, span in zip(numbers, spans, strict=True)
    ]
    anything = torch.ones(int(batch.input_ids.max()) + 1, dtype=torch.bool)
    return replace(
        pack(documents, anything, 1, serving), loaded=[batch.loaded[number] for number in numbers]
    )


def route(wanted: list[torch.Tensor], source: torch.Tensor, rank: int):
    """Who sends what: `wanted[q]` are the sorted places that rank q needs, `source` the rank that
    each comes from.

    Returns which of this rank's own are sent, counts sent and received, and the order of what
    arrives.
    """
    mine = source == rank
    sent = [places[mine[places]] for places in wanted]
    arriving = [wanted[rank][source[wanted[rank]] == other] for other in range(len(wanted))]
    picked = (mine.cumsum(0) - 1)[torch.cat(sent)]
    return (
        picked,
        [len(x) for x in sent],
        [len(x) for x in arriving],
        torch.argsort(torch.cat(arriving)),
    )
