"""Suites and protocols: what the target is asked, on small files with the schema of the hub's."""

from collections import Counter
from itertools import product

import pytest
from conftest import ROOT, turns, write_jsonl

from eagle3.benchmark import suites
from eagle3.benchmark.suites import (
    SUITES,
    Question,
    Task,
    draw,
    load_questions,
    parse_suite,
    setup_of,
)
from eagle3.config import Source
from eagle3.data.chat import Chat
from eagle3.data.templates import SYSTEM_PROMPTS
from eagle3.errors import ConfigError, RunError

SAMPLES = ROOT / "tests/data/suites"
SIZES = {"mtbench": 3, "gsm8k": 6, "humaneval": 3, "math500": 3, "ceval": 3}


@pytest.fixture(scope="module")
def chat(tokenizer):
    return Chat(tokenizer)


def sample(name):
    return load_questions(name, str(SAMPLES / f"{name}.jsonl"), ".cache")


def prompt(chat, question, protocol="chat", name="mine", answers=(), trained=None, examples=()):
    """What the target reads for a question under a protocol."""
    task = Task(name, setup_of(protocol, name, None, trained), None, [question], list(examples))
    return task.prompt_ids(question, list(answers), chat)


@pytest.mark.parametrize("name", ["heldout", f"{SAMPLES}/ceval.jsonl"])
def test_a_suite_as_it_is_written(name):
    assert parse_suite(name) == parse_suite(f"{name}:all") == (name, None)
    assert parse_suite(f"{name}:48") == (name, 48)


WRONG = ["heldut:3", "heldout:0", "heldout:x", "heldout:", "", ":", "no.jsonl:3", "run.py:3"]


@pytest.mark.parametrize("spec", WRONG)
def test_a_suite_that_is_none(spec):
    with pytest.raises(ConfigError, match=rf"^benchmark\.suites={spec}[ :][^\n]*$"):
        parse_suite(spec)


@pytest.mark.parametrize("name", SIZES)
def test_every_suite_reads_its_rows(name):
    questions = sample(name)
    assert len(questions) == SIZES[name]
    assert questions[1].id == f"{name}.jsonl:2"
    assert all(q.messages[-1]["role"] == "user" for q in questions)
    assert all(bool(q.later) == (name == "mtbench") for q in questions)
    assert all(bool(q.reference) == (name != "mtbench") for q in questions)


MAX = "    return max((abs(a - b) for a, b in zip(numbers, numbers[1:])), default=0)"
RIGHT = [("gsm8k", "18"), ("math500", r"\boxed{7/8}"), ("ceval", "答案：C")]
RIGHT += [pytest.param("humaneval", MAX, marks=pytest.mark.runs)]


@pytest.mark.parametrize("name, answer", RIGHT)
def test_right_answers_to_the_samples_score(name, answer):
    first, second, *_ = sample(name)
    score = SUITES[name].score
    assert score(answer, first.reference) and not score(answer, second.reference)


def test_the_multiple_choice_shows_its_options():
    text = sample("ceval")[0].messages[0]["content"]
    assert text.startswith("一周有____天。\n") and "\nC. 七\n" in text


BROKEN = ["{", "[]", "{}", '{"question": 3}', '{"prompt": [1, 2]}']
ROWS = list(product([*SIZES, "heldout"], BROKEN))
ROWS += product(["heldout"], ['{"messages": []}', '{"input_ids": [1]}', "3"])


@pytest.mark.parametrize("name, row", ROWS)
def test_a_row_of_something_else_is_named(name, row, tmp_path):
    first = (SAMPLES / f"{'mtbench' if name == 'heldout' else name}.jsonl").read_text()
    path = str(write_jsonl(tmp_path / "mine.jsonl", first.splitlines()[0], row))
    with pytest.raises(RunError, match=rf"mine\.jsonl, line 2: .* suite {name} \([^\n]+\)$"):
        load_questions(name, path, ".cache")


