"""The named chat templates: exact texts, the spans the model wrote, prompts, reasoning, tools."""

import jinja2
import pytest
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

CHATML = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>"
    "assistant\n"
)
# DIALOGUE as each template renders it; ⟦ ⟧ enclose what the model wrote and are no part of the
# text.
EXPECTED = {
    "chatml": CHATML + "⟦Because.<|im_end|>⟧\n",
    "qwen": CHATML + "⟦Because.<|im_end|>⟧\n",
    "qwen3-instruct": CHATML + "⟦Because.<|im_end|>⟧\n",
    "qwen3-thinking": CHATML + "⟦<think>\nA question.\n</think>\n\nBecause.<|im_end|>⟧\n",
    "qwen3-next-thinking": CHATML + "<think>\n⟦A question.\n</think>\n\nBecause.<|im_end|>⟧\n",
    "qwen3.5": CHATML + "<think>\n⟦A question.\n</think>\n\nBecause.<|im_end|>⟧\n",
    "lfm": "<|startoftext|>" + CHATML + "⟦Because.<|im_end|>⟧\n",
    "llama3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Hello.<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Because.<|eot_id|>⟧"
    ),
    "llama4": (
        "<|begin_of_text|><|header_start|>system<|header_end|>\n\nBe brief.<|eot|>"
        "<|header_start|>user<|header_end|>\n\nHi<|eot|><|header_start|>assistant<|header_end|>"
        "\n\n⟦Hello.<|eot|>⟧"
        "<|header_start|>user<|header_end|>\n\nWhy?<|eot|><|header_start|>assistant<|header_end|>"
        "\n\n⟦Because.<|eot|>⟧"
    ),
    "phi3": (
        "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\n⟦Hello.<|end|>⟧\n"
        "<|user|>\nWhy?<|end|>\n<|assistant|>\n⟦Because.<|end|>⟧\n<|endoftext|>"
    ),
    "phi4": (
        "<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>Hi<|im_end|>"
        "<|im_start|>assistant<|im_sep|>⟦Hello.<|im_end|>⟧<|im_start|>user<|im_sep|>Why?<|im_end|>"
        "<|im_start|>assistant<|im_sep|>⟦Because.<|im_end|>⟧"
    ),
    "phi4-mini": (
        "<|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>⟦Hello.<|end|>⟧"
        "<|user|>Why?<|end|><|assistant|>⟦Because.<|end|>⟧<|endoftext|>"
    ),
    "gpt-oss": (
        "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\n"
        "Knowledge cutoff: 2024-06\nCurrent date: 2025-06-28\n\nReasoning: medium\n\n"
        "# Valid channels: analysis, commentary, final. Channel must be included for every "
        "message.<|end|>"
        "<|start|>developer<|message|># Instructions\n\nBe "
        "brief.\n\n<|end|><|start|>user<|message|>Hi<|end|>"
        "<|start|>assistant⟦<|channel|>final<|message|>Hello.<|end|>⟧<|start|>user<|message|>"
        "Why?<|end|>"
        "<|start|>assistant⟦<|channel|>analysis<|message|>A question.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Because.<|return|>⟧"
    ),
    "deepseek-v2": (
        "<｜begin▁of▁sentence｜>Be brief.\n\nUser: Hi\n\nAssistant:⟦ Hello.<｜end▁of▁sentence｜>⟧"
        "User: Why?\n\nAssistant:⟦ Because.<｜end▁of▁sentence｜>⟧"
    ),
    "deepseek-v3": (
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Hi<｜Assistant｜>⟦Hello.<｜end▁of▁sentence｜>⟧"
        "<｜User｜>Why?<｜Assistant｜>⟦Because.<｜end▁of▁sentence｜>⟧"
    ),
    "deepseek-v32": (
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Hi<｜Assistant｜></think>"
        "⟦Hello.<｜end▁of▁sentence｜>⟧"
        "<｜User｜>Why?<｜Assistant｜><think>⟦A question.</think>Because.<｜end▁of▁sentence｜>⟧"
    ),
    "deepseek-r1-distill": (
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Hi<｜Assistant｜>⟦Hello.<｜end▁of▁sentence｜>⟧"
        "<｜User｜>Why?<｜Assistant｜><think>\n⟦A question.\n</think>\n\nBecause."
        "<｜end▁of▁sentence｜>⟧"
    ),
    "kimi-k2-instruct": (
        "<|im_system|>system<|im_middle|>Be brief.<|im_end|><|im_user|>user<|im_middle|>"
        "Hi<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>⟦Hello.<|im_end|>⟧<|im_user|>user<|im_middle|>"
        "Why?<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>⟦Because.<|im_end|>⟧"
    ),
    "kimi-k2-thinking": (
        "<|im_system|>system<|im_middle|>Be brief.<|im_end|><|im_user|>user<|im_middle|>"
        "Hi<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|><think></think>⟦Hello.<|im_end|>⟧"
        "<|im_user|>user<|im_middle|>Why?<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>⟦<think>A question.</think>Because.<|im_end|>⟧"
    ),
    "ling-flash-2.0": (
        "<role>SYSTEM</role>Be brief.\ndetailed thinking "
        "off<|role_end|><role>HUMAN</role>Hi<|role_end|>"
        "<role>ASSISTANT</role>⟦Hello.<|role_end|>⟧<role>HUMAN</role>Why?<|role_end|>"
        "<role>ASSISTANT</role>⟦Because.<|role_end|>⟧"
    ),
    "gemma": (
        "<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>"
        "model\n⟦Hello.<end_of_turn>⟧\n"
        "<start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n⟦Because.<end_of_turn>⟧\n"
    ),
    "longcat": (
        "SYSTEM:Be brief. [Round 0] USER:Hi ASSISTANT:⟦Hello.</longcat_s>⟧"
        " [Round 1] USER:Why? ASSISTANT:⟦Because.</longcat_s>⟧"
    ),
    "mistral": "<s>[INST] Be brief.\n\nHi[/INST]⟦ Hello.</s>⟧[INST] Why?[/INST]⟦ Because.</s>⟧",
}
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
THINKING = list(NO_REASONING)
# What the prompt opens and an earlier turn no longer shows, or shows closed.
OPENED = {
    "qwen3-next-thinking": ("<think>\n", ""),
    "qwen3.5": ("<think>\n", ""),
    "deepseek-r1-distill": ("<think>\n", ""),
    "deepseek-v32": ("<think>", "</think>"),
    "kimi-k2-thinking": ("", "<think></think>"),
}


