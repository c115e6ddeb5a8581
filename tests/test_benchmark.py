"""Configs and suites through any engine, the built-in decoder, and the statistics."""

import json
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import ROOT, write_jsonl

from eagle3.batch import Document
from eagle3.benchmark import builtin, measure
from eagle3.benchmark.builtin import acceptance_of, bigram, bigram_table, prompt_lookup, read, ties
from eagle3.benchmark.measure import benchmark, load_tasks
from eagle3.benchmark.request import Request, Subject, check_request, in_steps
from eagle3.benchmark.samples import MAX_TOKENS, samples
from eagle3.benchmark.statistics import Trial, acceptance, by_prompt_length, equality, speed
from eagle3.benchmark.suites import Question, Setup
from eagle3.checks import check_node
from eagle3.config import instantiate
from eagle3.data.chat import Chat
from eagle3.data.rows import RowError
from eagle3.decode.speculate import Generation
from eagle3.decode.tree import Candidates
from eagle3.draft.block import DFlashConfig, DSparkConfig
from eagle3.draft.flash import FlashCPU
from eagle3.draft.model import DraftConfig
from eagle3.engines.engine import Answer, answer_of_rounds
from eagle3.errors import ConfigError, RunError

UNREPORTED = Answer([1, 2], 1, [1], 1.0, "")  # the tokens of each round
SECTION = yaml.safe_load((ROOT / "conf/benchmark/builtin.yaml").read_text())


class Cycle:
    """A target that counts 0, 1, ..., V - 1, 0, ...: next token = token + 1."""

    def __init__(self, vocab_size=40):
        self.embedding = self.head = torch.eye(vocab_size)
        self.eos_token_ids = set()

    def states(self, input_ids, position_ids, cache=None, visible=None):
        last = self.embedding[(input_ids + 1) % len(self.embedding)]
        return torch.cat([last] * 3, dim=-1), last

    def lm_head(self, last):
        return last @ self.embedding.T

    def check_decoding(self):
        """It can be decoded."""


class Words:
    """A chat of characters, with a template that marks roles."""

    template = "roles"
    tokenizer = SimpleNamespace(
        added_tokens_decoder={}, decode=lambda ids, **options: "".join(map(chr, ids))
    )

    def encode_prompt(self, messages):
        messages = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        text = "".join(f"<{message['role'][0]}>{message['content']}" for message in messages)
        return [ord(letter) for letter in text + "<a>"]

    def decode(self, ids):
        return "".join(map(chr, ids))


class Prepared(list):
    """The texts that were prepared; `heldout` prompts."""

    heldout = ()

    def document(self, index):
        return Document(index, self[index], None)


@pytest.fixture(autouse=True)
def no_process(monkeypatch):
    """Naming the processor starts one."""
    monkeypatch.setattr(measure, "device_name", str)


def subject_of(folder, target=None, eval_path=None, prepared=None):
    data = SimpleNamespace(eval_path=eval_path, system_prompt="as prepared", chat_template="auto")
    data.path, data.sources = "conversations", {}
    spec = SimpleNamespace(config=None, aux_layer_ids=[1, 2, 3])
    handle = SimpleNamespace(spec=spec, device=torch.device("cpu"), load=lambda: target)
    return Subject(folder / "draft", handle, Words(), data, str(folder), 0, prepared)


@dataclass(kw_only=True)
class Echo(Request):
    """Repeats prompts: `accepted` of the drafts of a round, `seconds` a token."""

    log: list
    accepted: int = 1
    seconds: float = 0.01
    broken: bool = False
    in_process: bool = False
    dies_at: int = -1
    cut_at: int = 1000
    error: type = RunError

    def start(self, subject, run_dir):
        return {"runner": "echo"}

    def open(self, config):
        self.log.append(("open", config))

    def answer(self, config, prompts, setup):
        self.log.append(("answer", config, len(prompts), prompts))
        answers = [self.one(config[1], prompt[: setup.max_new_tokens]) for prompt in prompts]
        self.count(sum(len(answer.ids) for answer in answers))
        return answers

    def one(self, steps, ids):
        if steps == self.dies_at:
            raise self.error("the engine died")
        ids = [*ids[:-1], ids[-1] + 1] if self.broken and steps else ids
        accepted = [min(steps, self.accepted)] * len(ids)
        answer = answer_of_rounds(ids, "".join(map(chr, ids)), accepted, steps, 0)
        answer.seconds, answer.truncated = self.seconds * answer.rounds, len(ids) >= self.cut_at
        return answer

    def close(self):
        self.log.append(("close",))


