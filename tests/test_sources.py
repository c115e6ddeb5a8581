"""Files, folders, addresses and hub datasets to rows; broken ones never cost their neighbours."""

import gzip
import json
import lzma
from pathlib import Path

import datasets
import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from conftest import section, turns

from eagle3.data import sources
from eagle3.data.sources import Source, find_files, find_sources, may_be_remote, raw_rows, read_rows
from eagle3.errors import ConfigError, RunError


def row(i):
    return {"messages": turns(f"q{i}", f"a{i}")}


def lines(n):
    return "".join(json.dumps(row(i)) + "\n" for i in range(n)).encode()


def asked(rows):
    return [r.conversation.messages[0]["content"] for r in rows]


def read(path, content=None, **options):
    """The rows of a file, which first gets `content`."""
    if content is not None:
        path.write_bytes(content)
    return list(read_rows(find_files(Source(str(path)), str(path.parent / "cache")), **options))


ROWS = [row(i) for i in range(9)]
FORMS = {
    "a.jsonl": lines(9),
    "a.jsonl.gz": gzip.compress(lines(9), mtime=0),
    "a.json": json.dumps(ROWS).encode(),
    "indented.jsonl": json.dumps(ROWS, indent=2).encode(),
    "bom.jsonl": b"\xef\xbb\xbf" + lines(9),
    "bom.json": b"\xef\xbb\xbf" + json.dumps(ROWS).encode(),
    "a.parquet": None,
}


@pytest.mark.parametrize("block", [7, 64, 1 << 22])
@pytest.mark.parametrize("name", FORMS)
def test_forms_that_hold_the_same(tmp_path, monkeypatch, name, block):
    monkeypatch.setattr(sources, "BLOCK", block)
    path = tmp_path / name
    if name == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=4)
    rows = read(path, FORMS[name])
    assert [(r.line, q) for r, q in zip(rows, asked(rows))] == [(i + 1, f"q{i}") for i in range(9)]
    assert asked(read(path, num_samples=4)) == ["q0", "q1", "q2", "q3"]
    shares = [share for _, _, share in raw_rows(find_files(Source(str(path)), "")[0])]
    assert shares == sorted(shares) and shares[-1] == 1


