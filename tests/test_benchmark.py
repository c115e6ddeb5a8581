import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import ROOT

from eagle3.benchmark import builtin, measure
from eagle3.benchmark.baselines import acceptance_of, bigram, bigram_table, prompt_lookup
from eagle3.benchmark.builtin import ties
from eagle3.benchmark.measure import check, check_config
from eagle3.benchmark.statistics import Answer, Trial, acceptance, equality, speed
from eagle3.benchmark.suites import Question
from eagle3.checks import check_node
from eagle3.decode.speculate import Generation
from eagle3.draft.flash import FlashCPU
from eagle3.draft.model import Draft, DraftConfig
from eagle3.errors import ConfigError, RunError

torch.set_num_threads(1)


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


def make_draft(target):
    vocab_size, hidden = target.embedding.shape
    config = DraftConfig(hidden, 8, 2, 2, 4, vocab_size, vocab_size, hidden, 64)
    return Draft(
        config,
        FlashCPU,
        torch.ones(vocab_size, dtype=torch.bool),
        torch.zeros(vocab_size, dtype=torch.long),
    )


@pytest.fixture
def target():
    return Cycle()


def test_bigram_table_takes_the_most_frequent_successor():
    table = bigram_table(
        [torch.tensor([0, 1, 0, 2, 0, 2]), torch.tensor([1, 2, 1, 0]), torch.tensor([3])], 5
    )
    assert table.tolist() == [2, 0, 0, -1, -1]  # 1 -> 0 twice; 2 -> 0 and 2 -> 1 tie
    assert table.dtype == torch.int64


def test_bigram_chain_ends_where_no_successor_is_known():
    assert bigram([1, 2, -1], [7, 0], 5) == [1, 2]
    assert bigram([1, 0], [0], 3) == [1, 0, 1]


def slow_lookup(text, draft_length):
    for n in (3, 2, 1):
        for start in range(len(text) - n - 1, -1, -1):
            if text[start : start + n] == text[-n:]:
                return text[start + n : start + n + draft_length]
    return []


def test_prompt_lookup_equals_a_plain_search():
    random = torch.Generator().manual_seed(0)
    found = 0
    for _ in range(300):
        text = torch.randint(
            4, (int(torch.randint(1, 30, (), generator=random)),), generator=random
        ).tolist()
        assert prompt_lookup(text, 4) == slow_lookup(text, 4)
        found += bool(slow_lookup(text, 4))
    assert found > 200
    assert prompt_lookup([1, 2, 3, 9, 1, 2, 3], 2) == [9, 1]
    assert prompt_lookup([1, 2, 3], 2) == []


def test_acceptance_of_counts_rounds_as_decoding_does():
    answer = [5, 6, 7, 8, 9, 1]

    def perfect(text, length):
        return answer[len(text) - 2 :][:length]

    assert acceptance_of(perfect, [0, 0], answer, 2) == [3, 2]
    assert acceptance_of(perfect, [0, 0], answer, 8) == [5]
    assert acceptance_of(lambda text, length: [], [0, 0], answer, 2) == [1] * 5
    assert (
        acceptance_of(lambda text, length: [99, *perfect(text, length)[1:]], [0, 0], answer, 2)
        == [1] * 5
    )
    assert acceptance_of(perfect, [0, 0], [5], 2) == []
    text = [3, 5, 6, 7, 3]
    assert acceptance_of(prompt_lookup, text, [5, 6, 7, 3, 2], 3) == [4]


@pytest.mark.parametrize(
    "config", [[1, 5, 1, 6], [1, 1, 1, 2], [1, 0, 0, 0], [8, 0, 0, 0], [4, 7, 10, 60]]
)
def test_configs_that_can_run(config):
    check_config(config)


@pytest.mark.parametrize(
    "config",
    [
        [1, 3, 1, 5],
        [1, 0, 1, 1],
        [0, 3, 1, 4],
        [1, -1, 1, 0],
        [1, 1, 4, 6],
        [1, 3, 2, 1],
        [1, 3, 1],
        [],
        "1234",
    ],
)
def test_configs_that_cannot(config):
    with pytest.raises(ConfigError, match=r"^benchmark\.configs=[^\n]*\[?batch[^\n]*$"):
        check_config(config)