def questions(folder, count=1):
    return str(write_jsonl(folder / "mine.jsonl", *({"prompt": f"ask {i}"} for i in range(count))))


def measured(folder, configs, suites, log=None, **changed):
    """benchmark.json by the Echo."""
    section = {key: value for key, value in SECTION.items() if not key.startswith("_")}
    section |= {"configs": configs, "suites": suites, "max_new_tokens": 40, **changed}
    request, subject = Echo(log=[] if log is None else log, **section), subject_of(folder)
    benchmark(request, load_tasks(request, subject), subject, folder)
    return json.loads((folder / "benchmark.json").read_text())


def decoded(folder, target, prompts=(), subject=None, kind=DraftConfig, **changed):
    """benchmark.json by the built-in decoder with a random draft, on a suite of `prompts`."""
    lines = ({"id": f"h{i}", "input_ids": ids} for i, ids in enumerate(prompts))
    paths = {"heldout": str(write_jsonl(folder / "mine.jsonl", *lines))} if prompts else {}
    subject = subject_of(folder, target, **subject or {})
    changed = {"suites": ["heldout"], "max_new_tokens": 6, "paths": paths} | changed
    vocab_size, hidden = target.embedding.shape
    config = kind(hidden, 8, 2, 2, 4, vocab_size, vocab_size, hidden, 64)
    whole = torch.ones(vocab_size, dtype=torch.bool)
    draft = config.build(FlashCPU, whole, torch.zeros(vocab_size, dtype=torch.long))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtin, "read_draft", lambda *arguments: draft)
        request = instantiate(SECTION | changed)
        benchmark(request, load_tasks(request, subject), subject, folder)
    return json.loads((folder / "benchmark.json").read_text())


def test_bigram_table_takes_the_most_frequent_successor():
    texts = [torch.tensor([0, 1, 0, 2, 0, 2]), torch.tensor([1, 2, 1, 0]), torch.tensor([3])]
    table = bigram_table(texts, 5)
    assert table.tolist() == [2, 0, 0, -1, -1]  # 1 -> 0 twice; 2 -> 0 and 2 -> 1 tie
    assert table.dtype == torch.int64
    assert bigram([1, 2, -1], [7, 0], 5) == [1, 2], "ended by a token without a successor"
    assert bigram([1, 0], [0], 3) == [1, 0, 1]


LOOKUPS = [
    ([1, 2, 3, 9, 1, 2, 3], [9, 1]),
    ([1, 2, 3, 9, 7, 2, 3, 8, 1, 2, 3], [9, 7]),  # the longest, not the latest
    ([2, 3, 9, 0, 2, 3, 8, 1, 2, 3], [8, 1]),  # of equal ones the latest
    ([3, 3], [3]),
    ([1, 2, 3], []),
    ([1], []),
]


@pytest.mark.parametrize("text, drafted", LOOKUPS)
def test_prompt_lookup(text, drafted):
    assert prompt_lookup(text, 2) == drafted


def test_acceptance_of_counts_rounds_as_decoding_does():
    answer = [5, 6, 7, 8, 9, 1]

    def perfect(text, length):
        return answer[len(text) - 2 :][:length]

    def wrong_first(text, length):
        return [99, *perfect(text, length)[1:]]

    assert acceptance_of(perfect, [0, 0], answer, 2) == [3, 2]
    assert acceptance_of(perfect, [0, 0], answer, 8) == [5]
    assert acceptance_of(wrong_first, [0, 0], answer, 2) == [1] * 5
    assert acceptance_of(perfect, [0, 0], [5], 2) == []
    assert acceptance_of(prompt_lookup, [3, 5, 6, 7, 3], [5, 6, 7, 3, 2], 3) == [4]


