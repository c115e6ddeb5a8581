import pytest
import torch
from reference import random_turns

from eagle3.batch import Document, pack, serving, shifted

VOCAB, TTT_STEPS = 20, 4


def documents(lengths=(11, 1, 30, 2, 18), seed=0):
    generator = torch.Generator().manual_seed(seed)
    masks = random_turns(list(lengths), generator)
    return [
        (
            100 + i,
            torch.randint(0, VOCAB, (n,), generator=generator, dtype=torch.int32),
            masks[i, :n],
        )
        for i, n in enumerate(lengths)
    ]


IN_DRAFT_VOCAB = torch.arange(VOCAB) % 5 != 4


def expected_pairs(mask, ttt_steps=TTT_STEPS):
    """{(row, step): teacher's place or None beyond the end}, by the definition, pair by pair."""
    pairs, start = {}, 0
    for _, ids, a in documents():
        n = len(ids)
        for t in range(n):
            for k in range(ttt_steps):
                if mask is shifted:
                    supervised = t + k < n and a[t + k]
                else:
                    supervised = t + k + 2 < n and all(a[t + 1 : t + k + 3])
                    supervised = supervised and all(IN_DRAFT_VOCAB[ids[t + 2 : t + k + 2].long()])
                if supervised:
                    pairs[start + t, k] = start + t + k + 1 if t + k + 1 < n else None
        start += n
    return pairs


def pairs_of(batch):
    """In the batch's order."""
    offsets = torch.tensor([0, *batch.row_counts]).cumsum(0)
    rows = batch.rows[batch.pair_index - offsets[batch.pair_step]].tolist()
    teachers = [*batch.teacher_rows.tolist(), None]
    taught = [teachers[u] for u in batch.pair_teacher.tolist()]
    return list(zip(rows, batch.pair_step.tolist(), taught, strict=True))


@pytest.fixture(params=[serving, shifted])
def mask(request):
    return request.param


@pytest.fixture
def batch(mask):
    return pack([Document(*d) for d in documents()], IN_DRAFT_VOCAB, TTT_STEPS, mask)


def test_documents_lie_one_behind_the_other(batch):
    assert torch.equal(batch.input_ids, torch.cat([ids for _, ids, _ in documents()]).long())
    assert batch.document_keys == [100, 101, 102, 103, 104]
    assert batch.documents.lengths == [11, 1, 30, 2, 18] and batch.max_length == 30
    assert batch.documents.cu_seqlens.tolist() == [0, 11, 12, 42, 44, 62]
    assert batch.documents.cu_seqlens.dtype == torch.int32
    assert batch.position_ids.tolist() == [t for n in (11, 1, 30, 2, 18) for t in range(n)]
    assert batch.document_ends.tolist() == [
        end for n, end in ((11, 11), (1, 12), (30, 42), (2, 44), (18, 62)) for _ in range(n)
    ]


def test_pairs_and_their_teachers(batch, mask):
    pairs = pairs_of(batch)
    assert {(row, step): teacher for row, step, teacher in pairs} == expected_pairs(mask)
    assert len(pairs) == len(set(pairs))
    assert batch.pair_counts == [sum(step == k for _, step, _ in pairs) for k in range(TTT_STEPS)]


def test_some_shifted_pair_reaches_beyond_a_document():
    assert None in expected_pairs(shifted).values() and None not in expected_pairs(serving).values()


def test_pairs_come_in_order_of_their_teacher(batch):
    assert (batch.pair_teacher.diff() >= 0).all()
    before = [int((batch.pair_teacher < u).sum()) for u in range(len(batch.teacher_rows) + 2)]
    assert batch.pairs_before == before


def test_rows_are_nested_and_no_more_than_needed(batch, mask):
    needed = [set() for _ in range(TTT_STEPS)]
    for row, step in expected_pairs(mask):
        for k in range(step + 1):
            needed[k].add(row)
    assert [set(batch.rows[:count].tolist()) for count in batch.row_counts] == needed
    assert len(batch.rows) == batch.row_counts[0] and batch.row_counts == sorted(
        batch.row_counts, reverse=True
    )


def test_teacher_rows_follow_from_the_loss_mask_alone(batch):
    expected, start = [], 0
    for _, _, a in documents():
        expected += [start + j for j in range(len(a)) if a[j] or (j and a[j - 1])]
        start += len(a)
    assert batch.teacher_rows.tolist() == expected


def test_normalisers():
    counted = sum(step == 0 for _, step in expected_pairs(serving))
    assert (
        pack([Document(*d) for d in documents()], IN_DRAFT_VOCAB, TTT_STEPS, serving).normaliser
        == counted
    )
    assert (
        pack([Document(*d) for d in documents()], IN_DRAFT_VOCAB, TTT_STEPS, shifted).normaliser
        == 5 * 30
    )


def test_an_answer_that_runs_into_the_next_document_does_not_continue_there():
    ids = torch.zeros(4, dtype=torch.long)
    both = [(0, ids, torch.ones(4, dtype=torch.bool)), (1, ids, torch.ones(4, dtype=torch.bool))]
    batch = pack([Document(*d) for d in both], torch.ones(VOCAB, dtype=torch.bool), 2, serving)
    assert sorted(pairs_of(batch)) == [
        (0, 0, 1),
        (0, 1, 2),
        (1, 0, 2),
        (4, 0, 5),
        (4, 1, 6),
        (5, 0, 6),
    ]


def test_moving_keeps_everything(batch):
    moved = batch.to(torch.device("cpu"))
    assert pairs_of(moved) == pairs_of(batch) and moved.documents.lengths == batch.documents.lengths
