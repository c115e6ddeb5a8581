"""Suites and protocols: what the target is asked, on small files of the schema that the hub's data
sets have.
"""

import json

import pytest
from conftest import ROOT, TINY

from eagle3.benchmark import suites
from eagle3.benchmark.protocols import PROTOCOLS, prompt_ids
from eagle3.benchmark.suites import SUITES, Question, load, parse
from eagle3.config import Source
from eagle3.data.chat import SYSTEM_PROMPTS, Chat
from eagle3.errors import ConfigError, RunError

SAMPLES = ROOT / "tests/data/suites"
SIZES = {"mtbench": 3, "gsm8k": 6, "humaneval": 3, "math500": 3, "ceval": 3}


@pytest.fixture(scope="module")
def chat(tokenizer):
    return Chat(tokenizer)


def sample(name, count=None):
    return load(name, count, str(SAMPLES / f"{name}.jsonl"), ".cache")


def written(folder, *rows, name="mine.jsonl"):
    path = folder / name
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
    return str(path)


@pytest.mark.parametrize(
    "spec, parsed",
    [
        ("heldout:48", ("heldout", 48)),
        ("heldout", ("heldout", None)),
        ("ceval:3", ("ceval", 3)),
        (f"{SAMPLES}/ceval.jsonl:2", (f"{SAMPLES}/ceval.jsonl", 2)),
        (f"{SAMPLES}/ceval.jsonl", (f"{SAMPLES}/ceval.jsonl", None)),
    ],
)
def test_parse(spec, parsed):
    assert parse(spec) == parsed


@pytest.mark.parametrize(
    "spec",
    [
        "heldut:3",
        "heldout:0",
        "heldout:x",
        "heldout:",
        "heldout:-1",
        "",
        ":",
        "no.jsonl:3",
        "no.jsonl",
        "run.py:3",
    ],
)
def test_parse_names_what_is_wrong(spec):
    with pytest.raises(ConfigError, match=rf"^benchmark\.suites={spec}[ :][^\n]*$"):
        parse(spec)
    with pytest.raises(ConfigError, match="did you mean gsm8k"):
        parse("gms8k:3")


@pytest.mark.parametrize("name", SIZES)
def test_every_suite_reads_its_rows(name):
    questions = sample(name)
    assert len(questions) == SIZES[name] and len(sample(name, 2)) == 2
    assert questions[1].id == f"{name}.jsonl:2"
    assert all(q.messages[-1]["role"] == "user" for q in questions)
    assert all(bool(q.later) == (name == "mtbench") for q in questions)
    assert (
        (SUITES[name].score is not None)
        == (name != "mtbench")
        == all(q.reference for q in questions)
    )


@pytest.mark.parametrize(
    "name, answer",
    [
        ("gsm8k", "18"),
        ("math500", r"\boxed{7/8}"),
        ("ceval", "答案：C"),
        (
            "humaneval",
            "    return max((abs(a - b) for a, b in zip(numbers, numbers[1:])), default=0)",
        ),
    ],
)
def test_right_answers_to_the_samples_score(name, answer):
    first, second, *_ = sample(name)
    assert SUITES[name].score(answer, first.reference) and not SUITES[name].score(
        answer, second.reference
    )


def test_the_multiple_choice_shows_its_options():
    text = sample("ceval", 1)[0].messages[0]["content"]
    assert text.startswith("一周有____天。\n") and "\nC. 七\n" in text


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize(
    "row", ["{", "[]", "{}", '{"question": 3, "answer": "4"}', '{"prompt": [1, 2], "turns": "a"}']
)
def test_a_row_of_something_else_is_named(name, row, tmp_path):
    first = (SAMPLES / f"{name}.jsonl").read_text().splitlines()[0]
    with pytest.raises(
        RunError, match=rf"mine\.jsonl, line 2: not a question of the suite {name} \([^\n]+\)$"
    ):
        load(name, None, written(tmp_path, first, row), ".cache")


def test_rows_of_ones_own(tmp_path, chat):
    said = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    rows = [
        {"prompt": "one"},
        {"turns": ["one", "two"]},
        {"prompt": ["one", "two"]},
        {"messages": said},
        {"messages": said[:2], "prompt": "not this"},
        {"instruction": "one", "output": "1"},
        {"id": "mine", "input_ids": [4, 5]},
    ]
    path = written(tmp_path, *rows)
    questions = load(path, None, None, ".cache")
    assert [q.later for q in questions[:3]] == [[], ["two"], ["two"]]
    assert questions[3].messages == said and questions[5].messages[0]["content"] == "one"
    assert (questions[6].id, questions[6].input_ids, questions[0].id) == (
        "mine",
        [4, 5],
        "mine.jsonl:1",
    )
    manner = PROTOCOLS["chat"]("mine", None, None)
    assert prompt_ids(questions[4], [], manner, [], chat) == chat.encode_prompt(said[:1]), (
        "its answer is not shown"
    )
    assert prompt_ids(questions[6], [], manner, [], chat) == [4, 5]


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"messages": []}', '{"input_ids": [1]}', "3"])
def test_a_broken_row_of_ones_own_is_named(tmp_path, line):
    with pytest.raises(RunError, match=r"mine\.jsonl, line 2"):
        load("heldout", None, written(tmp_path, {"prompt": "q"}, line), ".cache")