CANNOT = [
    [1, 3, 1, 5], [1, 0, 1, 1], [0, 3, 1, 4], [1, -1, 1, 0], [1, 1, 4, 6], [1, 3, 2, 1], [1, 3, 1],
    [], "1234",
]  # fmt: skip
MISTAKES = [
    *(({"configs": [config]}, r"benchmark\.configs=[^\n]*batch") for config in CANNOT),
    ({"configs": []}, r"benchmark\.configs is empty"),
    ({"suites": []}, r"^benchmark\.suites or .* is empty"),
    ({"suites": ["heldout:2", "heldout:3"]}, "names a suite twice"),
    ({"protocol": "eagle", "system_prompt": "x"}, r"system_prompt=x does not go with .*eagle"),
    ({"paths": {"gsm9k": "."}}, r"benchmark\.paths\.gsm9k is no suite"),
    ({"paths": {"gsm8k": "nowhere"}}, r"benchmark\.paths\.gsm8k=nowhere does not exist"),
]


@pytest.mark.parametrize("changed, words", MISTAKES)
def test_mistakes_before_anything_loads(changed, words):
    with pytest.raises(ConfigError, match=words):
        check_request(SECTION | changed)


def test_what_can_run():
    check_node(SECTION, "benchmark")
    configs = [[1, 5, 1, 6], [1, 1, 1, 2], [1, 0, 0, 0], [8, 0, 0, 0], [4, 7, 10, 60]]
    check_request(SECTION | {"configs": configs})


def test_every_config_beside_the_baseline_of_its_batch(tmp_path):
    suite, log = questions(tmp_path, 5), []
    configs = [[1, 3, 1, 4], [2, 0, 0, 0], [2, 3, 4, 8]]
    result = measured(tmp_path, configs, [f"{suite}:4"], log)
    opened = [[1, 0, 0, 0], [2, 0, 0, 0], [1, 3, 1, 4], [2, 3, 4, 8]]
    assert [entry[1] for entry in log if entry[0] == "open"] == opened, "a server serves any batch"
    expected = [*["open", *["answer"] * 5, "open", "answer", "answer"] * 2, "close"]
    assert [kind for kind, *_ in log] == expected, "one config at a time"
    asked = [entry[2] for entry in log if entry[0] == "answer"]
    assert asked == [1, 1, 1, 1, 1, 2, 4] * 2, "a warm-up, then all; a batch is kept full"
    chain, alone, tree = result["suites"][suite]
    assert [row["config"] for row in (chain, alone, tree)] == configs
    assert chain["num_prompts"] == 4 and chain["equal_answers"] == 1 and chain["lossless"] is True
    assert chain["acceptance_length"] == 24 / 12 and alone["acceptance_length"] == 1
    assert chain["accepted_by_position"] == [1, 0, 0] and alone["accepted_by_position"] == []
    assert chain["speedup"] == pytest.approx(24 / 12) and alone["speedup"] == 1
    assert "warning" not in chain and "warning" not in alone
    protocol = result["protocol"]
    wanted = {"runner": "echo", "drafting": "chain and tree", "max_new_tokens": 40}
    wanted |= {"system_prompt": "as prepared", "protocol": "chat"}
    assert wanted.items() <= protocol.items() and protocol["template"].startswith("auto, sha256 ")


def test_samples_say_which_tokens_were_drafted(tmp_path):
    """The first two answers of a suite, under the first config that drafts."""
    suite, configs = questions(tmp_path, 3), [[1, 0, 0, 0], [1, 3, 1, 4], [2, 3, 1, 4]]
    found = measured(tmp_path, configs, [suite], max_new_tokens=6)["samples"]
    rounds = [([], "<"), (["s"], ">"), (["a"], "s"), ([" "], None)]
    named = [{"accepted": accepted, "target": target} for accepted, target in rounds]
    expected = {"config": [1, 3, 1, 4], "num_tokens": 6, "rounds": named}
    assert found == {suite: [{"prompt": f"ask {n}"} | expected for n in range(2)]}
    assert measured(tmp_path, configs[:1], [suite])["samples"] == {}, "nothing was drafted"


def test_samples_split_no_character_and_end(tokenizer):
    """A character of several tokens stands whole at the last, wherever rounds end; long answers are
    cut; an engine that reports no rounds has none.
    """
    ids, config = tokenizer.encode("a 🙂 é", add_special_tokens=False), [1, 2, 1, 3]
    answers = [answer_of_rounds(ids, "", [1, 0, 2], 2, 1.0)]
    answers += [answer_of_rounds(ids[:1] * 999, "", [2] * 400, 2, 1.0)]
    trials = [Trial(Question(input_ids=ids), [ids], [answer]) for answer in answers]
    measured = {tuple(config): {"a": trials, "b": [replace(trials[0], answers=[UNREPORTED])]}}
    found = samples([config], measured, Chat(tokenizer))
    short, long = (
        [[*part["accepted"], part["target"]] for part in sample["rounds"]] for sample in found["a"]
    )
    texts = [text for part in short for text in part]
    assert len(texts) == len(ids) > 6 and "".join(texts) == "a 🙂 é"
    assert [len(part) for part in short[:4]] == [1, 2, 1, 3]
    assert MAX_TOKENS - 3 < sum(map(len, long)) <= MAX_TOKENS
    assert found["a"][1]["num_tokens"] == 999 and found["b"] == []