def render(name, messages, tools=None, add_generation_prompt=False):
    """The text and the texts of its spans."""
    texts, spans = render_jinja_template(
        conversations=[messages],
        tools=tools,
        chat_template=read(name),
        return_assistant_tokens_mask=True,
        add_generation_prompt=add_generation_prompt,
        bos_token="<wrong>",
        eos_token="<wrong>",
    )
    return texts[0], [texts[0][start:stop] for start, stop in spans[0]]


def marked(text):
    """A text with ⟦ ⟧ as (text, texts of the spans)."""
    spans = [part.split("⟧")[0] for part in text.split("⟦")[1:]]
    return text.replace("⟦", "").replace("⟧", ""), spans


def test_every_name_is_expected():
    assert names() == sorted(EXPECTED)


@pytest.mark.parametrize("name", names())
def test_text_and_spans(name):
    assert render(name, DIALOGUE) == marked(EXPECTED[name])
    assert render(name, [*DIALOGUE[:-1], {**DIALOGUE[-1], "truncated": True}]) == marked(
        EXPECTED[name]
    )


@pytest.mark.parametrize("name", names())
def test_no_system_message_leaves_the_rest_as_it_is(name):
    """The text loses the system part only; the formats with a fixed block of their own keep it."""
    text, spans = render(name, DIALOGUE[1:])
    assert "Be brief" not in text
    assert spans == marked(EXPECTED[name])[1]
    rest = text[text.index("Hi") :]
    assert EXPECTED[name].replace("⟦", "").replace("⟧", "").endswith(rest)


