"""Every parallel layout trains as one process does: losses, gradients' norms and weights, in
float64.
"""

import os
from dataclasses import replace
from datetime import timedelta
from functools import partial
from multiprocessing import set_forkserver_preload
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import free_port, soft_target_loss

from eagle3.batch import Document, Features, pack, serving, shifted
from eagle3.draft.attention import Dense
from eagle3.draft.block import DFlashConfig, DSparkConfig
from eagle3.draft.flash import FlashCPU
from eagle3.draft.model import DraftConfig
from eagle3.loader import Loader
from eagle3.loss import FrozenWeights, Powers, Reached, kl
from eagle3.optim import GuardedOptimizer
from eagle3.parallel import sequence
from eagle3.parallel.ranks import Ranks, init_ranks
from eagle3.parallel.segments import Segmented, segments_of
from eagle3.parallel.sequence import Sequence
from eagle3.runs.metrics import Meter
from eagle3.train import Trainer

set_forkserver_preload(["torch", "transformers", "hydra", "eagle3.pipeline"])  # imported once
VOCAB, STEPS, UPDATES = 60, 4, 5
# The first is longer than any rank's share of an update.
LENGTHS = [150, 7, 31, 64, 5, 90, 18, 3, 40, 77, 12, 55]
SHAPE = DraftConfig(
    hidden_size=16, intermediate_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=6,
    vocab_size=VOCAB, draft_vocab_size=40, target_hidden_size=12, max_position_embeddings=256,
    initializer_range=0.3, num_aux_hidden_states=2, fc_norm=True, norm_output=True,
)  # fmt: skip
BLOCKS = {
    "hidden_size": 12, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 6, "vocab_size": VOCAB, "draft_vocab_size": VOCAB, "target_hidden_size": 12,
    "max_position_embeddings": 256, "initializer_range": 0.3, "num_aux_hidden_states": 2,
    "num_hidden_layers": 2, "mask_token_id": 7,
}  # fmt: skip
# By the kind of draft and whether its features are stored.
CASES = {
    ("eagle3", True): SHAPE,
    ("eagle3", False): SHAPE,
    ("dflash", True): DFlashConfig(**BLOCKS, block_size=STEPS + 1),
    ("dspark", False): DSparkConfig(**BLOCKS, block_size=STEPS, markov_rank=5),
}
ANCHORS = 9
CHOSEN = torch.arange(VOCAB) % 3 < 2
# (ulysses, ring) by number of processes; the rest of the processes train on other documents
LAYOUTS = {2: [(1, 1), (2, 1), (1, 2)], 4: [(2, 2), (1, 2), (1, 4)]}


class Conversations:
    """Documents in memory, with features (as offline) or without (as online)."""

    def __init__(self, stored: bool):
        randomly = np.random.default_rng(0)
        self.stored, self.lengths = stored, np.array(LENGTHS)
        self.ids = [torch.from_numpy(randomly.integers(0, VOCAB, n)) for n in LENGTHS]
        turns = [np.cumsum(randomly.random(n) < 0.15) for n in LENGTHS]
        self.masks = [torch.from_numpy(turn % 2 == 1) for turn in turns]
        for number in (0, 1, 2, 4, 7):
            self.masks[number][:] = False
        self.masks[0][40:45] = True  # a micro-batch of which most ranks have no row
        self.supervised = np.array([int(mask.sum()) for mask in self.masks])

    def begin(self, epoch):
        pass

    def load(self, numbers):
        documents = [Document(n, self.ids[n], self.masks[n]) for n in numbers]
        if not self.stored:
            return documents
        alone = [pack([document], CHOSEN, STEPS, serving) for document in documents]
        return [replace(d, features=imagine(b)) for d, b in zip(documents, alone, strict=True)]


