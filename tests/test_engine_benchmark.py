"""benchmark=sglang and vllm against a stand-in of their servers (`data/fake_engine.py`)."""

import json
import sys
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, compose_config, edit_model
from omegaconf import OmegaConf
from safetensors.torch import save_file
from transformers import LlamaConfig

from eagle3.benchmark import measure, served
from eagle3.benchmark.measure import benchmark, load_tasks
from eagle3.benchmark.request import Subject
from eagle3.benchmark.served import Served
from eagle3.benchmark.suites import Setup
from eagle3.checks import check_node
from eagle3.config import instantiate
from eagle3.engines.engine import Launch
from eagle3.engines.server import Server, choose_port
from eagle3.engines.sglang import Capture, SGLang
from eagle3.engines.vllm import VLLM
from eagle3.errors import ConfigError, RunError

runs = pytest.mark.runs
ENGINES = {"sglang": SGLang(), "vllm": VLLM()}
SHAPE = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "draft_vocab_size": 40}
SHAPE |= {"num_attention_heads": 2, "head_dim": 8}
PYTHON = f'#!/bin/sh\nexec {sys.executable} {ROOT / "tests/data/fake_engine.py"} "$@"\n'


@cache
def composed(name):
    return compose_config("model=hf", "model.path=x", f"benchmark={name}").benchmark


def section(name, **changed):
    """The section `benchmark`, as composed for benchmark=`name`."""
    given = {"suites": ["heldout"], "max_new_tokens": 11, "ready_seconds": 30}
    return OmegaConf.to_container(composed(name), resolve=True) | given | changed


@pytest.fixture(scope="session")
def python(tmp_path_factory):
    """The path of an executable that behaves as an interpreter with both engines."""
    path = tmp_path_factory.mktemp("engine") / "python"
    path.write_text(PYTHON)
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def subject(tmp_path):
    config = LlamaConfig(vocab_size=40, hidden_size=16, num_attention_heads=2)
    facts = {"path": "target", "dtype": "float32", "revision": None, "trust_remote_code": False}
    spec = SimpleNamespace(config=config, **facts)
    target = SimpleNamespace(spec=spec, device=torch.device("cpu"), close=lambda: None)
    draft = {"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama"}
    (tmp_path / "draft").mkdir()
    (tmp_path / "draft/config.json").write_text(json.dumps(draft | SHAPE))
    save_file({"norm.weight": torch.ones(16)}, tmp_path / "draft/model.safetensors")
    prompts = [{"id": f"p{first}", "input_ids": [first, 7]} for first in (0, 1, 2, 3, 1)]
    data = SimpleNamespace(eval_path=None, system_prompt=None, chat_template="auto", path="x")
    words = {"decode": lambda ids, **options: "".join(map(chr, ids))}
    tokenizer = SimpleNamespace(added_tokens_decoder={}, **words)
    chat = SimpleNamespace(template="", tokenizer=tokenizer, **words)
    prepared = SimpleNamespace(heldout=prompts)
    return Subject(tmp_path / "draft", target, chat, data, str(tmp_path), 0, prepared)


@pytest.fixture
def run(subject, tmp_path, monkeypatch):
    """run(name, python, configs, **section): benchmark.json's content; logs lie in tmp_path/run."""
    (tmp_path / "run").mkdir()
    # Naming the processor starts a process.
    monkeypatch.setattr(measure, "device_name", str)

    def run(name, python, configs=((1, 3, 1, 4),), **changed):
        configs = [list(config) for config in configs]
        given = section(name, configs=configs, python=python, **changed)
        request = instantiate(given)
        benchmark(request, load_tasks(request, subject), subject, tmp_path / "run")
        return json.loads((tmp_path / "run/benchmark.json").read_text())

    return run