@pytest.mark.parametrize("batch, seconds", [(10, 3), (1, 10 * 12 * 60)])
def test_larger_batches_are_timed_by_the_clock(tmp_path, monkeypatch, batch, seconds):
    """Ten overlapping requests that each report a minute took as long as the clock says."""
    suite, now = questions(tmp_path, 10), iter(range(0, 1000, 3))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: float(next(now)))
    result = measured(tmp_path, [[batch, 3, 1, 4]], [suite], seconds=60.0)
    (row,) = result["suites"][suite]
    assert row["tokens_per_second"] == pytest.approx(240 / seconds)


@pytest.mark.parametrize("error", [RunError, KeyboardInterrupt])
@pytest.mark.parametrize("dies_at, written", [(0, None), (5, [[1, 3, 1, 4]])])
def test_what_was_measured_before_an_error_is_written(tmp_path, error, dies_at, written):
    suite, log, path = questions(tmp_path), [], tmp_path / "benchmark.json"
    with pytest.raises(error):
        configs = [[1, 5, 1, 6], [1, 3, 1, 4]]
        measured(tmp_path, configs, [suite], log, dies_at=dies_at, error=error)
    assert log[-2][1][1] == dies_at and log[-1] == ("close",)
    rows = json.loads(path.read_text())["suites"][suite] if path.exists() else None
    assert rows is written is None or [row["config"] for row in rows] == written


def test_configs_of_a_batch_take_turns(tmp_path):
    log, configs = [], [[2, 5, 1, 6], [2, 3, 1, 4]]
    measured(tmp_path, configs, [questions(tmp_path, 3)], log, in_process=True)
    answers = [(entry[1][1], entry[2]) for entry in log if entry[0] == "answer"]
    two, one = [(0, 2), (5, 2), (3, 2)], [(3, 1), (5, 1), (0, 1)]
    assert answers == two + two + one, "a warm-up; then the second group in the other order"


def test_the_second_question_follows_the_own_first_answer(tmp_path):
    rows = {"turns": ["one", "two"]}, {"turns": ["three"]}
    path, log = str(write_jsonl(tmp_path / "mine.jsonl", *rows)), []
    result = measured(tmp_path, [[2, 0, 0, 0]], [path], log, max_new_tokens=19)
    prompts = [list(map(Words().decode, entry[3])) for entry in log if entry[0] == "answer"]
    assert prompts[1] == ["<s>as prepared<u>one<a>", "<s>as prepared<u>three<a>"]
    assert prompts[2] == ["<s>as prepared<u>one<a><s>as prepared<u>on<u>two<a>"]
    assert result["suites"][path][0]["num_prompts"] == 2, "a question with its turns counts once"


def test_losslessness_and_nothing_accepted(tmp_path, capsys):
    suite = questions(tmp_path)

    def row(**changed):
        return measured(tmp_path, [[1, 2, 1, 3]], [suite], **changed)["suites"][suite][0]

    for temperature, lossless, equal in ((1.0, None, None), (0.0, False, 0)):
        broken = row(temperature=temperature, broken=True)
        assert broken["lossless"] is lossless and broken.get("equal_answers") == equal
    none = row(accepted=0)
    assert none["acceptance_length"] == 1 and "EAGLE, not EAGLE3" in none["warning"]
    assert none["warning"] in capsys.readouterr().out


# The last number of a prompt, which is echoed, is right where the question holds the answer.
CUT = [(1000, 0, (0.5, 0.5, 4)), (33, 2, (0.0, 0.0, 2)), (1, 4, (None, None, 0))]