def imagine(batch):
    """A target whose states depend on token and position alone."""
    table = torch.randn(VOCAB, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    states = table[batch.input_ids] * (1 + torch.sin(batch.position_ids.double()))[:, None]
    teachers = states[batch.teacher_rows]
    logsumexp = teachers.logsumexp(1).float()
    return Features(states[:, :24], teachers[:, 36:], teachers.argmax(1) + 5, logsumexp)


def trainer_of(ranks, ulysses, ring, case, reduce_dtype=torch.float64):
    shape, stored = CASES[case], case[1]
    torch.manual_seed(0)
    chosen = CHOSEN if shape is SHAPE else torch.ones(VOCAB, dtype=torch.bool)
    d2t = chosen.nonzero()[:, 0] - torch.arange(shape.draft_vocab_size)
    draft = shape.build(FlashCPU, chosen, d2t).double()
    embedding = torch.randn(VOCAB, shape.hidden_size, dtype=torch.float64)
    head = torch.randn(shape.draft_vocab_size, 12, dtype=torch.float64)
    frozen = FrozenWeights(embedding, head)
    features, group = imagine, ulysses * ring
    packed = partial(pack, in_draft_vocab=chosen, ttt_steps=STEPS, mask=serving)
    if shape is not SHAPE:
        packed = partial(packed, anchors=ANCHORS)
    pack_documents = packed
    if group > 1:
        shared = Sequence(ulysses, ring, ranks.rank, shape, timedelta(minutes=30))
        features = partial(shared.features, imagine, embedding.dtype)

        def pack_documents(documents):
            return shared.deal(packed(documents))

    section = {"max_steps": UPDATES, "tokens_per_step": 160, "documents_per_update": None}
    section = SimpleNamespace(epochs=9, data_share=1.0, **section)
    replica, replicas = ranks.rank // group, ranks.world_size // group
    loader = Loader(Conversations(stored), section, pack_documents, 320, 3, replica, replicas)
    optimizer = torch.optim.AdamW(draft.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    optim = GuardedOptimizer(optimizer, scheduler, 0.5, "fp32")
    optim.reduce_dtype = reduce_dtype
    # What is counted for one weights of the steps, of all ranks, decides the next updates.
    weights = partial(Reached, decay=0.9) if stored else Powers
    loss = soft_target_loss(kl, chunk_rows=7, weights=weights)
    meter = Meter(STEPS, loss.weights, torch.device("cpu"))
    return Trainer(draft, frozen, loss, features, loader, optim, meter, ranks)


def train(trainer):
    """Losses, accuracies and gradient norms of each update, the weights behind the last."""
    seen, updates = [], iter(trainer.loader)
    for _ in range(UPDATES):
        norm = float(trainer.train_update(next(updates), 0.0))
        metrics = trainer.meter.read(trainer.ranks.all_reduce_tensor).items()
        kept = {k: v for k, v in metrics if k.startswith(("loss", "accuracy", "supervised"))}
        seen.append(kept | {"norm": norm})
    weights = {n: p.detach().clone() for n, p in trainer.draft.named_parameters()}
    return {"seen": seen, "weights": weights}


def in_process(rank, world_size, port, out):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    ranks = init_ranks(timedelta(minutes=30))
    results, sent = {}, []
    exchange = sequence.all_to_all_single_autograd

    def counted(x, received, split, group):
        here = dist.get_rank(group)
        sent.append(x[0].numel() * (sum(split) - split[here]) if len(x) else 0)
        return exchange(x, received, split, group)

    sequence.all_to_all_single_autograd = counted
    for ulysses, ring in LAYOUTS[world_size]:
        for case in CASES:
            sent.clear()
            trainer = trainer_of(ranks, ulysses, ring, case)
            result = train(trainer) | {"sent": list(sent)}
            results[ulysses, ring, case] = result | expected_sent(trainer)
    if world_size == 2:
        results["bf16"] = train(trainer_of(ranks, 1, 1, ("eagle3", True), torch.bfloat16))
    if rank in (0, world_size - 1):
        torch.save(results, f"{out}/{rank}.pt")
    dist.destroy_process_group()


def expected_sent(trainer):
    """Elements that one rank sends in each exchange of the forward pass; the backward pass returns
    as many. And how many batches had no row for it.

    Step 0: its tokens' keys and values, a share of the heads, to each other rank. Then nothing with
    ring alone; with ulysses, the queries (and from step 1 on k and v) of its rows for other ranks'
    heads, and theirs back. A block drafter does so in each layer, with all slots of its rows.
    """
    trainer.loader.state, elements, shape = {"epoch": 0, "update": 0}, [], trainer.draft.config
    updates, empty = iter(trainer.loader), 0
    kv_heads, slots, layers = 2 * shape.num_key_value_heads, 1, 1
    if shape.reads_mask_token:
        slots, layers = shape.block_size, shape.num_hidden_layers
    for batch in [batch for _ in range(UPDATES) for batch in next(updates)]:
        empty += len(batch.rows) == 0
        for _ in range(layers if batch.exchange else 0):
            group = batch.exchange.sequence
            head = shape.head_dim // group.ulysses
            elements.append((group.size - 1) * batch.tokens * kv_heads * head)
            others, heads = group.ulysses - 1, shape.num_attention_heads
            steps = batch.exchange.row_counts[: None if layers == 1 else 1]
            for step, everyone in enumerate(map(sum, steps)):
                if others and (everyone or step == 0):
                    own = heads + (kv_heads if step or shape.reads_mask_token else 0)
                    elements.append(others * batch.row_counts[step] * slots * own * head)
                    elements.append((everyone - batch.row_counts[step]) * slots * heads * head)
    return {"expected": elements, "empty": empty}


@pytest.fixture(scope="module")
def alone():
    return {case: train(trainer_of(Ranks(), 1, 1, case)) for case in CASES}


@pytest.mark.runs
@pytest.mark.parametrize("world_size", LAYOUTS)
def test_every_layout_equals_one_process(alone, world_size, tmp_path):
    arguments = world_size, free_port(), str(tmp_path)
    mp.start_processes(in_process, arguments, nprocs=world_size, start_method="forkserver")
    for rank in (0, world_size - 1):
        results = torch.load(tmp_path / f"{rank}.pt")
        if world_size == 2:  # gradients rounded to 8 bits: near, and not the same
            runs = results.pop("bf16"), alone["eagle3", True]
            rounded, exact = ([update["norm"] for update in run["seen"]] for run in runs)
            assert rounded == pytest.approx(exact, rel=0.05)
            assert rounded != pytest.approx(exact, rel=1e-6)
        assert len(results) == len(CASES) * len(LAYOUTS[world_size])
        assert rank == 0 or any(result["empty"] for result in results.values())
        for (ulysses, ring, case), result in results.items():
            layout, expected = (ulysses, ring, case), alone[case]
            for one, many in zip(expected["seen"], result["seen"], strict=True):
                assert many == pytest.approx(one, rel=1e-10, abs=1e-12, nan_ok=True), layout
            for name, weight in result["weights"].items():
                weight_alone = expected["weights"][name]
                torch.testing.assert_close(weight, weight_alone, rtol=1e-9, atol=1e-11)
            assert result["sent"] == result["expected"]
            assert bool(result["sent"]) == (ulysses * ring > 1)


def whole_batch(mask=serving):
    loaded = Conversations(True).load(range(len(LENGTHS)))
    batch = pack(loaded, CHOSEN, STEPS, mask)
    return replace(batch, features=imagine(batch), loaded=loaded)


@pytest.mark.parametrize("mask", [serving, shifted])
@pytest.mark.parametrize("shape", [(1, 2), (2, 2), (1, 8)])
def test_dealt_batches_are_the_whole(mask, shape):
    """Every token, row and pair is some rank's, once."""
    batch, size = whole_batch(mask), shape[0] * shape[1]
    parts = [Sequence(*shape, rank, SHAPE, None).deal(batch) for rank in range(size)]
    assert sum(part.tokens for part in parts) == len(batch.input_ids)
    for k in range(STEPS):
        assert sum(part.row_counts[k] for part in parts) == batch.row_counts[k]
        assert sum(part.pair_counts[k] for part in parts) == batch.pair_counts[k]
    assert sum(part.normaliser for part in parts) == batch.normaliser
    for part in parts:
        bare = replace(part, teacher_rows=part.own[:0])
        aux, last = part.features.aux_hidden_states, part.features.last_hidden_states
        assert torch.equal(aux, imagine(bare).aux_hidden_states[part.own])
        known = torch.isin(batch.teacher_rows, part.teacher_rows)
        assert torch.equal(last, batch.features.last_hidden_states[known])
        assert len(part.pair_index) == sum(part.pair_counts) == part.pairs_before[-1]


def test_a_group_deals_work_evenly():
    """One document of 4,096 tokens, all of it answer: the rank with most attention has at most 3 %
    above the mean.
    """
    ids, mask = torch.zeros(4096, dtype=torch.long), torch.ones(4096, dtype=torch.bool)
    batch = pack([Document(0, ids, mask)], torch.ones(VOCAB, dtype=torch.bool), STEPS, serving)
    owner, depth = Sequence(1, 8, 0, SHAPE, None).assign_tokens(batch), torch.zeros(4096)
    for count in batch.row_counts:
        depth[batch.rows[:count]] += 1
    work = torch.zeros(8).index_add_(0, owner, depth * (batch.position_ids + 1))
    rows = torch.zeros(8).index_add_(0, owner, depth)
    assert work.max() < 1.03 * work.mean() and rows.max() < 1.15 * rows.mean()


def test_other_backends_take_segments():
    """The dense reference over segments gives what it gives over whole documents."""
    batch = whole_batch()
    torch.manual_seed(1)
    q, rows = torch.randn(len(batch.rows), 4, 6, dtype=torch.float64), batch.rows
    k, v = torch.randn(2, len(batch.input_ids), 2, 6, dtype=torch.float64)
    out, lse = Dense.forward(q, rows, k, v, batch.documents)
    grads = Dense.backward(q, q, rows, k, v, out, lse, batch.documents)
    segments = segments_of(torch.arange(len(batch.input_ids)), batch)
    for backend in (Dense, FlashCPU):
        ours = Segmented(backend).forward(q, rows, k, v, segments)
        torch.testing.assert_close(ours, (out, lse))
        ours = Segmented(backend).backward(q, q, rows, k, v, out, lse, segments)
        torch.testing.assert_close(ours, grads)
