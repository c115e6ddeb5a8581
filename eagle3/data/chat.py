"""Conversations to ids and the assistant mask: rendered and tokenised once, spans found in it."""

import os
import re
from bisect import bisect_right
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property
from hashlib import sha256
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from eagle3.config import Data, Model
from eagle3.data import templates
from eagle3.data.rows import NO_ANSWER, Conversation, Message, RowError
from eagle3.errors import ConfigError, first_line
from eagle3.target.spec import TargetSpec

Messages = list[Message]
Span = tuple[int, int]

NOT_FOUND = "assistant turn not found in the rendering"
WHITESPACE = re.compile(r"\s*")
SPECIAL_LOOK = re.compile(r"<[|｜][^<>|｜]*[|｜]>|<(?:start|end)_of_turn>")
WORDS = ("qzfirst", "qzsecond", "qzthird", "qzfourth")  # that no template has itself
PROBE_ID = "qzcallids"  # of nine letters, as Mistral's templates want them
FUNCTION = {"name": "qzcall", "arguments": {"qzkey": "qzvalue"}}
PROBE_CALL = {"id": PROBE_ID, "type": "function", "function": FUNCTION}
SCHEMA = {"name": "qzcall", "description": "", "parameters": {"properties": {}}}
PROBE_TOOL = {"type": "function", "function": SCHEMA}


@dataclass
class Encoded:
    """Token ids and the spans [first, stop) of those supervised: answers and their ends."""

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
    """How a template frames an assistant turn; a generation prompt adds `prompt_rest` to it."""

    opening: str
    prompt_rest: str
    closings: tuple[str, ...]
    open_end: bool

    def start(self, text: str, cursor: int) -> int:
        """Where the next turn begins, -1 if none does: behind all of a generation prompt."""
        found = text.find(self.opening, cursor)
        if found < 0:
            return -1
        start = found + len(self.opening)
        # What the prompt gives, such as an empty thinking block, is not the model's to write.
        return start + len(self.prompt_rest) * text.startswith(self.prompt_rest, start)

    @cached_property
    def closing(self) -> re.Pattern:
        """What ends a turn, and white space before it."""
        # Not where it opens again: harmony has reasoning in a message of its own before the answer.
        ends = "|".join(map(re.escape, self.closings)) or "(?!)"
        return re.compile(rf"\s*(?:{ends})(?!\s*{re.escape(self.opening.strip())})")

    def end(self, text: str, answer_end: int) -> int | None:
        """The end of the closing that follows an answer, None if none does."""
        found = self.closing.match(text, answer_end)
        # Some templates leave the last turn open, and its end then is that of the text.
        open_ended = not self.closings or (self.open_end and not text[answer_end:].strip())
        return found.end() if found else answer_end if open_ended else None


def with_system(messages: Messages, system_prompt: str | None) -> Messages:
    """With `system_prompt` (a text, or a name that has one) first where there is none."""
    if system_prompt is None or not messages or messages[0]["role"] == "system":
        return messages
    system_prompt = templates.SYSTEM_PROMPTS.get(system_prompt, system_prompt)
    return [{"role": "system", "content": system_prompt}, *messages]


def load_tokenizer(model: Model | TargetSpec) -> PreTrainedTokenizerBase:
    """The target's tokenizer. Raises ConfigError."""
    where = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    try:
        return AutoTokenizer.from_pretrained(model.path, **where)
    except (OSError, ValueError, ImportError) as error:  # of a package that it needs
        reason = str(error).strip().partition("\n")[0]
        words = f"model.path={model.path} has no tokenizer that loads: {reason}"
        raise ConfigError(words) from error


