"""The prepared artefact: every row accounted for, nothing held out trained on, the same for any way
of making it.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from transformers import AutoTokenizer

from eagle3.data import prepare
from eagle3.data.chat import Chat
from eagle3.data.encoder import Preparation
from eagle3.data.sources import Source, find_files
from eagle3.data.vocab import choose_vocab, coverage, vocab_tensors
from eagle3.errors import RunError


def chat_turns(*turns):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def rows_of(n, start=0):
    return [
        {"messages": chat_turns(f"What is {i}?", f"It is the number {i}, and no other.")}
        for i in range(start, start + n)
    ]


def write_jsonl(path, rows):
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
    return path


def options(**changes):
    defaults = {
        "num_samples": None, "max_length": 128, "preformatted": False, "system_prompt": None, "only_last_turn": False,
        "on_reject": "skip", "num_heldout": 2, "vocab_size": 2048, "draft_vocab_size": 256,
    }  # fmt: skip
    return Preparation(**{**defaults, **changes})


def files(path):
    return find_files(Source(str(path)), "")


@pytest.fixture
def prepared_from(tmp_path, tokenizer):
    """A function: rows or sources, changes of the options -> (facts, Prepared, rejects)."""
    made = iter(range(100))

    def make(*given, eval_path=None, num_proc=1, template=None, **changes):
        folder = tmp_path / str(next(made))
        folder.mkdir()
        sources = [
            (g, find_files(g, "")) if isinstance(g, Source) else (Source(str(g)), files(g))
            for g in (
                write_jsonl(folder / "a.jsonl", g) if isinstance(g, list) else g for g in given
            )
        ]
        chosen = tokenizer
        if template is not None:
            chosen = AutoTokenizer.from_pretrained(TINY / "target")
            chosen.chat_template = template
        eval_files = files(eval_path) if eval_path else []
        facts = prepare.write(
            folder, Chat(chosen), options(**changes), sources, eval_files, num_proc
        )
        rejects = [json.loads(line) for line in (folder / "rejects.jsonl").read_text().splitlines()]
        return facts, prepare.load(folder), rejects

    return make


def adds_up(facts):
    gone = facts["held_out_rows"] + facts["left_out_by_weight"] + sum(facts["rejected"].values())
    return facts["rows"] == facts["documents"] + gone


def texts(prepared, tokenizer):
    return [tokenizer.decode(prepared.document(i)[1].tolist()) for i in range(len(prepared))]


def test_vocab_order_and_filling():
    counts = np.array([0, 5, 7, 5, 0, 1, 0, 0])
    assert choose_vocab(counts, 3, set()).tolist() == [1, 2, 3]
    assert choose_vocab(counts, 3, {7}).tolist() == [1, 2, 7]
    assert choose_vocab(counts, 6, {7}).tolist() == [0, 1, 2, 3, 5, 7]
    assert coverage(counts, np.array([1, 2])) == 12 / 18
    t2d, d2t = vocab_tensors(np.array([1, 2, 7]), 8)
    assert t2d.nonzero()[:, 0].tolist() == [1, 2, 7] and d2t.tolist() == [1, 1, 5]


@pytest.mark.parametrize("vocab", [[1, 2, 8], [2, 1], [1, 1], [-1, 2]])
def test_a_vocabulary_of_another_target_is_refused(vocab):
    with pytest.raises(RunError, match="does not belong to this target"):
        vocab_tensors(np.array(vocab), 8)


def test_every_row_is_accounted_for(prepared_from, tokenizer):
    bad = [
        "{broken",
        {"messages": chat_turns("only a question")},
        {"messages": chat_turns("long answers 2", "word " * 300)},
        {"messages": chat_turns("long question " * 100, "short")},
        rows_of(1)[0],
        {"conversations": [{"from": "gpt", "value": "cut"}, *rows_of(1, 90)[0]["messages"]]},
    ]
    facts, prepared, rejects = prepared_from(rows_of(10) + bad)
    assert adds_up(facts) and facts["rows"] == 16
    assert facts["rejected"] == {
        "broken JSON": 1,
        "no assistant turn": 1,
        "no assistant token within data.max_length": 1,
        "duplicate row": 1,
    }
    assert {(r["line"], r["reason"]) for r in rejects} == {
        (11, "broken JSON"), (12, "no assistant turn"), (14, "no assistant token within data.max_length"),
        (15, "duplicate row"),
    }  # fmt: skip
    assert facts["repaired"] == {"leading assistant turn dropped": 1}
    assert facts["cut_to_max_length"] == 1 and max(prepared.lengths) == 128
    assert len(prepared) == facts["documents"] and len(prepared.heldout) == 2
    assert tokenizer.eos_token_id in prepared.vocab
    assert facts["tokens"] == prepared.lengths.sum()
    masks = [prepared.document(i)[2] for i in range(len(prepared))]
    assert [int(mask.sum()) for mask in masks] == prepared.supervised.tolist()
    teachers = [int((mask | mask.roll(1) & (torch.arange(len(mask)) > 0)).sum()) for mask in masks]
    assert teachers == prepared.teachers.tolist()


def test_the_vocabulary_counts_what_is_trained_on(prepared_from, tokenizer):
    """Duplicates and held-out rows were counted while tokenising and are taken out again."""
    rows = (
        rows_of(10)
        + rows_of(5)
        + [{"messages": chat_turns("What is 3?", "Zebra zebra zebra zebra.")}]
    )
    _, prepared, _ = prepared_from(rows, draft_vocab_size=24, num_heldout=6)
    counts = np.zeros(2048, np.int64)
    for i in range(len(prepared)):
        _, ids, mask = prepared.document(i)
        counts += np.bincount(ids[mask].numpy(), minlength=2048)
    assert prepared.vocab.tolist() == choose_vocab(counts, 24, {tokenizer.eos_token_id}).tolist()


@pytest.mark.parametrize("num_proc", [2, 3])
def test_the_artefact_does_not_depend_on_processes(prepared_from, monkeypatch, num_proc):
    monkeypatch.setattr(prepare, "CHUNK_ROWS", 4)
    rows = [row if i % 7 else "{broken" for i, row in enumerate(rows_of(40) + rows_of(9))]
    one, many = prepared_from(rows), prepared_from(rows, num_proc=num_proc)
    assert one[0] == many[0] and [r | {"file": ""} for r in one[2]] == [
        r | {"file": ""} for r in many[2]
    ]
    assert np.array_equal(one[1].input_ids, many[1].input_ids) and np.array_equal(
        one[1].index, many[1].index
    )
    assert np.array_equal(one[1].vocab, many[1].vocab)
    assert [p["hash"] for p in one[1].heldout] == [p["hash"] for p in many[1].heldout]


def test_held_out_prompts_are_never_trained_on(prepared_from, tmp_path, tokenizer):
    """Whatever opens with a held-out question is left out: other answers, and longer conversations."""
    rows = rows_of(6)
    siblings = [
        {"messages": chat_turns(row["messages"][0]["content"], "Something else entirely.")}
        for row in rows
    ]
    longer = [
        {"messages": [*row["messages"], *chat_turns("Sure?", "Yes, very sure.")]} for row in rows
    ]
    facts, prepared, _ = prepared_from(rows + siblings + longer)
    assert (
        facts["heldout_prompts"] == 2
        and facts["held_out_rows"] == 6
        and facts["documents"] == 12
        and adds_up(facts)
    )
    for prompt in prepared.heldout:
        asked = tokenizer.decode(prompt["input_ids"])
        assert not any(text.startswith(asked) for text in texts(prepared, tokenizer))
    spaced = [
        {"messages": chat_turns(f" {row['messages'][0]['content']}\n", "Again.")} for row in rows
    ]
    told = [
        {"messages": [{"role": "system", "content": "Be brief."}, *row["messages"]]} for row in rows
    ]
    facts, *_ = prepared_from(rows + spaced + told)
    assert facts["held_out_rows"] == 6 and facts["documents"] == 12, (
        "spaces and system messages do not tell them apart"
    )
    evaluation = write_jsonl(
        tmp_path / "e.jsonl", ["{broken", {"messages": chat_turns("w " * 200)}, rows[0], rows[1]]
    )
    facts, prepared, rejects = prepared_from(rows + siblings, eval_path=evaluation, num_heldout=1)
    assert facts["heldout_rejected"] == {
        "broken JSON": 1,
        "held-out prompt longer than data.max_length": 1,
    }
    assert {r["line"] for r in rejects} == {1, 2}
    assert (
        facts["held_out_rows"] == 2
        and facts["documents"] == 10
        and facts["heldout_prompts"] == 1
        and adds_up(facts)
    )


def test_held_out_prompts_depend_on_the_conversations_alone(prepared_from):
    rows = rows_of(20)
    first, second = (
        prepared_from(rows, num_heldout=5)[1],
        prepared_from(rows[::-1], num_heldout=5)[1],
    )
    assert {p["hash"] for p in first.heldout} == {p["hash"] for p in second.heldout}


def test_a_mix_passes_by_weight(prepared_from, tmp_path, tokenizer):
    one, two = (
        write_jsonl(tmp_path / "one.jsonl", rows_of(60)),
        write_jsonl(tmp_path / "two.jsonl", rows_of(70, 50)),
    )
    facts, prepared, _ = prepared_from(Source(str(one), weight=0.5), Source(str(two), weight=2.0))
    assert adds_up(facts) and facts["rejected"]["duplicate row"] <= 10
    counts = Counter(texts(prepared, tokenizer))
    seconds = sum(count == 2 for count in counts.values())
    assert set(counts.values()) == {1, 2} and 55 <= seconds <= 70
    assert 15 < facts["left_out_by_weight"] < 45 and facts["rows"] == 130
    assert facts["documents_per_epoch"] == len(prepared) == facts["documents"] + seconds
    limited, *_ = prepared_from(Source(str(one)), Source(str(two)), num_samples=12)
    assert limited["rows"] == 24


def test_prepare_fails_on_request_and_on_nothing_left(prepared_from):
    with pytest.raises(RunError, match=r"line 5: broken JSON \(data\.on_reject=skip would"):
        prepared_from([*rows_of(4), "{broken"], on_reject="fail")
    with pytest.raises(
        RunError, match=r"none of 4 rows can be trained on \(4 x no assistant turn\)"
    ):
        prepared_from([{"messages": chat_turns(f"q{i}")} for i in range(4)])
    with pytest.raises(RunError, match=r"too few to hold out eval\.num_prompts=4"):
        prepared_from(rows_of(4), num_heldout=4)
    with pytest.raises(RunError, match="does not belong to this target"):
        prepared_from(rows_of(4), vocab_size=300)
    with pytest.raises(RunError, match=r"line 5: duplicate row"):
        prepared_from([*rows_of(4), rows_of(1)[0]], on_reject="fail")
    with pytest.raises(RunError, match="none of 0 rows"):
        prepared_from([])


def test_nothing_but_held_out_prompts_is_no_training_data(prepared_from, tmp_path):
    evaluation = write_jsonl(tmp_path / "e.jsonl", rows_of(5))
    with pytest.raises(RunError, match="every conversation is held out"):
        prepared_from(rows_of(5), eval_path=evaluation, num_heldout=9)


def test_rows_that_only_refuse_a_prompt_are_trained_on(prepared_from):
    """Whether a row is asked for its prompt depends on how far the workers are; what is kept must
    not.
    """
    template = (
        "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>{{ m.content }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}{{ raise_exception('no') if '7' in messages[0].content }}"
        "<|start_header_id|>assistant<|end_header_id|>{% endif %}"
    )
    facts, *_ = prepared_from(rows_of(30), template=template)
    assert facts["rejected"] == {} and facts["heldout_prompts"] == 2


def test_a_template_that_does_not_fit_ends_with_an_example(prepared_from):
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content | replace('It', 'THAT') }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    ok = [{"messages": chat_turns(f"q{i}", f"some answer {i}")} for i in range(150)]
    with pytest.raises(
        RunError, match=r"not found in 2 of 152 rows.*data\.chat_template(.|\n)*THAT is the number"
    ):
        prepared_from(ok + rows_of(2), template=template)
    facts, *_ = prepared_from(ok + rows_of(1), template=template)
    assert facts["rejected"] == {"assistant turn not found in the rendering": 1}


def test_preformatted_rows(prepared_from, tokenizer):
    chat = Chat(tokenizer)
    rendered = [{"text": chat.render(row["messages"])[0]} for row in rows_of(8)]
    plain, formatted = prepared_from(rows_of(8)), prepared_from(rendered, preformatted=True)
    assert set(texts(formatted[1], tokenizer)) <= {row["text"] for row in rendered}
    assert (
        formatted[0]["documents"] == plain[0]["documents"] == 6
        and formatted[0]["heldout_prompts"] == 2
    )
    assert formatted[0]["supervised_tokens"] / formatted[0]["tokens"] == pytest.approx(
        plain[0]["supervised_tokens"] / plain[0]["tokens"], rel=0.05
    )


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_prepare import *
prepare.CHUNK_ROWS, prepare.PART_CHUNKS = 4, 2
append = prepare.Writer.append
def slowly(self, chunk):
    append(self, chunk)
    print(self.state.rows, flush=True)
    time.sleep(0.02)
prepare.Writer.append = slowly
path, chat = Path({path!r}), Chat(AutoTokenizer.from_pretrained(TINY / "target"))
prepare.write(Path({folder!r}), chat, options(), [(Source(str(path)), files(path))], [], 2)
"""


