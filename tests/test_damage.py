"""What is read is as it was written, or one sentence says what is damaged and what to do."""

import errno
import hashlib
import os
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TRAIN_ONLY, UNSHOWN, cut, flip, run, run_command, spec_of, turns
from safetensors import SafetensorError
from transformers import AutoTokenizer
from xxhash import xxh3_128

from eagle3.data.chat import Chat
from eagle3.data.regenerate import Journal
from eagle3.errors import ConfigError, DamageError, RunError
from eagle3.export.read import read_any
from eagle3.runs.artefact import artefact, describe_file, read_manifest, write_manifest
from eagle3.runs.checkpoint import load_checkpoint
from eagle3.runs.disk import name_full_disk, read_json
from eagle3.runs.tensors import load_tensors, save_tensors


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGES = {"flipped": flip, "cut": cut, "emptied": empty, "removed": Path.unlink}
STAGES = "stages=[prepare,generate,train,export]"


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    """A run of seconds with a cache of its own."""
    folder = tmp_path_factory.mktemp("finished")
    run([*settings, f"cache_dir={folder / 'cache'}", STAGES], folder / "run")
    return folder


@pytest.fixture
def copy(finished, tmp_path, settings):
    """Run and cache as they were left, how to use the cache, and how to go on with the run."""
    folder = shutil.copytree(finished, tmp_path / "copy", symlinks=True)
    cache = f"cache_dir={folder / 'cache'}"
    return folder, [*settings, cache], [f"train.resume={folder / 'run'}", cache, TRAIN_ONLY]


def sentence(overrides, run_dir) -> str:
    """What a run ends with."""
    with pytest.raises((RunError, ConfigError)) as error:
        run(overrides, run_dir)
    assert "\n" not in str(error.value)
    return str(error.value)


ANSWER = "generated/*/*_00000.safetensors"
NAMES = ("input_ids.bin", "loss_mask.bin", "vocab.npy", "heldout.jsonl")
CACHED = [(f"prepared/*/{name}", "flipped") for name in NAMES]
for pattern in ("prepared/*/index.npy", "prepared/*/artefact.json", ANSWER):
    CACHED += [(pattern, how) for how in DAMAGES]


@pytest.mark.runs
@pytest.mark.parametrize(("pattern", "how"), CACHED)
def test_a_damaged_cache_is_one_sentence(copy, pattern, how):
    folder, overrides, _ = copy
    path = only(folder / "cache", pattern)
    DAMAGES[how](path)
    said = sentence([*overrides, "stages=[prepare,generate]"], folder / "again")
    stage = "generate" if pattern == ANSWER else "prepare"
    assert str(path) in said
    assert f"delete {path.parent} and add {stage} to stages" in said
    shutil.rmtree(path.parent)
    run([*overrides, f"stages=[{stage}]"], folder / "again")
    assert path.is_file()


@pytest.mark.runs
def test_what_an_interrupted_stage_left_is_checked_too(copy):
    folder, overrides, _ = copy
    path = only(folder / "cache", "prepared/*/artefact.json")
    whole, partial = path.parent, path.parent.with_suffix(".partial")
    whole.rename(partial)
    path = (partial / "artefact.json").rename(partial / "state.json")  # as `prepare` notes itself
    cut(path)
    said = sentence([*overrides, "stages=[prepare,generate]"], folder / "again")
    assert said.startswith(f"{path} is damaged (") and "; delete it" in said
    path.unlink()
    run([*overrides, "stages=[prepare,generate]"], folder / "again")
    assert (whole / "artefact.json").is_file()


LAST, BEST = "run/checkpoints/last", "run/checkpoints/best"
CHECKPOINT = [(f"{LAST}/*.safetensors", how, "last is damaged .*ln -sfn step_4") for how in DAMAGES]
CHECKPOINT += [(f"{LAST}/state.json", how, "last is damaged .*ln -sfn step_4") for how in DAMAGES]
CHECKPOINT += [
    (LAST, "removed", "last is missing or leads nowhere; to go on from step_6: ln -sfn step_6"),
    (f"{BEST}/*.safetensors", "flipped", r"best is damaged .*ln -sfn step_\d \S*best; when that"),
    ("run/run.json", "cut", r"run\.json is damaged .*put a whole copy in its place"),
    ("run/run.json", "emptied", r"run\.json is damaged"),
    ("run/run.json", "removed", r"has checkpoints, but no config in run\.json: put it back"),
    ("run/evaluation.json", "emptied", r"evaluation\.json is damaged .*delete it"),
]  # fmt: skip


@pytest.mark.runs
@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(("pattern", "how", "words"), CHECKPOINT)
def test_a_damaged_run_is_not_resumed(copy, pattern, how, words, named):
    """Neither by name nor, as a scheduler does, by the same command in the same folder."""
    folder, overrides, resume = copy
    DAMAGES[how](only(folder, pattern))
    stage = "stages=[export]" if "eval" in pattern or BEST in pattern else TRAIN_ONLY
    with pytest.raises(Exception, match=words) as error:
        run([*(resume if named else overrides), stage], folder / "run")
    assert "\n" not in str(error.value)


