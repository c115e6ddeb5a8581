"""Rows of local files, folders, hub datasets and addresses; a broken one never costs its file."""

import codecs
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

from fsspec.compression import compr
from fsspec.utils import infer_compression

from eagle3.config import Data, Source
from eagle3.data.rows import REMEDIES, Conversation, RowError, read_conversation
from eagle3.errors import ConfigError, RunError
from eagle3.runs.artefact import describe_file, fingerprint
from eagle3.runs.disk import write_atomically

PACKED = (".gz", ".bz2", ".xz", ".zst")
TEXTS = (".jsonl", ".json", ".ndjson")
SUFFIXES = (*TEXTS, *(f"{kind}{pack}" for kind in TEXTS for pack in PACKED), ".parquet")
ALLOWED = ".jsonl, .json, .ndjson (also .gz, .bz2, .xz, .zst) or .parquet"
# How such files begin, whatever they are called.
BEGINS = {
    ".gz": b"\x1f\x8b", ".bz2": b"BZh", ".xz": b"\xfd7zXZ", ".zst": b"(\xb5/\xfd",
    ".parquet": b"PAR1",
}  # fmt: skip
SEPARATORS = re.compile(r"[ \t\r\n,[]*")  # of a list's items, which are objects
BLOCK = 1 << 22
LONGEST_ITEM = 1 << 26  # letters after which what does not parse is broken


@dataclass
class DataFile:
    """`name` is what users know, `path` the local copy, `identity` goes into fingerprints."""

    name: str
    path: str
    identity: dict[str, Any]


SourceFiles = list[tuple[Source, list[DataFile]]]


@dataclass
class Row:
    """A conversation, or the reason for none; about `share` of its source was read up to here."""

    file: str
    line: int
    conversation: Conversation | None
    reason: str | None = None
    share: float = 0.0


def names_data(data: Data) -> bool:
    return data.path is not None or bool(data.sources)


def find_sources(data: Data, cache_dir: str) -> SourceFiles:
    """The files that `data` names, by source. Raises ConfigError or RunError."""
    named = {f"data.sources.{name}": source for name, source in data.sources.items()}
    named = named or {"data": Source(data.path, data.subset, data.split)}
    return [(source, find_files(source, cache_dir, key)) for key, source in named.items()]


def may_be_remote(path: str) -> bool:
    """Whether `path` has the form of an address or of a hub id (owner/name)."""
    hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) is not None
    return "://" in path or (hub_id and not path.endswith(SUFFIXES))


def find_files(source: Source, cache_dir: str, key: str = "data") -> list[DataFile]:
    """The files of the source at `key`, downloaded if remote. Raises ConfigError or RunError."""
    local = Path(source.path).expanduser()
    if local.exists():
        found = [local]
        if local.is_dir():
            found = sorted(p for p in local.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES))
        if not found:
            raise ConfigError(f"{key}.path={source.path} holds no file that ends in {ALLOWED}")
        described = [describe_file(path) | {"read_as": read_as(path.name)} for path in found]
        return [DataFile(str(path), str(path), each) for path, each in zip(found, described)]
    # Resolving a hub id asks the network even where all of its files are cached, which nodes of a
    # cluster often have not: what it resolved to is noted.
    noted = Path(cache_dir) / "sources" / f"{fingerprint(asdict(source) | {'weight': None})}.json"
    try:
        files = download(source, key)
    except ConfigError:
        raise
    except Exception as error:  # each file system and hub client raises its own kinds
        with suppress(OSError, ValueError, TypeError):  # a damaged note is none
            files = [DataFile(**file) for file in json.loads(noted.read_text())]
            if files and all(Path(file.path).is_file() for file in files):
                return files
        reason = " ".join(str(error).split()) or type(error).__name__
        words = f"is no local file or folder, and cannot be fetched: {reason}"
        raise RunError(f"{key}.path={source.path} {words}") from error
    noted.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(noted, [json.dumps([asdict(file) for file in files]).encode()])
    return files


def read_as(name: str) -> str:
    """The end of a name that decides how a file is read, "" for lines or a list of JSON."""
    return next((suffix for suffix in BEGINS if name.endswith(suffix)), "")


def download(source: Source, key: str) -> list[DataFile]:
    """The files of a hub id or an address, as `datasets` resolves them, in its cache."""
    from datasets import DownloadManager, load_dataset_builder

    if "://" in source.path:
        kind = "parquet" if source.path.endswith(".parquet") else "json"
        builder = load_dataset_builder(kind, data_files={source.split: source.path})
    else:
        builder = load_dataset_builder(source.path, source.subset)
    splits = builder.config.data_files or {}
    if source.split not in splits:
        words = f"is no split of {source.path}; it has: {', '.join(map(str, splits)) or 'none'}"
        raise ConfigError(f"{key}.split={source.split} {words}")
    urls = splits[source.split]
    print(f"data: reads {source.path}, fetching what the cache lacks", flush=True)
    return [
        DataFile(str(url), str(path), {"url": str(url), "origin": str(urls.origin_metadata)})
        for url, path in zip(urls, DownloadManager().download(list(urls)), strict=True)
    ]


