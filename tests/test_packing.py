"""Batches against the definition, pair by pair."""

import pytest
import torch
from reference import random_turns

from eagle3.batch import Document, pack, serving, shifted

VOCAB, TTT_STEPS, LENGTHS = 20, 4, [11, 1, 30, 2, 18]
STARTS = [0, 11, 12, 42, 44]
IN_DRAFT_VOCAB = torch.arange(VOCAB) % 5 != 4


def documents():
    generator = torch.Generator().manual_seed(0)
    masks = random_turns(LENGTHS, generator)
    ids = [torch.randint(0, VOCAB, (n,), generator=generator, dtype=torch.int32) for n in LENGTHS]
    return [Document(100 + i, x, masks[i, : len(x)]) for i, x in enumerate(ids)]


def expected_pairs(mask):
    """{(row, step): teacher's place or None beyond the end}."""
    pairs = {}
    for start, document in zip(STARTS, documents(), strict=True):
        ids, a, n = document.input_ids.long(), document.loss_mask, len(document.input_ids)
        for t in range(n):
            for k in range(TTT_STEPS):
                if mask is shifted:
                    supervised = t + k < n and a[t + k]
                else:
                    supervised = t + k + 2 < n and all(a[t + 1 : t + k + 3])
                    supervised = supervised and all(IN_DRAFT_VOCAB[ids[t + 2 : t + k + 2]])
                if supervised:
                    pairs[start + t, k] = start + t + k + 1 if t + k + 1 < n else None
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
    return pack(documents(), IN_DRAFT_VOCAB, TTT_STEPS, mask)


def test_documents_lie_one_behind_the_other(batch):
    assert torch.equal(batch.input_ids, torch.cat([d.input_ids for d in documents()]).long())
    assert batch.document_keys == [100, 101, 102, 103, 104]
    assert batch.documents.lengths == LENGTHS and batch.max_length == 30
    assert batch.documents.cu_seqlens.tolist() == [*STARTS, 62]
    assert batch.documents.cu_seqlens.dtype == torch.int32
    assert batch.position_ids.tolist() == [t for n in LENGTHS for t in range(n)]
    ends = [end for n, end in zip(LENGTHS, [*STARTS[1:], 62], strict=True) for _ in range(n)]
    assert batch.document_ends.tolist() == ends
    moved = batch.to(torch.device("cpu"))
    assert pairs_of(moved) == pairs_of(batch) and moved.documents.lengths == LENGTHS


def test_pairs_and_their_teachers(batch, mask):
    """In order of their teacher; only a shifted pair reaches beyond a document."""
    pairs, expected = pairs_of(batch), expected_pairs(mask)
    assert {(row, step): teacher for row, step, teacher in pairs} == expected
    assert len(pairs) == len(expected) and (None in expected.values()) == (mask is shifted)
    assert batch.pair_counts == [sum(step == k for _, step, _ in pairs) for k in range(TTT_STEPS)]
    assert batch.normaliser == (150 if mask is shifted else batch.pair_counts[0])
    assert (batch.pair_teacher.diff() >= 0).all()
    before = [int((batch.pair_teacher < u).sum()) for u in range(len(batch.teacher_rows) + 2)]
    assert batch.pairs_before == before


def test_rows_are_nested_and_no_more_than_needed(batch, mask):
    """Those of the teacher follow from the loss mask alone."""
    needed = [set() for _ in range(TTT_STEPS)]
    for row, step in expected_pairs(mask):
        for k in range(step + 1):
            needed[k].add(row)
    assert [set(batch.rows[:count].tolist()) for count in batch.row_counts] == needed
    assert len(batch.rows) == batch.row_counts[0]
    assert batch.row_counts == sorted(batch.row_counts, reverse=True)
    expected = []
    for start, document in zip(STARTS, documents(), strict=True):
        a = document.loss_mask
        expected += [start + j for j in range(len(a)) if a[j] or (j and a[j - 1])]
    assert batch.teacher_rows.tolist() == expected


def test_an_answer_that_runs_into_the_next_document_does_not_continue_there():
    ids, mask = torch.zeros(4, dtype=torch.long), torch.ones(4, dtype=torch.bool)
    both = [Document(0, ids, mask), Document(1, ids, mask)]
    batch = pack(both, torch.ones(VOCAB, dtype=torch.bool), 2, serving)
    first = [(0, 0, 1), (0, 1, 2), (1, 0, 2)]
    assert sorted(pairs_of(batch)) == first + [(row + 4, k, u + 4) for row, k, u in first]
