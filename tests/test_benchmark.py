import json
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import ROOT
from hydra.utils import instantiate

from eagle3.benchmark import builtin, measure
from eagle3.benchmark.builtin import acceptance_of, bigram, bigram_table, prompt_lookup, read, ties
from eagle3.benchmark.measure import benchmark
from eagle3.benchmark.request import Request, Subject, check_request
from eagle3.benchmark.statistics import Trial, acceptance, equality, speed
from eagle3.benchmark.suites import Question, Setup
from eagle3.checks import check_node
from eagle3.decode.speculate import Generation
from eagle3.draft.flash import FlashCPU
from eagle3.draft.model import Draft, DraftConfig
from eagle3.engines.engine import answer_of_rounds
from eagle3.errors import ConfigError, RunError

SECTION = yaml.safe_load((ROOT / "conf/benchmark/builtin.yaml").read_text())


class Cycle:
    """A target that counts 0, 1, ..., V - 1, 0, ...: next token = token + 1."""

    def __init__(self, vocab_size=40):
        self.embedding = torch.eye(vocab_size)
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

    def encode_prompt(self, messages):
        messages = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        text = "".join(f"<{message['role'][0]}>{message['content']}" for message in messages)
        return [ord(letter) for letter in text + "<a>"]

    def decode(self, ids):
        return "".join(map(chr, ids))


class Prepared(list):
    def document(self, index):
        return index, self[index], None


@pytest.fixture(autouse=True)
def no_process(monkeypatch):
    """Naming the processor starts one."""
    monkeypatch.setattr(measure, "device_name", str)


def make_draft(target):
    vocab_size, hidden = target.embedding.shape
    config = DraftConfig(hidden, 8, 2, 2, 4, vocab_size, vocab_size, hidden, 64)
    whole = torch.ones(vocab_size, dtype=torch.bool)
    return Draft(config, FlashCPU, whole, torch.zeros(vocab_size, dtype=torch.long))


def subject_of(folder, target=None, eval_path=None, heldout=None, prepared=None):
    data = SimpleNamespace(eval_path=eval_path, system_prompt="as prepared", chat_template="auto")
    spec = SimpleNamespace(config=None, aux_layer_ids=[1, 2, 3])
    handle = SimpleNamespace(spec=spec, device=torch.device("cpu"), load=lambda: target)
    texts = prepared and Prepared(prepared)
    return Subject(folder / "draft", handle, Words(), data, str(folder), 0, heldout, texts)


@dataclass(kw_only=True)
class Echo(Request):
    """Repeats prompts: `accepted` of the drafts of a round, `seconds` a token."""

    log: list
    accepted: int = 1
    seconds: float = 0.01
    broken: bool = False
    in_process: bool = False

    def start(self, subject, run_dir):
        return {"runner": "echo"}

    def open(self, config):
        self.log.append(("open", config))

    def answer(self, config, prompts, setup):
        self.log.append(("answer", config, len(prompts), prompts))
        return [self.one(config[1], prompt[: setup.max_new_tokens]) for prompt in prompts]

    def one(self, steps, ids):
        ids = [*ids[:-1], ids[-1] + 1] if self.broken and steps else ids
        accepted = [min(steps, self.accepted)] * len(ids)
        answer = answer_of_rounds(ids, "".join(map(chr, ids)), accepted, steps, 0)
        answer.seconds = self.seconds * answer.rounds
        return answer

    def close(self):
        self.log.append(("close",))


def rows_file(folder, *rows):
    path = folder / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def measured(folder, configs, suites, log=None, kind=Echo, **changed):
    section = {key: value for key, value in SECTION.items() if not key.startswith("_")}
    section |= {"configs": configs, "suites": suites, "max_new_tokens": 40, **changed}
    benchmark(kind(log=[] if log is None else log, **section), subject_of(folder), folder)
    return json.loads((folder / "benchmark.json").read_text())


def decoded(folder, target, heldout, prepared=None, **changed):
    """benchmark=builtin on the prompts of `heldout`."""
    path = folder / "heldout.jsonl"
    lines = [json.dumps({"id": f"h{i}", "input_ids": ids}) for i, ids in enumerate(heldout)]
    path.write_text("\n".join(lines))
    subject = subject_of(folder, target, heldout=path, prepared=prepared)
    changed = {"suites": ["heldout"], "max_new_tokens": 6} | changed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtin, "read_draft", lambda *arguments: make_draft(target))
        benchmark(instantiate(SECTION | changed), subject, folder)
    return json.loads((folder / "benchmark.json").read_text())


