"""The prepared artefact: every row accounted for, nothing held out trained on, always the same."""

import copy
import multiprocessing
import os
import signal
import subprocess
import time
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import read_jsonl, section, turns, write_jsonl

from eagle3.data import encoder, prepare
from eagle3.data.chat import Chat
from eagle3.data.sources import Source, find_files
from eagle3.data.vocab import choose_vocab, vocab_tensors
from eagle3.errors import RunError

TEMPLATE = (
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>{{ m.content }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant"
    "<|end_header_id|>{% endif %}"
)


def said(*words):
    return {"messages": turns(*words)}


def rows_of(n, start=0):
    numbers = range(start, start + n)
    return [said(f"What is {i}?", f"It is the number {i}, and no other.") for i in numbers]


@pytest.fixture
def prepared_from(tmp_path, tokenizer):
    """A function: rows or sources, and changes of what is asked for -> (Prepared, rejects)."""
    made = iter(range(100))

    def make(*given, num_heldout=2, vocab_size=2048, draft=256, template=None, **changes):
        folder = tmp_path / str(next(made))
        folder.mkdir()
        sources = []
        for source in given:
            if isinstance(source, list):
                source = Source(str(write_jsonl(folder / "a.jsonl", *source)))
            sources.append((source, find_files(source, "")))
        chosen = copy.copy(tokenizer)
        chosen.chat_template = template or tokenizer.chat_template
        data = section("data", **{"max_length": 128, "num_proc": 1, **changes})
        asked = (data, num_heldout, vocab_size, draft, sources, Chat(chosen), str(folder))
        assert prepare.find_prepared(*asked) is None
        prepared = prepare.prepare(*asked, write=True)
        assert prepare.find_prepared(*asked).path == prepared.path
        facts = prepared.facts
        gone = facts["held_out_rows"] + facts["left_out_by_weight"]
        assert facts["rows"] == facts["documents"] + gone + sum(facts["rejected"].values())
        return prepared, read_jsonl(prepared.path / "rejects.jsonl")

    return make


def texts(prepared, tokenizer):
    return [tokenizer.decode(prepared.document(i).input_ids.tolist()) for i in range(len(prepared))]


def test_vocab_order_and_filling():
    counts = np.array([0, 5, 7, 5, 0, 1, 0, 0])
    assert choose_vocab(counts, 3, set()).tolist() == [1, 2, 3]
    assert choose_vocab(counts, 3, {7}).tolist() == [1, 2, 7]
    assert choose_vocab(counts, 6, {7}).tolist() == [0, 1, 2, 3, 5, 7]
    t2d, d2t = vocab_tensors(np.array([1, 2, 7]), 8)
    assert t2d.nonzero()[:, 0].tolist() == [1, 2, 7] and d2t.tolist() == [1, 1, 5]

    for vocab in ([1, 2, 8], [2, 1], [1, 1], [-1, 2]):
        with pytest.raises(RunError, match="does not belong to this target"):
            vocab_tensors(np.array(vocab), 8)


def test_every_row_is_accounted_for(prepared_from, tokenizer):
    bad = [
        "{broken",
        said("only a question"),
        said("long answers 2", "word " * 300),
        said("long question " * 100, "short"),
        rows_of(1)[0],
        {"conversations": [{"from": "gpt", "value": "cut"}, *rows_of(1, 90)[0]["messages"]]},
    ]
    prepared, rejects = prepared_from(rows_of(10) + bad)
    facts = prepared.facts
    assert facts["rows"] == 16
    reasons = {11: "broken JSON", 12: "prompt without an answer", 15: "duplicate row"}
    reasons[14] = "no assistant token within data.max_length"
    assert {r["line"]: r["reason"] for r in rejects} == reasons
    assert facts["rejected"] == Counter(r["reason"] for r in rejects)
    assert facts["repaired"] == {"leading assistant turn dropped": 1}
    assert facts["cut_to_max_length"] == 1 and max(prepared.lengths) == 128
    assert len(prepared) == facts["documents"] and len(prepared.heldout) == 2
    assert tokenizer.eos_token_id in prepared.vocab and prepared.digest == facts["digest"]
    assert facts["tokens"] == prepared.lengths.sum()
    masks = [prepared.document(i).loss_mask for i in range(len(prepared))]
    assert [int(mask.sum()) for mask in masks] == prepared.supervised.tolist()
    teachers = [int((mask | mask.roll(1) & (torch.arange(len(mask)) > 0)).sum()) for mask in masks]
    assert teachers == prepared.teachers.tolist()


def test_the_vocabulary_counts_what_is_trained_on(prepared_from, tokenizer):
    """Neither duplicates nor held-out rows."""
    zebra = said("What is 3?", "Zebra zebra zebra zebra.")
    prepared, _ = prepared_from([*rows_of(10), *rows_of(5), zebra], draft=24, num_heldout=6)
    counts = np.zeros(2048, np.int64)
    for i in range(len(prepared)):
        document = prepared.document(i)
        ids = document.input_ids[document.loss_mask]
        counts += np.bincount(ids.numpy(), minlength=2048)
    assert prepared.vocab.tolist() == choose_vocab(counts, 24, {tokenizer.eos_token_id}).tolist()


@pytest.mark.runs
def test_the_artefact_does_not_depend_on_processes(prepared_from, monkeypatch):
    monkeypatch.setattr(encoder, "CHUNK_ROWS", 4)
    rows = [row if i % 7 else "{broken" for i, row in enumerate(rows_of(40) + rows_of(9))]
    (one, _), (many, _) = prepared_from(rows), prepared_from(rows, num_proc=2)
    assert one.facts == many.facts
    for name in ("input_ids.bin", "loss_mask.bin", "index.npy", "vocab.npy", "heldout.jsonl"):
        assert (one.path / name).read_bytes() == (many.path / name).read_bytes()


def test_held_out_prompts_are_never_trained_on(prepared_from, tmp_path, tokenizer):
    """Whatever opens with a held-out question is left out: other answers, longer conversations."""
    rows = rows_of(6)
    asked = [row["messages"][0]["content"] for row in rows]
    siblings = [said(question, "Something else.") for question in asked]
    longer = [{"messages": row["messages"] + turns("Sure?", "Yes, sure.")} for row in rows]
    prepared, _ = prepared_from(rows + siblings + longer)
    facts = prepared.facts
    assert (facts["heldout_prompts"], facts["held_out_rows"], facts["documents"]) == (2, 6, 12)
    for prompt in prepared.heldout:
        text = tokenizer.decode(prompt["input_ids"])
        assert not any(trained.startswith(text) for trained in texts(prepared, tokenizer))
    # spaces, system messages and another order make no other question
    spaced = [said(f" {question}\n", "Again.") for question in asked]
    system = {"role": "system", "content": "Be brief."}
    instructed = [{"messages": [system, *row["messages"]]} for row in rows]
    again, _ = prepared_from((rows + spaced + instructed)[::-1])
    assert again.facts["held_out_rows"] == 6 and again.facts["documents"] == 12
    assert {p["hash"] for p in again.heldout} == {p["hash"] for p in prepared.heldout}


def test_held_out_prompts_of_a_file(prepared_from, tmp_path):
    rows = rows_of(6)
    given = ["{broken", said("w " * 200), *rows]
    path = str(write_jsonl(tmp_path / "e.jsonl", *given))
    prepared, rejects = prepared_from(rows_of(9), eval_path=path, num_heldout=1)
    too_long = "held-out prompt longer than data.max_length"
    assert prepared.facts["heldout_rejected"] == {"broken JSON": 1, too_long: 1}
    assert {r["line"] for r in rejects} == {1, 2}
    assert prepared.facts["held_out_rows"] == prepared.facts["heldout_prompts"] == 1
    with pytest.raises(RunError, match="every conversation is held out"):
        prepared_from(rows, eval_path=path, num_heldout=9)


def test_of_questions_in_turn_the_first_is_held_out(prepared_from, tmp_path, tokenizer):
    rows = rows_of(9)
    question = rows[4]["messages"][:1]
    turns = [question[0]["content"], "And then?"]
    path = write_jsonl(tmp_path / "e.jsonl", {"turns": turns})
    prepared, _ = prepared_from(rows, eval_path=str(path))
    asked = [prompt["input_ids"] for prompt in prepared.heldout]
    assert asked == [Chat(tokenizer).encode_prompt(question)]
    assert prepared.facts["held_out_rows"] == 1


def test_a_mix_passes_by_weight(prepared_from, tmp_path, tokenizer):
    one = str(write_jsonl(tmp_path / "one.jsonl", *rows_of(60)))
    two = str(write_jsonl(tmp_path / "two.jsonl", *rows_of(70, 50)))
    prepared, _ = prepared_from(Source(one, weight=0.5), Source(two, weight=2.0))
    facts, counts = prepared.facts, Counter(texts(prepared, tokenizer))
    seconds = sum(count == 2 for count in counts.values())
    assert set(counts.values()) == {1, 2} and 55 <= seconds <= 70
    assert facts["rejected"]["duplicate row"] <= 10 and facts["rows"] == 130
    assert 15 < facts["left_out_by_weight"] < 45
    assert facts["documents_per_epoch"] == len(prepared) == facts["documents"] + seconds
    limited, _ = prepared_from(Source(one), Source(two), num_samples=12)
    assert limited.facts["rows"] == 24


FAIL = {"on_reject": "fail"}
ENDS = [
    ([*rows_of(4), "{broken"], FAIL, r"line 5: broken JSON \(data\.on_reject=skip"),
    ([*rows_of(4), rows_of(1)[0]], FAIL, "line 5: duplicate row"),
    ([said("q")] * 2, {}, r"none of 2 rows .*\(2 x prompt without an answer; .*add regenerate"),
    ([{"id": 1}], {}, r"\(1 x no messages; the first row has id; missing are messages or conv"),
    ([], {}, "none of 0 rows"),
    (rows_of(4), {"num_heldout": 4}, r"too few to hold out eval\.num_prompts=4"),
    (rows_of(4), {"vocab_size": 300}, "does not belong to this target"),
]


@pytest.mark.parametrize("rows, changes, sentence", ENDS)
def test_what_ends_the_stage(prepared_from, rows, changes, sentence):
    with pytest.raises(RunError, match=sentence):
        prepared_from(rows, **changes)


def test_rows_that_only_refuse_a_prompt_are_trained_on(prepared_from):
    """Which rows are asked for their prompts depends on the workers; what is kept must not."""
    refusing = "{{ raise_exception('no') if add_generation_prompt and '7' in messages[0].content }}"
    facts = prepared_from(rows_of(30), template=refusing + TEMPLATE)[0].facts
    assert facts["rejected"] == {} and facts["heldout_prompts"] == 2


def test_a_template_that_does_not_fit_ends_with_an_example(prepared_from):
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content | replace('It', 'THAT') }}<|eot_id|>"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    ok = [said(f"q{i}", f"some answer {i}") for i in range(150)]
    sentence = r"not found in 2 of 152 rows.*data\.chat_template(.|\n)*THAT is the number"
    with pytest.raises(RunError, match=sentence):
        prepared_from(ok + rows_of(2), template=template)
    facts = prepared_from(ok + rows_of(1), template=template)[0].facts
    assert facts["rejected"] == {"assistant turn not found in the rendering": 1}


