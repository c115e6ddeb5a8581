import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from eagle3.benchmark import builtin
from eagle3.benchmark.baselines import acceptance_of, bigram, bigram_table, prompt_lookup
from eagle3.benchmark.builtin import Trial, acceptance, benchmark, draft_length, losslessness, run, speed
from eagle3.benchmark.suites import Prompt, load, parse
from eagle3.checks import check_node
from eagle3.decode import Generation
from eagle3.draft.attention import FlashCPU
from eagle3.draft.model import Draft, DraftConfig
from eagle3.errors import ConfigError, RunError

torch.set_num_threads(1)


class Cycle:
    """A target that counts 0, 1, ..., V - 1, 0, ...: next token = token + 1."""

    def __init__(self, vocab_size=40):
        self.embedding = torch.eye(vocab_size)
        self.eos_token_ids = set()

    def states(self, input_ids, position_ids, cache=None):
        last = self.embedding[(input_ids + 1) % len(self.embedding)]
        return last.repeat(1, 3), last

    def lm_head(self, last):
        return last @ self.embedding.T


def make_draft(target):
    vocab_size, hidden = target.embedding.shape
    config = DraftConfig(hidden, 8, 2, 2, 4, vocab_size, vocab_size, hidden, 64)
    return Draft(config, FlashCPU, torch.ones(vocab_size, dtype=torch.bool), torch.zeros(vocab_size, dtype=torch.long))


@pytest.fixture
def target():
    return Cycle()


@pytest.fixture
def prompts():
    return [Prompt(f"p{i}", "one" if i < 3 else "two", torch.arange(i, i + 4)) for i in range(5)]


def generation(ids, emitted, accepted=(), seconds=1.0):
    return Generation(ids, list(emitted), list(accepted), 0.5, seconds)


def test_bigram_table_takes_the_most_frequent_successor():
    table = bigram_table([torch.tensor([0, 1, 0, 2, 0, 2]), torch.tensor([1, 2, 1, 0]), torch.tensor([3])], 5)
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
        text = torch.randint(4, (int(torch.randint(1, 30, (), generator=random)),), generator=random).tolist()
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
    assert acceptance_of(lambda text, length: [99, *perfect(text, length)[1:]], [0, 0], answer, 2) == [1] * 5
    assert acceptance_of(perfect, [0, 0], [5], 2) == []
    text = [3, 5, 6, 7, 3]
    assert acceptance_of(prompt_lookup, text, [5, 6, 7, 3, 2], 3) == [4]


@pytest.mark.parametrize("spec, parsed", [("heldout:48", ("heldout", 48)), ("heldout", ("heldout", None))])
def test_parse(spec, parsed):
    assert parse(spec) == parsed


@pytest.mark.parametrize("spec", ["heldut:3", "heldout:0", "heldout:x", "heldout:", "heldout:-1"])
def test_parse_names_what_is_wrong(spec):
    with pytest.raises(ConfigError, match=rf"^benchmark\.suites={spec} .*[^\n]*$"):
        parse(spec)


class Words:
    """A chat of characters, with a template that marks roles."""

    def encode_prompt(self, messages):
        messages = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        return [ord(c) for c in "".join(f"<{m['role'][0]}>{m['content']}" for m in messages) + "<a>"]


def text_of(prompt):
    return "".join(map(chr, prompt.input_ids.tolist()))


def turns(*contents):
    return [{"role": "user" if i % 2 == 0 else "assistant", "content": c} for i, c in enumerate(contents)]


def test_heldout_prompts_end_with_the_question(tmp_path):
    path = tmp_path / "eval.jsonl"
    path.write_text("".join(json.dumps({"messages": turns(*t)}) + "\n" for t in (["q", "r"], ["q", "r", "s"], ["x"])))
    prompts = load(["heldout:2"], Words(), str(path))
    assert [text_of(p) for p in prompts] == ["<u>q<a>", "<u>q<a>r<u>s<a>"]
    assert [(p.id, p.suite) for p in prompts] == [("eval.jsonl:1", "heldout"), ("eval.jsonl:2", "heldout")]
    assert len(load(["heldout"], Words(), str(path))) == len(load(["heldout:9"], Words(), str(path))) == 3
    assert text_of(load(["heldout:1"], Words(), str(path), "be kind")[0]) == "<s>be kind<u>q<a>"


def test_heldout_prompts_that_come_tokenised(tmp_path):
    path = tmp_path / "heldout.jsonl"
    path.write_text(json.dumps({"id": "a:7", "input_ids": [4, 5]}) + "\n")
    (prompt,) = load(["heldout:8"], Words(), str(path))
    assert (prompt.id, prompt.input_ids.tolist()) == ("a:7", [4, 5])
    with pytest.raises(ConfigError, match=r"benchmark\.system_prompt .* a:7"):
        load(["heldout"], Words(), str(path), "be kind")


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"messages": []}', '{"input_ids": [1]}', "3"])
def test_a_broken_row_is_named(tmp_path, line):
    path = tmp_path / "eval.jsonl"
    path.write_text(json.dumps({"messages": turns("q")}) + "\n" + line + "\n")
    with pytest.raises(RunError, match=r"eval\.jsonl, line 2"):
        load(["heldout"], Words(), str(path))


