"""The named chat templates: exact texts, the spans the model wrote, prompts, reasoning, tools."""

import re

import jinja2
import pytest
from conftest import ROOT
from transformers.utils.chat_template_utils import render_jinja_template

from eagle3.data.templates import names, read
from eagle3.errors import ConfigError

DIALOGUE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello.", "reasoning_content": "A greeting."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "Because.", "reasoning_content": "A question."},
]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2]}}}
CALLS = [
    {"role": "user", "content": "1+2?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "Three."},
]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def expected(kind):
    """By template, DIALOGUE or CALLS as it renders them; ⟦ ⟧ enclose what the model wrote and are
    no part of the text.
    """
    text = (ROOT / "tests/data/templates.txt").read_text()
    parts = re.split(rf"^===== {kind} (.*)\n", text, flags=re.MULTILINE)[1:]
    texts = [part.partition("\n=====")[0].removesuffix("\n") for part in parts[1::2]]
    pairs = zip(parts[::2], texts, strict=True)
    return {name: text for names, text in pairs for name in names.split()}


EXPECTED, WITH_TOOLS = expected("dialogue"), expected("tools")
# What an answer without reasoning begins with in the last turn, after the prompt.
NO_REASONING = {
    "qwen3-thinking": "<think>\n\n</think>\n\n",
    "qwen3-next-thinking": "\n</think>\n\n",
    "qwen3.5": "\n</think>\n\n",
    "deepseek-v32": "</think>",
    "kimi-k2-thinking": "<think></think>",
    "gpt-oss": "<|channel|>final<|message|>",
    "deepseek-r1-distill": "",
}
# What the prompt opens and an earlier turn no longer shows, or shows closed.
OPENED = {
    "qwen3-next-thinking": ("<think>\n", ""),
    "qwen3.5": ("<think>\n", ""),
    "deepseek-r1-distill": ("<think>\n", ""),
    "deepseek-v32": ("<think>", "</think>"),
    "kimi-k2-thinking": ("", "<think></think>"),
}
REFUSES_DEFINITIONS = set(names()) - set(WITH_TOOLS) | {"deepseek-v3"}


def render(name, messages, tools=None, prompt=False):
    """The text and the texts of its spans."""
    texts, spans = render_jinja_template(
        conversations=[messages],
        tools=tools,
        chat_template=read(name),
        return_assistant_tokens_mask=True,
        add_generation_prompt=prompt,
        bos_token="<wrong>",
        eos_token="<wrong>",
    )
    return texts[0], [texts[0][start:stop] for start, stop in spans[0]]


def marked(text):
    """A text with ⟦ ⟧ as (text, texts of the spans)."""
    return re.sub("[⟦⟧]", "", text), re.findall("(?s)⟦(.*?)⟧", text)


def answers(change):
    return [m | change(m) if m["role"] == "assistant" else m for m in DIALOGUE]


def test_names():
    assert names() == sorted(EXPECTED)
    words = r"data\.chat_template=lama3 is none of auto, chatml, .*did you mean llama3\?"
    with pytest.raises(ConfigError, match=words):
        read("lama3")


@pytest.mark.parametrize("name", names())
def test_text_and_spans(name):
    text, spans = marked(EXPECTED[name])
    assert render(name, DIALOGUE) == (text, spans)
    assert render(name, [*DIALOGUE[:-1], DIALOGUE[-1] | {"truncated": True}]) == (text, spans)
    # Without a system message the rest stays; formats with a fixed block of their own keep it.
    short, found = render(name, DIALOGUE[1:])
    assert "Be brief" not in short and found == spans
    assert text.endswith(short[short.index("Hi") :])
    # A prompt ends where its answer starts.
    before = EXPECTED[name].split("⟦")
    last = marked("⟦".join(before[:2]))[0]
    assert render(name, DIALOGUE[:4], prompt=True) == (last, spans[:1])
    # An earlier turn differs where the prompt opens a thinking block that history drops.
    opened, shown = OPENED.get(name, ("", ""))
    first = render(name, DIALOGUE[:2], prompt=True)[0]
    assert first.endswith(opened) and first.removesuffix(opened) + shown == before[0]
    if name not in NO_REASONING:
        assert "A question." not in text


@pytest.mark.parametrize("name", NO_REASONING)
def test_reasoning(name):
    text, spans = render(name, DIALOGUE)
    assert "A question." in spans[1] and "A greeting." not in text
    thought = "<think>\n{reasoning_content}\n</think>\n\n{content}"
    inside = answers(lambda m: {"content": thought.format(**m), "reasoning_content": None})
    assert render(name, inside) == (text, spans)
    plain = answers(lambda m: {"reasoning_content": None})
    end = spans[1][spans[1].index("Because.") :]
    assert render(name, plain)[1][1] == NO_REASONING[name] + end


@pytest.mark.parametrize("name", ["llama3", "gemma", "qwen3.5", "mistral"])
def test_answers_are_trimmed_where_the_model_has_it_so(name):
    spaced = answers(lambda m: {"content": f" {m['content']}\n"})
    assert render(name, spaced) == marked(EXPECTED[name])


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_tools(name):
    expected, spans = marked(WITH_TOOLS[name])
    tools = None if name in REFUSES_DEFINITIONS else [TOOL]
    text, found = render(name, CALLS, tools)
    prompt = render(name, CALLS[:3], tools, prompt=True)[0]
    assert text.startswith(prompt) and text[len(prompt) :].rstrip("\n") == spans[-1]
    if name == "qwen3.5":
        head, _, text = text.partition("<|im_end|>\n")
        assert '<tools>\n{"type": "function", "function": {"name": "add", "parameters"' in head
        assert head.startswith("<|im_start|>system\n# Tools\n\nYou have access to the following")
        assert head.endswith("</IMPORTANT>")
    assert (text, found) == (expected, spans)


@pytest.mark.parametrize("name", sorted(set(WITH_TOOLS) - {"llama3"}))
def test_two_calls_and_two_tool_messages(name):
    calling = CALLS[1] | {"content": "So.", "tool_calls": [CALL] * 2}
    text, spans = render(name, [CALLS[0], calling, CALLS[2], *CALLS[2:]])
    apart = 1 if "deepseek" in name else 2
    for shown, pattern in (
        (spans[0], "<tool_call>|<｜tool▁call▁begin｜>"),
        (text, "<tool_response>|<｜tool▁output▁begin｜>"),
    ):
        assert len(re.findall(pattern, shown)) == 2
        assert len(re.findall(f"\n({pattern})", shown)) == apart
    assert text.count("Three.") == 1 and text.count("1+2?") == 1


def test_llama3_renders_one_call_a_turn():
    with pytest.raises(jinja2.TemplateError, match="one tool call a turn"):
        render("llama3", [CALLS[0], CALLS[1] | {"tool_calls": [CALL] * 2}])


@pytest.mark.parametrize("name", sorted(REFUSES_DEFINITIONS))
def test_tools_are_refused_by_a_sentence(name):
    refused = [(DIALOGUE, [TOOL])]
    if name not in WITH_TOOLS:
        refused += [(CALLS[:2], None), ([CALLS[0], CALLS[2]], None)]
    for messages, tools in refused:
        with pytest.raises(jinja2.TemplateError, match=rf"^data\.chat_template={name} .*\.$"):
            render(name, messages, tools)
