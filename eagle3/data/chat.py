"""Conversations to token ids and the assistant mask."""

from dataclasses import dataclass

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from eagle3.data.sources import RowError
from eagle3.errors import ConfigError

Messages = list[dict[str, str]]


@dataclass
class Encoded:
    """`input_ids` and `loss_mask` (1: assistant content or its end of turn), both of length n."""

    input_ids: list[int]
    loss_mask: list[int]


SYSTEM_PROMPTS = {
    # From the Llama 2 release; SpecForge's `llama3` template puts it before conversations that have none.
    "llama2": (
        "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while "
        "being safe. Your answers should not include any harmful, unethical, racist, sexist, toxic, "
        "dangerous, or illegal content. Please ensure that your responses are socially unbiased and positive "
        "in nature.\n\nIf a question does not make any sense, or is not factually coherent, explain why "
        "instead of answering something not correct. If you don't know the answer to a question, please don't"
        " share false information."
    )
}


def with_system(messages: Messages, system_prompt: str | None) -> Messages:
    """Put `system_prompt` (a text, or a name of `SYSTEM_PROMPTS`) first where a conversation has none of its own."""
    if system_prompt is None or messages[0]["role"] == "system":
        return messages
    system_prompt = SYSTEM_PROMPTS.get(system_prompt, system_prompt)
    return [{"role": "system", "content": system_prompt}, *messages]


def load_tokenizer(path: str, revision: str | None, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The target's tokenizer; raises ConfigError when there is none, or none that can render a chat."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path={path} has no tokenizer that loads: {str(error).splitlines()[0]}") from error
    if tokenizer.chat_template is None:
        raise ConfigError(f"the tokenizer of model.path={path} has no chat template; add chat_template.jinja beside it")
    return tokenizer


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
    """Where each assistant turn (content and end of turn) lies in the rendered text: [start, stop) in characters.

    Templates may render earlier turns differently from the last (Qwen3 gives the last an empty thinking block), so a
    turn is found by its content behind what the template renders for the turns before it.
    """
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        content = message["content"].strip()
        before = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
        alone = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False).rstrip()
        end_of_turn = alone[alone.rfind(content) + len(content) :]
        stop = text.find(content, len(before)) + len(content)
        found = text.startswith(before) and content in alone and stop >= len(before) + len(content)
        if not found or not text.startswith(end_of_turn, stop):
            raise RowError("the chat template renders a turn differently once others follow")
        spans.append((len(before), stop + len(end_of_turn)))
    return spans


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    """The ids that ask for the next assistant turn; trailing assistant messages are dropped."""
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]