@runs
@pytest.mark.parametrize("name", ENGINES)
def test_counts_speed_and_servers(name, run, subject, python, tmp_path):
    configs = [(1, 3, 1, 4), (2, 3, 1, 4), (2, 0, 0, 0)]
    closed = []
    subject.target.close = lambda: closed.append(list((tmp_path / "run").iterdir()))
    result = run(name, python, configs, mem_fraction_static=0.5, tp_size=2)
    assert closed == [[]], "the target's memory is freed before a server starts"
    one, two, alone = result["suites"]["heldout"]
    # 10 tokens after the prefill's, by prompts whose rounds commit 1, 2, 3, 4 and 2
    assert one["acceptance_length"] == two["acceptance_length"] == 50 / (10 + 5 + 4 + 3 + 5)
    # vLLM tells the order of rounds, so that what lies behind the end can be left out
    second, third = (6, 2) if name == "vllm" else (7, 3)
    assert one["accepted_by_position"] == [17 / 27, second / 27, third / 27]
    assert one["tokens_per_second"] == pytest.approx(400) and one["speedup"] == pytest.approx(4)
    assert one["lossless"] is True and one["num_prompts"] == one["truncated"] == 5
    assert alone["acceptance_length"] == 1 and alone["speedup"] == 1
    protocol = result["protocol"]
    assert (protocol["runner"], protocol["dtype"], protocol["tp_size"]) == (name, "float32", 2)
    assert protocol["version"] == {"sglang": "0.5.23", "vllm": "0.32.0"}[name]
    logs = {path.name: path.read_text() for path in (tmp_path / "run").glob("*.log")}
    drafting, baseline = f"{name}-3-1-4.log", f"{name}-0-0-0.log"
    assert sorted(logs) == [baseline, drafting], "another batch starts no server"
    assert "0.5" in logs[drafting] and str(subject.draft_folder) in logs[drafting]
    assert str(subject.draft_folder) not in logs[baseline]


@runs
@pytest.mark.parametrize("name", ENGINES)
def test_requests_under_way_and_their_order(name, subject, python, tmp_path):
    request = instantiate(section(name, configs=[[3, 0, 0, 0]], python=python))
    request.start(subject, tmp_path)
    for batch in (1, 3):
        request.open([batch, 0, 0, 0])
        prompts, counted = [[0, i] for i in range(6)], []
        request.count = counted.append
        answers = request.answer([batch, 0, 0, 0], prompts, Setup(2))
        assert counted == [2] * 6, "as each answer comes"
        assert [answer.ids for answer in answers] == [[i + 1, i + 2] for i in range(6)]
        assert request.get("/most").json()[0] == batch
    request.close()


FAILURES = {
    "--die-at-start": "model's architecture.*\n.*not supported",
    "--die-at-request": "ended with exit code 1: it is out of memory.*\n",
    "--refuse": r"400.*too long",
}


@runs
@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("flag", FAILURES)
def test_a_server_that_fails(name, run, python, flag, tmp_path, monkeypatch):
    if flag == "--refuse":
        monkeypatch.setattr(served, "DEATH_SECONDS", 0)
    with pytest.raises(RunError, match=f"(?s){FAILURES[flag]}"):
        run(name, python, server_args=[flag])
    assert not (tmp_path / "run/benchmark.json").exists()


@pytest.fixture
def address(python, tmp_path):
    """Starts a stand-in and gives its address."""
    modules = {"sglang": "sglang.launch_server", "vllm": "vllm.entrypoints.openai.api_server"}
    started = []

    def start(name, *flags):
        port = choose_port(None, "port")
        command = [python, "-m", modules[name], "--port", str(port), *flags]
        log = tmp_path / f"{len(started)}.log"
        server = Server(command, f"http://127.0.0.1:{port}", {}, log, 30)
        started.append(server.__enter__())
        return server.url

    yield start
    for server in started:
        server.close()


CHAIN = ("--speculative-num-steps", "2", "--speculative-eagle-topk", "1",
         "--speculative-num-draft-tokens", "3", "--speculative-algorithm")  # fmt: skip
