"""metrics.jsonl across resumes, what counts as a secret, and a real offline W&B run read back from
its files.
"""

import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from eagle3.runs import logger
from eagle3.runs.logger import REDACTED, JsonLines, NoTracker, Wandb, read_metrics, redact

ROOT = Path(__file__).parents[1]


def test_each_line_is_on_disk_when_log_returns(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.log({"loss": 2.5, "eval/accepted": [0.5, math.nan]}, 1)
    lines.log({"loss": math.nan, "grad_norm": math.inf}, 2)
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert written == [
        {"step": 1, "loss": 2.5, "eval/accepted": [0.5, None]},
        {"step": 2, "loss": None, "grad_norm": None},
    ]
    lines.close()


def test_resume_drops_later_lines_and_a_cut_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path)
    for step in range(1, 6):
        lines.log({"loss": float(step)}, step)
    lines.log({"eval/acceptance_length": 2.0}, 3)
    lines.close()
    with path.open("a") as file:
        file.write('{"step": 6, "lo')
    resumed = JsonLines(path, resume_step=3)
    resumed.log({"loss": 40.0}, 4)
    resumed.close()
    assert [(row["step"], row.get("loss")) for row in read_metrics(path)] == [
        (1, 1.0), (2, 2.0), (3, 3.0), (3, None), (4, 40.0),
    ]  # fmt: skip
    assert path.read_text().count("\n") == 5
    assert list(tmp_path.iterdir()) == [path]


def test_a_cut_last_line_is_not_glued_to_the_next(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 2.0')
    lines = JsonLines(path, resume_step=9)
    lines.log({"loss": 3.0}, 3)
    lines.close()
    assert [row["step"] for row in read_metrics(path)] == [1, 3]


def test_a_new_run_starts_its_file_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n')
    JsonLines(path).close()
    assert read_metrics(path) == []


def test_no_file_no_metrics(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


SECRET_KEYS = (
    "token", "HF_TOKEN", "hfToken", "access_token", "auth_tokens", "use_auth_token", "developer_token", "client_secret",
    "db_password", "passwd", "api_key", "apiKey", "api-key", "openai_api_key", "credentials", "aws_credentials_file",
    "aws_secret_access_key", "private_key", "hub.token", "Authorization", "secret_tokens",
)  # fmt: skip
ORDINARY_KEYS = (
    "tokens_per_step", "max_new_tokens", "eos_token_ids", "eos_token_id", "eos_token", "pad_token", "mask_token",
    "chat_template", "tokens_per_second", "tokenizer_path", "supervised_tokens", "token_ids", "bytes_per_token",
    "embedding_key", "num_key_value_heads", "key", "author", "special_tokens", "token_type_ids", "tokens", "monkey",
)  # fmt: skip


def test_what_counts_as_a_secret():
    assert redact(dict.fromkeys(SECRET_KEYS, "x")) == dict.fromkeys(SECRET_KEYS, REDACTED)
    assert redact([f"{key}=a b" for key in SECRET_KEYS]) == [
        f"{key}={REDACTED}" for key in SECRET_KEYS
    ]
    ordinary = dict.fromkeys(ORDINARY_KEYS, "x")
    assert redact(ordinary) == ordinary
    assert redact([f"{key}=x" for key in ORDINARY_KEYS]) == [f"{key}=x" for key in ORDINARY_KEYS]


def test_redact_keeps_everything_but_secrets():
    config = {
        "train": {"tokens_per_step": 2048, "betas": [0.9, 0.95]},
        "model": {"eos_token": "</s>", "hf_token": "abc", "keys": [{"password": 17}, "x"]},
        "hub": {"token": None, "credentials": {"user": "a", "pass": "b"}},
    }
    before = json.dumps(config)
    redacted = redact(config)
    assert redacted == {
        "train": {"tokens_per_step": 2048, "betas": [0.9, 0.95]},
        "model": {"eos_token": "</s>", "hf_token": REDACTED, "keys": [{"password": REDACTED}, "x"]},
        "hub": {"token": None, "credentials": REDACTED},
    }
    assert json.dumps(config) == before and redact(redacted) == redacted


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("+model.hf_token=abc", f"+model.hf_token={REDACTED}"),
        ("hub={user: me, token: abc}", f"hub={{user: me, token: {REDACTED}}}"),
        ("hub={'token': 'a b'}", f"hub={{'token': {REDACTED}}}"),
        ("hub={credentials: {user: a, pass: b}}", f"hub={{credentials: {REDACTED}}}"),
        ("train.tokens_per_step=2048", "train.tokens_per_step=2048"),
        (
            "model={eos_token_ids: [1,2], pad_token: x}",
            "model={eos_token_ids: [1,2], pad_token: x}",
        ),
        ("https://me:pw@host/x", f"https://{REDACTED}@host/x"),
        (
            "https://host/x?a=1&access_token=abc&b=2",
            f"https://host/x?a=1&access_token={REDACTED}&b=2",
        ),
        ("data.path=hf_" + "a" * 34, f"data.path={REDACTED}"),
        ("the token: you know", "the token: you know"),
        ("data.path=/home/secret/x.jsonl", "data.path=/home/secret/x.jsonl"),
    ],
)
def test_redact_inside_strings(text, expected):
    assert redact([text]) == [expected]