BAD_MESSAGE = b'{"messages": [{"role": "us\xff", "content": "x"}]}'
BAD_ROWS = {  # reasons by line; empty files hold no rows, where one shard among others may be empty
    "a.jsonl": (
        lines(1) + b"{broken\n\n\xff\xfe\n3\n" + lines(1),
        {1: None, 2: "broken JSON", 4: "bad UTF-8", 5: "row is not an object", 6: None},
    ),
    "b.jsonl": (
        b'{"messages": ' + b"9" * 5000 + b"}\n" + b"[" * 100_000 + b"\n" + lines(1),
        {1: "broken JSON", 2: "broken JSON", 3: None},
    ),
    "c.json": (
        b"[" + b", ".join([lines(1).strip(), BAD_MESSAGE, lines(1), b"null", b"{}"]) + b"]",
        {1: None, 2: "unknown role", 3: None, 4: "row is not an object", 5: "no messages"},
    ),
    "d.jsonl": (b"", {}),
    "e.jsonl": (b" \n\n", {}),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_what_is_wrong_costs_one_row(tmp_path, name):
    content, reasons = BAD_ROWS[name]
    assert {r.line: r.reason for r in read(tmp_path / name, content)} == reasons


PACKED = gzip.compress(lines(50), mtime=0)
BROKEN = [
    ("a.json", b'[{"a": 1}, {"b": ', "is not JSON"),
    ("a.json", b'[{"a": 1} {"b" 2}]', "is not JSON"),
    ("a.json", b'[{"a": 1}]\n[{"a": 2}]', "goes on behind its JSON list"),
    ("a.jsonl.gz", PACKED[:60], "is damaged"),
    ("a.jsonl.gz", lines(9), "is damaged .*; fetch it again"),
    ("a.jsonl.gz", PACKED[:40] + b"\xff" * 4 + PACKED[44:], "is damaged .*; fetch it again"),
    ("a.jsonl", PACKED, r"is a \.gz file by its content; let its name end so"),
    ("a.jsonl", b"PAR1", r"is a \.parquet file by its content; let its name end so"),
    ("a.jsonl.xz", lzma.compress(lines(50))[:60], "is damaged"),
    ("a.jsonl.zst", b"(\xb5", "needs a package"),
    ("a.parquet", b"PAR1 but not really", "is damaged"),
    ("a.csv", b"a,b\n", r"is of no kind that can be read; allowed: \.jsonl"),
]


@pytest.mark.parametrize("name, content, message", BROKEN)
def test_files_that_cannot_be_read(tmp_path, monkeypatch, name, content, message):
    if name.endswith("zst"):
        monkeypatch.setattr(sources, "infer_compression", lambda name: None)
    with pytest.raises(RunError, match=rf"{name} {message}"):
        read(tmp_path / name, content)


def test_a_folder_is_read_in_order_of_names(tmp_path):
    folder = tmp_path / "data"
    (folder / "b").mkdir(parents=True)
    (folder / "b" / "2.jsonl").write_bytes(lines(1))
    (folder / "1.json").write_text(json.dumps([row(7)]))
    (folder / "notes.txt").write_text("not data")
    assert asked(read(folder)) == ["q7", "q0"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no file that ends in"):
        read(tmp_path / "empty")


def test_sources_are_named_in_the_order_of_the_config(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_bytes(lines(1))
    named = {name: Source(str(tmp_path / f"{name}.jsonl"), weight=0.5) for name in "ba"}
    found = find_sources(section("data", path=None, sources=named), "")
    names = [(source, files[0].name[-7:]) for source, files in found]
    assert names == [(named["b"], "b.jsonl"), (named["a"], "a.jsonl")]
    one = find_sources(section("data", path=named["a"].path), "")
    assert [source.weight for source, _ in one] == [1.0]
    with pytest.raises(RunError, match=r"data\.sources\.c\.path"):
        find_sources(section("data", path=None, sources={"c": Source("/no/such/file")}), "")


def test_addresses_go_through_datasets(tmp_path):
    """Any file system that fsspec knows: the one in memory stands for s3:// and its like."""
    fsspec.filesystem("memory").pipe("/bucket/a.jsonl", lines(3))
    found = find_files(Source("memory://bucket/*.jsonl"), str(tmp_path))
    assert [file.name for file in found] == ["memory:///bucket/a.jsonl"]
    assert asked(read_rows(found)) == ["q0", "q1", "q2"]


def test_hub_datasets(tmp_path, monkeypatch):
    """A folder with splits and subsets stands for the hub: `datasets` resolves both alike."""
    hub = tmp_path / "hub"
    hub.mkdir()
    for name, n in (("one", 2), ("two", 3)):
        table = pyarrow.Table.from_pylist([row(i) for i in range(n)])
        pyarrow.parquet.write_table(table, hub / f"{name}.parquet")
    files = (("main", "one"), ("other", "two"))
    card = "".join(
        f"- config_name: {name}\n  data_files:\n  - {{split: train_sft, path: {file}.parquet}}\n"
        for name, file in files
    )
    (hub / "README.md").write_text(f"---\nconfigs:\n{card}---\n")
    load, place = datasets.load_dataset_builder, str(tmp_path / "cache")
    local = lambda path, subset: load(str(hub), subset)  # noqa: E731
    monkeypatch.setattr(datasets, "load_dataset_builder", local)
    source = Source("owner/name", "other", "train_sft")
    found = find_files(source, place)
    assert asked(read_rows(found)) == ["q0", "q1", "q2"]
    words = r"data\.split=train is no split of owner/name; it has: train_sft"
    with pytest.raises(ConfigError, match=words):
        find_files(Source("owner/name", "other"), place)

    def unreachable(path, subset):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
    assert find_files(source, place) == found, "what was fetched once is found without network"
    words = r"data\.path=owner/else is no local file.*no network at all"
    with pytest.raises(RunError, match=words):
        find_files(Source("owner/else"), place)
    (note,) = Path(place, "sources").glob("*.json")
    for damaged in ("[", "5", "[5]", "[{}]"):
        note.write_text(damaged)
        with pytest.raises(RunError, match="no network at all"):
            find_files(source, place)


def test_a_share_of_rows_is_always_the_same(tmp_path):
    path = tmp_path / "a.jsonl"
    some = asked(read(path, lines(200), share=0.3))
    assert some == asked(read(path, share=0.3)) and 40 < len(some) < 80
    assert set(some) < set(asked(read(path, share=0.6)))


def test_identity_follows_the_content_and_how_a_name_is_read(tmp_path):
    def identity(name, content):
        (tmp_path / name).write_bytes(content)
        return str(find_files(Source(str(tmp_path / name)), "")[0].identity)

    two, three = lines(2), lines(3)
    assert len({identity(name, two) for name in ("a.jsonl", "a.json", "a.ndjson")}) == 1
    others = [("a.jsonl", two), ("a.jsonl", three), ("a.jsonl.gz", two), ("a.parquet", two)]
    assert len({identity(*other) for other in others}) == 4


REMOTE = ["owner/name", "s3://b/a.jsonl", "Hugging4/chat_200k"]
LOCAL = ["a.jsonl", "data/a.json", "/a/b", "./a", "owner/name/more"]


@pytest.mark.parametrize("path", REMOTE + LOCAL)
def test_what_may_be_remote(path):
    assert may_be_remote(path) == (path in REMOTE)
