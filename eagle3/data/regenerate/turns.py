"""What of a row is asked again, and what of an answer is kept."""

import re
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from eagle3.data.chat import with_system
from eagle3.data.rows import Message, RowError
from eagle3.data.sources import Row

LONE_SURROGATE = re.compile("[\\ud800-\\udfff]")


Complete = Callable[
    [list[Message], Counter], Awaitable[Message]
]  # what to ask with, counts -> answer, or RowError


async def converse(complete: Complete, row: Row, system_prompt: str | None) -> dict[str, Any]:
    """Ask turn by turn, each with the answers so far: {"messages" or "reason", and what was
    counted}.
    """
    said, counts = [], Counter()
    try:
        for message in questions(row, system_prompt):
            said.append({"role": message["role"], "content": message["content"]})
            if message["role"] == "user":
                # Reasoning is not sent back, as chat templates of reasoning models drop it too.
                history = [{"role": m["role"], "content": m["content"]} for m in said]
                said.append(await complete(history, counts))
                if said[-1].get("truncated"):
                    break
    except RowError as error:
        return {"reason": str(error), **counts}
    return {"messages": said, **counts}


def questions(row: Row, system_prompt: str | None) -> list[Message]:
    """The system message, if any, and the user turns of a row. Raises RowError where they cannot be
    asked again.
    """
    conversation = row.conversation
    if conversation is None:
        raise RowError(row.reason)
    if conversation.tools or any(
        m["role"] == "tool" or m.get("tool_calls") for m in conversation.messages
    ):
        raise RowError("tool calls cannot be answered again")
    asked = [
        m for m in with_system(conversation.messages, system_prompt) if m["role"] != "assistant"
    ]
    if any(LONE_SURROGATE.search(m["content"]) for m in asked):
        raise RowError("bad UTF-8")
    return asked


def answer(content: str | None, reasoning: str | None, truncated: bool) -> Message:
    """The assistant message; thinking within the content becomes `reasoning_content`. Raises
    RowError if empty.
    """
    content, reasoning = (LONE_SURROGATE.sub("\ufffd", text or "") for text in (content, reasoning))
    if not reasoning and ("</think>" in content or content.lstrip().startswith("<think>")):
        reasoning, _, content = content.partition("</think>")
        reasoning, content = reasoning.strip().removeprefix("<think>").strip(), content.lstrip()
    if not content.strip() and not (truncated and reasoning.strip()):
        raise RowError("empty answer")
    message: Message = {"role": "assistant", "content": content}
    if reasoning.strip():
        message["reasoning_content"] = reasoning
    if truncated:
        message["truncated"] = True
    return message
