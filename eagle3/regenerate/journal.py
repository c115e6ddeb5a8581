"""Rows that are through, a line each as they come, so that a killed run loses none; in source order at the end."""

import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from eagle3.data.rows import Message
from eagle3.data.sources import Row
from eagle3.errors import RunError

COUNTS = ("turns", "truncated", "retries", "answer_tokens")


class Journal:
    """`journal.jsonl` of a folder and a progress bar, as a context; `finish` turns it into what the stage leaves.

    A line has {"row", "file", "line", "messages" or "reason"} and counts. `offsets` has where a row's line begins, by
    the row's number, which is all that memory holds. `complete`: a killed call wrote everything already.
    """

    def __init__(self, folder: Path):
        self.folder, self.path, self.facts = folder, folder / "journal.jsonl", folder / "facts.json"
        self.complete = self.facts.exists()
        self.offsets: dict[int, int] = {}
        self.stream = self.path.open("a+b")
        self.stream.seek(0)
        end = 0
        for line in self.stream:
            if line.endswith(b"\n"):
                self.offsets[json.loads(line)["row"]] = end
                end += len(line)
        self.stream.truncate(end)
        self.before, self.started, self.share = len(self.offsets), time.monotonic(), 0.0
        text = "regenerate {task.fields[rows]:,} rows, {task.fields[speed]:.1f} rows/s"
        self.progress = Progress(TextColumn(text), BarColumn(), TimeRemainingColumn(), transient=True)
        self.task = self.progress.add_task("", total=1.0, rows=self.before, speed=0.0)

    def __enter__(self) -> "Journal":
        self.progress.start()
        return self

    def __exit__(self, *error) -> None:
        self.progress.stop()
        self.stream.close()

    def unfinished(self, rows: Iterator[Row]) -> Iterator[tuple[int, Row]]:
        return ((number, row) for number, row in enumerate(rows) if number not in self.offsets)

    def write(self, number: int, row: Row, messages: list[Message], reason: str | None, counts: Counter[str]) -> None:
        """A row is through: with a reason to reject it, or with messages."""
        entry = {"row": number, "file": row.file, "line": row.line, **counts}
        offset = self.stream.seek(0, os.SEEK_END)
        self.stream.write(to_line(entry | ({"reason": reason} if reason else {"messages": messages})))
        self.stream.flush()
        self.offsets[number] = offset
        # What earlier calls did must not count as speed in the remaining time.
        move = self.progress.update if self.share else self.progress.reset
        self.share = max(self.share, getattr(row, "share", 0.0))
        speed = (len(self.offsets) - self.before) / max(time.monotonic() - self.started, 1e-3)
        move(self.task, completed=self.share, rows=len(self.offsets), speed=speed)

    def finish(self) -> dict[str, Any]:
        """Write `conversations.jsonl` and `rejects.jsonl`, remove the journal; returns the facts.

        Raises RunError when not one row was answered. Killed anywhere in it, the next call goes through it again.
        """
        if not self.complete:
            partial = self.facts.with_suffix(".tmp")
            partial.write_text(json.dumps(self.sort()))
            os.replace(partial, self.facts)
        self.path.unlink()
        return json.loads(self.facts.read_text())

    def sort(self) -> dict[str, Any]:
        """Both files, in the order of the rows; returns the facts."""
        counts, rejected, answered = Counter(dict.fromkeys(COUNTS, 0)), Counter(), 0
        with (self.folder / "conversations.jsonl").open("wb") as good, (self.folder / "rejects.jsonl").open("wb") as bad:
            for _, offset in sorted(self.offsets.items()):
                self.stream.seek(offset)
                entry = json.loads(self.stream.readline())
                counts.update({name: entry.get(name, 0) for name in COUNTS})
                if "reason" in entry:
                    rejected[entry["reason"]] += 1
                    bad.write(to_line({key: entry[key] for key in ("file", "line", "reason")}))
                    continue
                messages, answered = entry["messages"], answered + 1
                counts["turns"] += sum(message["role"] == "assistant" for message in messages)
                counts["truncated"] += bool(messages and messages[-1].get("truncated"))
                good.write(to_line({"id": f"{entry['file']}:{entry['line']}", "messages": messages}))
            for stream in (good, bad):
                stream.flush()
                os.fsync(stream.fileno())
        if not answered:
            self.path.unlink()  # a server that is put right may answer what it refused
            reasons = "; ".join(f"{count} x {reason}" for reason, count in rejected.most_common(3)) or "there are none"
            raise RunError(
                f"none of the {len(self.offsets)} rows could be answered again ({reasons}); "
                "check data.path and regenerate"
            )
        return {"rows": len(self.offsets), "answered": answered, **counts, "rejected": dict(rejected.most_common())}


def to_line(entry: dict) -> bytes:
    return json.dumps(entry, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
