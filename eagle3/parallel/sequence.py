"""Sequence parallelism (USP): `ulysses` x `ring` ranks train on the same micro-batches together.

Rows meet only through k^0 and v^0, so each rank takes some of the tokens and their rows through all
steps. One all-to-all brings every rank the keys and values of all tokens, for its share of the
heads, and returns their gradients once. With `ring` alone later steps send nothing; the ranks of a
`ulysses` group swap rows for heads and back around each step's attention (arXiv 2405.07719 has the
same layout for whole models, where k and v go round in every layer).

T packed tokens, of which a rank owns O; N rows; H query and G key/value heads of size d; u ulysses,
P = u x ring ranks. Index vectors are named x_of_y: they give an x for every y, where token is a
place in the packed batch, own a place among a rank's own tokens, input a place in its `input_ids`,
row a place in `batch.rows`, and arrival a place in what an all-to-all brings, rank by rank. The
argsort of a permutation is its inverse, y_of_x.

An example: ring 2, K = 1, a document of 8 tokens, its first and last two on rank 0:

    rank_of_token       0 0 1 1 1 1 0 0
    token_of_input      0 1 2 6 7          rank 0's, and token 2: row 1 reads its embedding
    input_of_own        0 1 3 4            batch.own: its own tokens 0 1 6 7 among these
    keys arrive         0 1 6 7 2 3 4 5    first rank 0's, then rank 1's
    arrival_of_token    0 1 4 5 6 7 2 3    picks them in packed order
    segments            tokens 0 1 see keys 0:2, tokens 6 7 see keys 0:8
"""

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd, wait_tensor
from torch.utils._pytree import tree_map_only

from eagle3.batch import (
    Batch,
    Features,
    count_before,
    pack,
    serving,
    split_by_cost,
    starts_of,
    to_device,
)
from eagle3.draft.attention import Backend, KeysValues
from eagle3.draft.model import DraftConfig
from eagle3.parallel.segments import Segment, Segmented, segments_of

BLOCKS_PER_RANK = 8  # more of them balance better, fewer share more teacher rows
SMALLEST_BLOCK = 16


def all_to_all(x: Tensor, received: list[int], sent: list[int], group) -> Tensor:
    """Send the first `sent[0]` rows of x to the group's rank 0, and so on; differentiable."""
    return wait_tensor(all_to_all_single_autograd(x.contiguous(), received, sent, group))


