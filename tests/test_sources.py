"""Files, folders, addresses and hub datasets to rows, each with its place; broken ones never cost
their neighbours.
"""

import gzip
import json
import lzma

import datasets
import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from conftest import section

from eagle3.data import sources
from eagle3.data.sources import Source, find_files, find_sources, may_be_remote, raw_rows, read_rows
from eagle3.errors import ConfigError, RunError


def row(i):
    contents = {"user": f"q{i}", "assistant": f"a{i}"}
    return {"messages": [{"role": role, "content": text} for role, text in contents.items()]}


def lines(n):
    return "".join(json.dumps(row(i)) + "\n" for i in range(n)).encode()


def asked(rows):
    return [r.conversation.messages[0]["content"] for r in rows]


def read(path, tmp_path, **options):
    return list(read_rows(find_files(Source(str(path)), str(tmp_path / "cache")), **options))


@pytest.fixture
def network_off(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize("block", [7, 64, 1 << 22])
@pytest.mark.parametrize("form", ["lines", "compressed", "list", "indented", "bom", "parquet"])
def test_forms_that_hold_the_same(tmp_path, monkeypatch, form, block):
    monkeypatch.setattr(sources, "BLOCK", block)
    everything = [row(i) for i in range(9)]
    names = {"compressed": "a.jsonl.gz", "parquet": "a.parquet", "list": "a.json"}
    path = tmp_path / names.get(form, "a.jsonl")
    if form == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(everything), path, row_group_size=4)
    else:
        content = {
            "lines": lines(9),
            "compressed": gzip.compress(lines(9)),
            "list": json.dumps(everything).encode(),
            "indented": json.dumps(everything, indent=2).encode(),
            "bom": b"\xef\xbb\xbf" + lines(9),
        }[form]
        path.write_bytes(content)
    rows = read(path, tmp_path)
    assert asked(rows) == [f"q{i}" for i in range(9)] and [r.line for r in rows] == list(
        range(1, 10)
    )
    assert asked(read(path, tmp_path, num_samples=4)) == ["q0", "q1", "q2", "q3"]
    shares = [share for _, _, share in raw_rows(find_files(Source(str(path)), "")[0])]
    assert shares == sorted(shares) and shares[-1] == 1


def test_rows_are_named_by_file_and_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(1) + b"{broken\n\n\xff\xfe\n3\n" + lines(1))
    reasons = {r.line: r.reason for r in read(path, tmp_path)}
    bad = {2: "broken JSON", 4: "bad UTF-8", 5: "row is not an object"}
    assert reasons == {1: None, **bad, 6: None}