@pytest.mark.parametrize("cut_at, truncated, scored", CUT)
def test_answers_that_were_cut_are_counted_and_not_scored(tmp_path, cut_at, truncated, scored):
    """The right ones are the longer ones."""
    asked = ["What is {}?", "And what is {}?"]
    rows = [{"question": asked[i % 2].format(i % 2), "answer": "#### 1"} for i in range(4)]
    paths = {"gsm8k": str(write_jsonl(tmp_path / "g.jsonl", *rows))}
    changed = {"paths": paths, "max_new_tokens": 60, "cut_at": cut_at}
    (row,) = measured(tmp_path, [[1, 2, 1, 3]], ["gsm8k"], **changed)["suites"]["gsm8k"]
    found = row.get("score"), row.get("baseline_score"), row["num_scored"]
    assert (row["num_prompts"], row["truncated"], found) == (4, truncated, scored)


def test_what_cannot_be_scored_is_not(tmp_path):
    paths = {"gsm8k": str(write_jsonl(tmp_path / "g.jsonl", {"turns": ["1"]}, {"turns": ["2"]}))}
    (row,) = measured(tmp_path, [[1, 2, 1, 3]], ["gsm8k"], paths=paths)["suites"]["gsm8k"]
    assert row["num_scored"] == 0 and "score" not in row


def test_questions_are_a_sample_and_one_has_no_interval(tmp_path):
    suite, log = questions(tmp_path, 40), []
    (row,) = measured(tmp_path, [[1, 2, 1, 3]], [f"{suite}:1"], log)["suites"][suite]
    assert row["interval95"] is row["speedup_interval95"] is None and row["acceptance_length"]
    (row,) = measured(tmp_path, [[1, 2, 1, 3]], [f"{suite}:9"], log)["suites"][suite]
    assert row["interval95"] and row["speedup_interval95"]
    asked = {Words().decode(entry[3][0]) for entry in log if entry[0] == "answer"}
    assert len(asked) == 9 and asked != {f"<s>as prepared<u>ask {i}<a>" for i in range(9)}


def test_what_is_found_before_the_first_stage(tmp_path, capsys):
    subject, mine = subject_of(tmp_path), questions(tmp_path, 3)

    def load(*suites, **changed):
        section = {"suites": list(suites), "configs": [[1, 0, 0, 0]]} | changed
        return load_tasks(instantiate(SECTION | section), subject)

    (heldout, own) = load("heldout:2", f"{mine}:2")
    assert (heldout.name, heldout.questions, heldout.count) == ("heldout", [], 2)
    assert len(own.questions) == 2
    with pytest.raises(
        RunError, match=r"mine.*: .*gsm8k \(it has no 'question'; it has 'prompt'\)$"
    ):
        load("heldout:2", "gsm8k:2", paths={"gsm8k": mine})
    subject.data.path = None
    assert [task.name for task in load("heldout:2", mine)] == [mine]
    assert "lists heldout, but no data is named" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"lists heldout, but no data is named .*; set data="):
        load("heldout:2")

    def refuse(messages):
        raise RowError("refused by the chat template: no system role")

    subject.chat.encode_prompt = refuse
    with pytest.raises(ConfigError, match=r"mine\.jsonl:1 cannot be asked \(refused .*role\)$"):
        load(mine)


@pytest.mark.parametrize("execute_code, times", [(False, 0), (True, 3)])
def test_code_runs_only_where_that_was_asked_for(tmp_path, monkeypatch, execute_code, times):
    paths, ran = {"humaneval": str(ROOT / "tests/data/suites/humaneval.jsonl")}, []
    score = "eagle3.benchmark.scoring.passes"
    monkeypatch.setattr(score, lambda source: ran.append(source) or True)
    changed = {"paths": paths, "max_new_tokens": 90, "execute_code": execute_code}
    (row,) = measured(tmp_path, [[1, 2, 1, 3]], ["humaneval"], **changed)["suites"]["humaneval"]
    assert len(ran) == times and ("score" in row) is execute_code


def test_builtin_reports_every_suite_and_config(tmp_path):
    configs, prepared = (
        [[1, 2, 1, 3], [1, 0, 0, 0]],
        Prepared([torch.arange(10), torch.tensor([3, 5])]),
    )
    prepared.heldout = [{"id": f"h{i}", "input_ids": [i, 3]} for i in range(3)]
    given = {"configs": configs, "suites": ["heldout:2"]}
    result = decoded(tmp_path, Cycle(), subject={"prepared": prepared}, **given)
    row, alone = result["suites"]["heldout"]
    assert row["num_prompts"] == 2 and row["config"] == configs[0] and row["lossless"] is True
    assert row["bigram"] == 5 / 2 and row["prompt_lookup"] == 1
    assert len(row["accepted_by_position"]) == 2
    assert alone["acceptance_length"] == alone["bigram"] == 1
    protocol = {"suites": ["heldout:2"], "system_prompt": "as prepared", "drafting": "chain"}
    protocol |= {"dtype": "float32", "runner": "builtin", "threads": torch.get_num_threads()}
    assert protocol.items() <= result["protocol"].items()


