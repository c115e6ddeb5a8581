"""Rows of conversation files: each is given with the file and line it came from, or with what is wrong with it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from eagle3.errors import RunError

ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}
ROLES |= {role: role for role in ("system", "user", "assistant")}


class RowError(ValueError):
    """One row cannot be used; the message is the reason it is counted under."""


@dataclass
class Row:
    """`messages` of one conversation, each {"role", "content"}, or the reason why the row has none."""

    file: str
    line: int
    messages: list[dict[str, str]] | None
    reason: str | None = None


def read_rows(path: str) -> Iterator[Row]:
    """Rows of a JSONL file, or of a JSON file that holds a list. Raises RunError when the file holds no rows."""
    text = Path(path).read_bytes()
    if not text.strip():
        raise RunError(f"data.path={path} is empty; give a file with one conversation a line")
    if text.lstrip()[:1] == b"[":
        yield from read_list(path, text)
        return
    for line, raw in enumerate(text.splitlines(), start=1):
        if not raw.strip():
            continue
        try:
            yield Row(path, line, read_messages(json.loads(raw.decode("utf-8"))))
        except UnicodeDecodeError:
            yield Row(path, line, None, "bad UTF-8")
        except json.JSONDecodeError:
            yield Row(path, line, None, "broken JSON")
        except RowError as error:
            yield Row(path, line, None, str(error))


def read_list(path: str, text: bytes) -> Iterator[Row]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise RunError(f"data.path={path} is not JSON: {error}") from error
    for number, value in enumerate(values, start=1):
        try:
            yield Row(path, number, read_messages(value))
        except RowError as error:
            yield Row(path, number, None, str(error))


def read_messages(value: object) -> list[dict[str, str]]:
    """One JSON row, `messages` (role, content) or `conversations` (from, value) -> messages. Raises RowError."""
    if not isinstance(value, dict):
        raise RowError("row is not an object")
    turns = value.get("messages", value.get("conversations"))
    if not isinstance(turns, list) or not turns:
        raise RowError("no messages")
    messages = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise RowError("message is not an object")
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if role not in ROLES:
            raise RowError("unknown role")
        if not isinstance(content, str):
            raise RowError("content is not text")
        if not content.strip():
            raise RowError("empty turn")
        messages.append({"role": ROLES[role], "content": content})
    speakers = [m["role"] for m in messages if m["role"] != "system"]
    if speakers[::2] != ["user"] * len(speakers[::2]) or speakers[1::2] != ["assistant"] * len(speakers[1::2]):
        raise RowError("turns do not alternate between user and assistant")
    return messages