def test_configs_match_the_signatures():
    made = {}
    for path in (ROOT / "conf/logger").glob("*.yaml"):
        options = yaml.safe_load(path.read_text())
        module, name = options.pop("_target_").rsplit(".", 1)
        assert module == "eagle3.runs.logger"
        made[path.stem] = getattr(logger, name)(**options)
    assert isinstance(made["jsonl"], NoTracker) and isinstance(made["wandb"], Wandb)


def test_trackers_have_the_same_methods():
    import inspect

    methods = [name for name in vars(NoTracker) if not name.startswith("_")]
    assert methods == ["start", "log", "table", "file", "finish"]
    for name in methods:
        assert inspect.signature(getattr(NoTracker, name)) == inspect.signature(
            getattr(Wandb, name)
        )


def test_wandb_refuses_what_it_cannot_do(monkeypatch):
    with pytest.raises(ValueError, match=r"logger\.mode must be .* not 'of line'"):
        Wandb("p", mode="of line")
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(logger.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install wandb") as error:
        Wandb("p")
    assert "\n" not in str(error.value)


def test_wandb_without_a_login_is_one_sentence(tmp_path):
    code = "import sys, eagle3.runs.logger as l; l.Wandb('p', mode='online').start(sys.argv[1], 'n', {})"
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "WANDB_API_KEY": ""}
    command = [sys.executable, "-c", code, str(tmp_path)]
    ended = subprocess.run(
        command, cwd=ROOT, timeout=60, capture_output=True, text=True, env=environment, check=False
    )
    last = ended.stderr.strip().splitlines()[-1]
    assert (
        last.startswith("eagle3.errors.ConfigError: logger=wandb: ")
        and "logger.mode=offline" in last
    )


def test_importing_and_choosing_jsonl_does_not_import_wandb():
    code = "import sys, eagle3.runs.logger as l; l.NoTracker().start('.', 'n', {}); sys.exit('wandb' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT, timeout=60).returncode
        == 0
    )


def test_finish_without_start_is_fine():
    Wandb("p", mode="offline").finish()


OFFLINE_RUN = """
import sys, time
from pathlib import Path
from eagle3.runs.logger import Wandb
def children():
    return len(Path("/proc/self/task").joinpath(str(Path("/proc/self").readlink()), "children").read_text().split())
run_dir, run_id = sys.argv[1], sys.argv[2] or None
tracker = Wandb("proj", group="grp", mode="offline", tags=["a"])
config = {"optimizer": {"lr": 1e-4}, "hub": {"token": "SESAME"}, "overrides": ["hub.token=SESAME", "seed=3"]}
print(tracker.start(run_dir, "my run", config, run_id))
for step in range(1, 4):
    tracker.log({"loss": 3.0 / step, "accuracy/step_0": 0.1 * step}, step)
tracker.table("benchmark", ["suite", "speedup", "lossless"], [["mtbench", 1.5, True], ["gsm8k", None, "tie"]])
tracker.file(run_dir + "/report.html")
tracker.file(run_dir + "/notes.txt")
before = children()
tracker.finish()
for _ in range(50):
    if children():
        time.sleep(0.1)
print(before, children())
"""