def test_an_empty_suite(tmp_path):
    with pytest.raises(RunError, match=r"names gsm8k, but .*mine\.jsonl holds no question"):
        load("gsm8k", 3, written(tmp_path), ".cache")


def test_what_cannot_be_fetched_names_the_way_out(monkeypatch, tmp_path):
    def fail(*arguments):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("eagle3.data.sources.download", fail)
    with pytest.raises(
        RunError,
        match=r"gsm8k: openai/gsm8k .*\(no route to host\).*set \+benchmark\.paths\.gsm8k=",
    ):
        load("gsm8k", 3, None, str(tmp_path))
    monkeypatch.setattr("datasets.get_dataset_config_names", fail)
    with pytest.raises(RunError, match=r"ceval: ceval/ceval-exam .*\(no route to host\)"):
        load("ceval", 3, None, str(tmp_path))


def test_all_subsets_of_a_suite_come_one_after_the_other(monkeypatch, tmp_path):
    asked = []

    def find(source: Source, cache_dir, key):
        asked.append((source.path, source.subset, source.split))
        return suites.find_files(Source(str(SAMPLES / "ceval.jsonl")), cache_dir)

    monkeypatch.setattr(
        "datasets.get_dataset_config_names", lambda path: ["law", "logic", "physician"]
    )
    monkeypatch.setattr(
        suites, "files_of", lambda name, source, cache_dir: find(source, cache_dir, name)
    )
    assert len(load("ceval", 5, None, str(tmp_path))) == 5
    assert asked == [("ceval/ceval-exam", "law", "val"), ("ceval/ceval-exam", "logic", "val")], (
        "no more than needed"
    )


def test_chat_asks_behind_the_system_prompt_of_training(chat):
    (question,) = sample("gsm8k", 1)
    plain = chat.encode_prompt(question.messages)
    for given, trained, system in (
        (None, None, None),
        (None, "be kind", "be kind"),
        ("be short", "be kind", "be short"),
    ):
        manner = PROTOCOLS["chat"]("gsm8k", given, trained)
        expected = (
            chat.encode_prompt([{"role": "system", "content": system}, *question.messages])
            if system
            else plain
        )
        assert prompt_ids(question, [], manner, [], chat) == expected
    assert (manner.max_new_tokens, manner.shots, manner.stop) == (1024, 0, ())


def test_specforge_completes_a_raw_text_behind_five_solved_questions(chat):
    manner = PROTOCOLS["specforge"]("gsm8k", None, "ignored")
    questions = sample("gsm8k")
    assert (manner.max_new_tokens, manner.shots, manner.stop[0]) == (512, 5, "Question")
    ids = prompt_ids(questions[5], [], manner, questions[: manner.shots], chat)
    text = chat.tokenizer.decode(ids, skip_special_tokens=True)
    assert text.startswith("Question: A baker fills 4 trays") and text.endswith(
        "How many has he now?\nAnswer:"
    )
    assert text.count("Question: ") == 6 and "#### 1,365\n\nQuestion: Noah" in text
    assert "assistant" not in chat.tokenizer.decode(ids)


@pytest.mark.parametrize(
    "name, tokens, system",
    [("mtbench", 2048, True), ("humaneval", 1024, False), ("math500", 2048, False)],
)
def test_specforge_asks_the_other_suites_through_the_template(chat, name, tokens, system):
    manner = PROTOCOLS["specforge"](name, None, "ignored")
    question = sample(name)[0]
    ids = prompt_ids(question, [], manner, [], chat)
    first = [{"role": "system", "content": SYSTEM_PROMPTS["llama2"]}] if system else []
    assert (
        ids == chat.encode_prompt([*first, *question.messages]) and manner.max_new_tokens == tokens
    )


def test_eagle_puts_one_system_prompt_before_all_suites(chat):
    for name in SIZES:
        manner = PROTOCOLS["eagle"](name, None, None)
        assert (manner.system_prompt, manner.shots, manner.max_new_tokens) == ("llama2", 0, 1024)


def test_the_second_turn_follows_the_own_answer(chat):
    question = sample("mtbench")[1]
    manner = PROTOCOLS["eagle"]("mtbench", None, None)
    ids = prompt_ids(question, [" 6 m and 12 m.\n"], manner, [], chat)
    asked = [
        {"role": "system", "content": SYSTEM_PROMPTS["llama2"]},
        *question.messages,
        {"role": "assistant", "content": "6 m and 12 m."},
        {"role": "user", "content": "And if it is cut into three pieces of 1 : 2 : 3?"},
    ]
    assert ids == chat.encode_prompt(asked)


def test_tokenised_questions_stay_what_they_are(chat):
    question = Question(input_ids=[7, 8, 9], id="a")
    assert prompt_ids(question, [], PROTOCOLS["chat"]("heldout", None, "be kind"), [], chat) == [
        7,
        8,
        9,
    ]


def test_the_evaluation_set_of_the_tiny_target(chat):
    questions = load("heldout", 3, str(TINY / "eval.jsonl"), ".cache")
    assert [q.id for q in questions] == ["eval.jsonl:1", "eval.jsonl:2", "eval.jsonl:3"]
    assert prompt_ids(questions[0], [], PROTOCOLS["chat"]("heldout", None, None), [], chat)