def test_builtin_runs_trees_and_batches(tmp_path):
    """Answers of 6 tokens to three prompts, two of them at a time, are those of batch 1."""
    configs = [[2, 2, 3, 6], [2, 2, 1, 3], [1, 2, 1, 3]]
    result = decoded(tmp_path, Cycle(), [[0, 3], [1, 3], [2, 3]], configs=configs)
    tree, batch, chain = rows = result["suites"]["heldout"]
    assert [row["config"] for row in rows] == configs
    assert all(row["lossless"] is True and "bigram" not in row for row in rows)
    assert tree["acceptance_length"] >= batch["acceptance_length"] == chain["acceptance_length"]


@pytest.mark.parametrize("kind", [DFlashConfig, DSparkConfig])
def test_builtin_decodes_with_a_block_drafter_or_refuses_the_config(tmp_path, kind):
    configs, prompts = [*SECTION["configs"], [2, 5, 1, 6], [1, 2, 1, 3]], [[0, 3], [1, 3], [2, 3]]
    rows = decoded(tmp_path, Cycle(), prompts, kind=kind, configs=configs)["suites"]["heldout"]
    assert [row["config"] for row in rows] == configs and all(row["lossless"] for row in rows)
    assert rows[0]["acceptance_length"] == rows[1]["acceptance_length"]
    with pytest.raises(ConfigError, match=r"benchmark\.configs=\[1, 3, 2, 6\]: .* topk must be 1"):
        decoded(tmp_path, Cycle(), prompts, kind=kind, configs=[[1, 3, 2, 6]])


def test_builtin_answers_in_order_and_without_common_luck():
    counted = []

    def answers(config, prompts, count, temperature=0.0):
        request = instantiate(SECTION | {"temperature": temperature})
        request.target, request.chat, request.seed, request.rules = Cycle(), Words(), 0, {}
        request.open(config)
        request.count = counted.append
        return request.answer(config, prompts, Setup(count))

    found = answers([2, 0, 0, 0], [[0, 3], [1, 9, 5], [7]], 4)
    assert [a.ids for a in found] == [[4, 5, 6, 7], [6, 7, 8, 9], [8, 9, 10, 11]]
    assert found[0].rounds == 3 and [answer.truncated for answer in found] == [True] * 3
    assert counted == [2, 2, 2, 2, 1, 1, 1, 1], "a bar moves with every round"
    one, other = answers([1, 0, 0, 0], [[0, 3], [0, 3]], 8, 50.0)
    assert one.ids != other.ids


def test_heldout_behind_another_system_prompt_needs_conversations(tmp_path):
    row = {"messages": [{"role": "user", "content": "q"}]}
    path, ask = str(write_jsonl(tmp_path / "m.jsonl", row)), partial(decoded, tmp_path, Cycle(256))
    changed = {"configs": [[1, 0, 0, 0]], "system_prompt": "be kind"}
    assert ask(subject={"eval_path": path}, **changed)["protocol"]["system_prompt"] == "be kind"
    with pytest.raises(ConfigError, match=r"set data\.eval_path"):
        ask(**changed)


def trial(*answers, prompt=(0,), seconds=1.0):
    """A question answered by (ids, emitted, accepted) in turn."""
    generations = [Generation(*map(list, answer), seconds) for answer in answers]
    given = [read(generation, 3, Setup(99), Words(), set()) for generation in generations]
    return Trial(Question(), [list(prompt)] * len(answers), given, seconds * len(answers))


def test_acceptance_figures():
    loop, short = ([3] * 40, [4] * 9 + [3], [3] * 10), ([9], [], [])
    trials = [trial((range(8), [4, 2, 1], [3, 1, 0])), trial(loop), trial(short)]
    row = acceptance(trials, 3, seed=0)
    low, high = row.pop("interval95")
    assert low == pytest.approx(7 / 3) and high == pytest.approx(3.9)
    expected = {"acceptance_length": 46 / 13, "loops": 1, "acceptance_length_loop_free": 7 / 3}
    expected |= {"first_round": 4, "accepted_by_position": [12 / 13, 11 / 13, 11 / 13]}
    assert expected.items() <= row.items()
    empty = acceptance([trial(short)], 1, seed=0)
    assert empty["acceptance_length"] is empty["interval95"] is None