def test_bigram_table_takes_the_most_frequent_successor():
    texts = [torch.tensor([0, 1, 0, 2, 0, 2]), torch.tensor([1, 2, 1, 0]), torch.tensor([3])]
    table = bigram_table(texts, 5)
    assert table.tolist() == [2, 0, 0, -1, -1]  # 1 -> 0 twice; 2 -> 0 and 2 -> 1 tie
    assert table.dtype == torch.int64
    assert bigram([1, 2, -1], [7, 0], 5) == [1, 2], "ended by a token without a successor"
    assert bigram([1, 0], [0], 3) == [1, 0, 1]


@pytest.mark.parametrize(
    "text, drafted",
    [
        ([1, 2, 3, 9, 1, 2, 3], [9, 1]),
        ([1, 2, 3, 9, 7, 2, 3, 8, 1, 2, 3], [9, 7]),  # the longest, not the latest
        ([2, 3, 9, 0, 2, 3, 8, 1, 2, 3], [8, 1]),  # of equal ones the latest
        ([3, 3], [3]),
        ([1, 2, 3], []),
        ([1], []),
    ],
)
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
    assert acceptance_of(lambda text, length: [], [0, 0], answer, 2) == [1] * 5
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
    ({"protocol": "specforge", "system_prompt": "x"}, r"system_prompt=x does not go with "),
    ({"paths": {"gsm9k": "."}}, r"benchmark\.paths\.gsm9k is no suite"),
    ({"paths": {"gsm8k": "nowhere"}}, r"benchmark\.paths\.gsm8k=nowhere does not exist"),
]


@pytest.mark.parametrize("changed, words", MISTAKES)
def test_mistakes_before_anything_loads(changed, words):
    with pytest.raises(ConfigError, match=words):
        check_request(SECTION | changed)


def test_what_can_run():
    check_node(SECTION, "benchmark")
    check_request(SECTION)
    configs = [[1, 5, 1, 6], [1, 1, 1, 2], [1, 0, 0, 0], [8, 0, 0, 0], [4, 7, 10, 60]]
    check_request(SECTION | {"configs": configs})


def test_every_config_beside_the_baseline_of_its_batch(tmp_path):
    suite = rows_file(tmp_path, *({"prompt": f"question {i}"} for i in range(5)))
    configs, log = [[1, 3, 1, 4], [2, 0, 0, 0], [2, 3, 4, 8]], []
    result = measured(tmp_path, configs, [f"{suite}:4"], log)
    opened = [entry[1] for entry in log if entry[0] == "open"]
    assert opened == [[1, 0, 0, 0], [2, 0, 0, 0], [1, 3, 1, 4], [2, 3, 4, 8]], (
        "a server serves any batch"
    )
    one_by_one, at_once = ["open", *["answer"] * 5], ["open", "answer", "answer"]
    expected = [*[*one_by_one, *at_once] * 2, "close"]
    assert [kind for kind, *_ in log] == expected, "one config at a time"
    asked = [entry[2] for entry in log if entry[0] == "answer"]
    assert asked == [1, 1, 1, 1, 1, 2, 4] * 2, "a warm-up, then all; a batch is kept full"
    chain, alone, tree = result["suites"][suite]
    assert [row["config"] for row in (chain, alone, tree)] == configs
    assert chain["num_prompts"] == 4
    assert chain["acceptance_length"] == 29 / 15 and alone["acceptance_length"] == 1
    assert chain["accepted_by_position"] == [1, 0, 0] and alone["accepted_by_position"] == []
    assert chain["speedup"] == pytest.approx(29 / 15) and alone["speedup"] == 1
    assert chain["lossless"] is True and chain["equal_answers"] == 1
    assert "warning" not in chain and "warning" not in alone
    protocol = result["protocol"]
    assert protocol["runner"] == "echo" and protocol["drafting"] == "chain and tree"
    assert protocol["max_new_tokens"] == 40 and protocol["system_prompt"] == "as prepared"
    assert protocol["protocol"] == "chat" and protocol["template"].startswith("auto, sha256 ")