SPECULATIVE = ("--speculative-config", '{"num_speculative_tokens": 2}')
DETAILED = ("--per-request-spec-decode-metrics", "detailed")
RUNNING = {  # how a server reports its speed, drafts, and says what it accepted
    "sglang": ("--enable-metrics", (*CHAIN, "EAGLE3"), ()),
    "vllm": ("--enable-per-request-metrics", SPECULATIVE, DETAILED),
}


@runs
@pytest.mark.parametrize("name", ENGINES)
def test_running_servers(name, run, address):
    timed, drafting, more = RUNNING[name]
    alone, url = address(name, timed), address(name, timed, *drafting, *more)
    result = run(name, None, [(2, 2, 1, 3)], url=f"{url}/v1", alone_url=alone)
    assert result["suites"]["heldout"][0]["acceptance_length"] == 50 / (10 + 5 + 4 + 4 + 5)
    protocol = result["protocol"]
    assert protocol["url"] == f"{url}/v1" and protocol["version"] is protocol["device"] is None
    for configs, drafts, words in (
        ([(1, 3, 1, 4)], url, r"= \[2, 1, 3\]; set benchmark.configs"),
        ([(1, 2, 1, 3)], alone, r"= \[0, 0, 0\]"),
    ):
        with pytest.raises(ConfigError, match=words):
            run(name, None, configs, url=drafts, alone_url=alone)


UNFIT = [
    ("sglang", ("--enable-metrics", *CHAIN, "EAGLE"), "drafts by EAGLE; the draft needs EAGLE3"),
    ("sglang", (*CHAIN, "EAGLE3"), "start it with --enable-metrics"),
    ("vllm", ("--enable-per-request-metrics", *SPECULATIVE), "metrics detailed"),
    ("sglang", None, r"no server answers at http://127\.0\.0\.1:9 "),
]


@runs
@pytest.mark.parametrize("name, flags, words", UNFIT)
def test_running_servers_that_do_not_fit(name, flags, words, run, address):
    url = address(name, *flags) if flags else "http://127.0.0.1:9"
    with pytest.raises(RunError, match=words):
        run(name, None, [(1, 2, 1, 3)], url=url, alone_url=address(name, RUNNING[name][0]))


SPECULATORS = {"architectures": "null", "speculators_model_type": "eagle3"}
SPECULATORS |= {"transformer_layer_config": SHAPE}
WRONG_DRAFTS = [
    ({"vocab_size": 41}, "vocab_size"),
    ({"target_hidden_size": 32}, "hidden"),
    ({"architectures": ["LlamaForCausalLM"]}, "architectures"),
    (SPECULATORS, "speculators"),
]


@pytest.mark.parametrize("change, words", WRONG_DRAFTS)
def test_a_draft_for_something_else(run, subject, python, tmp_path, change, words):
    edit_model(subject.draft_folder, change)
    with pytest.raises(RunError, match=words):
        run("sglang", python)
    assert not list((tmp_path / "run").iterdir())
    if change is SPECULATORS:
        vllm = instantiate(section("vllm"))
        vllm.check_draft(subject.draft_folder, subject.target.spec)


@runs
@pytest.mark.parametrize("name", ENGINES)
def test_settings_are_checked_before_anything_starts(name, python, monkeypatch, tmp_path):
    monkeypatch.setenv("ENGINES_DIR", str(tmp_path))
    check_node(section(name), "benchmark")
    given = section(name, python=python)
    Served.check_settings(given)
    Served.check_settings(given | {"python": None, "url": "http://a", "alone_url": "http://b"})
    with pytest.raises(ConfigError, match=rf"^{name} is not installed .* benchmark\.python="):
        Served.check_settings(given | {"python": None, "url": "http://a"})
    trees = given | {"configs": [[1, 3, 1, 4], [4, 7, 10, 60]]}
    if name == "sglang":
        return Served.check_settings(trees)
    with pytest.raises(ConfigError, match=r"configs=\[4, 7, 10, 60\] is a tree"):
        Served.check_settings(trees)


