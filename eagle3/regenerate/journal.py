"""Finished rows, one line each, so that a killed run loses none; sorted into source order at the end."""

import json
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from eagle3.data.rows import Message
from eagle3.data.sources import Row
from eagle3.errors import RunError

COUNTS = ("turns", "truncated", "retries", "answer_tokens")


class Journal:
    """`journal.jsonl` of a folder: {"file", "line", "messages" or "reason", "counts", "servers"} a row.

    Rows that a server refused or never answered carry `"again": true`: as long as the stage is incomplete, its next
    start asks for them once more, and of two lines of a row the later one counts. `facts` is set when `finish` was
    through already. Memory holds numbers of lines and byte offsets, never texts.
    """

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / "journal.jsonl"
        self.finished: dict[str, set[int]] = {}
        self.given_up: dict[str, set[int]] = {}
        self.last_line: dict[str, int] = {}
        self.numbers: dict[str, int] = {}
        self.places = array("q")
        done = folder / "facts.json"
        self.facts: dict[str, Any] | None = json.loads(done.read_text()) if done.exists() else None
        if self.facts is None:
            self.stream = self.path.open("a+b")
            self.read_back()

    def read_back(self) -> None:
        """Learn what an interrupted call finished; from the first line on that is not whole, it is cut off."""
        self.stream.seek(0)
        end = 0
        for raw in self.stream:
            try:
                entry = json.loads(raw)
            except ValueError:
                break
            if not raw.endswith(b"\n"):
                break
            self.note(entry, end)
            kept = self.given_up if entry.get("again") else self.finished
            kept.setdefault(entry["file"], set()).add(entry["line"])
            end += len(raw)
        self.stream.truncate(end)

    def note(self, entry: dict, offset: int) -> None:
        number = self.numbers.setdefault(entry["file"], len(self.numbers))
        self.places.extend((number, entry["line"], offset))

    @property
    def done(self) -> int:
        return sum(map(len, self.finished.values()))

    def once(self, rows: Iterable[Row]) -> Iterator[tuple[Row, bool]]:
        """Every row with whether it is finished; a file that comes twice is answered once."""
        for row in rows:
            if row.line > self.last_line.get(row.file, -1):
                self.last_line[row.file] = row.line
                yield row, self.is_finished(row)

    def is_finished(self, row: Row) -> bool:
        return row.line in self.finished.get(row.file, ())

    def was_given_up(self, row: Row) -> bool:
        """An earlier call got no answer for it either."""
        return row.line in self.given_up.get(row.file, ())

    def answer(self, row: Row, messages: list[Message], counts: dict[str, int], servers: dict[str, int]) -> None:
        """`counts`: some of COUNTS; `servers`: answers by server."""
        counts = {"turns": sum(m["role"] == "assistant" for m in messages)} | counts
        counts["truncated"] = int(messages[-1].get("truncated", False))
        self.append({"file": row.file, "line": row.line, "messages": messages, "counts": counts, "servers": servers})

    def reject(self, row: Row, reason: str, again: bool = False, retries: int = 0) -> None:
        entry = {"file": row.file, "line": row.line, "reason": reason, "counts": {"retries": retries}}
        self.append(entry | ({"again": True} if again else {}))

    def append(self, entry: dict) -> None:
        offset = self.stream.seek(0, os.SEEK_END)
        self.stream.write(to_line(entry))
        self.stream.flush()
        self.note(entry, offset)
        self.finished.setdefault(entry["file"], set()).add(entry["line"])

    def close(self) -> None:
        if self.facts is None:
            self.stream.close()

    def in_order(self) -> Iterator[dict]:
        """The last line of every row, in the order in which `once` went through them."""
        numbers, lines, offsets = np.frombuffer(self.places, dtype=np.int64).reshape(-1, 3).T
        ranks = {name: rank for rank, name in enumerate(self.last_line)}
        rank = np.array([ranks.get(name, -1) for name in self.numbers], dtype=np.int64)[numbers]
        order = np.lexsort((offsets, lines, rank))
        rank, lines, offsets = rank[order], lines[order], offsets[order]
        last = np.append((rank[1:] != rank[:-1]) | (lines[1:] != lines[:-1]), True)
        for offset in offsets[last & (rank >= 0)]:
            self.stream.seek(offset)
            yield json.loads(self.stream.readline())

    def finish(self) -> dict[str, Any]:
        """Write `conversations.jsonl` and `rejects.jsonl`, remove the journal; returns the facts.

        Raises RunError when not one row was answered. Killed anywhere in it, it can be called again.
        """
        if self.facts is not None:
            self.path.unlink(missing_ok=True)
            return self.facts
        rejected, counts, servers, answered = Counter(), Counter(dict.fromkeys(COUNTS, 0)), Counter(), 0
        accepted, refused = self.folder / "conversations.jsonl", self.folder / "rejects.jsonl"
        with accepted.with_suffix(".tmp").open("wb") as good, refused.with_suffix(".tmp").open("wb") as bad:
            for entry in self.in_order() if self.places else ():
                counts.update(entry["counts"])
                if "reason" in entry:
                    rejected[entry["reason"]] += 1
                    bad.write(to_line({key: entry[key] for key in ("file", "line", "reason")}))
                    continue
                answered += 1
                servers.update(entry["servers"])
                good.write(to_line({"id": f"{entry['file']}:{entry['line']}", "messages": entry["messages"]}))
            for stream in (good, bad):
                stream.flush()
                os.fsync(stream.fileno())
        rows = answered + rejected.total()
        if not answered:
            reasons = "; ".join(f"{count} x {reason}" for reason, count in rejected.most_common(3)) or "there are none"
            raise RunError(
                f"none of the {rows} rows could be answered again ({reasons}); check data.path and regenerate"
            )
        facts = {"rows": rows, "answered": answered, **counts, "rejected": dict(rejected.most_common())}
        facts |= {"servers": dict(sorted(servers.items()))} if servers else {}
        for path in (accepted, refused):
            os.replace(path.with_suffix(".tmp"), path)
        partial = self.folder / "facts.tmp"
        partial.write_text(json.dumps(facts, indent=1))
        os.replace(partial, self.folder / "facts.json")
        self.path.unlink()
        return facts


def to_line(entry: dict) -> bytes:
    return json.dumps(entry, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