def test_larger_batches_are_timed_by_the_clock(tmp_path, monkeypatch):
    """Ten overlapping requests that each report a minute took as long as the clock says."""
    suite = rows_file(tmp_path, *({"prompt": f"question {i}"} for i in range(10)))
    now = iter(range(0, 1000, 3))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: float(next(now)))
    for batch, tokens_per_second in ((10, 290 / 3), (1, 290 / (10 * 15 * 60))):
        result = measured(tmp_path, [[batch, 3, 1, 4]], [suite], seconds=60.0)
        (row,) = result["suites"][suite]
        assert row["tokens_per_second"] == pytest.approx(tokens_per_second)


@pytest.mark.parametrize("error", [RunError, ConfigError, KeyboardInterrupt])
def test_what_was_measured_before_an_error_is_written(tmp_path, error):
    suite, log = rows_file(tmp_path, {"prompt": "question"}), []

    class Dying(Echo):
        def one(self, steps, ids):
            if steps == dies_at:
                raise error("the engine died")
            return super().one(steps, ids)

    configs = [[1, 5, 1, 6], [1, 3, 1, 4]]
    for dies_at, written in ((0, None), (5, [[1, 3, 1, 4]])):
        with pytest.raises(error):
            measured(tmp_path, configs, [suite], log, Dying)
        assert log[-2][1][1] == dies_at and log[-1] == ("close",)
        path = tmp_path / "benchmark.json"
        rows = json.loads(path.read_text())["suites"][suite] if path.exists() else None
        assert rows is written is None or [row["config"] for row in rows] == written


def test_configs_of_a_batch_take_turns(tmp_path):
    suite, log = rows_file(tmp_path, *({"prompt": f"{i}"} for i in range(3))), []
    measured(tmp_path, [[2, 5, 1, 6], [2, 3, 1, 4]], [suite], log, in_process=True)
    answers = [(entry[1][1], entry[2]) for entry in log if entry[0] == "answer"]
    warm_up, two, one = [(0, 2), (5, 2), (3, 2)], [(0, 2), (5, 2), (3, 2)], [(3, 1), (5, 1), (0, 1)]
    assert answers == warm_up + two + one, "the second group in the other order"


def test_the_second_question_follows_the_own_first_answer(tmp_path):
    path, log = rows_file(tmp_path, {"turns": ["one", "two"]}, {"turns": ["three"]}), []
    result = measured(tmp_path, [[2, 0, 0, 0]], [path], log, max_new_tokens=19)
    prompts = [list(map(Words().decode, entry[3])) for entry in log if entry[0] == "answer"]
    assert prompts[1] == ["<s>as prepared<u>one<a>", "<s>as prepared<u>three<a>"]
    assert prompts[2] == ["<s>as prepared<u>one<a><s>as prepared<u>on<u>two<a>"]
    (row,) = result["suites"][path]
    assert row["num_prompts"] == 2, "a question with its turns counts once"


def test_sampling_and_losslessness(tmp_path):
    suite = rows_file(tmp_path, {"prompt": "question"})
    for temperature, equal in ((1.0, None), (0.0, False)):
        changed = {"temperature": temperature, "broken": True}
        (row,) = measured(tmp_path, [[1, 2, 1, 3]], [suite], **changed)["suites"][suite]
        assert row["lossless"] is equal and row.get("equal_answers") == (None, 0)[equal is False]


def test_nothing_accepted_is_a_warning(tmp_path, capsys):
    suite = rows_file(tmp_path, {"prompt": "question"})
    (row,) = measured(tmp_path, [[1, 2, 1, 3]], [suite], accepted=0)["suites"][suite]
    assert row["acceptance_length"] == 1 and "EAGLE, not EAGLE3" in row["warning"]
    assert row["warning"] in capsys.readouterr().out


def test_answers_are_scored(tmp_path):
    """The echo of the last number of the prompt is right where the question holds the answer."""
    rows = [{"question": f"What is {i}?", "answer": f"It is\n#### {i % 2}"} for i in range(4)]
    paths = {"gsm8k": rows_file(tmp_path, *rows)}
    changed = {"paths": paths, "max_new_tokens": 60}
    (row,) = measured(tmp_path, [[1, 2, 1, 3]], ["gsm8k"], **changed)["suites"]["gsm8k"]
    assert (row["score"], row["baseline_score"], row["num_scored"]) == (0.5, 0.5, 4)


def test_code_runs_only_where_that_was_asked_for(tmp_path, monkeypatch):
    paths, ran = {"humaneval": str(ROOT / "tests/data/suites/humaneval.jsonl")}, []
    score = "eagle3.benchmark.scoring.passes"
    monkeypatch.setattr(score, lambda source: ran.append(source) or True)
    for execute_code, times in ((False, 0), (True, 3)):
        changed = {"paths": paths, "max_new_tokens": 90, "execute_code": execute_code}
        (row,) = measured(tmp_path, [[1, 2, 1, 3]], ["humaneval"], **changed)["suites"]["humaneval"]
        assert len(ran) == times and ("score" in row) is execute_code