@pytest.mark.parametrize("config, steps", [([1, 5, 1, 6], 5), ([1, 1, 1, 2], 1), ([1, 0, 0, 0], 0)])
def test_configs_of_chains(config, steps):
    assert draft_length(config) == steps


@pytest.mark.parametrize(
    "config", [[4, 3, 1, 4], [1, 7, 10, 60], [1, 3, 1, 5], [1, 0, 1, 1], [1, 3, 1], [1, -1, 1, 0], []]
)
def test_configs_that_need_an_engine(config):
    with pytest.raises(ValueError, match=r"^benchmark\.configs=.* trees need an engine[^\n]*$"):
        draft_length(config)


def test_yaml_fits_the_signature():
    node = yaml.safe_load((Path(__file__).parents[1] / "conf/benchmark/builtin.yaml").read_text())
    check_node(node, "benchmark")
    assert [draft_length(config) for config in node["configs"]] == [5]
    assert [parse(spec) for spec in node["suites"]] == [("heldout", 48)]


def test_run_reports_every_suite_and_config(target, prompts):
    seen = []

    def progress(prompts):
        for prompt in prompts:
            seen.append(prompt.id)
            yield prompt

    configs = [[1, 3, 1, 4], [1, 0, 0, 0]]
    successors = (torch.arange(40) + 1) % 40
    result = benchmark(target, make_draft(target), prompts, configs, 12, 0.0, successors, progress=progress)
    assert seen == [p.id for p in prompts]
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert {suite: [row["config"] for row in rows] for suite, rows in result["suites"].items()} == {
        "one": configs,
        "two": configs,
    }
    chain, alone = result["suites"]["one"]
    assert (chain["num_prompts"], result["suites"]["two"][0]["num_prompts"]) == (3, 2)
    assert chain["bigram"] == 11 / 3 and chain["prompt_lookup"] == 1  # 11 tokens: rounds of 4, 4, 3; nothing repeats
    assert chain["lossless"] is True and alone["lossless"] is True
    assert alone["acceptance_length"] == alone["bigram"] == 1 and alone["accepted_by_position"] == []
    assert len(chain["accepted_by_position"]) == 3
    assert chain["speedup"] == pytest.approx(chain["tokens_per_second"] / chain["baseline_tokens_per_second"])
    protocol = result["protocol"]
    assert protocol["drafting"] == "chain" and protocol["dtype"] == "float32" and protocol["threads"] == 1
    assert "decode only" in protocol["timing"]


def test_sampling_checks_no_losslessness(target, prompts):
    result = benchmark(target, make_draft(target), prompts[:1], [[1, 2, 1, 3]], 6, 1.0)
    assert result["suites"]["one"][0]["lossless"] is None
    assert "bigram" not in result["suites"]["one"][0]


class Job:
    """What the stage reads of `eagle3.pipeline.Run`."""

    def __init__(self, run_dir, target, eval_path=None):
        self.run_dir = self.prepared_path = run_dir
        self.target, self.chat = target, Words()
        data = SimpleNamespace(eval_path=eval_path, system_prompt="as prepared")
        self.config = SimpleNamespace(seed=0, data=data)

        class Prepared(list):
            def document(self, index):
                return index, self[index], None

        self.prepared = Prepared([torch.arange(10), torch.tensor([3, 5])])


def test_stage_writes_benchmark_json(tmp_path, target):
    (tmp_path / "heldout.jsonl").write_text("".join(f'{{"id": "h{i}", "input_ids": [{i}, 3]}}\n' for i in range(3)))
    result = run(Job(tmp_path, target), make_draft(target), ((1, 2, 1, 3),), ("heldout:2",), 6, 0.0)
    assert json.loads((tmp_path / "benchmark.json").read_text()) == result
    (row,) = result["suites"]["heldout"]
    assert row["num_prompts"] == 2 and row["config"] == [1, 2, 1, 3] and row["lossless"] is True
    assert row["bigram"] == 5 / 2
    assert result["protocol"]["suites"] == ["heldout:2"] and result["protocol"]["system_prompt"] == "as prepared"


def test_stage_puts_its_own_system_prompt_before_conversations(tmp_path):
    target, path = Cycle(256), tmp_path / "eval.jsonl"
    path.write_text(json.dumps({"messages": turns("q")}) + "\n")
    arguments = [(1, 0, 0, 0)], ["heldout"], 3, 0.0, "be kind"
    result = run(Job(tmp_path, target, str(path)), make_draft(target), *arguments)
    assert result["protocol"]["system_prompt"] == "be kind"
    with pytest.raises(ConfigError, match=r"^benchmark\.system_prompt needs data\.eval_path"):
        run(Job(tmp_path, target), make_draft(target), *arguments)


