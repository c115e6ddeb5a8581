"""benchmark=sglang and benchmark=vllm against a stand-in of their servers (`data/fake_engine.py`)."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from transformers import LlamaConfig

from eagle3.benchmark import measure as benchmark_flow
from eagle3.benchmark import sglang, vllm
from eagle3.benchmark.served import Servers, check_draft
from eagle3.checks import check_node
from eagle3.errors import ConfigError, RunError

torch.set_num_threads(1)
CONF = Path(__file__).parents[1] / "conf/benchmark"
ENGINES = {"sglang": sglang, "vllm": vllm}


@pytest.fixture(scope="session")
def python(tmp_path_factory):
    """The path of an executable that behaves as an interpreter with both engines."""
    path = tmp_path_factory.mktemp("engine") / "python"
    path.write_text(
        f'#!/bin/sh\nexec {sys.executable} {Path(__file__).parent / "data/fake_engine.py"} "$@"\n'
    )
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def job(tmp_path):
    target = LlamaConfig(vocab_size=40, hidden_size=16, num_attention_heads=2)
    draft = {"architectures": ["LlamaForCausalLMEagle3"], "vocab_size": 40, "hidden_size": 16}
    (tmp_path / "draft").mkdir()
    (tmp_path / "draft/config.json").write_text(json.dumps(draft))
    prompts = [{"id": f"p{first}", "input_ids": [first, 7]} for first in (0, 1, 2, 3, 1)]
    (tmp_path / "heldout.jsonl").write_text(
        "".join(json.dumps(prompt) + "\n" for prompt in prompts)
    )
    model = SimpleNamespace(path=str(tmp_path / "target"), revision=None, trust_remote_code=False)
    data = SimpleNamespace(eval_path=None, system_prompt=None, chat_template="auto")
    job = SimpleNamespace(
        config=SimpleNamespace(model=model, data=data, seed=0, cache_dir=str(tmp_path)),
        device=torch.device("cpu"),
        target_dtype="float32",
        target_config=target,
        draft_folder=tmp_path / "draft",
        prepared_path=tmp_path,
        run_dir=tmp_path / "run",
        chat=SimpleNamespace(template="", tokenizer=None),
        let_go_of_target=lambda: None,
    )
    job.run_dir.mkdir()
    return job


def run(name, job, python, configs=((1, 3, 1, 4),), **more):
    return ENGINES[name].run(
        job, configs, ["heldout"], 11, 0.0, python=python, ready_seconds=30, **more
    )


@pytest.mark.parametrize("name", ENGINES)
def test_counts_speed_and_servers(name, job, python):
    configs = [(1, 3, 1, 4), (2, 3, 1, 4), (2, 0, 0, 0)]
    result = run(name, job, python, configs, mem_fraction_static=0.5, tp_size=2)
    assert json.loads((job.run_dir / "benchmark.json").read_text())["suites"] == result["suites"]
    one, two, alone = result["suites"]["heldout"]
    # 10 tokens after the prefill's, by prompts whose rounds commit 1, 2, 3, 4 and 2
    assert one["acceptance_length"] == two["acceptance_length"] == 50 / (10 + 5 + 4 + 3 + 5)
    low, high = one["interval95"]
    assert 1 <= low < 50 / 27 < high <= 4
    cut = (
        name == "vllm"
    )  # which tells the order of rounds, so that what lies behind the end can be left out
    assert one["accepted_by_position"] == [17 / 27, (6 if cut else 7) / 27, (2 if cut else 3) / 27]
    assert one["tokens_per_second"] == pytest.approx(400) and one["speedup"] == pytest.approx(4)
    assert one["lossless"] is True and one["num_prompts"] == 5
    assert alone["acceptance_length"] == 1 and alone["speedup"] == 1
    assert "warning" not in one
    protocol = result["protocol"]
    assert (protocol["runner"], protocol["dtype"], protocol["tp_size"]) == (name, "float32", 2)
    assert protocol["version"] == {"sglang": "0.5.23", "vllm": "0.32.0"}[name]
    logs = {path.name: path.read_text() for path in job.run_dir.glob("*.log")}
    assert sorted(logs) == [
        f"{name}-0-0-0.log",
        f"{name}-3-1-4.log",
    ]  # the batch alone starts no server
    assert "0.5" in logs[f"{name}-3-1-4.log"] and str(job.draft_folder) in logs[f"{name}-3-1-4.log"]
    assert str(job.draft_folder) not in logs[f"{name}-0-0-0.log"]


@pytest.mark.parametrize("name", ENGINES)
def test_requests_under_way_and_their_order(name, job, python):
    seen = []

    def measure(job, opener, *rest):
        for batch in (1, 3):
            client = opener([batch, 0, 0, 0])
            seen.append([answer.ids for answer in client.answer([[0, i] for i in range(6)], 2)])
            seen.append(client.get("/most").json()[0])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark_flow, "run", measure)
        run(name, job, python, [(3, 0, 0, 0)])
    assert seen[0] == seen[2] == [[i + 1, i + 2] for i in range(6)]
    assert seen[1] == 1 and seen[3] == 3


@pytest.mark.parametrize("name", ENGINES)
def test_nothing_accepted_is_said(name, job, python, capsys):
    (job.prepared_path / "heldout.jsonl").write_text('{"id": "p", "input_ids": [0, 7]}\n')
    (row,) = run(name, job, python)["suites"]["heldout"]
    assert row["acceptance_length"] == 1 and "Usual causes" in row["warning"]
    assert "acceptance is exactly 1.0" in capsys.readouterr().out


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize(
    "flag, words",
    [
        ("--die-at-start", "model's architecture.*\n.*not supported"),
        ("--die-at-request", "ended with exit code 1: it is out of memory.*\n"),
        ("--refuse", r"refused a request \(HTTP 400\).*too long"),
    ],
)
def test_a_server_that_fails(name, job, python, flag, words):
    with pytest.raises(RunError, match=f"(?s){words}"):
        run(name, job, python, server_args=[flag])
    assert not (job.run_dir / "benchmark.json").exists()


@pytest.fixture
def address(job, python):
    """Starts a stand-in and gives its address."""
    started = []

    def start(name, *flags):
        module = {"sglang": "sglang.launch_server", "vllm": "vllm.entrypoints.openai.api_server"}[
            name
        ]
        command = lambda port, drafting: [python, "-m", module, "--port", str(port), *flags]  # noqa: E731
        servers = Servers(
            SimpleNamespace(name="fake"),
            command,
            None,
            None,
            None,
            job.run_dir / str(len(started)),
            30,
            30,
        )
        started.append(servers)
        return servers([1, 0, 0, 0]).url

    yield start
    for servers in started:
        servers.close()


def test_running_sglang_servers(job, address):
    drafting = [
        "--speculative-num-steps",
        "2",
        "--speculative-eagle-topk",
        "1",
        "--speculative-num-draft-tokens",
        "3",
    ]
    alone = address("sglang", "--enable-metrics")
    with_draft = address(
        "sglang", "--enable-metrics", "--speculative-algorithm", "EAGLE3", *drafting
    )
    result = run("sglang", job, None, [(2, 2, 1, 3)], url=f"{with_draft}/v1", alone_url=alone)
    assert result["suites"]["heldout"][0]["acceptance_length"] == 50 / (10 + 5 + 4 + 4 + 5)
    assert result["protocol"]["url"] == f"{with_draft}/v1" and result["protocol"]["version"] is None
    with pytest.raises(
        ConfigError, match=r"configs=\[1, 3, 1, 4\] .* = \[2, 1, 3\]; set benchmark.configs to that"
    ):
        run("sglang", job, None, url=with_draft, alone_url=alone)
    with pytest.raises(ConfigError, match=r"= \[0, 0, 0\]"):
        run("sglang", job, None, url=alone, alone_url=alone)
    eagle = address("sglang", "--enable-metrics", "--speculative-algorithm", "EAGLE", *drafting)
    with pytest.raises(RunError, match=r"algorithm EAGLE; an EAGLE3 draft needs EAGLE3"):
        run("sglang", job, None, [(1, 2, 1, 3)], url=eagle, alone_url=alone)
    with pytest.raises(RunError, match="start it with --enable-metrics"):
        run("sglang", job, None, url=with_draft, alone_url=address("sglang"))


def test_running_vllm_servers(job, address):
    timed = "--enable-per-request-metrics"
    drafting = ["--speculative-config", '{"num_speculative_tokens": 2}']
    alone = address("vllm", timed)
    detailed = address("vllm", timed, *drafting, "--per-request-spec-decode-metrics", "detailed")
    result = run("vllm", job, None, [(1, 2, 1, 3)], url=detailed, alone_url=alone)
    assert result["suites"]["heldout"][0]["acceptance_length"] == 50 / (10 + 5 + 4 + 4 + 5)
    with pytest.raises(ConfigError, match=r"= \[2, 1, 3\]; set benchmark.configs to that"):
        run("vllm", job, None, url=detailed, alone_url=alone)
    with pytest.raises(RunError, match="per-request-spec-decode-metrics detailed"):
        run(
            "vllm",
            job,
            None,
            [(1, 2, 1, 3)],
            url=address("vllm", timed, *drafting),
            alone_url=alone,
        )


def test_nobody_at_an_address(job, python):
    with pytest.raises(RunError, match=r"no server answers at http://127\.0\.0\.1:9/"):
        run("sglang", job, python, url="http://127.0.0.1:9", alone_url="http://127.0.0.1:9")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"vocab_size": 41}, "is for a target with vocab_size=41, not 40"),
        ({"target_hidden_size": 32}, "is for a target with hidden_size=32, not 16"),
        ({"architectures": ["LlamaForCausalLM"]}, r"is no EAGLE3 draft: .*\['LlamaForCausalLM'"),
    ],
)
def test_a_draft_for_something_else(job, python, change, words):
    path = job.draft_folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(RunError, match=words):
        run("vllm", job, python)
    assert not list(job.run_dir.iterdir())


def test_a_draft_in_the_form_of_speculators(job):
    values = {
        "speculators_model_type": "eagle3",
        "transformer_layer_config": {"vocab_size": 40, "hidden_size": 16},
    }
    (job.draft_folder / "config.json").write_text(json.dumps(values))
    check_draft(job.draft_folder, job.target_config, "vLLM", speculators=True)
    with pytest.raises(RunError, match="form of speculators, which SGLang does not read"):
        check_draft(job.draft_folder, job.target_config, "SGLang", speculators=False)


@pytest.mark.parametrize("name", ENGINES)
def test_settings_are_checked_before_anything_starts(name, python):
    check_settings, configs = ENGINES[name].check_settings, [[4, 3, 1, 4], [1, 0, 0, 0]]
    check_settings({"configs": configs, "python": python})
    check_settings(
        {"configs": configs, "url": "http://127.0.0.1:1", "alone_url": "http://127.0.0.1:2"}
    )
    with pytest.raises(
        ConfigError, match=rf"^{name} is not installed for .*engines\.sh and set benchmark\.python="
    ):
        check_settings({"configs": configs, "url": "http://127.0.0.1:1"})


def test_vllm_refuses_trees():
    with pytest.raises(ConfigError, match=r"configs=\[4, 7, 10, 60\] is a tree"):
        vllm.check_settings({"configs": [[1, 3, 1, 4], [4, 7, 10, 60]]})


def test_a_vllm_answer_is_cut_where_it_ends():
    drafted = {"num_spec_steps": 2, "per_step_accepted": [3, 2]}
    reply = {"choices": [{"token_ids": [1] * 6, "text": ""}]}
    reply["metrics"] = {"generation_time_ms": 500, "speculative_decoding": drafted}
    answer = vllm.read(reply, 3)
    assert (answer.rounds, answer.emitted, answer.accepted_at) == (2, [4, 1], [2, 1, 1])
    reply["choices"][0]["token_ids"] = [1] * 9  # one round without a draft
    answer = vllm.read(reply, 3)
    assert (answer.rounds, answer.emitted, answer.accepted_at) == (3, [4, 3, 1], [2, 2, 1])
    assert answer.seconds == 0.5


@pytest.mark.parametrize("name", ENGINES)
def test_yaml_fits_the_signature(name):
    node = OmegaConf.load(CONF / f"{name}.yaml")
    assert node.pop("defaults") == ["builtin", "_self_"]
    check_node(
        OmegaConf.to_container(OmegaConf.merge(OmegaConf.load(CONF / "builtin.yaml"), node)),
        "benchmark",
    )