@pytest.mark.parametrize("name", names())
def test_a_prompt_ends_where_its_answer_starts(name):
    before = EXPECTED[name].split("⟦")
    last = (before[0] + "⟦" + before[1]).replace("⟦", "").replace("⟧", "")
    assert render(name, DIALOGUE[:4], add_generation_prompt=True) == (
        last,
        [marked(EXPECTED[name])[1][0]],
    )
    # An earlier turn differs where the prompt opens a thinking block that history drops.
    opened, shown = OPENED.get(name, ("", ""))
    first = render(name, DIALOGUE[:2], add_generation_prompt=True)[0]
    assert first.endswith(opened) and first.removesuffix(opened) + shown == before[0]


@pytest.mark.parametrize("name", THINKING)
def test_reasoning(name):
    text, spans = render(name, DIALOGUE)
    assert "A question." in spans[1] and "A greeting." not in text
    inside = [
        {
            **m,
            "content": f"<think>\n{m['reasoning_content']}\n</think>\n\n{m['content']}",
            "reasoning_content": None,
        }
        if m["role"] == "assistant"
        else m
        for m in DIALOGUE
    ]
    assert render(name, inside) == (text, spans)
    plain = [{"role": m["role"], "content": m["content"]} for m in DIALOGUE]
    end = spans[1][spans[1].index("Because.") :]
    assert render(name, plain)[1][1] == NO_REASONING[name] + end


@pytest.mark.parametrize("name", sorted(set(names()) - set(THINKING)))
def test_reasoning_is_left_out_elsewhere(name):
    assert "A question." not in render(name, DIALOGUE)[0]


@pytest.mark.parametrize("name", ["llama3", "gemma", "qwen3.5", "mistral"])
def test_answers_are_trimmed_where_the_model_has_it_so(name):
    spaced = [
        {**m, "content": f" {m['content']}\n"} if m["role"] == "assistant" else m for m in DIALOGUE
    ]
    assert render(name, spaced) == marked(EXPECTED[name])


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
TOOL_JSON = '{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}'
CALLS = [
    {"role": "user", "content": "1+2?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2]}}}
        ],
    },
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "Three."},
]
QWEN_TOOLS = (
    "<|im_start|>system\n# Tools\n\nYou may call one or more functions to assist with the user "
    "query.\n\n"
    f"You are provided with function signatures within <tools></tools> XML "
    f"tags:\n<tools>\n{TOOL_JSON}\n</tools>\n\n"
    "For each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> "
    'XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": '
    "<args-json-object>}\n</tool_call><|im_end|>\n"
)
QWEN_CALL = (
    "<|im_start|>user\n1+2?<|im_end|>\n<|im_start|>assistant\n"
    '⟦<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2]}}\n</tool_call><|im_end|>⟧\n'
    "<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
)
# CALLS from the user's message on (llama3: the system block too, and the definitions stand in the
# user's message).
WITH_TOOLS = {
    "qwen": QWEN_TOOLS + QWEN_CALL + "⟦Three.<|im_end|>⟧\n",
    "qwen3-instruct": QWEN_TOOLS + QWEN_CALL + "⟦Three.<|im_end|>⟧\n",
    "qwen3-thinking": QWEN_TOOLS + QWEN_CALL + "⟦<think>\n\n</think>\n\nThree.<|im_end|>⟧\n",
    "qwen3-next-thinking": QWEN_TOOLS + QWEN_CALL + "<think>\n⟦\n</think>\n\nThree.<|im_end|>⟧\n",
    "qwen3.5": (
        "<|im_start|>user\n1+2?<|im_end|>\n<|im_start|>assistant\n<think>\n⟦\n</think>"
        "\n\n<tool_call>\n<function=add>\n"
        "<parameter=a>\n1\n</parameter>\n<parameter=b>\n[2]\n</parameter>\n</function>"
        "\n</tool_call><|im_end|>⟧\n"
        "<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\n⟦\n</think>\n\nThree.<|im_end|>⟧\n"
    ),
    "llama3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nGiven the following functions, please "
        "respond with a JSON for a "
        "function call with its proper arguments that best answers the given prompt.\n\n"
        'Respond in the format {"name": function name, "parameters": dictionary of argument name '
        "and its value}."
        'Do not use variables.\n\n{\n    "type": "function",\n    "function": {\n        "name": '
        '"add",\n'
        '        "parameters": {\n            "type": "object"\n        }\n    '
        "}\n}\n\n1+2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
        '⟦{"name": "add", "parameters": {"a": 1, "b": [2]}}<|eot_id|>⟧'
        '<|start_header_id|>ipython<|end_header_id|>\n\n"3"<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Three.<|eot_id|>⟧"
    ),
    "deepseek-v3": (
        "<｜begin▁of▁sentence｜><｜User｜>1+2?<｜Assistant｜>⟦<｜tool▁calls▁begin｜>"
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n"
        '```json\n{"a": 1, "b": [2]}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
        "<｜end▁of▁sentence｜>⟧<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>3<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
        "⟦Three.<｜end▁of▁sentence｜>⟧"
    ),
}
REFUSES_DEFINITIONS = set(names()) - set(WITH_TOOLS) | {"deepseek-v3"}


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_tools(name):
    text, spans = marked(WITH_TOOLS[name])
    got, got_spans = render(name, CALLS, tools=None if name in REFUSES_DEFINITIONS else [TOOL])
    assert got_spans == spans
    if name == "qwen3.5":
        head, _, got = got.partition("<|im_end|>\n")
        start = "<|im_start|>system\n# Tools\n\nYou have access to the following functions:\n\n"
        assert head.startswith(f"{start}<tools>\n{TOOL_JSON}\n</tools>\n\n")
        assert head.endswith("</IMPORTANT>")
    assert got == text


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_a_prompt_after_a_tool_ends_where_its_answer_starts(name):
    tools = None if name in REFUSES_DEFINITIONS else [TOOL]
    text, spans = render(name, CALLS, tools)
    prompt = render(name, CALLS[:3], tools, add_generation_prompt=True)[0]
    assert text.startswith(prompt) and text[len(prompt) :].rstrip("\n") == spans[-1]