def test_killed_at_any_moment_it_goes_on(tmp_path, tokenizer, monkeypatch):
    """SIGKILL in the middle, then again: the artefact is that of a call nobody interrupted, and no
    process stays.
    """
    rows = [row if i % 9 else "{broken" for i, row in enumerate(rows_of(90) + rows_of(20))]
    path, folder, whole = (
        write_jsonl(tmp_path / "a.jsonl", rows),
        tmp_path / "killed",
        tmp_path / "whole",
    )
    folder.mkdir(), whole.mkdir()
    script = KILLED.format(tests=str(ROOT / "tests"), path=str(path), folder=str(folder))
    for stop_at in (20, 60):
        process = subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        children = []
        for line in process.stdout:
            children = children or children_of(process.pid)
            if int(line) >= stop_at:
                process.send_signal(signal.SIGKILL)
                break
        process.wait()
        assert (folder / "state.npz").exists() and len(children) == 2
        deadline = time.time() + 10
        while (
            any(os.path.exists(f"/proc/{child}") for child in children) and time.time() < deadline
        ):
            time.sleep(0.1)
        assert not any(os.path.exists(f"/proc/{child}") for child in children)
    read = []
    raw_rows = prepare.raw_rows
    monkeypatch.setattr(prepare, "CHUNK_ROWS", 4)
    encode = prepare.Encoder.__call__
    monkeypatch.setattr(
        prepare.Encoder,
        "__call__",
        lambda self, rows, below: read.extend(rows) or encode(self, rows, below),
    )
    arguments = (Chat(tokenizer), options(), [(Source(str(path)), files(path))], [])
    resumed = prepare.write(folder, *arguments)
    assert len(read) <= 110 - 56, "finished parts are not tokenised again"
    assert resumed == prepare.write(whole, *arguments) and raw_rows is prepare.raw_rows
    for name in (
        "input_ids.bin",
        "loss_mask.bin",
        "index.npy",
        "vocab.npy",
        "heldout.jsonl",
        "rejects.jsonl",
    ):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in whole.iterdir())


def children_of(pid):
    found = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True
    ).stdout.split()
    return [int(child) for child in found]


def test_a_worker_that_dies_is_named(tmp_path, tokenizer, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", rows_of(40))
    monkeypatch.setattr(prepare, "CHUNK_ROWS", 4)
    monkeypatch.setattr(prepare.Encoder, "__call__", lambda self, rows, below: os._exit(9))
    with pytest.raises(RunError, match=r"process of prepare was killed.*lower data\.num_proc=2"):
        prepare.write(
            tmp_path, Chat(tokenizer), options(), [(Source(str(path)), files(path))], [], 2
        )
