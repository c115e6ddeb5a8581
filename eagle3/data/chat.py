"""Conversations to token ids and the assistant mask: one rendering, one tokenisation, spans found
in that text.
"""

import re
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from hashlib import sha256
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from eagle3.data import templates
from eagle3.data.rows import Conversation, Message, RowError
from eagle3.errors import ConfigError

Messages = list[Message]
Span = tuple[int, int]

NOT_FOUND = "assistant turn not found in the rendering"
WHITESPACE = re.compile(r"\s*")
SPECIAL_LOOK = re.compile(r"<[|｜][^<>|｜]*[|｜]>|<(?:start|end)_of_turn>")
LONGEST_TEXT = 1 << 23
PROBE_CALL = {"type": "function", "function": {"name": "qzcall", "arguments": {"qzkey": "qzvalue"}}}
PROBE_TOOL = {
    "type": "function",
    "function": {"name": "qzcall", "description": "", "parameters": {"properties": {}}},
}

SYSTEM_PROMPTS = {
    # From the Llama 2 release, with the two spaces that EAGLE's and SpecForge's copies have (so
    # their drafts too).
    "llama2": (
        "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while "
        "being safe.  Your answers should not include any harmful, unethical, racist, sexist, toxic, "
        "dangerous, or illegal content. Please ensure that your responses are socially unbiased and positive "
        "in nature.\n\nIf a question does not make any sense, or is not factually coherent, explain why "
        "instead of answering something not correct. If you don't know the answer to a question, please don't"
        " share false information."
    )
}


@dataclass
class Encoded:
    """`input_ids` of n tokens, and the spans [first, stop) of tokens that are supervised: answers
    and their ends.
    """

    text: str
    input_ids: list[int]
    spans: list[Span]

    @property
    def loss_mask(self) -> list[int]:
        mask = [0] * len(self.input_ids)
        for first, stop in self.spans:
            mask[first:stop] = [1] * (stop - first)
        return mask


@dataclass
class Turns:
    """How a template frames an assistant turn: `opening` stands before it, `prompt_rest` is what a
    generation prompt adds to that, and one of `closings` ends it, but for the last turn where that
    has an `open_end`.
    """

    opening: str
    prompt_rest: str
    closings: tuple[str, ...]
    open_end: bool


def with_system(messages: Messages, system_prompt: str | None) -> Messages:
    """Put `system_prompt` (a text, or a name of `SYSTEM_PROMPTS`) first where a conversation has
    none of its own.
    """
    if system_prompt is None or messages[0]["role"] == "system":
        return messages
    system_prompt = SYSTEM_PROMPTS.get(system_prompt, system_prompt)
    return [{"role": "system", "content": system_prompt}, *messages]


def load_tokenizer(
    path: str, revision: str | None, trust_remote_code: bool, chat_template: str = "auto"
) -> PreTrainedTokenizerBase:
    """The target's tokenizer with the named chat template, or its own; raises ConfigError when
    there is none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.path={path} has no tokenizer that loads: {str(error).splitlines()[0]}"
        ) from error
    if not tokenizer.is_fast:
        raise ConfigError(
            f"the tokenizer of model.path={path} gives no offsets; add its tokenizer.json"
        )
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    if chat_template != "auto":
        tokenizer.chat_template = templates.read(chat_template)
        check_tokens(tokenizer, chat_template)
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"the tokenizer of model.path={path} has no chat template; set data.chat_template to one of "
            f"{', '.join(templates.names())}, or add chat_template.jinja beside it"
        )
    return tokenizer


def check_tokens(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise ConfigError where a named template frames turns by tokens that the tokenizer does not
    have.
    """
    words = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text, _ = Chat(tokenizer).render(words)
    unknown = [token for token in SPECIAL_LOOK.findall(text) if token not in tokenizer.get_vocab()]
    if unknown:
        raise ConfigError(
            f"data.chat_template={name} needs {unknown[0]}, which is no token of the target's tokenizer"
        )