def test_acceptance_by_the_length_of_prompts():
    """To the nearest power of two; an answer of one token needed no round and does not count."""
    answer, short = (range(8), [4, 2, 1], [3, 1, 0]), ([9], [], [])
    trials = [trial(answer, prompt=range(n)) for n in (900, 1400, 1500)]
    trials += [trial((range(8), [1] * 7, [0] * 7), prompt=range(1100)), trial(short)]
    near, far = by_prompt_length(trials)
    expected = {"prompt_tokens": 1024, "answers": 3, "rounds": 13, "acceptance_length": 21 / 13}
    assert near == expected
    assert far == expected | {
        "prompt_tokens": 2048, "answers": 1, "rounds": 3, "acceptance_length": 7 / 3
    }  # fmt: skip


def test_turns_of_a_question_are_resampled_together():
    one, other = ([5] * 5, [4], [3]), ([5] * 3, [1, 1], [0, 0])
    together = acceptance([trial(one, other)] * 20, 3, seed=0)
    apart = acceptance([trial(one), trial(other)] * 20, 3, seed=0)
    assert together["acceptance_length"] == apart["acceptance_length"] == 2
    assert together["interval95"] == [2, 2] and apart["interval95"][0] < 1.8


def test_interval_covers_the_mean_as_often_as_it_says():
    random, covered = torch.Generator().manual_seed(0), 0
    for seed in range(60):
        rounds = torch.randint(1, 5, (40, 6), generator=random).tolist()
        trials = [trial((range(1 + sum(n)), n, [e - 1 for e in n])) for n in rounds]
        low, high = acceptance(trials, 3, seed)["interval95"]
        covered += low <= 2.5 <= high
    assert 52 <= covered < 60


def test_speed_counts_decoding_alone():
    baseline, drafted = (trial((range(11), [], []), seconds=seconds) for seconds in (5.0, 1.0))
    row = speed([drafted, drafted], [baseline, baseline], seed=0)
    assert row["tokens_per_second"] == 10 and row["baseline_tokens_per_second"] == 2
    assert row["speedup"] == 5 and row["speedup_interval95"] == pytest.approx([5, 5])


TIES = [(1e-6, [1, 8], "tie"), (0.1, [1, 8], False), (1e-6, [2, 8], False), (1e-6, [0, 7], True),
        (1e-6, [], None)]  # fmt: skip


@pytest.mark.parametrize("gap, end, expected", TIES)
def test_lossless_or_tie(gap, end, expected):
    """Behind the second answer token the target likes tokens 0 and 1, `gap` apart, and not 2; an
    answer that stops early has no such place.
    """
    logits, texts = torch.tensor([[2.0, 2.0 - 2 * gap, -1.0]]), []

    def states(input_ids, position_ids):
        texts.append(input_ids.tolist())
        return None, torch.zeros(len(input_ids), 3)

    head = {"embedding": torch.zeros(3, 3), "lm_head": lambda last: logits}
    target, answers = SimpleNamespace(states=states, **head), ([5, 6, 0, 7], [5, 6, *end])
    baseline, drafted = (trial((ids, [1] * 3, [0] * 3), prompt=(9, 9)) for ids in answers)
    pair = [drafted, drafted], [baseline, baseline]
    row = equality(*pair) | ties(target, *pair)
    assert row["lossless"] == (expected or False) and ("tie_gap" in row) == bool(texts)
    if not texts:
        assert row["equal_answers"] == (expected is True) and expected is not False
    else:
        assert texts[0] == [9, 9, 5, 6]
        assert row["tie_gap"] == pytest.approx(1.5 if end[0] == 2 else gap, rel=0.2)