def test_rows_of_ones_own(tmp_path, chat):
    user, assistant, _ = messages = turns("a", "b", "c")
    rows = (
        {"prompt": "one"},
        {"turns": ["one", "two"]},
        {"prompt": ["one", "two"]},
        {"messages": messages},
        {"messages": [user, assistant], "prompt": "not this"},
        {"instruction": "one", "output": "1"},
        {"id": "mine", "input_ids": [4, 5]},
        {"messages": [{"role": "system", "content": "s"}, user, user | {"content": "two"}]},
    )
    path = str(write_jsonl(tmp_path / "mine.jsonl", *rows))
    questions = load_questions(path, None, ".cache")
    assert [questions[i].later for i in (0, 1, 2, 7)] == [[], ["two"], ["two"], ["two"]]
    assert questions[3].messages == messages and questions[7].messages[1:] == [user]
    assert questions[5].messages[0]["content"] == "one"
    assert [questions[i].id for i in (6, 0)] == ["mine", "mine.jsonl:1"]
    assert prompt(chat, questions[4]) == chat.encode_prompt([user]), "its answer is not shown"
    assert prompt(chat, questions[6], trained="be kind") == [4, 5]


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_takes_the_rows_of_eagle(name, tmp_path):
    """Code comes without the tests that would score it."""
    row = {"question_id": 81, "category": "math", "turns": ["one", "two"]}
    rows = row | {"reference": ["It is 1\n#### 1", "2"]}, row, {"turns": "alone"}
    path = str(write_jsonl(tmp_path / "question.jsonl", *rows))
    first, second, third = load_questions(name, path, ".cache")
    assert first.messages == [{"role": "user", "content": "one"}] and first.later == ["two"]
    assert first.reference == (None if name == "humaneval" else "It is 1\n#### 1")
    assert second.reference is None and third.later == []
    assert [question.category for question in (first, second, third)] == ["math", "math", ""]


def test_speed_bench_is_asked_only_with_all_of_its_texts(tmp_path, monkeypatch):
    """Its columns, of a row with its text and of one as the hub has it; and which subset it is."""
    row = {"question_id": "1", "category": "math", "turns": ["one", "two"], "multiturn": True}
    bare = row | {"turns": [f"{suites.PLACEHOLDER} USING SPECDEC_BENCH\n\nNow {{question}}"]}
    path = str(write_jsonl(tmp_path / "test.jsonl", row, bare))
    with pytest.raises(
        RunError, match=r"test\.jsonl, line 2: .* suite speed \(a text .* is missing"
    ):
        load_questions("speed", path, ".cache")
    asked = []
    monkeypatch.setattr(suites, "find_files", lambda source, *_: asked.append(source) or [])
    for name in ("speed", "speed_16k"):
        with pytest.raises(RunError, match="holds no question"):
            load_questions(name, None, ".cache")
    speed = "nvidia/SPEED-Bench"
    assert asked == [Source(speed, subset, "test") for subset in ("qualitative", "throughput_16k")]


def numbered(*categories, reference="1"):
    return [Question(id=str(i), category=c, reference=reference) for i, c in enumerate(categories)]


def ids(questions):
    return [int(question.id) for question in questions]


def test_a_sample_has_as_many_of_each_category_as_can_be():
    questions = numbered(*"a" * 10, *"b" * 10, *"c" * 2)
    counts = {n: Counter(q.category for q in draw(questions, n, 0)) for n in (3, 6, 12)}
    assert counts == {3: Counter("abc"), 6: Counter("aabbcc"), 12: Counter("aaaaabbbbbcc")}
    samples = [ids(draw(questions, 6, seed)) for seed in range(9)]
    assert all(sample == sorted(sample) for sample in samples)
    assert samples[0] == ids(draw(questions, 6, 0))
    assert len({*map(tuple, samples)}) > 5, "another seed, other questions"
    assert {*samples[0]} < {*ids(draw(questions, 9, 0))}
    assert draw(questions, None, 0) == draw(questions, 99, 0) == questions


def test_what_is_shown_is_not_asked():
    task = Task("gsm8k", setup_of("specforge", "gsm8k", None, None), 4)
    task.take(numbered(*"x" * 9), seed=0)
    assert ids(task.examples) == [0, 1, 2, 3, 4] and ids(task.questions) == [5, 6, 7, 8]
    for too_few in (numbered(*"x" * 5), numbered(*"x" * 9, reference=None)):
        with pytest.raises(RunError, match="gsm8k needs 5 solved questions to show, and others"):
            task.take(too_few, seed=0)