class Chat:
    """A tokenizer, its chat template, and what was learnt about how that frames assistant turns."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any] | None = None):
        self.tokenizer, self.options = tokenizer, options or {}
        self.template = tokenizer.get_chat_template()
        self.marked = "generation" in re.findall(r"{%-?\s*(\w+)", self.template)

    @property
    def identity(self) -> dict[str, Any]:
        """For fingerprints: equal when the same conversations give the same ids."""
        whole = self.tokenizer.backend_tokenizer.to_str().encode()
        dated = {"date": str(date.today())} if "strftime_now" in self.template else {}
        return {
            "tokenizer": sha256(whole).hexdigest(),
            "template": self.template,
            "options": self.options,
        } | dated

    def render(
        self, messages: Messages, tools=None, prompt: bool = False
    ) -> tuple[str, list[Span]]:
        """The text of `messages` and, where the template has `{% generation %}`, the character
        spans it marks.

        Raises RowError with what the template refuses.
        """
        try:
            texts, spans = render_jinja_template(
                [messages],
                tools=tools,
                chat_template=self.template,
                return_assistant_tokens_mask=self.marked,
                add_generation_prompt=prompt,
                **{**self.tokenizer.special_tokens_map, **self.options},
            )
        except (
            Exception
        ) as error:  # templates raise what they like: jinja's errors, KeyError, TypeError
            raise RowError(f"refused by the chat template: {str(error).splitlines()[0]}") from error
        return texts[0], [tuple(span) for span in spans[0]] if self.marked else []

    @cached_property
    def turns(self) -> Turns:
        return learn(self)

    @cached_property
    def frame(self) -> Turns | None:
        """How a marked template frames turns; None where that cannot be learnt."""
        try:
            return self.turns
        except ConfigError:
            return None

    @cached_property
    def call_closing(self) -> str:
        """The special token that ends a turn which calls a tool."""
        asked = {"role": "user", "content": "qzasked"}
        call = {"role": "assistant", "content": "", "tool_calls": [PROBE_CALL]}
        result = {"role": "tool", "content": "qzresult", "name": "qzcall"}
        text, _ = self.render([asked, call, result], [PROBE_TOOL])
        _, _, after = text.partition("qzvalue")
        found = first_special(self.tokenizer, after)
        if found is None:
            raise RowError("the chat template does not show where a tool call ends")
        return after[found[0] : found[1]]

    def encode(self, conversation: Conversation, only_last_turn: bool = False) -> Encoded:
        """Render once, tokenise once; a token belongs to a turn if it ends in it. Raises RowError."""
        if conversation.text is not None:
            text = conversation.text
            spans = find_spans(self, text)
        else:
            if not any(m["role"] == "assistant" for m in conversation.messages):
                raise RowError("no assistant turn")
            text, marked = self.render(conversation.messages, conversation.tools)
            cut = any(m.get("truncated") for m in conversation.messages)
            spans = (
                mend(self, marked, text, cut)
                if marked
                else find_turns(self, conversation.messages, text)
            )
        if not any(first < stop for first, stop in spans):
            raise RowError(NOT_FOUND)
        if len(text) > LONGEST_TEXT:
            raise RowError(f"longer than {LONGEST_TEXT:,} characters")
        spans = spans[-1:] if only_last_turn else spans
        try:
            encoding = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError) as error:
            raise RowError("bad UTF-8") from error
        return Encoded(
            text, encoding.ids, [span for span in map(token_span(encoding, text), spans) if span]
        )

    def encode_prompt(self, messages: Messages, tools=None) -> list[int]:
        """The ids that ask for the next assistant turn; trailing assistant messages are dropped."""
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        return self.tokenize(self.render(messages, tools, prompt=True)[0])

    def prompt_of(self, conversation: Conversation) -> list[int]:
        """The ids that ask for the last assistant turn again, also of preformatted text."""
        if conversation.text is None:
            return self.encode_prompt(conversation.messages, conversation.tools)
        return self.tokenize(conversation.text[: find_spans(self, conversation.text)[-1][0]])

    def tokenize(self, text: str) -> list[int]:
        return self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """The text of an answer, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def token_span(encoding, text: str):
    """A function from characters [start, stop) to the tokens [first, stop) that end in them, or
    None when none does.

    `char_to_token` is the first token over a character; where a tokenizer leaves characters out,
    all offsets are read.
    """

    def boundary(place: int) -> int:
        """The first token that ends behind `place`."""
        if place >= len(text):
            return len(encoding.ids)
        token = encoding.char_to_token(place)
        if token is not None:
            return token
        return next(
            (i for i, (_, end) in enumerate(encoding.offsets) if end > place), len(encoding.ids)
        )

    def tokens(span: Span) -> Span | None:
        first, stop = boundary(span[0]), boundary(span[1])
        return (first, stop) if first < stop else None

    return tokens