def test_a_vllm_answer_is_cut_where_it_ends():
    drafted = {"num_spec_steps": 2, "per_step_accepted": [3, 2]}
    reply = {"choices": [{"token_ids": [1] * 6, "text": "", "finish_reason": "length"}]}
    reply["metrics"] = {"generation_time_ms": 500, "speculative_decoding": drafted}
    answer = VLLM().read_reply(reply, 3)
    assert (answer.rounds, answer.emitted, answer.accepted_at) == (2, [4, 1], [2, 1, 1])
    reply["choices"][0]["token_ids"] = [1] * 9  # one round without a draft
    answer = VLLM().read_reply(reply, 3)
    assert (answer.rounds, answer.emitted, answer.accepted_at) == (3, [4, 3, 1], [2, 2, 1])
    assert answer.seconds == 0.5 and answer.truncated


def test_a_server_that_captures(subject):
    launch = Launch(subject.target.spec, "python", 1, server_args=("--log-level", "info"))
    capture = Capture("module:hook", {"root": "/dev/shm"}, [0, 15, 28], "cpu", 16384)
    line = SGLang().capture_command(launch, capture)
    flag = line.index("--return-aux-hidden-state-layer-ids")
    assert line[flag + 1 :] == ["0", "15", "28", "--log-level", "info"]
    hooks = json.loads(line[line.index("--forward-hooks") + 1])
    assert hooks[0]["hook_factory"] == "module:hook" and hooks[0]["config"]["root"] == "/dev/shm"
    assert "--disable-radix-cache" in line and "--trust-remote-code" not in line
    with pytest.raises(ConfigError, match="--pp-size=2 does not go with"):
        SGLang().capture_command(Launch(launch.model, "", 1, server_args=("--pp-size=2",)), capture)


ALL_TOKENS = {"sglang": {"top_k": -1, "max_new_tokens": 9}, "vllm": {"top_k": 0, "max_tokens": 9}}