def test_builtin_reports_every_suite_and_config(tmp_path):
    prompts, configs = [[0, 3], [1, 3], [2, 3]], [[1, 2, 1, 3], [1, 0, 0, 0]]
    texts = [torch.arange(10), torch.tensor([3, 5])]
    changed = {"configs": configs, "suites": ["heldout:2"]}
    result = decoded(tmp_path, Cycle(), prompts, prepared=texts, **changed)
    row, alone = result["suites"]["heldout"]
    assert row["num_prompts"] == 2 and row["config"] == configs[0] and row["lossless"] is True
    assert row["bigram"] == 5 / 2 and row["prompt_lookup"] == 1
    assert len(row["accepted_by_position"]) == 2
    assert alone["acceptance_length"] == alone["bigram"] == 1
    protocol = result["protocol"]
    assert protocol["suites"] == ["heldout:2"] and protocol["system_prompt"] == "as prepared"
    assert protocol["drafting"] == "chain" and protocol["dtype"] == "float32"
    assert protocol["runner"] == "builtin" and protocol["threads"] == torch.get_num_threads()


def test_builtin_runs_trees_and_batches(tmp_path):
    """Answers of 6 tokens to three prompts, two of them at a time, are those of batch 1."""
    configs = [[2, 2, 3, 6], [2, 2, 1, 3], [1, 2, 1, 3]]
    result = decoded(tmp_path, Cycle(), [[0, 3], [1, 3], [2, 3]], configs=configs)
    tree, batch, chain = rows = result["suites"]["heldout"]
    assert [row["config"] for row in rows] == configs
    assert all(row["lossless"] is True and "bigram" not in row for row in rows)
    assert tree["acceptance_length"] >= batch["acceptance_length"] == chain["acceptance_length"]


def decoder_of(target, config, temperature=0.0):
    request = instantiate(SECTION | {"temperature": temperature})
    request.target, request.chat, request.seed, request.rules = target, Words(), 0, {}
    request.open(config)
    return partial(request.answer, config)


def test_builtin_answers_in_order_and_without_common_luck():
    answers = decoder_of(Cycle(), [2, 0, 0, 0])([[0, 3], [1, 9, 5], [7]], Setup(4))
    assert [a.ids for a in answers] == [[4, 5, 6, 7], [6, 7, 8, 9], [8, 9, 10, 11]]
    assert answers[0].rounds == 3
    one, other = decoder_of(Cycle(), [1, 0, 0, 0], 50.0)([[0, 3], [0, 3]], Setup(8))
    assert one.ids != other.ids