def test_yaml_fits_the_signature():
    node = yaml.safe_load((ROOT / "conf/benchmark/builtin.yaml").read_text())
    check_node(node, "benchmark")
    check(node["configs"], node["suites"], node["protocol"], node["system_prompt"], node["paths"])


def test_mistakes_before_anything_loads(tmp_path):
    configs, suites = [[1, 3, 1, 4]], ["heldout"]
    with pytest.raises(ConfigError, match="names a suite twice"):
        check(configs, ["heldout:2", "heldout:3"])
    with pytest.raises(
        ConfigError, match=r"benchmark\.protocol=eagel is unknown.*did you mean eagle"
    ):
        check(configs, suites, "eagel")
    for protocol in ("specforge", "eagle"):
        with pytest.raises(
            ConfigError, match=rf"benchmark\.system_prompt=be kind does not go with .*{protocol}"
        ):
            check(configs, suites, protocol, "be kind")
    with pytest.raises(ConfigError, match=r"benchmark\.paths\.gsm9k is no suite"):
        check(configs, suites, paths={"gsm9k": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"benchmark\.paths\.gsm8k=nowhere does not exist"):
        check(configs, suites, paths={"gsm8k": "nowhere"})


class Words:
    """A chat of characters, with a template that marks roles."""

    template = "roles"

    def encode_prompt(self, messages):
        messages = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        return [
            ord(c) for c in "".join(f"<{m['role'][0]}>{m['content']}" for m in messages) + "<a>"
        ]

    def decode(self, ids):
        return "".join(map(chr, ids))


class Job:
    """What the stage reads of `eagle3.pipeline.Run`."""

    def __init__(self, run_dir, target=None, eval_path=None):
        self.run_dir = self.prepared_path = run_dir
        self.target, self.chat, self.device = target, Words(), torch.device("cpu")
        data = SimpleNamespace(
            eval_path=eval_path, system_prompt="as prepared", chat_template="auto"
        )
        self.config = SimpleNamespace(seed=0, data=data, cache_dir=str(run_dir))

        class Prepared(list):
            def document(self, index):
                return index, self[index], None

        self.prepared = Prepared([torch.arange(10), torch.tensor([3, 5])])

    def read_draft(self):
        return make_draft(self.target)


class Echo:
    """An engine that repeats its prompt: `accepted` of `steps` drafts a round, `seconds` a token."""

    def __init__(self, config, log, accepted=1, seconds=0.01, broken=False):
        self.config, self.log, self.accepted, self.seconds, self.broken = (
            config,
            log,
            accepted,
            seconds,
            broken,
        )
        log.append(("open", config))

    def answer(self, prompts, max_new_tokens, stop=()):
        self.log.append(("answer", self.config, len(prompts), max_new_tokens, stop))
        return [self.one(prompt[:max_new_tokens]) for prompt in prompts]

    def one(self, ids):
        accepted = min(self.config[1], self.accepted)
        rounds = -(-(len(ids) - 1) // (accepted + 1))
        at = (
            [rounds if k < accepted else 0 for k in range(self.config[1])]
            if self.config[1]
            else None
        )
        ids = [*ids[:-1], ids[-1] + 1] if self.broken and self.config[1] else ids
        return Answer(ids, rounds, at, self.seconds * rounds, "".join(map(chr, ids)))

    def close(self):
        self.log.append(("close", self.config))


def rows_file(folder, *rows):
    path = folder / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def measured(
    folder, configs, suites, log=None, temperature=0.0, together=False, options=None, **echo
):
    log = [] if log is None else log
    engine = partial(Echo, log=log, **echo)
    return measure.run(
        Job(folder), engine, configs, suites, 40, temperature, together=together, **options or {}
    )


def test_every_config_beside_the_baseline_of_its_batch(tmp_path):
    suite = rows_file(tmp_path, *({"prompt": f"question {i}"} for i in range(5)))
    configs, log = [[1, 3, 1, 4], [2, 0, 0, 0], [2, 3, 4, 8]], []
    result = measured(tmp_path, configs, [f"{suite}:4"], log, options={"facts": {"runner": "echo"}})
    assert json.loads((tmp_path / "benchmark.json").read_text()) == result
    opened = [entry[1] for entry in log if entry[0] == "open"]
    assert opened == [[1, 0, 0, 0], [2, 0, 0, 0], [1, 3, 1, 4], [2, 3, 4, 8]], (
        "a server serves any batch"
    )
    one_by_one, at_once = ["open", *["answer"] * 5, "close"], ["open", "answer", "answer", "close"]
    assert [kind for kind, *_ in log] == [*one_by_one, *at_once] * 2, "one engine at a time"
    asked = [entry[2] for entry in log if entry[0] == "answer"]
    assert asked == [1, 1, 1, 1, 1, 2, 4] * 2, "a warm-up, then all; a batch is kept full"
    chain, alone, tree = result["suites"][suite]
    assert [row["config"] for row in (chain, alone, tree)] == configs and chain["num_prompts"] == 4
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
    (row,) = measured(tmp_path, [[10, 3, 1, 4]], [suite], seconds=60.0)["suites"][suite]
    assert row["tokens_per_second"] == pytest.approx(290 / 3)
    (row,) = measured(tmp_path, [[1, 3, 1, 4]], [suite], seconds=60.0)["suites"][suite]
    assert row["tokens_per_second"] == pytest.approx(290 / (10 * 15 * 60))


def test_an_engine_is_closed_when_it_fails(tmp_path):
    log = []

    class Dying(Echo):
        def one(self, ids):
            raise RunError("the engine died")

    with pytest.raises(RunError, match="died"):
        suite = rows_file(tmp_path, {"prompt": "question"})
        measure.run(
            Job(tmp_path), lambda config: Dying(config, log), [[1, 3, 1, 4]], [suite], 40, 0.0
        )
    assert log[-1] == ("close", [1, 0, 0, 0])


def test_what_was_measured_before_an_engine_failed_is_kept(tmp_path):
    suite = rows_file(tmp_path, {"prompt": "question"})

    def opener(config):
        if config[1] == 5:
            raise RunError("out of memory at start")
        return Echo(config, [])

    with pytest.raises(RunError, match="out of memory"):
        measure.run(Job(tmp_path), opener, [[1, 5, 1, 6], [1, 3, 1, 4]], [suite], 40, 0.0)
    rows = json.loads((tmp_path / "benchmark.json").read_text())["suites"][suite]
    assert [row["config"] for row in rows] == [[1, 3, 1, 4]]


def test_engines_of_a_batch_take_turns(tmp_path):
    suite, log = rows_file(tmp_path, *({"prompt": f"{i}"} for i in range(3))), []
    measured(tmp_path, [[2, 5, 1, 6], [2, 3, 1, 4]], [suite], log, together=True)
    steps = [entry[1][1] for entry in log if entry[0] == "answer"]
    assert steps == [0, 5, 3, 0, 5, 3, 3, 5, 0], (
        "warm-up, a group of two, a group of one in the other order"
    )
    assert [entry[2] for entry in log if entry[0] == "answer"] == [2] * 6 + [1] * 3


def test_the_second_question_follows_the_own_first_answer(tmp_path):
    path = rows_file(tmp_path, {"turns": ["one", "two"]}, {"turns": ["three"]})
    log, prompts = [], []

    class Recording(Echo):
        def answer(self, given, max_new_tokens, stop=()):
            prompts.append([Words().decode(ids) for ids in given])
            return super().answer(given, max_new_tokens, stop)

    measure.run(
        Job(tmp_path), lambda config: Recording(config, log), [[2, 0, 0, 0]], [path], 19, 0.0
    )
    assert prompts[1] == ["<s>as prepared<u>one<a>", "<s>as prepared<u>three<a>"]
    assert prompts[2] == ["<s>as prepared<u>one<a><s>as prepared<u>on<u>two<a>"]
    (row,) = json.loads((tmp_path / "benchmark.json").read_text())["suites"][path]
    assert row["num_prompts"] == 2, "a question with its turns counts once"


def test_sampling_checks_no_losslessness(tmp_path):
    suite = rows_file(tmp_path, {"prompt": "question"})
    (row,) = measured(tmp_path, [[1, 2, 1, 3]], [suite], temperature=1.0, broken=True)["suites"][
        suite
    ]
    assert row["lossless"] is None and "equal_answers" not in row
    (row,) = measured(tmp_path, [[1, 2, 1, 3]], [suite], broken=True)["suites"][suite]
    assert row["lossless"] is False and row["equal_answers"] == 0


def test_nothing_accepted_is_said(tmp_path, capsys):
    suite = rows_file(tmp_path, {"prompt": "question"})
    (row,) = measured(tmp_path, [[1, 2, 1, 3]], [suite], accepted=0)["suites"][suite]
    assert row["acceptance_length"] == 1 and "EAGLE, not EAGLE3" in row["warning"]
    assert "acceptance is exactly 1.0" in capsys.readouterr().out


def test_answers_are_scored(tmp_path):
    """The echo of the last number of the prompt is right where the question holds the answer."""
    rows = [{"question": f"What is {i}?", "answer": f"It is\n#### {i % 2}"} for i in range(4)]
    (tmp_path / "g.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = measure.run(
        Job(tmp_path),
        lambda config: Echo(config, []),
        [[1, 2, 1, 3]],
        ["gsm8k"],
        60,
        0.0,
        paths={"gsm8k": str(tmp_path / "g.jsonl")},
    )
    (row,) = result["suites"]["gsm8k"]
    (row,) = result["suites"]["gsm8k"]
    assert (row["score"], row["baseline_score"], row["num_scored"]) == (0.5, 0.5, 4)


def test_code_runs_only_where_that_was_asked_for(tmp_path, monkeypatch):
    paths, ran = {"humaneval": str(ROOT / "tests/data/suites/humaneval.jsonl")}, []
    monkeypatch.setattr(
        "eagle3.benchmark.scoring.passes", lambda source: ran.append(source) or True
    )
    for execute, times in ((False, 0), (True, 3)):
        result = measure.run(
            Job(tmp_path),
            lambda c: Echo(c, []),
            [[1, 2, 1, 3]],
            ["humaneval"],
            90,
            0.0,
            execute_code=execute,
            paths=paths,
        )
        (row,) = result["suites"]["humaneval"]
        assert len(ran) == times and ("score" in row) is execute


def test_builtin_reports_every_suite_and_config(tmp_path, target):
    (tmp_path / "heldout.jsonl").write_text(
        "".join(f'{{"id": "h{i}", "input_ids": [{i}, 3]}}\n' for i in range(3))
    )
    configs = ((1, 2, 1, 3), (1, 0, 0, 0))
    result = builtin.run(Job(tmp_path, target), configs, ("heldout:2",), 6, 0.0)
    assert json.loads((tmp_path / "benchmark.json").read_text()) == result
    row, alone = result["suites"]["heldout"]
    assert row["num_prompts"] == 2 and row["config"] == [1, 2, 1, 3] and row["lossless"] is True
    assert (
        row["bigram"] == 5 / 2
        and row["prompt_lookup"] == 1
        and len(row["accepted_by_position"]) == 2
    )
    assert (
        alone["acceptance_length"] == alone["bigram"] == 1 and alone["accepted_by_position"] == []
    )
    protocol = result["protocol"]
    assert protocol["suites"] == ["heldout:2"] and protocol["system_prompt"] == "as prepared"
    assert (
        protocol["drafting"] == "chain"
        and protocol["dtype"] == "float32"
        and protocol["threads"] == 1
    )
    assert "decode only" in protocol["timing"]


def test_builtin_runs_trees_and_batches(tmp_path, target):
    """Answers of 6 tokens to three prompts, two of them at a time, are those of the target alone at
    batch 1.
    """
    (tmp_path / "heldout.jsonl").write_text(
        "".join(f'{{"id": "h{i}", "input_ids": [{i}, 3]}}\n' for i in range(3))
    )
    configs = [[2, 2, 3, 6], [2, 2, 1, 3], [1, 2, 1, 3]]
    rows = builtin.run(Job(tmp_path, target), configs, ["heldout"], 6, 0.0)["suites"]["heldout"]
    assert [row["config"] for row in rows] == configs and all(
        row["lossless"] is True for row in rows
    )
    assert (
        rows[0]["acceptance_length"] >= rows[1]["acceptance_length"] == rows[2]["acceptance_length"]
    )
    decoder = builtin.Decoder(target, None, [2, 0, 0, 0], 0.0, 0, Words())
    answers = decoder.answer([[0, 3], [1, 9, 5], [7]], 4)
    assert [a.ids for a in answers] == [[4, 5, 6, 7], [6, 7, 8, 9], [8, 9, 10, 11]] and answers[
        0
    ].rounds == 3


def test_sampled_answers_do_not_share_their_luck(target):
    decoder = builtin.Decoder(target, None, [1, 0, 0, 0], 50.0, 0, Words())
    one, other = decoder.answer([[0, 3], [0, 3]], 8)
    assert one.ids != other.ids


def test_heldout_behind_another_system_prompt(tmp_path):
    target, path = Cycle(256), tmp_path / "eval.jsonl"
    path.write_text(json.dumps({"messages": turns("q")}) + "\n")
    arguments = [(1, 0, 0, 0)], ["heldout"], 3, 0.0, "be kind"
    result = builtin.run(Job(tmp_path, target, str(path)), *arguments)
    assert result["protocol"]["system_prompt"] == "be kind"
    with pytest.raises(ConfigError, match=r"heldout is tokenised .* set data\.eval_path"):
        builtin.run(Job(tmp_path, target), *arguments)


def turns(*contents):
    return [
        {"role": "user" if i % 2 == 0 else "assistant", "content": c}
        for i, c in enumerate(contents)
    ]


def trial(*answers, prompt=(0,), seconds=1.0):
    """A question answered by (ids, emitted, accepted) in turn."""
    read = builtin.Decoder(None, None, [1, 3, 1, 4], 0.0, 0, Words()).read
    answers = [
        read(Generation(list(ids), list(emitted), list(accepted), 0.5, seconds), ())
        for ids, emitted, accepted in answers
    ]
    return Trial(Question(), [list(prompt)] * len(answers), answers, seconds * len(answers))


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
    assert empty["acceptance_length"] is empty["interval95"] is None and empty[
        "accepted_by_position"
    ] == [None]


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
        trials = [
            trial((range(1 + sum(emitted)), emitted, [e - 1 for e in emitted]))
            for emitted in rounds
        ]
        low, high = acceptance(trials, 3, seed)["interval95"]
        covered += low <= 2.5 <= high
    assert 88 <= covered <= 100


def test_speed_counts_decoding_alone():
    alone, drafted = (
        trial((range(11), [], []), seconds=5.0),
        trial((range(11), [], []), seconds=1.0),
    )
    row = speed([drafted, drafted], [alone, alone], seed=0)
    assert row["tokens_per_second"] == 10 and row["baseline_tokens_per_second"] == 2
    assert row["speedup"] == 5 and row["speedup_interval95"] == pytest.approx([5, 5])


@pytest.mark.parametrize(
    "gap, second, expected",
    [(1e-6, 1, "tie"), (0.1, 1, False), (1e-6, 2, False), (1e-6, None, True)],
)
def test_lossless_or_tie(gap, second, expected):
    """The target likes tokens 0 and 1 after the second answer token, `gap` apart, and dislikes
    token 2.
    """
    logits = torch.tensor([[2.0, 2.0 - 2 * gap, -1.0]])
    texts = []

    def states(input_ids, position_ids):
        texts.append(input_ids.tolist())
        return None, torch.zeros(len(input_ids), 3)

    target = SimpleNamespace(
        embedding=torch.zeros(3, 3), states=states, lm_head=lambda last: logits
    )
    answers = [5, 6, 0, 7], [5, 6, 0, 7] if second is None else [5, 6, second, 8]
    alone, drafted = (trial((ids, [1] * 3, [0] * 3), prompt=(9, 9)) for ids in answers)
    row = equality([drafted, drafted], [alone, alone]) | ties(
        target, [drafted, drafted], [alone, alone]
    )
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
    whole = Generation([ord(c) for c in "abcdefgh"], [3, 3, 1], [2, 2, 0], 0.5, 3.0)
    cut = builtin.cut(whole, (stop,), Words())
    assert cut.ids == whole.ids[:length] and (cut.emitted, cut.accepted) == (emitted, accepted)
    assert cut.decode_seconds == len(emitted)
    decoder = builtin.Decoder(None, None, [1, 2, 1, 3], 0.0, 0, Words())
    assert decoder.read(cut, (stop,)).text == "abcdefgh".partition(stop)[0]
