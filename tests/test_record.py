"""run.json: what a first start writes, what a resumed run keeps of it."""

import json
import subprocess

import torch

from eagle3.config import RunConfig
from eagle3.runs import record
from eagle3.runs.logger import REDACTED
from eagle3.runs.record import RunRecord, git_commit

CPU = torch.device("cpu")


def test_a_resumed_run_keeps_how_it_was_started(tmp_path):
    config = RunConfig(name="a run", seed=3, regenerate={"extra_body": {"api_key": "SESAME"}})
    first = RunRecord(config, tmp_path, ["seed=3", "hub.token=SESAME"], CPU)
    first.inputs["prepared"] = {"rows": 7}
    first.tracker_id = "id"
    first.write()
    resumed = RunRecord(config, tmp_path, ["train.resume=x"], CPU)
    assert (resumed.inputs, resumed.tracker_id) == ({"prepared": {"rows": 7}}, "id")
    resumed.inputs["generated"] = {"path": tmp_path}  # what JSON does not know is its text
    resumed.write()
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    content = json.loads((tmp_path / "run.json").read_text())
    assert content["overrides"] == ["seed=3", f"hub.token={REDACTED}"]
    assert content["resumed_with"] == ["train.resume=x"] and content["tracker_id"] == "id"
    assert content["config"]["regenerate"]["extra_body"] == {"api_key": REDACTED}
    assert content["seeds"] == {"seed": 3} and content["hardware"]["device"] == "cpu"
    assert content["inputs"] == {"prepared": {"rows": 7}, "generated": {"path": str(tmp_path)}}
    assert {"torch", "python"} <= content["versions"].keys()


def test_the_commit_says_whether_files_differ_from_it(tmp_path, monkeypatch):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    file = tmp_path / "record.py"
    monkeypatch.setattr(record, "__file__", str(file))
    assert git_commit() is None
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    file.write_text("1")
    subprocess.run([*git, "add", "-A"], check=True)
    subprocess.run([*git, "commit", "-qm", "one"], check=True)
    commit = git_commit()
    assert len(commit) == 40
    file.write_text("2")
    assert git_commit() == commit + "+"