def load_chat(model: Model, data: Data) -> "Chat":
    """The target's tokenizer with the named chat template, or its own. Raises ConfigError."""
    path, name, tokenizer = model.path, data.chat_template, load_tokenizer(model)
    if not tokenizer.is_fast:
        raise ConfigError(f"model.path={path}: its tokenizer gives no offsets; add tokenizer.json")
    # A tokenizer.json may cut and pad by itself, which would spoil conversations in silence.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    if name != "auto":
        tokenizer.chat_template = templates.read(name)
    remedy = f"set data.chat_template to one of {', '.join(templates.names())}"
    if tokenizer.chat_template is None:
        words = f"has no chat template; add one, or {remedy}"
        raise ConfigError(f"the tokenizer of model.path={path} {words}")
    chat = Chat(tokenizer, data.chat_template_kwargs)
    words = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        text, _ = chat.render(with_system(words, data.system_prompt))
    except RowError as error:
        words = f"data.chat_template={name} renders no conversation ({error})"
        raise ConfigError(f"{words}; mend it, or {remedy}") from error
    if name != "auto":  # its framing may be by tokens that there are not
        for token in SPECIAL_LOOK.findall(text):
            if tokenizer.backend_tokenizer.token_to_id(token) is None:
                raise ConfigError(f"data.chat_template={name} needs {token}, no token here")
    return chat