@pytest.mark.parametrize("name", ENGINES)
def test_nothing_but_the_temperature_shapes_what_is_drawn(name):
    request = instantiate(section(name, temperature=0.5))

    async def post_all(bodies, batch, steps):
        return bodies

    request.post_all = post_all
    (body,) = request.answer([1, 0, 0, 0], [[4]], Setup(9, stop=("x",)))
    wanted = {"temperature": 0.5, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    wanted |= ALL_TOKENS[name] | {"stop": ["x"]}
    assert wanted.items() <= body.get("sampling_params", body).items() and [4] in body.values()


BLOCK = {"model_type": "qwen3", "num_hidden_layers": 1, "block_size": 4, "mask_token_id": 1}
BLOCK |= {"target_layer_ids": [1], "markov_rank": 2, "markov_head_type": "vanilla"}
KINDS = {
    "dflash": BLOCK | {"architectures": ["DFlashDraftModel"]},
    "dspark": BLOCK | {"architectures": ["Qwen3DSparkModel"]},
}
ASKED = {  # for three drafted tokens that are drawn where they can be; and whether they are
    ("sglang", "dflash"): ("DFLASH", {"num-draft-tokens": 4}, False),
    ("sglang", "dspark"): ("DSPARK", {"dspark-block-size": 3, "num-draft-tokens": 4}, True),
    ("vllm", "dflash"): ("dflash", {"num_speculative_tokens": 3}, True),
    ("vllm", "dspark"): ("dspark", {"num_speculative_tokens": 3}, True),
}


@pytest.mark.parametrize("name, kind", ASKED)
def test_what_engines_are_asked_for_a_block_drafter(name, kind):
    """SGLang draws for DSpark unasked, and says that a server which drafts blocks takes 1 step."""
    engine, (method, sizes, drawn) = ENGINES[name], ASKED[name, kind]
    assert engine.samples_drafts(kind, 1, True) == drawn
    options = engine.draft_options("D", kind, (3, 1, 4), drawn)
    if name == "vllm":
        given = {"method": method, "model": "D", "draft_sample_method": "probabilistic"}
        assert json.loads(options["--speculative-config"]) == given | sizes
        return
    given = {"algorithm": method, "draft-model-path": "D"} | sizes
    assert options == {f"--speculative-{flag}": value for flag, value in given.items()}
    info = {"algorithm": method, "num_steps": 1, "eagle_topk": 1, "num_draft_tokens": 4}
    info = {f"speculative_{key}": value for key, value in info.items()}
    answer = SimpleNamespace(status_code=200, url="http://a", json=lambda: info)
    assert engine.read_drafting(lambda path: answer, kind) == (3, 1, 4)
    with pytest.raises(RunError, match=f"drafts by {method}; the draft needs EAGLE3"):
        engine.read_drafting(lambda path: answer, "eagle3")


@runs
@pytest.mark.parametrize("name, kind", [("sglang", "dspark"), ("vllm", "dflash")])
def test_block_drafters_are_measured(name, kind, run, subject, python):
    """At no more tokens than a block has, and without branches."""
    edit_model(subject.draft_folder, KINDS[kind])
    row = run(name, python)["suites"]["heldout"][0]
    assert row["acceptance_length"] == 50 / (10 + 5 + 4 + 3 + 5) and row["lossless"]
    assert row["drafts"] == "greedy"
    refused = [(1, 5, 1, 6), (1, 2, 2, 4)] if name == "sglang" else [(1, 5, 1, 6)]
    for config in refused:
        with pytest.raises(
            ConfigError, match="this draft drafts blocks: topk must be 1, "
        ) as found:
            run(name, python, [config])
        assert str(found.value).startswith(f"benchmark.configs={[*config]}: ")


DRAWN = {"sglang": "--speculative-use-rejection-sampling", "vllm": '"probabilistic"'}


@runs
@pytest.mark.parametrize(
    ("name", "temperature", "draft_vocab_size", "config", "drafts"),
    [
        ("sglang", 1.0, 40, (1, 3, 1, 4), "sampled"),
        ("sglang", 0.0, 40, (1, 3, 1, 4), "greedy"),
        ("sglang", 1.0, 30, (1, 3, 1, 4), "greedy"),  # SGLang 0.5.23 does not start with the flag
        ("sglang", 1.0, 40, (1, 3, 2, 4), "greedy"),
        ("vllm", 1.0, 30, (1, 3, 1, 4), "sampled"),
        ("vllm", 0.0, 40, (1, 3, 1, 4), "greedy"),
    ],
)
def test_drafts_are_drawn_as_the_target_is(
    run, subject, python, tmp_path, name, temperature, draft_vocab_size, config, drafts
):
    """At a temperature a chain of the built-in decoder is; what each engine did is recorded."""
    edit_model(subject.draft_folder, {"draft_vocab_size": draft_vocab_size})
    result = run(name, python, [config], temperature=temperature)
    (log,) = (tmp_path / "run").glob(f"{name}-3-*.log")
    assert (DRAWN[name] in log.read_text()) == (drafts == "sampled")
    assert result["suites"]["heldout"][0]["drafts"] == drafts
    given = instantiate(section(name, python=python, temperature=temperature, url="http://a"))
    assert given.choice_of_drafts(config[1:]) is None


def test_the_built_in_decoder_says_how_it_drafts():
    given = {"suites": ["heldout"], "temperature": 1.0}
    request = instantiate(OmegaConf.to_container(composed("builtin")) | given)
    chain, tree = (3, 1, 4), (3, 2, 4)
    assert [request.choice_of_drafts(each) for each in (chain, tree)] == ["sampled", "greedy"]
    request.temperature = 0.0
    assert request.choice_of_drafts(chain) == "greedy"