def test_an_empty_suite(tmp_path):
    with pytest.raises(RunError, match=r"names gsm8k, but .*mine\.jsonl holds no question"):
        load_questions("gsm8k", str(write_jsonl(tmp_path / "mine.jsonl")), ".cache")


@pytest.mark.parametrize("name, source", [("gsm8k", "openai/gsm8k"), ("ceval", "ceval/ceval-exam")])
def test_what_cannot_be_fetched_names_the_way_out(monkeypatch, tmp_path, name, source):
    def fail(*arguments):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("eagle3.data.sources.download", fail)
    monkeypatch.setattr("datasets.get_dataset_config_names", fail)
    words = rf"{source} .*\(no route to host\).*set \+benchmark\.paths\.{name}="
    with pytest.raises(RunError, match=words):
        load_questions(name, None, str(tmp_path))


def test_all_subsets_of_a_suite_come_one_after_the_other(monkeypatch, tmp_path):
    asked, subsets, find_files = [], ["law", "logic", "physician"], suites.find_files

    def find(source: Source, cache_dir, key):
        asked.append((source.path, source.subset, source.split))
        return find_files(Source(str(SAMPLES / "ceval.jsonl")), cache_dir)

    monkeypatch.setattr("datasets.get_dataset_config_names", lambda path: subsets)
    monkeypatch.setattr(suites, "find_files", find)
    assert len(load_questions("ceval", None, str(tmp_path))) == 3 * SIZES["ceval"]
    assert asked == [("ceval/ceval-exam", name, "val") for name in subsets]


def test_chat_asks_behind_the_system_prompt_of_training(chat):
    question = sample("gsm8k")[0]
    assert prompt(chat, question) == chat.encode_prompt(question.messages)
    system = {"role": "system", "content": "be kind"}
    expected = chat.encode_prompt([system, *question.messages])
    assert prompt(chat, question, trained="be kind") == expected
    setup = setup_of("chat", "gsm8k", "be short", "be kind")
    assert setup.system_prompt == "be short"
    assert (setup.max_new_tokens, setup.shots, setup.stop) == (1024, 0, ())


def test_specforge_completes_a_raw_text_behind_five_solved_questions(chat):
    setup, questions = setup_of("specforge", "gsm8k", None, "ignored"), sample("gsm8k")
    assert (setup.max_new_tokens, setup.shots, setup.stop[0]) == (512, 5, "Question")
    ids = prompt(chat, questions[5], "specforge", "gsm8k", examples=questions[:5])
    text = chat.tokenizer.decode(ids, skip_special_tokens=True)
    assert text.startswith("Question: A baker fills 4 trays")
    assert text.endswith("How many has he now?\nAnswer:")
    assert text.count("Question: ") == 6 and "#### 1,365\n\nQuestion: Noah" in text
    assert "assistant" not in chat.tokenizer.decode(ids)


THROUGH = [("specforge", "mtbench", 2048), ("specforge", "humaneval", 1024)]
THROUGH += [("specforge", "math500", 2048), *(("eagle", name, 1024) for name in SIZES)]


@pytest.mark.parametrize("protocol, name, tokens", THROUGH)
def test_protocols_that_ask_through_the_template(chat, protocol, name, tokens):
    question, system = sample(name)[0], protocol == "eagle" or name == "mtbench"
    first = [{"role": "system", "content": SYSTEM_PROMPTS["llama2"]}] if system else []
    expected = chat.encode_prompt([*first, *question.messages])
    assert prompt(chat, question, protocol, name, trained="ignored") == expected
    setup = setup_of(protocol, name, None, None)
    assert (setup.max_new_tokens, setup.shots) == (tokens, 0)


def test_later_turns_follow_the_answers(chat):
    question = sample("mtbench")[1]
    asked = [
        {"role": "system", "content": SYSTEM_PROMPTS["llama2"]},
        *question.messages,
        {"role": "assistant", "content": "6 m and 12 m."},
        {"role": "user", "content": "And if it is cut into three pieces of 1 : 2 : 3?"},
    ]
    ids = prompt(chat, question, "eagle", "mtbench", answers=[" 6 m and 12 m.\n"])
    assert ids == chat.encode_prompt(asked)
