"""Several processes through the one launcher: what they write, and who is heard when one fails."""

import json

import pytest
from conftest import run_command

pytestmark = pytest.mark.runs


@pytest.fixture(scope="module")
def command(target_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("launch")
    rows = [
        {"question": f"What is {i}?", "answer": "It is a number " * (1 + i % 5)} for i in range(24)
    ]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def command(*overrides):
        given = [
            "model=hf", f"model.path={target_folder}", "model.dtype=float32",
            "data=jsonl", f"data.path={folder / 'chat.jsonl'}",
            "data.max_length=96", "data.num_proc=1", "draft.vocab_size=300", "eval.num_prompts=3",
            "eval.batch_size=3", "eval.max_new_tokens=8", "mode=offline",
            "hidden_states.dtype=fp32", "target.batch_tokens=200", f"cache_dir={folder / 'cache'}",
            "launch.threads=1", "name=test",
        ]  # fmt: skip
        return run_command(*given, *overrides)

    return command


def test_two_processes_capture_what_one_does(command, tmp_path):
    for name, processes in {"one": 1, "two": 2}.items():
        done = command(
            "stages=[prepare,capture]",
            f"hidden_states.path={tmp_path / name}",
            f"hydra.run.dir={tmp_path / name}_run",
            f"launch.nproc_per_node={processes}",
        )
        assert done.returncode == 0, done.stderr[-2000:]
    for path in (tmp_path / "one").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_the_first_error_is_what_users_see(command, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.safetensors").write_bytes(b"")
    done = command(
        "stages=[prepare,capture]",
        f"hidden_states.path={tmp_path / 'other'}",
        "launch.nproc_per_node=2",
        f"hydra.run.dir={tmp_path / 'run'}",
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: hidden_states.path=")