class Chat:
    """A tokenizer, its chat template, and how that frames assistant turns."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any] | None = None):
        self.tokenizer, self.options = tokenizer, options or {}
        self.template = tokenizer.get_chat_template()
        # Whether the template has {% generation %}, which a name of its own may contain too.
        self.marked = "generation" in re.findall(r"{%-?\s*(\w+)", self.template)

    @property
    def identity(self) -> dict[str, Any]:
        """For fingerprints: equal when the same conversations give the same ids."""
        whole = sha256(self.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
        # A template with a clock renders otherwise tomorrow.
        dated = {"date": str(date.today())} if "strftime_now" in self.template else {}
        rendered = {"template": self.template, "options": self.options}
        rendered["special_tokens"] = self.tokenizer.special_tokens_map
        return {"tokenizer": whole, **rendered, **dated}

    def render(self, messages: Messages, tools=None, prompt=False) -> tuple[str, list[Span]]:
        """The text, and its spans that `{% generation %}` marks. Raises RowError if refused."""
        try:
            texts, spans = render_jinja_template(
                [messages],
                tools=tools,
                chat_template=self.template,
                return_assistant_tokens_mask=self.marked,
                add_generation_prompt=prompt,
                **{**self.tokenizer.special_tokens_map, **self.options},
            )
        except Exception as error:  # templates raise what they like: jinja's errors, KeyError
            reason = first_line(error)
            raise RowError(f"refused by the chat template: {reason}") from error
        return texts[0], [tuple(span) for span in spans[0]] if self.marked else []

    @cached_property
    def turns(self) -> Turns:
        """What the template puts around a conversation of known words. Raises ConfigError."""
        roles = ("user", "assistant") * 2
        messages = [{"role": r, "content": w} for r, w in zip(roles, WORDS, strict=True)]
        try:
            text, asked = self.render(messages)[0], self.render(messages[:1])[0]
            prompted = self.render(messages[:1], prompt=True)[0]
        except RowError as error:
            raise ConfigError(f"data.chat_template cannot be used: {error}; set one") from error
        parts = re.fullmatch("(.*?)".join(["", *WORDS, ""]), text, re.DOTALL)
        if parts is None:
            words = "does not render user and assistant turns in order"
            raise ConfigError(f"the chat template {words}; set data.chat_template")
        _, before_second, middle, before_fourth, last = parts.groups()
        tail = asked.partition(WORDS[0])[2]  # what ends a question
        prompt = prompted[len(asked) :] if prompted.startswith(asked) else ""
        opening = self.find_opening([before_second, before_fourth], tail, prompt)
        prompt_rest = prompt[len(opening) :]
        # Where nothing but space opens an answer, it is found by what ends the question.
        if not opening.strip():
            opening, prompt_rest = tail.rstrip() + opening.rstrip(), ""
        if not opening.strip():
            words = "set data.chat_template, or mark them with {% generation %}"
            raise ConfigError(f"the chat template has no text in front of assistant turns: {words}")
        last = last.strip()
        found = find_special(self.tokenizer, last)
        closings = [last[: found[0][1] if found else None]] if last else []
        # Templates may close the last turn otherwise than those before it (gpt-oss).
        found = find_special(self.tokenizer, middle)
        if found and not middle.lstrip().startswith(tuple(closings)):
            closings.append(middle[slice(*found[0])])
        return Turns(opening, prompt_rest, tuple(closings), open_end=not last)

    def find_opening(self, heads: list[str], tail: str, prompt: str) -> str:
        """What the prompt and the texts before answers begin with, from the role's marker on."""
        marker = find_special(self.tokenizer, prompt)
        begins = [prompt] if prompt else []
        # The text before an answer may begin with what ends the question, which others (a tool's
        # result, say) do not end with: the opening is what the marker of the role begins.
        for head in heads:
            head = head.removeprefix(tail)
            place = head.rfind(prompt[slice(*marker[0])]) if marker else -1
            begins.append(head[max(0, place) :])
        prefix = os.path.commonprefix(begins)  # noqa: RUF071 (by character is meant)
        # Half a tag, such as <think>, would not open a turn that goes on otherwise.
        tag = prefix.rfind("<")
        return prefix[:tag] if tag >= 0 and ">" not in prefix[tag:] else prefix

    @cached_property
    def tool_probe(self) -> str:
        """The rendering of a call, its result and an answer. Raises RowError."""
        asked = {"role": "user", "content": "qzasked"}
        call = {"role": "assistant", "content": "", "tool_calls": [PROBE_CALL]}
        result = {"role": "tool", "content": "qzresult", "name": "qzcall", "tool_call_id": PROBE_ID}
        answer = {"role": "assistant", "content": "qzanswer"}
        return self.render([asked, call, result, answer], [PROBE_TOOL])[0]

    @cached_property
    def call_closing(self) -> str:
        """The special token that ends a turn which calls a tool. Raises RowError."""
        after = self.tool_probe.partition("qzvalue")[2]
        found = find_special(self.tokenizer, after)
        if not found:
            raise RowError("the chat template does not show where a tool call ends")
        return after[slice(*found[0])]

    @cached_property
    def turns_behind_results(self) -> Turns:
        """`turns` of answers to a tool's result, which in some (Mistral) its end alone opens."""
        with suppress(RowError):
            before = self.tool_probe.partition("qzresult")[2].partition("qzanswer")[0]
            found = find_special(self.tokenizer, before)
            if found and self.turns.opening not in before:
                return replace(self.turns, opening=before[slice(*found[-1])], prompt_rest="")
        return self.turns

    def encode(self, conversation: Conversation, only_last_turn: bool = False) -> Encoded:
        """Render and tokenise once; a token belongs to a turn if it ends in it. Raises RowError."""
        messages, text = conversation.messages, conversation.text
        if text is not None:
            spans = find_spans(self.turns, text)
        elif not any(m["role"] == "assistant" for m in messages):
            raise RowError(NO_ANSWER)
        else:
            text, marked = self.render(messages, conversation.tools)
            spans = trim(self, marked, text, messages) if marked else locate(self, messages, text)
        if not any(first < stop for first, stop in spans):
            raise RowError(NOT_FOUND)
        try:
            encoding = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError) as error:
            raise RowError("bad UTF-8") from error
        turns = spans[-1:] if only_last_turn else spans
        stops = [stop for _, stop in encoding.offsets]
        token_spans = [(bisect_right(stops, a), bisect_right(stops, b)) for a, b in turns]
        return Encoded(text, encoding.ids, [span for span in token_spans if span[0] < span[1]])

    def encode_prompt(self, messages: Messages, tools=None) -> list[int]:
        """The ids that ask for the next assistant turn; trailing assistant messages are dropped."""
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        return self.tokenize(self.render(messages, tools, prompt=True)[0])

    def prompt_of(self, conversation: Conversation) -> list[int]:
        """The ids that ask for the last assistant turn again, also of preformatted text."""
        text = conversation.text
        if text is None:
            return self.encode_prompt(conversation.messages, conversation.tools)
        return self.tokenize(text[: find_spans(self.turns, text)[-1][0]])

    def tokenize(self, text: str) -> list[int]:
        return self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """The text of an answer, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def find_special(tokenizer: PreTrainedTokenizerBase, text: str) -> list[Span]:
    """Where special tokens stand in `text`."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    longest_first = sorted(special, key=len, reverse=True)
    pattern = "|".join(map(re.escape, longest_first)) or "(?!)"
    return [found.span() for found in re.finditer(pattern, text)]