@pytest.mark.parametrize("name", sorted(set(WITH_TOOLS) - {"llama3"}))
def test_two_calls_and_two_tool_messages(name):
    messages = [
        CALLS[0],
        {**CALLS[1], "content": "So.", "tool_calls": CALLS[1]["tool_calls"] * 2},
        CALLS[2],
        *CALLS[2:],
    ]
    text, spans = render(name, messages)
    one = render(name, CALLS)[0]
    call = next(part for part in ("<tool_call>", "<｜tool▁call▁begin｜>") if part in one)
    output = next(part for part in ("<tool_response>", "<｜tool▁output▁begin｜>") if part in one)
    assert (
        spans[0].count("\n" + call) == (1 if "deepseek" in name else 2)
        and spans[0].count(call) == 2
    )
    assert text.count("\n" + output) == (1 if "deepseek" in name else 2) and text.count(output) == 2
    assert text.count("Three.") == 1 and text.count("1+2?") == 1


def test_llama3_renders_one_call_a_turn():
    with pytest.raises(jinja2.TemplateError, match="one tool call a turn"):
        render("llama3", [CALLS[0], {**CALLS[1], "tool_calls": CALLS[1]["tool_calls"] * 2}])


@pytest.mark.parametrize("name", sorted(REFUSES_DEFINITIONS))
def test_tools_are_refused_by_a_sentence(name):
    with pytest.raises(jinja2.TemplateError, match=rf"^data\.chat_template={name} .*\.$"):
        render(name, DIALOGUE, tools=[TOOL])
    if name not in WITH_TOOLS:
        for messages in (CALLS[:2], [CALLS[0], CALLS[2]]):
            with pytest.raises(jinja2.TemplateError, match=rf"^data\.chat_template={name} .*\.$"):
                render(name, messages)


def test_unknown_name():
    with pytest.raises(
        ConfigError,
        match=r"data\.chat_template=lama3 is none of auto, chatml, .*did you mean llama3\?",
    ):
        read("lama3")
