"""Rows, the assistant mask, the draft vocabulary, the prepared artefact and the loader."""

import json

import numpy as np
import pytest
import torch

from eagle3.data import prepare
from eagle3.data.chat import encode, encode_prompt, with_system
from eagle3.data.loader import Loader, fill_micro_steps, plan_epoch
from eagle3.data.sources import RowError, read_messages, read_rows
from eagle3.data.supervision import serving
from eagle3.data.vocab import choose_vocab, coverage, vocab_tensors
from eagle3.errors import RunError


def chat(*turns):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def rows_of(n):
    return [{"messages": chat(f"What is {i}?", f"It is the number {i}, and no other.")} for i in range(n)]


def write_jsonl(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def options(path, **changes):
    defaults = {
        "eval_path": None,
        "num_samples": None,
        "max_length": 128,
        "system_prompt": None,
        "only_last_turn": False,
        "on_reject": "skip",
        "num_heldout": 2,
        "vocab_size": 2048,
        "draft_vocab_size": 256,
    }
    return prepare.Preparation(path=str(path), **{**defaults, **changes})


def test_both_row_shapes():
    sharegpt = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    assert read_messages(sharegpt) == read_messages({"messages": chat("a", "b")}) == chat("a", "b")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([], "not an object"),
        ({}, "no messages"),
        ({"messages": [{"role": "alien", "content": "x"}]}, "unknown role"),
        ({"messages": [{"role": "user", "content": 3}]}, "not text"),
        ({"messages": chat("a", " ")}, "empty turn"),
        ({"messages": chat("a") + chat("b")}, "alternate"),
        ({"messages": [{"role": "assistant", "content": "b"}]}, "alternate"),
    ],
)
def test_bad_rows_have_a_reason(row, reason):
    with pytest.raises(RowError, match=reason):
        read_messages(row)


def test_rows_are_named_by_file_and_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(rows_of(1)[0]).encode() + b"\n{broken\n\n\xff\xfe\n")
    rows = list(read_rows(str(path)))
    assert [(row.line, row.reason) for row in rows] == [(1, None), (2, "broken JSON"), (4, "bad UTF-8")]


def test_empty_file(tmp_path):
    with pytest.raises(RunError, match="empty"):
        list(read_rows(str(write_jsonl(tmp_path / "a.jsonl", []))))


def test_mask_is_the_assistant_turns_and_their_ends(tokenizer):
    messages = with_system(chat("first question", "the first answer", "second", "the second answer"), "be brief")
    encoded = encode(tokenizer, messages)
    runs, text = [], []
    for token, supervised in zip(encoded.input_ids, encoded.loss_mask, strict=True):
        if supervised:
            text.append(token)
        elif text:
            runs.append(tokenizer.decode(text))
            text = []
    runs += [tokenizer.decode(text)] if text else []
    assert runs == ["the first answer<|eot_id|>", "the second answer<|eot_id|>"]
    last = encode(tokenizer, messages, only_last_turn=True)
    assert sum(last.loss_mask) < sum(encoded.loss_mask) and last.loss_mask[-1] == 1
    assert encode_prompt(tokenizer, messages) == encoded.input_ids[: len(encode_prompt(tokenizer, messages))]


def test_templates_that_rewrite_history_are_rejected(tokenizer):
    original = tokenizer.chat_template
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    try:
        with pytest.raises(RowError, match="renders a turn differently"):
            encode(tokenizer, chat("a", "b", "c", "d"))
    finally:
        tokenizer.chat_template = original


def test_vocab_order_and_filling():
    counts = np.array([0, 5, 7, 5, 0, 1, 0, 0])
    assert choose_vocab(counts, 3, set()).tolist() == [1, 2, 3]
    assert choose_vocab(counts, 3, {7}).tolist() == [1, 2, 7]
    assert choose_vocab(counts, 6, {7}).tolist() == [0, 1, 2, 3, 5, 7]
    assert coverage(counts, np.array([1, 2])) == 12 / 18
    t2d, d2t = vocab_tensors(np.array([1, 2, 7]), 8)
    assert t2d.nonzero()[:, 0].tolist() == [1, 2, 7] and d2t.tolist() == [1, 1, 5]


def test_prepare_counts_every_row(tmp_path, tokenizer):
    bad = ["{broken", {"messages": chat("only a question")}, {"messages": chat("long", "word " * 300)}]
    path = write_jsonl(tmp_path / "a.jsonl", rows_of(10) + bad)
    learnt = prepare.write(tmp_path, tokenizer, options(path))
    prepared = prepare.load(tmp_path)
    assert learnt["rows"] == learnt["documents"] + learnt["held_out_rows"] + sum(learnt["rejected"].values())
    assert learnt["rejected"] == {"broken JSON": 1, "no assistant turn": 1}
    assert learnt["cut_to_max_length"] == 1 and max(prepared.lengths) == 128
    assert len(prepared) == learnt["documents"] and len(prepared.heldout) == 2
    rejects = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert {(r["line"], r["reason"]) for r in rejects} == {(11, "broken JSON"), (12, "no assistant turn")}
    assert tokenizer.eos_token_id in prepared.vocab
    trained = {tokenizer.decode(prepared.document(i)[1].tolist()) for i in range(len(prepared))}
    for row in prepared.heldout:
        assert not any(text.startswith(tokenizer.decode(row["input_ids"])) for text in trained)


