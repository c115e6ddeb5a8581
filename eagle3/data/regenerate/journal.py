"""Rows that are through, a line each as they come, so that a killed run loses none; in source order
at the end.
"""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from eagle3.data.sources import Row
from eagle3.errors import RunError


class Journal:
    """`journal.jsonl` of a folder, with a progress bar, as a context; `finish` makes of it what the
    stage leaves.

    A line has {"row", "file", "line", "messages" or "reason", "retries", "answer_tokens"}.
    `offsets` says where each row's line begins, by the row's number; memory holds no more.
    `complete`: a killed call was through with `finish`.
    """

    def __init__(self, folder: Path):
        self.folder, self.path, self.facts = folder, folder / "journal.jsonl", folder / "facts.json"
        self.complete = self.facts.exists()
        self.offsets: dict[int, int] = {}
        self.stream = self.path.open("a+b")
        self.stream.seek(0)
        end = 0
        for line in self.stream:
            if line.endswith(b"\n"):  # else the last call was killed in the middle of it
                self.offsets[json.loads(line)["row"]] = end
                end += len(line)
        self.stream.truncate(end)
        columns = (BarColumn(), TaskProgressColumn(show_speed=True), TimeRemainingColumn())
        self.progress = Progress(
            TextColumn("regenerate {task.completed:,} rows"), *columns, transient=True
        )
        self.task = self.progress.add_task("", total=None, completed=len(self.offsets))

    def __enter__(self) -> "Journal":
        self.progress.start()
        return self

    def __exit__(self, *error) -> None:
        self.progress.stop()
        self.stream.close()

    def write(self, number: int, row: Row, entry: dict[str, Any]) -> None:
        """A row is through: `entry` has "reason" or "messages", and counts."""
        offset = self.stream.seek(0, os.SEEK_END)
        self.stream.write(to_line({"row": number, "file": row.file, "line": row.line, **entry}))
        self.stream.flush()
        self.offsets[number] = offset
        done, share = len(self.offsets), getattr(row, "share", 0.0)
        self.progress.update(
            self.task, completed=done, total=max(done, (number + 1) / share) if share else None
        )

    def say(self, line: str) -> None:
        self.progress.console.print(line, markup=False, soft_wrap=True)

    def finish(self) -> dict[str, Any]:
        """Write `conversations.jsonl` and `rejects.jsonl`, remove the journal; returns the facts.

        Raises RunError when not one row was answered. Killed anywhere in it, it can be called
        again.
        """
        if not self.complete:
            partial = self.facts.with_suffix(".tmp")
            partial.write_text(json.dumps(self.sort()))
            os.replace(partial, self.facts)
        self.path.unlink()
        return json.loads(self.facts.read_text())

    def sort(self) -> dict[str, Any]:
        """Both files, in the order of the rows; returns the facts."""
        counts, rejected = Counter(turns=0, truncated=0, retries=0, answer_tokens=0), Counter()
        good, bad = (
            (self.folder / name).open("wb") for name in ("conversations.jsonl", "rejects.jsonl")
        )
        with good, bad:
            for _, offset in sorted(self.offsets.items()):
                self.stream.seek(offset)
                entry = json.loads(self.stream.readline())
                counts.update({name: entry.get(name, 0) for name in ("retries", "answer_tokens")})
                if "reason" in entry:
                    rejected[entry["reason"]] += 1
                    bad.write(to_line({key: entry[key] for key in ("file", "line", "reason")}))
                    continue
                answers = [
                    message for message in entry["messages"] if message["role"] == "assistant"
                ]
                counts.update(
                    turns=len(answers), truncated=sum("truncated" in answer for answer in answers)
                )
                good.write(
                    to_line(
                        {"id": f"{entry['file']}:{entry['line']}", "messages": entry["messages"]}
                    )
                )
        rows = len(self.offsets)
        if rows == rejected.total():
            self.path.unlink()  # servers that are put right may answer what they refused
            reasons = (
                "; ".join(f"{count} x {reason}" for reason, count in rejected.most_common(3))
                or "there are none"
            )
            raise RunError(
                f"none of the {rows} rows could be answered again ({reasons}); check data and regenerate"
            )
        return {
            "rows": rows,
            "answered": rows - rejected.total(),
            **counts,
            "rejected": dict(rejected.most_common()),
        }


def to_line(entry: dict) -> bytes:
    return json.dumps(entry, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