class Exchange(NamedTuple):
    """What the attention of a dealt batch moves between ranks; planned on the host.

    `tokens_of_rank` [P] are counts, `arrival_of_token` int64 [T]. The ranks of a ulysses group swap
    rows: `segments` are their tokens together, `rows` int64 [N] all their rows, needed longest
    first, as places among those; `row_counts` [K][u] counts each rank's, and `row_of_arrival`,
    int64 [N_k] for each step k, gives places in `rows`.
    """

    sequence: "Sequence"
    tokens_of_rank: list[int]
    arrival_of_token: Tensor
    segments: list[Segment]
    rows: Tensor
    row_counts: list[list[int]]
    row_of_arrival: list[Tensor]

    def to(self, device: torch.device) -> "Exchange":
        return tree_map_only(Tensor, lambda x: to_device(x, device), self)

    def __call__(self, kernels, backend: Backend, batch: Batch, k0: Tensor, v0: Tensor):
        """Send k0, v0 [O,G,d] of the own tokens; `KeysValues` of all, for this rank's heads."""
        sequence, heads = self.sequence, (self.sequence.ulysses, -1)
        shares = torch.cat([k0.unflatten(1, heads), v0.unflatten(1, heads)], dim=2)  # [O,u,2G/u,d]
        # Rank p works on the head share p % u, so the shares repeat from ring place to ring place.
        sent = shares.transpose(0, 1).repeat(sequence.ring, 1, 1, 1).flatten(0, 1)  # [P*O,2G/u,d]
        arrived = all_to_all(sent, self.tokens_of_rank, [len(k0)] * sequence.size, sequence.group)
        k, v = arrived.index_select(0, self.arrival_of_token).chunk(2, dim=1)  # [T,G/u,d] each
        return SharedKeysValues(self, kernels, backend, batch, k.contiguous(), v.contiguous())

    def rows_to_heads(self, tensors: list[Tensor], step: int) -> list[Tensor]:
        """This rank's rows with all heads, each [n,H,d] -> the group's, in the order of `rows`,
        with this rank's share of the heads [N_k,H/u,d].
        """
        ulysses = self.sequence.ulysses
        if ulysses == 1:
            return tensors
        shares = torch.cat([x.unflatten(1, (ulysses, -1)) for x in tensors], dim=2)  # [n,u,*,d]
        sent = shares.transpose(0, 1).flatten(0, 1)  # [u*n,*,d]
        splits, group = [len(shares)] * ulysses, self.sequence.heads_group
        arrived = all_to_all(sent, self.row_counts[step], splits, group)  # [N_k,*,d]
        grouped = arrived.index_select(0, self.row_of_arrival[step].argsort())
        parts = grouped.split([x.shape[1] // ulysses for x in tensors], dim=1)
        return [part.contiguous() for part in parts]

    def heads_to_rows(self, x: Tensor, step: int) -> Tensor:
        """The reverse: [N_k,H/u,d] -> [n,H,d]."""
        ulysses = self.sequence.ulysses
        if ulysses == 1:
            return x
        sent = self.row_counts[step]
        num_own = sent[self.sequence.rank % ulysses]
        by_rank = x.index_select(0, self.row_of_arrival[step])  # [N_k,H/u,d]
        arrived = all_to_all(by_rank, [num_own] * ulysses, sent, self.sequence.heads_group)
        return arrived.unflatten(0, (ulysses, num_own)).transpose(0, 1).flatten(1, 2)  # [n,H,d]


class SharedKeysValues(KeysValues):
    """Those of a shared batch, for this rank's heads: k0, v0 [T,G/u,d]."""

    def __init__(self, exchange: Exchange, kernels, backend: Backend, batch: Batch, k0, v0):
        super().__init__(kernels, Segmented(backend), batch, k0, v0)
        self.exchange, self.documents, self.rows = exchange, exchange.segments, exchange.rows

    def attend(self, q: Tensor, *own: Tensor, step: int = 0) -> Tensor:
        # At step 0 the keys are k0; later q, k and v travel in one message.
        shares = self.exchange.rows_to_heads([q, *own], step)
        return self.exchange.heads_to_rows(super().attend(*shares, step=step), step)


class Route:
    """An all-to-all of vectors, each to the ranks that want it."""

    def __init__(self, wanted: list[Tensor], source: Tensor, rank: int):
        """`wanted[p]`: the places, sorted, that rank p needs; `source`: the rank that has each."""
        has = source == rank
        sent = [places[has[places]] for places in wanted]
        source_of_wanted = source[wanted[rank]]
        self.picked = (has.cumsum(0) - 1)[torch.cat(sent)]  # a rank has its places in order
        self.sent = [len(places) for places in sent]
        self.received = torch.bincount(source_of_wanted, minlength=len(wanted)).tolist()
        self.arrival_of_wanted = torch.argsort(source_of_wanted, stable=True).argsort()

    def send(self, x: Tensor, group) -> Tensor:
        """`x` of the places that this rank has -> of those it wants."""
        arrived = x.new_empty(sum(self.received), *x.shape[1:])
        picked = x[to_device(self.picked, x.device)]
        dist.all_to_all_single(arrived, picked, self.received, self.sent, group)
        return arrived[to_device(self.arrival_of_wanted, x.device)]


class Sequence:
    """The ranks that share a replica's micro-batches; rank p has ring place p // u, heads p % u."""

    def __init__(
        self, ulysses: int, ring: int, rank: int, config: DraftConfig, timeout: timedelta | None
    ):
        """`rank` is that of the run, whose ranks must all make their Sequence; without the
        `timeout` of its collectives it deals batches and cannot send.
        """
        self.ulysses, self.ring, self.size = ulysses, ring, ulysses * ring
        self.rank, self.config = rank % self.size, config
        self.group = self.heads_group = None
        if timeout is not None:  # groups of neighbours: every rank has to make every group
            self.group, _ = dist.new_subgroups(self.size, timeout=timeout)
            self.heads_group, _ = dist.new_subgroups(ulysses, timeout=timeout)

    def assign_tokens(self, batch: Batch) -> Tensor:
        """rank_of_token int64 [T].

        Documents are cut into blocks, and these dealt by what their rows cost, so that causal
        attention, prompts and answers come out even.
        """
        config, depth_of_token = self.config, torch.zeros_like(batch.input_ids)
        for count in batch.row_counts:
            depth_of_token[batch.rows[:count]] += 1  # how many steps need its row
        if config.reads_mask_token:  # which goes through all slots and layers
            depth_of_token[batch.rows] = config.block_size * config.num_hidden_layers
        # Multiplications: fc, k^0 and v^0 of every token; the rest of the layer, the head and
        # attention to the tokens before at every step that needs the row. Prompts cost least.
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        per_token = config.hidden_size * (config.aux_size + 2 * keys)
        width = 2 * queries + 2 * keys + 3 * config.intermediate_size + config.draft_vocab_size
        per_step = config.hidden_size * width + 2 * queries * (batch.position_ids + 1)
        cost_of_token = (per_token + depth_of_token * per_step).double()

        size = max(SMALLEST_BLOCK, -(-len(cost_of_token) // (BLOCKS_PER_RANK * self.size)))
        block_of_token = (batch.position_ids % size == 0).cumsum(0) - 1
        cost_of_block = torch.zeros(int(block_of_token[-1]) + 1, dtype=torch.double)
        cost_of_block.index_add_(0, block_of_token, cost_of_token)
        return assign(cost_of_block.long().numpy(), self.size)[block_of_token]

    def deal(self, batch: Batch) -> Batch:
        """Select this rank's tokens, rows, pairs and teacher rows from a packed batch."""
        rank_of_token = self.assign_tokens(batch)
        token_is_own = rank_of_token == self.rank
        num_steps = len(batch.row_counts)

        token_of_input = with_tokens_ahead(token_is_own, batch.document_ends, num_steps)
        input_of_own = token_is_own[token_of_input].nonzero()[:, 0]
        token_of_own = token_of_input[input_of_own]

        # Own rows keep the order of all rows, so those needed longest still come first.
        row_is_own = token_is_own[batch.rows]
        own_row_of_row = row_is_own.cumsum(0) - 1
        row_counts = [int(row_is_own[:count].sum()) for count in batch.row_counts]

        # A pair goes where its row goes; `pair_index` counts through the rows of all steps.
        row_of_pair = batch.pair_index - starts_of(batch.row_counts)[batch.pair_step]
        pair_is_own = row_is_own[row_of_pair]
        pair_step = batch.pair_step[pair_is_own]
        own_row_of_pair = own_row_of_row[row_of_pair[pair_is_own]]
        pair_teacher = batch.pair_teacher[pair_is_own]
        teachers = pair_teacher[pair_teacher < len(batch.teacher_rows)].unique()
        # U, "beyond the document", lies behind all teachers and becomes their number.
        pair_teacher = torch.searchsorted(teachers, pair_teacher)

        features, routes = batch.features, None
        if features is None:
            routes = self.plan_routes(batch, rank_of_token, rank_of_token[batch.rows][row_of_pair])
        else:
            features = features.select(token_of_own, teachers)
        exchange = self.plan_exchange(batch, rank_of_token)
        return replace(
            batch,
            input_ids=batch.input_ids[token_of_input],
            loss_mask=batch.loss_mask[token_of_input],
            position_ids=batch.position_ids[token_of_input],
            document_ends=torch.searchsorted(token_of_input, batch.document_ends[token_of_input]),
            teacher_rows=batch.teacher_rows[teachers],
            own=input_of_own,
            rows=torch.searchsorted(token_of_own, batch.rows[row_is_own]),
            row_counts=row_counts,
            pair_index=own_row_of_pair + starts_of(row_counts)[pair_step],
            pair_step=pair_step,
            pair_teacher=pair_teacher,
            pairs_before=count_before(pair_teacher, len(teachers)),
            pair_counts=torch.bincount(pair_step, minlength=num_steps).tolist(),
            normaliser=batch.normaliser if self.rank == 0 else 0,  # it is added up over ranks
            features=features,
            loaded=[],
            # A step runs on all ranks of a group or on none: their all-to-alls must meet.
            num_steps=sum(map(any, exchange.row_counts)),
            exchange=exchange,
            routes=routes,
        )

    def plan_exchange(self, batch: Batch, rank_of_token: Tensor) -> Exchange:
        """Every rank plans the same from the whole batch, so that nothing has to be agreed on."""
        first, rank_of_row = self.rank - self.rank % self.ulysses, rank_of_token[batch.rows]
        in_group = rank_of_row // self.ulysses == first // self.ulysses
        # In the order of the batch, so those needed longest still come first.
        token_of_row, member_of_row = batch.rows[in_group], rank_of_row[in_group] - first
        of_steps = [member_of_row[: in_group[:count].sum()] for count in batch.row_counts]
        group_tokens = (rank_of_token // self.ulysses == first // self.ulysses).nonzero()[:, 0]
        return Exchange(
            sequence=self,
            tokens_of_rank=torch.bincount(rank_of_token, minlength=self.size).tolist(),
            arrival_of_token=torch.argsort(rank_of_token, stable=True).argsort(),
            segments=segments_of(group_tokens, batch),
            rows=torch.searchsorted(group_tokens, token_of_row),
            row_counts=[torch.bincount(x, minlength=self.ulysses).tolist() for x in of_steps],
            row_of_arrival=[torch.argsort(x, stable=True) for x in of_steps],
        )

    def plan_routes(
        self, batch: Batch, rank_of_token: Tensor, rank_of_pair: Tensor
    ) -> tuple[Batch | None, Route, Route]:
        """The documents that this rank prefills, if any, and the ways of tokens and teacher rows.

        A target reads whole documents, so ranks prefill some each, and send the features to where
        these are trained on.
        """
        lengths = batch.documents.lengths
        source_of_document = assign(np.array(lengths), self.size)
        source_of_token = source_of_document.repeat_interleave(torch.tensor(lengths))
        inside = batch.pair_teacher < len(batch.teacher_rows)
        ranks = range(self.size)
        tokens = [(rank_of_token == rank).nonzero()[:, 0] for rank in ranks]
        teachers = [batch.pair_teacher[inside & (rank_of_pair == rank)].unique() for rank in ranks]
        own_documents = (source_of_document == self.rank).nonzero()[:, 0].tolist()
        loaded, prefilled = [batch.loaded[number] for number in own_documents], None
        if loaded:
            # Only tokens and teacher rows matter to a target, whatever the draft vocabulary.
            any_token = torch.ones(int(batch.input_ids.max()) + 1, dtype=torch.bool)
            prefilled = replace(pack(loaded, any_token, 1, serving), loaded=loaded)
        token_route = Route(tokens, source_of_token, self.rank)
        teacher_sources = source_of_token[batch.teacher_rows]
        return prefilled, token_route, Route(teachers, teacher_sources, self.rank)

    def features(
        self, features_of: Callable[[Batch], Features], dtype: torch.dtype, batch: Batch
    ) -> Features:
        """Features of a dealt batch, by a function that computes those of whole documents.

        Every rank prefills some of a batch's documents; hidden states are sent as `dtype`.
        """
        device = batch.input_ids.device
        prefilled, tokens, teachers = batch.routes
        if prefilled is None:  # nothing to send, but the collectives want every rank
            sizes = self.config.aux_size, self.config.target_hidden_size
            aux, last = (torch.empty(0, size, dtype=dtype, device=device) for size in sizes)
            features = Features(aux, last, last[:, 0].long(), last[:, 0])
        else:
            features = features_of(prefilled.to(device))
        return Features(
            tokens.send(features.aux_hidden_states.to(dtype), self.group),
            teachers.send(features.last_hidden_states.to(dtype), self.group),
            teachers.send(features.argmax, self.group),
            teachers.send(features.logsumexp.float(), self.group),
        )


def assign(costs: np.ndarray, num_ranks: int) -> Tensor:
    """The rank of each item, int64 [items], such that ranks have about the same costs."""
    rank_of_item = torch.empty(len(costs), dtype=torch.long)
    for rank, items in enumerate(split_by_cost(np.arange(len(costs)), costs, num_ranks)):
        rank_of_item[torch.from_numpy(items)] = rank
    return rank_of_item


def with_tokens_ahead(token_is_own: Tensor, document_ends: Tensor, steps: int) -> Tensor:
    """Own tokens and up to `steps` behind each in its document: step k of row t reads t+k+1."""
    needed, own = token_is_own.clone(), token_is_own.nonzero()[:, 0]
    for distance in range(1, steps + 1):
        ahead = own + distance
        needed[ahead[ahead < document_ends[own]]] = True
    return needed.nonzero()[:, 0]