def test_prepare_fails_on_request_and_on_nothing_left(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", [*rows_of(4), "{broken"])
    with pytest.raises(RunError, match="line 5: broken JSON"):
        prepare.write(tmp_path, tokenizer, options(path, on_reject="fail"))
    path = write_jsonl(tmp_path / "b.jsonl", [{"messages": chat(f"q{i}")} for i in range(4)])
    with pytest.raises(RunError, match=r"none of 4 rows.*no assistant turn"):
        prepare.write(tmp_path, tokenizer, options(path))
    path = write_jsonl(tmp_path / "c.jsonl", rows_of(4))
    with pytest.raises(RunError, match=r"too few to hold out eval\.num_prompts"):
        prepare.write(tmp_path, tokenizer, options(path, num_heldout=4))


def test_held_out_prompts_are_never_trained_on(tmp_path, tokenizer):
    """Another answer to a held-out question is left out too, and what cannot be held out is listed."""
    rows = rows_of(6)
    siblings = [{"messages": chat(row["messages"][0]["content"], "Something else entirely.")} for row in rows]
    path = write_jsonl(tmp_path / "a.jsonl", rows + siblings)
    learnt = prepare.write(tmp_path, tokenizer, options(path))
    assert learnt["heldout_prompts"] == 2 and learnt["held_out_rows"] == 4 and learnt["documents"] == 8
    evaluation = write_jsonl(tmp_path / "e.jsonl", ["{broken", {"messages": chat("word " * 200)}, rows[0], rows[1]])
    learnt = prepare.write(tmp_path, tokenizer, options(path, eval_path=str(evaluation), num_heldout=1))
    assert learnt["rejected"] == {"broken JSON": 1, "held-out prompt longer than data.max_length": 1}
    assert learnt["held_out_rows"] == 2 and learnt["documents"] == 10 and learnt["heldout_prompts"] == 1


def test_templates_that_think_in_the_last_turn_only(tokenizer):
    original = tokenizer.chat_template
    tokenizer.chat_template = (
        "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|eot_id|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    )
    try:
        encoded = encode(tokenizer, chat("a", "the first answer", "c", "the second answer"))
    finally:
        tokenizer.chat_template = original
    text = tokenizer.decode([i for i, m in zip(encoded.input_ids, encoded.loss_mask, strict=True) if m])
    assert text == "the first answer<|eot_id|><think>\n\n</think>\n\nthe second answer<|eot_id|>"


def test_plans_depend_on_the_seed_alone():
    lengths = np.random.default_rng(0).integers(10, 100, 57)
    plan = plan_epoch(lengths, 0, 0, 300, None)
    assert sorted(np.concatenate(plan).tolist()) == list(range(57))
    assert all(lengths[update].sum() <= 300 for update in plan)
    assert [u.tolist() for u in plan] == [u.tolist() for u in plan_epoch(lengths, 0, 0, 300, None)]
    assert np.concatenate(plan).tolist() != np.concatenate(plan_epoch(lengths, 0, 1, 300, None)).tolist()
    assert [len(u) for u in plan_epoch(lengths, 0, 0, 300, 8)] == [8] * 7 + [1]


def test_micro_steps_hold_every_document_once():
    lengths = np.random.default_rng(1).integers(10, 100, 40)
    steps = fill_micro_steps(np.arange(40), lengths, 128)
    assert sorted(i for step in steps for i in step) == list(range(40))
    assert all(sum(lengths[i] for i in step) <= 128 for step in steps)


def test_loader_goes_on_where_it_was(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", rows_of(30))
    prepare.write(tmp_path, tokenizer, options(path))
    prepared = prepare.load(tmp_path)
    t2d, _ = vocab_tensors(prepared.vocab, 2048)

    def loader():
        return Loader(prepared, t2d, serving, 3, 2, None, 128, 1, None, seed=0)

    def take(source, n):
        updates = iter(source)
        return [[batch.input_ids for batch in next(updates).batches] for _ in range(n)]

    whole = loader()
    expected = take(whole, 12)
    assert whole.total_updates == 2 * len(whole.plan(0))
    for consumed in (1, 5, len(whole.plan(0)), 9):
        first, second = loader(), loader()
        take(first, consumed)
        second.state = dict(first.state)
        for got, want in zip(take(second, 12 - consumed), expected[consumed:], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