@pytest.mark.parametrize("stop, end", [((), 6), (("\x06",), 99), (("\x06\x07",), 99)])
def test_an_answer_that_ends_with_the_last_token_that_fits_is_whole(stop, end):
    request, target = instantiate(SECTION), Cycle()
    request.target, request.chat, request.seed, request.rules = target, Words(), 0, {}
    request.open([1, 0, 0, 0])
    target.eos_token_ids = {end}
    found = [request.answer([1, 0, 0, 0], [[0, 3]], Setup(n, stop=stop))[0] for n in (2, 3, 4, 9)]
    ends_at = 4 if len("".join(stop)) == 2 else 3
    assert [answer.truncated for answer in found] == [n < ends_at for n in (2, 3, 4, 9)]
    assert [len(answer.ids) for answer in found] == [min(n, ends_at) for n in (2, 3, 4, 9)]


CUTS = [
    ("e", 5, [3, 1], [2, 1]),
    ("a", 1, [], []),
    ("cd", 4, [3], [2]),
    ("x", 8, [3, 3, 1], [2, 2, 0]),
]


@pytest.mark.parametrize("stop, length, emitted, accepted", CUTS)
def test_a_generation_is_cut_where_a_stop_text_is_complete(stop, length, emitted, accepted):
    whole = Generation([ord(letter) for letter in "abcdefgh"], [3, 3, 1], [2, 2, 0], 3.0)
    answer = read(whole, 2, Setup(99, stop=(stop,)), Words(), set())
    assert answer.ids == whole.ids[:length] and answer.emitted == emitted
    assert answer.accepted_at == [sum(count >= k for count in accepted) for k in (1, 2)]
    assert answer.seconds == answer.rounds == len(emitted)
    assert answer.text == "abcdefgh".partition(stop)[0]


def official_tree(likely, depth, topk, total_token):
    """The paths of a tree as EAGLE's own code draws it, in the plainest way: one level from the
    root, then `depth` times another from the best nodes of the last. `likely`: log-probabilities of
    each token behind each; the root is token 0.
    """

    def level(best):
        found = []
        for path, score in best:
            behind = likely[path[-1] if path else 0]
            tokens = sorted(range(len(behind)), key=lambda token: -behind[token])[:topk]
            found += [((*path, token), score + behind[token]) for token in tokens]
        return sorted(found, key=lambda pair: -pair[1])

    candidates = last = level([((), 0.0)])
    for _ in range(depth):
        last = level(last[:topk])
        candidates = candidates + last
    best = sorted(candidates, key=lambda pair: -pair[1])[: total_token - 1]
    return {path for path, _ in best}


def drafted_tree(likely, steps, topk, verify_tokens):
    """The same by what drafts here."""
    table, root = torch.tensor(likely), torch.zeros(1, dtype=torch.long)
    candidates, tokens = Candidates(1, topk, table.device), root[None]
    for _ in range(steps):
        tokens, _ = candidates.extend(table[tokens])
    tree = candidates.tree(root, torch.arange(len(table)), verify_tokens)
    ids, parents, paths = tree.ids[0].tolist(), tree.parents[0].tolist(), [()]
    for node in range(1, verify_tokens):
        paths.append((*paths[parents[node]], ids[node]))
    return set(paths[1:])


def test_trees_of_eagles_protocol_are_as_deep_as_eagles():
    """On drafts sure enough that trees are deep: those of its `depth` are one step more here."""
    deep, same, other = 0, 0, 0
    for seed in range(20):
        logits = 6 * torch.randn(30, 30, generator=torch.Generator().manual_seed(seed))
        likely = logits.double().log_softmax(-1).tolist()
        official = official_tree(likely, 4, 3, 20)
        _, *drafting = in_steps([1, 4, 3, 20], "eagle")
        deep += max(map(len, official)) == 5
        same += drafted_tree(likely, *drafting) == official
        other += drafted_tree(likely, 4, 3, 20) == official
    assert same == 20 and deep == 20 and other == 0


def test_configs_of_eagles_protocol_are_its_own(tmp_path):
    assert in_steps([4, 7, 10, 60], "chat") == in_steps([4, 7, 10, 60], "specforge")
    suites, changed = [questions(tmp_path)], {"protocol": "eagle"}
    configs = [[1, 2, 2, 11], [1, 3, 1, 4]]
    check_request(SECTION | changed | {"configs": configs})
    with pytest.raises(ConfigError, match=r"configs=\[1, 2, 2, 11\] must be"):
        check_request(SECTION | {"configs": configs})
    tree, chain = measured(tmp_path, configs, suites, accepted=9, **changed)["suites"][suites[0]]
    assert (tree["config"], chain["config"]) == ([1, 3, 2, 11], [1, 3, 1, 4])
    assert len(tree["accepted_by_position"]) == 3