def locate(chat: Chat, messages: Messages, text: str) -> list[Span]:
    """Characters of every assistant turn with its closing, for unmarked text. Raises RowError."""
    # A question is stepped over by its content, so that an opening quoted in it is not taken for
    # one; an answer must stand between an opening and a closing. What a template does to earlier
    # turns (drop thinking, add an empty block) is thereby seen as it was rendered.
    turns, cursor, spans = chat.turns, 0, []
    for message in messages:
        content = message["content"].strip()
        if message["role"] != "assistant":
            called = message["role"] == "tool"
            turns = chat.turns_behind_results if called else chat.turns
            # A system message may stand by the last question: it is stepped over only if it quotes.
            must = turns.opening.strip() in content or turns is not chat.turns
            found = text.find(content, cursor) if must or message["role"] != "system" else -1
            if found >= 0:
                cursor = found + len(content)
            elif must:
                raise RowError(NOT_FOUND)
            continue
        start = turns.start(text, cursor)
        if start < 0:
            raise RowError(NOT_FOUND)
        answer_end, cursor = find_end(chat, text, start, message)
        spans.append((start, answer_end if message.get("truncated") else cursor))
    return spans


def find_end(chat: Chat, text: str, start: int, message: Message) -> Span:
    """Where the answer that begins at `start` ends, and where its closing does. Raises RowError."""
    content = message["content"].strip()
    answer = content.rpartition("</think>")[2].strip()  # what stays where thinking is dropped
    candidates = [content or message.get("reasoning_content", "").strip()]
    candidates += [answer] if answer else []
    calls = message.get("tool_calls")
    for candidate in [*candidates, ""] if calls else candidates:  # some drop the text of a call
        # The answer's words may stand there before it does: it ends where a closing follows.
        place = text.find(candidate, start)
        while place >= 0:
            answer_end = place + len(candidate)
            if calls:  # they stand between the text and the closing
                answer_end = text.find(chat.call_closing, answer_end)
                stop = answer_end + len(chat.call_closing) if answer_end >= 0 else None
            else:
                stop = chat.turns.end(text, answer_end)
            if stop is not None:
                return answer_end, stop
            place = text.find(candidate, place + 1) if candidate else -1
    raise RowError(NOT_FOUND)


def trim(chat: Chat, marked: list[Span], text: str, messages: Messages) -> list[Span]:
    """Marked spans without the opening and with the closing, which an answer that was cut lacks."""
    try:
        turns = chat.turns
    except ConfigError:  # the marks are all there is to go by
        return marked
    spans = []
    for start, stop in marked:
        start += len(turns.opening) * text.startswith(turns.opening, start)
        behind = WHITESPACE.match(text, stop).end()
        following = [behind + len(c) for c in turns.closings if text.startswith(c, behind)]
        inside = [text.rfind(closing, start, stop) for closing in turns.closings]
        ends = [p + len(c) for p, c in zip(inside, turns.closings, strict=True) if p >= 0]
        spans.append((start, max(following or ends, default=stop)))
    # Nothing follows an answer that was cut, so only the last one can be.
    if any(m.get("truncated") for m in messages):
        start, stop = spans[-1]
        closing = next((c for c in turns.closings if text[start:stop].endswith(c)), "")
        spans[-1] = (start, stop - len(closing))
    return spans


def find_spans(turns: Turns, text: str) -> list[Span]:
    """Assistant turns of a text that was rendered elsewhere. Raises RowError without any."""
    spans, start = [], turns.start(text, 0)
    while start >= 0:
        found = turns.closing.search(text, start)
        spans.append((start, found.end() if found else len(text)))
        start = turns.start(text, spans[-1][1])
    if not spans:
        raise RowError(NOT_FOUND)
    return spans