def first_special(tokenizer: PreTrainedTokenizerBase, text: str) -> Span | None:
    """Where the first special token stands in `text`."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    found = (
        re.search("|".join(map(re.escape, sorted(special, key=len, reverse=True))), text)
        if special
        else None
    )
    return found.span() if found else None


def common_prefix(*texts: str) -> str:
    """The longest common prefix that does not end inside a tag such as `<think>`."""
    low, high = min(texts), max(texts)
    prefix = low[: next((i for i, letter in enumerate(low) if letter != high[i]), len(low))]
    tag = prefix.rfind("<")
    return prefix[:tag] if tag >= 0 and ">" not in prefix[tag:] else prefix


def learn(chat: Chat) -> Turns:
    """Render a conversation of known words and see what the template puts around them. Raises
    ConfigError.
    """
    words = ["qzfirst", "qzsecond", "qzthird", "qzfourth"]
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": word} for i, word in enumerate(words)
    ]
    try:
        text, asked = chat.render(messages)[0], chat.render(messages[:1])[0]
        prompted = chat.render(messages[:1], prompt=True)[0]
    except RowError as error:
        raise ConfigError(
            f"the tokenizer's chat template cannot be used: {error}; set data.chat_template"
        ) from error
    places = [text.find(word) for word in words]
    if -1 in places or places != sorted(places):
        raise ConfigError(
            "the tokenizer's chat template does not render user and assistant turns in order; "
            "set data.chat_template to a named one"
        )
    tail = asked.partition(words[0])[2]
    prompt = prompted[len(asked) :] if prompted.startswith(asked) else ""
    heads = []
    for i in (1, 3):
        between = text[places[i - 1] + len(words[i - 1]) : places[i]]
        head = between.removeprefix(tail) if between.startswith(tail) else between
        marker = first_special(chat.tokenizer, prompt)
        place = head.rfind(prompt[slice(*marker)]) if marker else -1
        heads.append(head[max(0, place) :])
    opening = common_prefix(*heads, prompt) if prompt else common_prefix(*heads)
    rest = prompt[len(opening) :]
    if not opening.strip():
        opening, rest = tail.rstrip() + opening.rstrip(), ""
    last = text[places[3] + len(words[3]) :].strip()
    found = first_special(chat.tokenizer, last)
    closings = [last[: found[1]] if found else last] if last else []
    middle = text[places[1] + len(words[1]) : places[2]]
    found = first_special(chat.tokenizer, middle)
    if found and not any(middle.lstrip().startswith(closing) for closing in closings):
        closings.append(middle[found[0] : found[1]])
    if not opening.strip():
        raise ConfigError(
            "the tokenizer's chat template has no text in front of assistant turns by which they can be found; "
            "set data.chat_template, or mark them with {% generation %}"
        )
    return Turns(opening, rest, tuple(closings), open_end=not last)


def start_of_turn(turns: Turns, text: str, cursor: int) -> int:
    """Where the next assistant turn begins: behind its opening, and behind all of a generation
    prompt.
    """
    found = text.find(turns.opening, cursor)
    if found < 0:
        return -1
    start = found + len(turns.opening)
    return start + len(turns.prompt_rest) if text.startswith(turns.prompt_rest, start) else start


def find_turns(chat: Chat, messages: Messages, text: str) -> list[Span]:
    """Characters of every assistant turn with its closing, by walking the messages and the text
    side by side.

    A question is stepped over by its content, so that an opening quoted in it is not taken for one;
    an answer must stand between an opening and a closing. What a template does to earlier turns
    (drop thinking, add an empty block) is thereby seen as it was rendered.
    """
    turns, cursor, spans = chat.turns, 0, []
    for message in messages:
        content = message["content"].strip()
        if message["role"] != "assistant":
            found = text.find(content, cursor) if message["role"] != "system" else -1
            cursor = found + len(content) if found >= 0 else cursor
            if found < 0 and turns.opening in content:
                raise RowError(NOT_FOUND)
            continue
        start = start_of_turn(turns, text, cursor)
        if start < 0:
            raise RowError(NOT_FOUND)
        closings = (chat.call_closing,) if message.get("tool_calls") else turns.closings
        answer, stop = close(text, start, message, closings, turns.open_end)
        spans.append((start, answer if message.get("truncated") else stop))
        cursor = stop
    return spans


def close(
    text: str, start: int, message: Message, closings: tuple[str, ...], open_end: bool
) -> Span:
    """Where the answer that begins at `start` ends, and where its closing does. Raises RowError."""
    content = message["content"].strip()
    answer = content.rpartition("</think>")[2].strip()
    cores = (
        [content, answer] if answer else [content or message.get("reasoning_content", "").strip()]
    )
    cores += [""] if message.get("tool_calls") else []  # some templates drop the text beside a call
    for core in dict.fromkeys(cores):
        found = text.find(core, start)
        while found >= 0:
            end = found + len(core)
            if message.get("tool_calls"):
                place = text.find(closings[0], end)
                if place >= 0:
                    return place, place + len(closings[0])
            behind = WHITESPACE.match(text, end).end()
            for closing in closings:
                if text.startswith(closing, behind):
                    return end, behind + len(closing)
            if not closings or (open_end and behind == len(text)):
                return end, end
            found = text.find(core, found + 1) if core else -1
    raise RowError(NOT_FOUND)


def mend(chat: Chat, marked: list[Span], text: str, cut: bool) -> list[Span]:
    """Spans that a template marks: from behind the opening, where that is marked too, to the
    closing with it.

    The last ends before its closing where the answer was cut.
    """
    if chat.frame is None:
        return marked
    spans = []
    for start, stop in marked:
        if text.startswith(chat.frame.opening, start):
            start += len(chat.frame.opening)
        behind = WHITESPACE.match(text, stop).end()
        closing = next((c for c in chat.frame.closings if text.startswith(c, behind)), None)
        if closing:
            stop = behind + len(closing)
        elif ends := [
            p + len(c) for c in chat.frame.closings if (p := text.rfind(c, start, stop)) >= 0
        ]:
            stop = max(ends)
        spans.append((start, stop))
    if cut:
        start, stop = spans[-1]
        closing = next((c for c in chat.frame.closings if text[start:stop].endswith(c)), "")
        spans[-1] = (start, stop - len(closing))
    return spans


def find_spans(chat: Chat, text: str) -> list[Span]:
    """Assistant turns of a text that was rendered elsewhere: from every opening to the next
    closing.
    """
    spans, cursor = [], 0
    while (start := start_of_turn(chat.turns, text, cursor)) >= 0:
        stops = [(text.find(closing, start), len(closing)) for closing in chat.turns.closings]
        place, size = min(((p, n) for p, n in stops if p >= 0), default=(len(text), 0))
        spans.append((start, place + size))
        cursor = place + size
    if not spans:
        raise RowError(NOT_FOUND)
    return spans
