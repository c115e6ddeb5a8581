"""One row of any chat dataset -> a conversation, or the reason why it is none."""

import json
from dataclasses import dataclass
from itertools import dropwhile
from typing import Any

Message = dict[str, Any]

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant",
    "bard": "assistant", "model": "assistant", "function_call": "assistant",
    "tool": "tool", "observation": "tool", "function": "tool", "ipython": "tool",
}  # fmt: skip
# What may stand before a role; None: nothing but the system message.
BEFORE = {"user": (None, "assistant"), "assistant": ("user", "tool"), "tool": ("assistant", "tool")}
# Datasets have reasoning under one of these names, and templates read it under another.
REASONING = ("reasoning_content", "reasoning", "thinking")
QUESTIONS = ("instruction", "question", "problem", "query", "prompt")
ANSWERS = ("output", "response", "answer", "solution", "completion")
NO_MESSAGES, NO_ANSWER = "no messages", "prompt without an answer"
# What to do where no row can be used, by the reason.
REMEDIES = {
    NO_ANSWER: "the rows have prompts but no answers: add regenerate to stages",
    NO_MESSAGES: "missing are messages or conversations, or instruction and output",
}


class RowError(ValueError):
    """One row cannot be used; the message is the reason it is counted under."""


@dataclass
class Conversation:
    """`messages` as chat templates take them, `tools` as JSON schemas, or a rendered `text`;
    `repaired` says what was left out. An answer with `truncated` has no end of turn. Where nothing
    is answered yet, questions follow each other.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    text: str | None = None
    repaired: str | None = None


def read_conversation(row: dict[str, Any], preformatted: bool = False) -> Conversation:
    """A row with messages, or instruction and output, or prompts alone, or, `preformatted`, a text.
    Raises RowError.
    """
    if preformatted:
        if not isinstance(row.get("text"), str) or not row["text"].strip():
            raise RowError("no text")
        return Conversation([], text=row["text"])
    try:
        row = without_nulls(row)
    except RecursionError as error:
        raise RowError("nested too deeply") from error
    turns = row.get("messages") or row.get("conversations") or from_columns(row)
    if not isinstance(turns, list):
        raise RowError(NO_MESSAGES)
    found = map(read_message, filter(None, turns))  # a message of nulls alone is none
    messages = [m for m in found if m["content"].strip() or m["role"] != "system"]
    # Alpaca-like rows have the system message beside the turns.
    system, repaired = row.get("system"), None
    if isinstance(system, str) and system.strip() and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    first = next((i for i, m in enumerate(messages) if m["role"] != "system"), len(messages))
    # ShareGPT cuts long conversations anywhere, so that parts of them begin with an answer.
    rest = list(dropwhile(lambda m: m["role"] == "assistant", messages[first:]))
    if 0 < len(rest) < len(messages) - first:
        messages, repaired = messages[:first] + rest, "leading assistant turn dropped"
    # Users and assistants alternate; results follow the assistant that called the tools.
    before, prompts_alone = None, all(m["role"] in ("system", "user") for m in messages)
    for message in messages[min(first, 1) :]:
        if message["role"] == "system":
            raise RowError("system message behind the first")
        if before not in BEFORE[message["role"]] and not prompts_alone:
            raise RowError("turns do not alternate between user and assistant")
        before = message["role"]
    if before is None:
        raise RowError(NO_MESSAGES)
    return Conversation(messages, read_tools(row.get("tools")), repaired=repaired)


def from_columns(row: dict) -> list[Message] | None:
    """Questions in turn, or instruction (with input) and output, under the names of datasets."""
    turns = row.get("turns")
    if isinstance(turns, list) and turns and all(isinstance(turn, str) for turn in turns):
        return [{"role": "user", "content": turn} for turn in turns]
    question, answer = (
        next((row[name] for name in names if isinstance(row.get(name), str)), None)
        for names in (QUESTIONS, ANSWERS)
    )
    if question is None:
        return None
    if isinstance(row.get("input"), str) and row["input"].strip():
        question += f"\n\n{row['input']}"
    messages = [{"role": "user", "content": question}]
    if answer is not None and answer.strip():
        messages.append({"role": "assistant", "content": answer})
    return messages


def read_message(turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise RowError("message is not an object")
    name = turn.get("role") or turn.get("from")
    if not isinstance(name, str) or name.lower() not in ROLES:
        raise RowError("unknown role")
    role, content = ROLES[name.lower()], turn.get("content", turn.get("value", ""))
    calls = turn.get("tool_calls")
    # ShareGPT writes a call as a turn of its own, whose value is the call.
    if name.lower() == "function_call":
        calls, content = content, ""
    # Multimodal form: parts of text are joined, any other part is refused.
    if isinstance(content, list) and all(map(is_text, content)):
        content = "".join(part.get("text", "") for part in content)
    if not isinstance(content, str):
        raise RowError("content is not text")
    message: Message = {"role": role, "content": content}
    if calls := read_calls(calls):
        message["tool_calls"] = calls
    reasoning = next(filter(None, map(turn.get, REASONING)), None)
    if isinstance(reasoning, str) and reasoning.strip():
        message |= dict.fromkeys(REASONING, reasoning)
    if not content.strip() and not calls and role != "system":
        raise RowError("empty turn")
    for key in ("name", "tool_call_id", "truncated"):
        if turn.get(key):
            message[key] = turn[key]
    return message


def is_text(part: Any) -> bool:
    known = isinstance(part, dict) and ("text" in part or part.get("type") == "text")
    return known and isinstance(part.get("text", ""), str)


def read_calls(calls: Any) -> list[dict]:
    """Tool calls, also as a JSON text; arguments become objects, as chat templates take them."""
    calls = parse(calls, "tool calls are not JSON") or []
    read = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError("tool call without a name")
        arguments = parse(function.get("arguments"), "tool call arguments are not JSON") or {}
        named = {"id": call["id"]} if call.get("id") else {}
        function = {"name": function["name"], "arguments": arguments}
        read.append({**named, "type": "function", "function": function})
    return read


def read_tools(tools: Any) -> list[dict] | None:
    """Schemas as a list or a JSON text; bare functions get the wrapper that templates expect."""
    tools = parse(tools, "tools are not JSON") or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("tools are not a list of objects")
    return [t if "function" in t else {"type": "function", "function": t} for t in tools] or None


def parse(value: Any, reason: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return without_nulls(json.loads(value.strip() or "null"))
    except (ValueError, RecursionError) as error:
        raise RowError(reason) from error


def without_nulls(value: Any) -> Any:
    """Tables fill with null what a row does not have: a null is what is not there, however deep."""
    if isinstance(value, dict):
        return {name: without_nulls(part) for name, part in value.items() if part is not None}
    if isinstance(value, list):
        items = [without_nulls(item) for item in value if item is not None]
        # Among plain values, such as the allowed ones of a schema, it is one of them.
        return items if all(isinstance(item, dict | list) for item in items) else value
    return value