def test_preformatted_rows(prepared_from, tokenizer):
    chat = Chat(tokenizer)
    rendered = [{"text": chat.render(row["messages"])[0]} for row in rows_of(8)]
    plain, _ = prepared_from(rows_of(8))
    formatted, _ = prepared_from(rendered, preformatted=True)
    assert set(texts(formatted, tokenizer)) <= {row["text"] for row in rendered}
    assert formatted.facts["documents"] == plain.facts["documents"] == 6
    shares = [p.facts["supervised_tokens"] / p.facts["tokens"] for p in (plain, formatted)]
    assert shares[0] == pytest.approx(shares[1], rel=0.05)


@pytest.mark.runs
def test_killed_at_any_moment_it_goes_on(tmp_path, tokenizer, monkeypatch):
    """SIGKILL in the middle, then again: the artefact is that of a call nobody interrupted."""
    rows = [row if i % 9 else "{broken" for i, row in enumerate(rows_of(90) + rows_of(20))]
    source = Source(str(write_jsonl(tmp_path / "a.jsonl", *rows)))
    asked = (2, 2048, 256, [(source, find_files(source, ""))], Chat(tokenizer))
    monkeypatch.setattr(encoder, "CHUNK_ROWS", 4)
    monkeypatch.setattr(prepare, "PART_CHUNKS", 2)
    append = prepare.Writer.append

    def prepare_until(stop_at, pipe):
        def append_and_wait(self, chunk):
            append(self, chunk)
            if self.rows >= stop_at:
                pipe.send(self.rows)
                time.sleep(600)

        prepare.Writer.append = append_and_wait
        two = section("data", max_length=128, num_proc=2)
        prepare.prepare(two, *asked, str(tmp_path / "killed"), True)

    children = []
    for stop_at in (20, 60):
        receiver, sender = multiprocessing.Pipe()
        context = multiprocessing.get_context("fork")
        process = context.Process(target=prepare_until, args=(stop_at, sender))
        process.start()
        assert receiver.recv() == stop_at
        children += children_of(process.pid)
        process.kill()
        process.join()
    assert len(children) == 4
    while any(os.path.exists(f"/proc/{child}") for child in children):
        time.sleep(0.1)
    read, encode = [], encoder.Encoder.__getitem__

    def noting(self, asked):
        read.extend(asked[0])
        return encode(self, asked)

    monkeypatch.setattr(encoder.Encoder, "__getitem__", noting)
    one = section("data", max_length=128, num_proc=1)
    resumed = prepare.prepare(one, *asked, str(tmp_path / "killed"), True)
    assert len(read) <= 110 - 56, "finished parts are not tokenised again"
    whole = prepare.prepare(one, *asked, str(tmp_path / "whole"), True)
    assert resumed.facts == whole.facts
    kept, wanted = ({p.name: p.read_bytes() for p in x.path.iterdir()} for x in (resumed, whole))
    assert kept == wanted and len(wanted) == 7