def test_bad_utf8_inside_a_list_costs_one_row(tmp_path):
    path = tmp_path / "a.json"
    bad = b'{"messages": [{"role": "us\xff", "content": "x"}]}'
    path.write_bytes(b"[" + b", ".join([lines(1).strip(), bad, lines(1)]) + b"]")
    assert [r.reason for r in read(path, tmp_path)] == [None, "unknown role", None]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"a": 1}, {"b": ', "is not JSON"),
        (b'[{"a": 1} {"b" 2}]', "is not JSON"),
        (b'[{"a": 1}]\n[{"a": 2}]', "goes on behind its JSON list"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, content, message):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(RunError, match=message):
        read(path, tmp_path)


def test_empty_files_hold_no_rows(tmp_path):
    """One empty shard among others is nothing to stop at; `prepare` ends when there is no row at
    all.
    """
    for content in (b"", b" \n\n"):
        (tmp_path / "a.jsonl").write_bytes(content)
        assert read(tmp_path / "a.jsonl", tmp_path) == []


@pytest.mark.parametrize("suffix", ["gz", "xz", "zst"])
def test_damaged_and_unsupported_packing(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"a.jsonl.{suffix}"
    gz, xz = gzip.compress(lines(50)), lzma.compress(lines(50))
    packed = {"gz": gz, "xz": xz, "zst": b"(\xb5/\xfd"}[suffix]
    path.write_bytes(packed[: len(packed) // 2])
    if suffix == "zst":
        monkeypatch.setattr(sources, "infer_compression", lambda name: None)
    with pytest.raises(RunError, match=r"a\.jsonl\.\w+ (is damaged|needs a package)"):
        read(path, tmp_path)


def test_numbers_and_nesting_beyond_reason_cost_one_row(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"messages": ' + b"9" * 5000 + b"}\n" + b"[" * 100_000 + b"\n" + lines(1))
    assert [r.reason for r in read(path, tmp_path)] == ["broken JSON", "broken JSON", None]


def test_broken_parquet_and_unknown_kinds(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(RunError, match=r"a\.parquet is damaged"):
        read(tmp_path / "a.parquet", tmp_path)
    (tmp_path / "a.csv").write_text("a,b\n")
    with pytest.raises(RunError, match=r"a\.csv is of no kind that can be read; allowed: \.jsonl"):
        read(tmp_path / "a.csv", tmp_path)


def test_a_folder_is_read_in_order_of_names(tmp_path):
    folder = tmp_path / "data"
    (folder / "b").mkdir(parents=True)
    (folder / "b" / "2.jsonl").write_bytes(lines(1))
    (folder / "1.json").write_text(json.dumps([row(7)]))
    (folder / "notes.txt").write_text("not data")
    assert asked(read(folder, tmp_path)) == ["q7", "q0"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no file that ends in"):
        read(tmp_path / "empty", tmp_path)


def test_sources_are_named_in_the_order_of_the_config(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_bytes(lines(1))
    named = {name: Source(str(tmp_path / f"{name}.jsonl"), weight=0.5) for name in "ba"}
    found = find_sources(section("data", path=None, sources=named), "")
    assert [(source, files[0].name[-7:]) for source, files in found] == [
        (named["b"], "b.jsonl"), (named["a"], "a.jsonl"),
    ]  # fmt: skip
    one = find_sources(section("data", path=named["a"].path), "")
    assert [source.weight for source, _ in one] == [1.0]
    with pytest.raises(RunError, match=r"data\.sources\.c\.path"):
        find_sources(
            section("data", path=None, sources={"c": Source("/no/such/file")}), str(tmp_path)
        )


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
    card = (
        "configs:\n- config_name: main\n  data_files:\n  - {split: train_sft, path: one.parquet}\n"
    )
    card += "- config_name: other\n  data_files:\n  - {split: train_sft, path: two.parquet}\n"
    (hub / "README.md").write_text(f"---\n{card}---\n")
    load = datasets.load_dataset_builder
    monkeypatch.setattr(
        datasets, "load_dataset_builder", lambda path, subset: load(str(hub), subset)
    )
    source = Source("owner/name", "other", "train_sft")
    found = find_files(source, str(tmp_path / "cache"))
    assert asked(read_rows(found)) == ["q0", "q1", "q2"]
    with pytest.raises(
        ConfigError, match=r"data\.split=train is no split of owner/name; it has: train_sft"
    ):
        find_files(Source("owner/name", "other"), str(tmp_path / "cache"))

    def unreachable(path, subset):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
    assert find_files(source, str(tmp_path / "cache")) == found, (
        "what was fetched once is found without network"
    )
    with pytest.raises(
        RunError, match=r"data\.path=owner/else is no local file.*no network at all"
    ):
        find_files(Source("owner/else"), str(tmp_path / "cache"))


def test_a_share_of_rows_is_always_the_same(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(200))
    some = asked(read(tmp_path / "a.jsonl", tmp_path, share=0.3))
    assert some == asked(read(tmp_path / "a.jsonl", tmp_path, share=0.3)) and 40 < len(some) < 80
    assert set(some) < set(asked(read(tmp_path / "a.jsonl", tmp_path, share=0.6)))


def test_identity_follows_the_content(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(2))
    before = find_files(Source(str(path)), "")[0].identity
    path.write_bytes(lines(3))
    assert find_files(Source(str(path)), "")[0].identity != before


@pytest.mark.parametrize(
    ("path", "remote"),
    [("owner/name", True), ("s3://b/a.jsonl", True), ("a.jsonl", False), ("data/a.json", False),
     ("/a/b", False), ("./a", False), ("owner/name/more", False), ("Hugging4/chat_200k", True)],
)  # fmt: skip
def test_what_may_be_remote(path, remote):
    assert may_be_remote(path) == remote