def offline_records(path):
    """The records of a .wandb file: LevelDB's log format, whose header here is seven bytes, holding
    protobufs.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts, records = path.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            records.append(Record.FromString(parts))
            parts = b""
    return records


@pytest.fixture(scope="module")
def offline_run(tmp_path_factory):
    """A run in its own process, whose command line holds the secret too."""
    run_dir = tmp_path_factory.mktemp("run")
    (run_dir / "report.html").write_text("<!doctype html><title>the report</title>")
    (run_dir / "notes.txt").write_text("a note")
    command = [sys.executable, "-c", OFFLINE_RUN, str(run_dir), "", "hub.token=SESAME"]
    ended = subprocess.run(
        command, check=False, cwd=ROOT, timeout=60, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    (folder,) = (run_dir / "wandb").glob("offline-run-*")
    (path,) = folder.glob("*.wandb")
    run_id, *children = ended.stdout.split()
    return run_dir, folder, run_id, offline_records(path), [int(count) for count in children]


def test_offline_run_holds_config_and_overrides(offline_run):
    _, _, run_id, records, _ = offline_run
    (run,) = (record.run for record in records if record.HasField("run"))
    assert (run.run_id, run.project, run.run_group, run.display_name) == (
        run_id,
        "proj",
        "grp",
        "my run",
    )
    config = {update.key: json.loads(update.value_json) for update in run.config.update}
    assert config["optimizer"] == {"lr": 1e-4}
    assert config["hub"] == {"token": REDACTED}
    assert config["overrides"] == [f"hub.token={REDACTED}", "seed=3"]


def test_offline_run_holds_the_curves(offline_run):
    curves = []
    for record in offline_run[3]:
        items = {
            item.key or "/".join(item.nested_key): item.value_json for item in record.history.item
        }
        if "loss" in items:
            curves.append(
                tuple(json.loads(items[key]) for key in ("step", "loss", "accuracy/step_0"))
            )
    assert curves == [(1, 3.0, 0.1), (2, 1.5, 0.2), (3, 1.0, pytest.approx(0.3))]
    assert any(
        record.metric.glob_name == "*" and record.metric.step_metric == "step"
        for record in offline_run[3]
    )


def test_offline_run_holds_table_report_and_file(offline_run):
    _, folder, _, records, _ = offline_run
    (table,) = (folder / "files/media/table").glob("benchmark_*.table.json")
    table = json.loads(table.read_text())
    assert table["columns"] == ["suite", "speedup", "lossless"]
    assert table["data"] == [["mtbench", 1.5, True], ["gsm8k", None, "tie"]]
    (page,) = (folder / "files/media/html").glob("report_*.html")
    assert page.read_text() == "<!doctype html><title>the report</title>"
    artifacts = [record.request.log_artifact.artifact for record in records] + [
        record.artifact for record in records
    ]
    assert any(artifact.name.startswith("notes.txt-") for artifact in artifacts)


def test_offline_run_holds_no_secret(offline_run):
    files = [path for path in (offline_run[0] / "wandb").rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if b"SESAME" in path.read_bytes()]


def test_finish_ends_the_background_service(offline_run):
    before, after = offline_run[4]
    assert before > 0 and after == 0


def test_resumed_run_keeps_its_id(offline_run, tmp_path):
    (tmp_path / "report.html").write_text("<!doctype html>")
    (tmp_path / "notes.txt").write_text("a note")
    command = [sys.executable, "-c", OFFLINE_RUN, str(tmp_path), offline_run[2]]
    ended = subprocess.run(
        command, check=False, cwd=ROOT, timeout=60, capture_output=True, text=True
    )
    assert ended.stdout.split()[0] == offline_run[2], ended.stderr
    assert list((tmp_path / "wandb").glob(f"offline-run-*-{offline_run[2]}"))