def test_stage_refuses_configs_before_it_loads_anything():
    with pytest.raises(ConfigError, match=r"benchmark\.configs=\[8, 3, 1, 4\]"):
        run(None, None, [[1, 3, 1, 4], [8, 3, 1, 4]], ["heldout"], 6, 0.0)


def test_baseline_and_draft_take_turns(target, prompts, monkeypatch):
    calls = []

    def answer(input_ids, steps, max_new_tokens):
        calls.append((int(input_ids[0]), steps, max_new_tokens))
        return generation([1], [])

    list(builtin.measure(answer, prompts[:2], [5, 3], 96))
    assert calls[:3] == [(0, 0, 8), (0, 5, 8), (0, 3, 8)]
    assert calls[3:] == [(0, 0, 96), (0, 5, 96), (0, 3, 96), (1, 3, 96), (1, 5, 96), (1, 0, 96)]


def trials_of(generations):
    return [Trial(Prompt("p", "s", torch.tensor([0])), generation(g.ids, []), g) for g in generations]


def test_acceptance_figures():
    generations = [
        generation(list(range(8)), [4, 2, 1], [3, 1, 0]),
        generation([3] * 40, [4] * 9 + [3], [3] * 10),
        generation([9], []),
    ]
    row = acceptance(trials_of(generations), 3, seed=0)
    assert row["acceptance_length"] == 46 / 13
    assert row["loops"] == 1 and row["acceptance_length_loop_free"] == 7 / 3
    assert row["first_round"] == 4
    assert row["accepted_by_position"] == [12 / 13, 11 / 13, 11 / 13]
    low, high = row["interval95"]
    assert low == pytest.approx(7 / 3) and high == pytest.approx(3.9)
    assert acceptance(trials_of(generations), 3, seed=0) == row
    empty = acceptance(trials_of([generation([9], [])]), 1, seed=0)
    assert empty["acceptance_length"] is empty["interval95"] is None and empty["accepted_by_position"] == [None]


def test_interval_covers_the_mean_as_often_as_it_says():
    random, covered = torch.Generator().manual_seed(0), 0
    for seed in range(100):
        rounds = torch.randint(1, 5, (40, 6), generator=random).tolist()
        generations = [
            generation(list(range(1 + sum(emitted))), emitted, [e - 1 for e in emitted]) for emitted in rounds
        ]
        low, high = acceptance(trials_of(generations), 4, seed)["interval95"]
        covered += low <= 2.5 <= high
    assert 88 <= covered <= 100


def test_speed_counts_decoding_alone():
    trial = Trial(
        Prompt("p", "s", torch.tensor([0])),
        generation(list(range(11)), [], seconds=5.0),
        generation(list(range(11)), []),
    )
    row = speed([trial, trial], seed=0)
    assert row["tokens_per_second"] == 10 and row["baseline_tokens_per_second"] == 2
    assert row["speedup"] == 5 and row["speedup_interval95"] == pytest.approx([5, 5])


@pytest.mark.parametrize(
    "gap, second, expected", [(1e-6, 1, "tie"), (0.1, 1, False), (1e-6, 2, False), (1e-6, None, True)]
)
def test_lossless_or_tie(gap, second, expected):
    """The target likes tokens 0 and 1 after the second answer token, `gap` apart, and dislikes token 2."""
    logits = torch.tensor([[2.0, 2.0 - 2 * gap, -1.0]])
    texts = []

    def states(input_ids, position_ids):
        texts.append(input_ids.tolist())
        return None, torch.zeros(len(input_ids), 3)

    target = SimpleNamespace(embedding=torch.zeros(3, 3), states=states, lm_head=lambda last: logits)
    drafted = [5, 6, 0, 7] if second is None else [5, 6, second, 8]
    trial = Trial(Prompt("p", "s", torch.tensor([9, 9])), generation([5, 6, 0, 7], []), generation(drafted, []))
    row = losslessness(target, [trial, trial])
    assert row["lossless"] == expected
    if expected is True:
        assert row == {"lossless": True} and texts == []
    else:
        assert texts[0] == [9, 9, 5, 6]
        assert row["tie_gap"] == pytest.approx(1.5 if second == 2 else gap, rel=0.2)


def test_an_answer_that_stops_early_is_not_lossless():
    target = SimpleNamespace(embedding=torch.zeros(3, 3))
    trial = Trial(Prompt("p", "s", torch.tensor([9])), generation([5, 6, 0], []), generation([5, 6], []))
    assert losslessness(target, [trial])["lossless"] is False
    assert math.isinf(losslessness(target, [trial])["tie_gap"])