def children_of(pid):
    command = ["ps", "-o", "pid=", "--ppid", str(pid)]
    return [int(pid) for pid in subprocess.run(command, capture_output=True).stdout.split()]


@pytest.mark.runs
def test_a_worker_that_dies_is_named(prepared_from, monkeypatch):
    monkeypatch.setattr(encoder, "CHUNK_ROWS", 4)
    monkeypatch.setattr(encoder.Encoder, "__getitem__", lambda self, asked: os._exit(9))
    with pytest.raises(RunError, match=r"process of prepare was killed.*lower data\.num_proc=2"):
        prepared_from(rows_of(40), num_proc=2)


@pytest.mark.runs
def test_a_worker_that_stands_still_is_noticed_and_ended(prepared_from, monkeypatch):
    monkeypatch.setattr(encoder, "STILL_SECONDS", 1)
    stop = lambda self, asked: os.kill(os.getpid(), signal.SIGSTOP)  # noqa: E731
    monkeypatch.setattr(encoder.Encoder, "__getitem__", stop)
    with pytest.raises(RunError, match=r"process of prepare was stopped, or hangs.*data\.num_proc"):
        prepared_from(rows_of(10), num_proc=2)
    for worker in multiprocessing.active_children():
        worker.join()  # that of a stopped one would wait for ever


def test_held_out_rows_that_cannot_be_asked_say_why(prepared_from, tmp_path):
    refusing = "{{ raise_exception('no x') if messages[0].content == 'x' }}"
    rows = [said("x", "answer")] * 2 + [{"messages": []}]
    held = str(write_jsonl(tmp_path / "held.jsonl", *rows))
    why = r"no row can be asked \(2 x refused by the chat template: no x; 1 x no messages; the"
    with pytest.raises(RunError, match=why):
        prepared_from(rows_of(8), template=refusing + TEMPLATE, eval_path=held)