def raw_rows(file: DataFile) -> Iterator[tuple[int, bytes | Any, float]]:
    """(line, a JSON line's bytes or a parsed row, share of the file read). Raises RunError."""
    name = file.name.split("?")[0]
    if not name.endswith(SUFFIXES):
        raise RunError(f"{file.name} is of no kind that can be read; allowed: {ALLOWED}")
    compression = infer_compression(name)
    if compression is None and name.endswith(PACKED):
        raise RunError(f"{file.name} needs a package to unpack it, such as `pip install zstandard`")
    kind = read_as(name)
    with open(file.path, "rb") as stream:
        start = stream.read(8)
    if found := [end for end, begin in BEGINS.items() if start.startswith(begin) and end != kind]:
        raise RunError(f"{file.name} is a {found[0]} file by its content; let its name end so")
    try:
        yield from parquet_rows(file) if kind == ".parquet" else json_rows(file, compression)
    except RunError:
        raise
    except Exception as error:  # each library raises its own kinds
        raise RunError(f"{file.name} is damaged ({str(error).strip()}); fetch it again") from error


def json_rows(file: DataFile, compression: str | None) -> Iterator[tuple[int, bytes | Any, float]]:
    size = max(1, Path(file.path).stat().st_size)
    with open(file.path, "rb") as disk:
        start = compr[compression](disk, mode="rb").read(BLOCK)
        disk.seek(0)
        stream = compr[compression](disk, mode="rb")
        if start.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            for number, item in enumerate(list_items(stream, file.name), start=1):
                # None would be a row that is left out; no object either is rejected.
                yield number, [] if item is None else item, disk.tell() / size
            return
        for line, raw in enumerate(stream, start=1):
            if raw.strip():
                yield line, raw.removeprefix(codecs.BOM_UTF8), disk.tell() / size


def list_items(stream: BinaryIO, name: str) -> Iterator[Any]:
    """The items of a JSON list, parsed while it is read: memory holds one block and one item."""
    # Bad UTF-8 costs the row it stands in (an unknown role, a refused text), not the file.
    decode = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
    decoder, text, place = json.JSONDecoder(), "", 0
    while True:
        block = stream.read(BLOCK)
        text, place = text[place:] + decode(block, final=not block), 0
        while True:
            place = SEPARATORS.match(text, place).end()
            if text[place : place + 1] == "]":
                if (text[place + 1 :] + stream.read(BLOCK).decode("latin-1")).strip():
                    raise RunError(f"{name} goes on behind its JSON list; give one list, or lines")
                return
            try:
                item, stop = decoder.raw_decode(text, place)
            except (ValueError, RecursionError) as error:
                if block and len(text) - place <= LONGEST_ITEM:
                    break  # the rest of it is in the next block
                near = repr(text[place : place + 40])
                raise RunError(f"{name} is not JSON: {error} near {near}") from error
            if stop == len(text) and block:
                break  # a number may go on in the next block
            place = stop
            yield item


def parquet_rows(file: DataFile) -> Iterator[tuple[int, dict, float]]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file.path) as table:
        # Row groups may be as large as the file; batches keep memory small.
        batches = (batch.to_pylist() for batch in table.iter_batches(batch_size=256))
        for number, row in enumerate(chain.from_iterable(batches), start=1):
            yield number, row, number / table.metadata.num_rows


def decode(raw: bytes | Any) -> dict[str, Any]:
    """What `raw_rows` gave -> an object. Raises RowError."""
    if isinstance(raw, bytes):
        try:
            raw = json.loads(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise RowError("bad UTF-8") from error
        except (ValueError, RecursionError) as error:
            raise RowError("broken JSON") from error
    if not isinstance(raw, dict):
        raise RowError("row is not an object")
    return raw


def locate_rows(sources: SourceFiles, num_samples: int | None) -> Iterator[tuple[float, tuple]]:
    """(share read so far, (source, file, line, content or None where the weight leaves it out))."""
    first, num_files = 0, sum(len(files) for _, files in sources)
    for number, (source, files) in enumerate(sources):
        located = ((i, *row) for i, file in enumerate(files, first) for row in raw_rows(file))
        asked = enumerate(islice(located, num_samples), start=1)
        for count, (file, line, raw, share) in asked:
            # By the hash of the line alone, so that other rows, files or processes change nothing.
            below = source.weight * 2**64
            chosen = source.weight >= 1 or int(fingerprint({"line": line}), 16) < below
            read = max((file - first + share) / len(files), count / (num_samples or math.inf))
            share = (first + read * len(files)) / num_files
            yield share, (number, file, line, raw if chosen else None)
        first += len(files)


def read_rows(
    files: list[DataFile], num_samples: int | None = None, preformatted=False, share: float = 1.0
) -> Iterator[Row]:
    """The first `num_samples` rows of files, or `share` of them, parsed in this process."""
    located = locate_rows([(Source("", weight=share), files)], num_samples)
    for read, (_, file, line, raw) in located:
        if raw is None:
            continue
        row = Row(files[file].name, line, None, share=read)
        try:
            row.conversation = read_conversation(decode(raw), preformatted)
        except RowError as error:
            row.reason = str(error)
        yield row


def why_none(rejected: Counter[str], files: list[DataFile]) -> str:
    """Why no row can be used: by reason, what the first row has, and what to do about it."""
    counted = (f"{count:,} x {reason}" for reason, count in rejected.most_common(3))
    why = "; ".join(counted) or "no rows"
    remedy = next((words for reason, words in REMEDIES.items() if reason in rejected), None)
    if remedy is None:
        return why
    columns: list[str] = []
    with suppress(RowError):
        columns = [name[:30] for name in list(decode(next(raw_rows(files[0]))[1]))[:8]]
    return f"{why}; the first row has {', '.join(columns) or 'no columns'}; {remedy}"