def test_heldout_behind_another_system_prompt_needs_conversations(tmp_path):
    path = rows_file(tmp_path, {"messages": [{"role": "user", "content": "q"}]})
    section = SECTION | {"configs": [[1, 0, 0, 0]], "suites": ["heldout"], "max_new_tokens": 3}
    request = instantiate(section | {"system_prompt": "be kind"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtin, "read_draft", lambda *arguments: make_draft(Cycle(256)))
        benchmark(request, subject_of(tmp_path, Cycle(256), path), tmp_path)
    result = json.loads((tmp_path / "benchmark.json").read_text())
    assert result["protocol"]["system_prompt"] == "be kind"
    with pytest.raises(ConfigError, match=r"set data\.eval_path"):
        benchmark(request, subject_of(tmp_path), tmp_path)


def trial(*answers, prompt=(0,), seconds=1.0):
    """A question answered by (ids, emitted, accepted) in turn."""
    generations = [
        Generation(list(ids), list(emitted), list(accepted), 0.5, seconds)
        for ids, emitted, accepted in answers
    ]
    given = [read(generation, 3, (), Words()) for generation in generations]
    return Trial(Question(), [list(prompt)] * len(answers), given, seconds * len(answers))


def test_acceptance_figures():
    trials = [
        trial((range(8), [4, 2, 1], [3, 1, 0])),
        trial(([3] * 40, [4] * 9 + [3], [3] * 10)),
        trial(([9], [], [])),
    ]
    row = acceptance(trials, 3, seed=0)
    assert row["acceptance_length"] == 46 / 13
    assert row["loops"] == 1 and row["acceptance_length_loop_free"] == 7 / 3
    assert row["first_round"] == 4
    assert row["accepted_by_position"] == [12 / 13, 11 / 13, 11 / 13]
    low, high = row["interval95"]
    assert low == pytest.approx(7 / 3) and high == pytest.approx(3.9)
    assert acceptance(trials, 3, seed=0) == row
    empty = acceptance([trial(([9], [], []))], 1, seed=0)
    assert empty["acceptance_length"] is empty["interval95"] is None


def test_turns_of_a_question_are_resampled_together():
    one, other = ([5] * 5, [4], [3]), ([5] * 3, [1, 1], [0, 0])
    together = acceptance([trial(one, other)] * 20, 3, seed=0)
    apart = acceptance([trial(one), trial(other)] * 20, 3, seed=0)
    assert together["acceptance_length"] == apart["acceptance_length"] == 2
    assert together["interval95"] == [2, 2] and apart["interval95"][0] < 1.8


def test_interval_covers_the_mean_as_often_as_it_says():
    random, covered = torch.Generator().manual_seed(0), 0
    for seed in range(100):
        rounds = torch.randint(1, 5, (40, 6), generator=random).tolist()
        trials = [trial((range(1 + sum(n)), n, [e - 1 for e in n])) for n in rounds]
        low, high = acceptance(trials, 3, seed)["interval95"]
        covered += low <= 2.5 <= high
    assert 88 <= covered <= 100


def test_speed_counts_decoding_alone():
    baseline, drafted = (trial((range(11), [], []), seconds=seconds) for seconds in (5.0, 1.0))
    row = speed([drafted, drafted], [baseline, baseline], seed=0)
    assert row["tokens_per_second"] == 10 and row["baseline_tokens_per_second"] == 2
    assert row["speedup"] == 5 and row["speedup_interval95"] == pytest.approx([5, 5])


@pytest.mark.parametrize(
    "gap, second, expected",
    [(1e-6, 1, "tie"), (0.1, 1, False), (1e-6, 2, False), (1e-6, None, True)],
)
def test_lossless_or_tie(gap, second, expected):
    """Behind the second answer token the target likes tokens 0 and 1, `gap` apart, and not 2."""
    logits = torch.tensor([[2.0, 2.0 - 2 * gap, -1.0]])
    texts = []

    def states(input_ids, position_ids):
        texts.append(input_ids.tolist())
        return None, torch.zeros(len(input_ids), 3)

    target = SimpleNamespace(
        embedding=torch.zeros(3, 3), states=states, lm_head=lambda last: logits
    )
    answers = [5, 6, 0, 7], [5, 6, 0, 7] if second is None else [5, 6, second, 8]
    baseline, drafted = (trial((ids, [1] * 3, [0] * 3), prompt=(9, 9)) for ids in answers)
    pair = [drafted, drafted], [baseline, baseline]
    row = equality(*pair) | ties(target, *pair)
    assert row["lossless"] == expected
    if expected is True:
        assert row == {"lossless": True, "equal_answers": 1} and texts == []
    else:
        assert texts[0] == [9, 9, 5, 6]
        assert row["tie_gap"] == pytest.approx(1.5 if second == 2 else gap, rel=0.2)


def test_an_answer_that_stops_early_is_not_lossless():
    target = SimpleNamespace(embedding=torch.zeros(3, 3))
    pair = [trial(([5, 6, 0], [1, 1], [0, 0]))], [trial(([5, 6], [1], [0]))]
    row = equality(*pair) | ties(target, *pair)
    assert row["lossless"] is False and "tie_gap" not in row


@pytest.mark.parametrize(
    "stop, length, emitted, accepted",
    [
        ("e", 5, [3, 1], [2, 1]),
        ("a", 1, [], []),
        ("cd", 4, [3], [2]),
        ("x", 8, [3, 3, 1], [2, 2, 0]),
    ],
)
def test_a_generation_is_cut_where_a_stop_text_is_complete(stop, length, emitted, accepted):
    whole = Generation([ord(letter) for letter in "abcdefgh"], [3, 3, 1], [2, 2, 0], 0.5, 3.0)
    answer = read(whole, 2, (stop,), Words())
    assert answer.ids == whole.ids[:length] and answer.emitted == emitted
    assert answer.accepted_at == [sum(count >= k for count in accepted) for k in (1, 2)]
    assert answer.seconds == answer.rounds == len(emitted)
    assert answer.text == "abcdefgh".partition(stop)[0]
