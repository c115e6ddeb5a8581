"""Conversations to token ids and the assistant mask."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from eagle3.data.sources import RowError

Messages = list[dict[str, str]]


@dataclass
class Encoded:
    """`input_ids` and `loss_mask` (1: assistant content or its end of turn), both of length n."""

    input_ids: list[int]
    loss_mask: list[int]


def with_system(messages: Messages, system_prompt: str | None) -> Messages:
    """Put `system_prompt` first where a conversation has no system message of its own."""
    if system_prompt is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]


def encode(tokenizer: PreTrainedTokenizerBase, messages: Messages, only_last_turn: bool = False) -> Encoded:
    """Render once, tokenise once; a token belongs to a turn if it ends in it. Raises RowError."""
    if not any(m["role"] == "assistant" for m in messages):
        raise RowError("no assistant turn")
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    spans = assistant_spans(tokenizer, messages, text)
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = spans[-1:] if only_last_turn else spans
    mask = [int(any(start < end <= stop for start, stop in spans)) for _, end in tokens["offset_mapping"]]
    if not any(mask):
        raise RowError("no assistant token found")
    return Encoded(tokens["input_ids"], mask)


def assistant_spans(tokenizer: PreTrainedTokenizerBase, messages: Messages, text: str) -> list[tuple[int, int]]:
    """Where each assistant turn (content and end of turn) lies in the rendered text: [start, stop) in characters."""
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
        after = text if i + 1 == len(messages) else tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
        if not text.startswith(after) or not after.startswith(before):
            raise RowError("the chat template renders a turn differently once others follow")
        spans.append((len(before), len(after.rstrip())))
    return spans


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    """The ids that ask for the next assistant turn; trailing assistant messages are dropped."""
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]