@pytest.mark.runs
def test_the_command_says_so_and_what_it_names_works(copy):
    folder, _, resume = copy
    last = folder / LAST
    last.unlink()
    last.symlink_to("step_9")
    result = run_command(*resume)
    assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr
    command = result.stderr.partition("to go on from step_6: ")[2].strip()
    assert command == f"ln -sfn step_6 {last}"
    subprocess.run(command.split(), check=True)
    assert run_command(*resume).returncode == 0


@pytest.mark.runs
@pytest.mark.parametrize(
    ("change", "left"), [(None, None), (empty, 0), (cut, 8), (lambda path: flip(path, 0.05), 9)]
)
def test_a_history_that_is_lost_is_said(copy, capsys, change, left):
    folder, _, resume = copy
    path = folder / "run" / "metrics.jsonl"
    assert len(path.read_text().splitlines()) == 9
    if change:
        change(path)
    run(resume, folder / "run")
    said = capsys.readouterr().out
    assert ("was cut or changed" in said) == (change is not None)
    assert change is None or f"{left} lines are left of its history" in said


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("place", [0.05, 0.5, 1.0])
def test_a_damaged_draft_is_refused(exported, tmp_path, how, place):
    folder = shutil.copytree(exported / "portable", tmp_path / "draft")
    path = folder / "model.safetensors"
    flip(path, place) if how == "flipped" else DAMAGES[how](path)
    with pytest.raises(RunError, match=r"model\.safetensors is damaged|cannot be read"):
        read_any(folder)


def each_flipped(path: Path, read):
    """What `read` gives of a file with any one byte changed, but where it names the damage."""
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole)
        flip(path, place)
        try:
            yield read(path)
        except DamageError as damage:
            assert str(path.parent) in str(damage)


def test_every_byte_of_tensors_counts(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {"b": torch.zeros(0), "a": torch.tensor(3.0), "c": torch.ones(2, 3) > 0}
    save_tensors(path, tensors)
    whole = path.read_bytes()
    loaded = load_tensors(path)
    assert loaded.keys() == tensors.keys() and torch.equal(loaded["c"], tensors["c"])
    save_tensors(path, tensors)
    assert path.read_bytes() == whole
    # What a byte can change without being found is the checksum's own name, and spaces.
    for found in each_flipped(path, load_tensors):
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_every_byte_of_a_manifest_counts(tmp_path):
    path, content = tmp_path / "state.json", {"best": -float("inf"), "update": 3, "text": "ä"}
    (tmp_path / "a.bin").write_bytes(b"abc")
    write_manifest(path, content)
    assert read_manifest(path, whole=True) == content
    size = path.stat().st_size
    passed = list(each_flipped(path, lambda path: read_manifest(path, whole=True)))
    assert all(found == content for found in passed) and len(passed) < 0.2 * size


def test_large_files_with_checksums_of_their_own_are_left_to_them(tmp_path):
    def write(folder: Path) -> dict:
        for name in ("shard_00000000.safetensors", "index.npz", "rejects.jsonl"):
            (folder / name).write_bytes(b"content")
        return {"documents": 3}

    asked = (str(tmp_path), "imported", {"a": 1}, write, "import")
    path = artefact(*asked)
    flip(path / "shard_00000000.safetensors")
    assert artefact(*asked) == path
    (path / "index.npz").unlink()
    with pytest.raises(RunError, match=rf"index.npz is missing .*; delete {path} and add import"):
        artefact(*asked)


@pytest.mark.runs
def test_a_store_without_index_or_inputs(settings, tmp_path):
    store = tmp_path / "store"
    offline = [*settings, "mode=offline", f"hidden_states.path={store}"]
    run([*offline, "stages=[prepare,capture]"], tmp_path / "run")
    shard, index = store / "shard_00000000.safetensors", (store / "index.npz").read_bytes()
    before = shard.stat().st_mtime_ns
    (store / "index.npz").unlink()
    said = sentence([*offline, TRAIN_ONLY], tmp_path / "run")
    assert f"{store} holds no complete store (no index.npz): add capture to stages" in said
    run([*offline, "stages=[prepare,capture]"], tmp_path / "run")
    assert shard.stat().st_mtime_ns == before and (store / "index.npz").read_bytes() == index
    (store / "store.json").unlink()
    assert "(no store.json)" in sentence([*offline, TRAIN_ONLY], tmp_path / "run")
    (store / "index.npz").unlink()
    said = sentence([*offline, "stages=[prepare,capture]"], tmp_path / "run")
    assert "holds .safetensors, but no store.json: put it back" in said


@pytest.mark.parametrize("content", ["", "[]", "{", "\xff", "[" * 100_000])
def test_json_that_is_none(tmp_path, content):
    path = tmp_path / "benchmark.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(DamageError, match=r"benchmark\.json is damaged .*delete it"):
        read_json(path)


def test_a_damaged_line_of_a_journal_is_answered_again(tmp_path, tokenizer):
    facts = {"reason": None, "counts": Counter()}
    said = [SimpleNamespace(key=key, messages=turns(key), **facts) for key in "abcd"]
    path, chat = tmp_path / "journal.jsonl", Chat(tokenizer)
    with Journal(path, chat, UNSHOWN) as journal:
        for dialogue in said:
            journal.add(dialogue)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b'"content": "b"', b'"content": "x"')
    broken = b"5\n[[1]]\n\xff" + lines[2][:20] + b"\n"
    path.write_bytes(b"".join([*lines[:2], broken, lines[3], lines[2][:30]]))
    with Journal(path, chat, UNSHOWN) as journal:
        assert sorted(journal.offsets) == ["a", "d"]
        journal.add(said[1])
    with Journal(path, chat, UNSHOWN) as journal:
        assert sorted(journal.offsets) == ["a", "b", "d"]
        assert all(journal.read(key)["messages"] == turns(key) for key in journal.offsets)


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
WRITERS = {
    "prepare": "eagle3.data.prepare.write_atomically",
    "generate": "eagle3.evaluate.save_tensors",
    "metrics": "eagle3.runs.logger.JsonLines.log",
    "checkpoint": "torch.distributed.checkpoint.hf_storage.HuggingFaceStorageWriter.write_data",
    "export": "eagle3.export.write.save_tensors",
    "report": "eagle3.runs.tracking.write_report",
}


@pytest.mark.runs
@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_anywhere(settings, tmp_path, monkeypatch, writer):
    overrides = [*settings, f"cache_dir={tmp_path / 'cache'}", STAGES]

    def write(*unused, **named):
        raise FULL

    with monkeypatch.context() as patch:
        patch.setattr(WRITERS[writer], write)
        said = sentence(overrides, tmp_path / "run")
    assert f"No space left on device; {tmp_path}" in said.replace("; earlier ones are whole", "")
    command = f"train.resume={tmp_path / 'run'}" if writer in ("export", "report") else overrides[0]
    assert f" free: make room, and go on with: python run.py {command}" in said
    run(overrides, tmp_path / "run")
    assert (tmp_path / "run" / "draft" / "config.json").exists()


@pytest.mark.parametrize(
    "error",
    [
        FULL,
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "/tmp/x"),
        SafetensorError("Error while serializing: No space left on device (os error 28)"),
        RunError("process 1 failed: OSError: [Errno 28] No space left on device; more in a log"),
    ],
)  # fmt: skip
def test_how_a_full_disk_is_said(tmp_path, error):
    ends = pytest.raises(RunError, match=r"free: make room, and go on with: again$")
    with ends as said, name_full_disk([tmp_path], lambda: "again"):
        raise error
    assert (getattr(error, "filename", None) or str(tmp_path)) in str(said.value)


def test_other_errors_are_not_of_the_disk(tmp_path):
    with pytest.raises(ValueError, match="other"), name_full_disk([tmp_path], str):
        raise ValueError("other")


def test_a_target_is_what_is_read_of_its_folder(target_folder, tmp_path):
    folder = shutil.copytree(target_folder, tmp_path / "target")
    seen = [spec_of(folder).identity]

    def changed(**model) -> bool:
        seen.append(spec_of(folder, **model).identity)
        return seen[-1] != seen[-2]

    (folder / "pytorch_model.bin").write_bytes(b"is not read beside safetensors")
    assert not changed()
    (folder / "model.safetensors").unlink()
    assert changed()
    (folder / "pytorch_model.bin").write_bytes(b"another target's weights")
    assert changed()
    (folder / "modeling.py").write_text("x = 1")
    assert not changed()
    assert changed(trust_remote_code=True)
    (folder / "modeling.py").write_text("x = 2")
    assert changed(trust_remote_code=True)


def test_the_tokens_that_a_template_names_are_part_of_a_chat(target_folder):
    tokenizer = AutoTokenizer.from_pretrained(target_folder)
    before = Chat(tokenizer).identity
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(5)
    assert Chat(tokenizer).identity != before


def test_the_remedy_of_a_damaged_checkpoint_names_the_link_that_is_read(finished, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(finished / "run" / "checkpoints", folder, symlinks=True)
    flip(only(folder / "best", "*.safetensors"))
    with pytest.raises(RunError, match=rf"best is damaged .*ln -sfn step_\d {folder / 'best'}$"):
        load_checkpoint(folder / "best", "draft/")


def test_checksums_need_nothing_that_came_with_python_3_11(tmp_path, monkeypatch):
    monkeypatch.delattr("hashlib.file_digest", raising=False)
    (tmp_path / "a").write_bytes(b"abc")
    described = describe_file(tmp_path / "a")
    assert described == {"bytes": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}
    assert describe_file(tmp_path / "a", xxh3_128)["bytes"] == 3
