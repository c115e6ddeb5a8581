"""Every shape of row that chat datasets have, and every way in which a row can be unusable."""

import functools
import json

import pytest
from conftest import turns

from eagle3.data.rows import RowError, read_conversation

ASKED, ANSWERED = turns("a", "b")
PLAIN = {"messages": [ASKED, ANSWERED]}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
BROKEN = {"name": "f", "arguments": "{"}
DEEPLY = functools.reduce(lambda inner, _: [inner], range(2000), [])
CALL_AS_TEXT = {"function": {"name": "add", "arguments": json.dumps({"x": 1})}}


def said(*roles):
    """A turn "a", "b", ... of each, in the words of ShareGPT."""
    return [{"from": role, "value": "ab"[i], "weight": None} for i, role in enumerate(roles)]


@pytest.mark.parametrize(
    "row",
    [
        PLAIN,
        {"conversations": said("human", "gpt")},
        {"messages": None, "conversations": said("user", "bing")},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, ANSWERED]},
        {"instruction": "a", "input": "", "output": "b"},
        {"question": "a", "answer": "b"},
        {"problem": "a", "solution": "b", "lang": "python"},
        {"instruction": "a", "response": "b", "conversations": None},
    ],
)
def test_shapes_that_say_the_same(row):
    assert read_conversation(row).messages == [ASKED, ANSWERED]


@pytest.mark.parametrize(
    ("row", "questions"),
    [
        ({"prompt": "a"}, ["a"]),
        ({"question": "a", "answer": None}, ["a"]),
        ({"instruction": "a", "input": "1", "output": ""}, ["a\n\n1"]),
        ({"instruction": "a", "input": ""}, ["a"]),
        (
            {"question_id": 81, "category": "writing", "turns": ["a", "b"], "reference": []},
            ["a", "b"],
        ),
        ({"messages": turns("a")}, ["a"]),
        ({"conversations": said("human", "human")}, ["a", "b"]),
    ],
)
def test_prompts_alone(row, questions):
    messages = read_conversation(row).messages
    assert messages == [{"role": "user", "content": question} for question in questions]


def test_system_and_input_are_kept():
    for row, expected in (
        ({"instruction": "sum", "input": "1 2", "output": "3"}, ["be kind", "sum\n\n1 2", "3"]),
        ({"conversations": said("human")}, ["be kind", "a"]),
    ):
        messages = read_conversation({"system": "be kind", **row}).messages
        assert [message["content"] for message in messages] == expected
    messages = read_conversation({"conversations": said("system", "human")}).messages
    assert [message["role"] for message in messages] == ["system", "user"]


def test_tools_and_reasoning():
    function = {"name": "add", "parameters": {}}
    row = {
        "messages": [
            ASKED,
            {"role": "assistant", "content": None, "tool_calls": [CALL_AS_TEXT]},
            {"role": "tool", "content": "2", "tool_call_id": "7"},
            {"role": "assistant", "content": "two", "reasoning_content": "hm"},
        ],
        "tools": json.dumps([function]),
    }  # fmt: skip
    read = read_conversation(row)
    assert read.tools == [{"type": "function", "function": function}]
    assert read.messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert read.messages[2]["tool_call_id"] == "7" and read.messages[3]["reasoning_content"] == "hm"
    sharegpt = [
        {"from": "human", "value": "a"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "two"},
    ]
    read = read_conversation({"conversations": sharegpt})
    assert read.messages[1]["tool_calls"] == [CALL]
    assert [message["role"] for message in read.messages[2:]] == ["tool", "assistant"]


def test_a_leading_answer_is_dropped_and_preformatted_text_kept():
    read = read_conversation({"conversations": [{"from": "gpt", "value": "cut"}, *turns("a", "b")]})
    assert read.messages == [ASKED, ANSWERED] and read.repaired == "leading assistant turn dropped"
    assert read_conversation(PLAIN).repaired is None
    assert read_conversation({"text": "<u>a<a>b"}, preformatted=True).text == "<u>a<a>b"
    with pytest.raises(RowError, match="no text"):
        read_conversation(PLAIN, preformatted=True)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "no messages"),
        ({"messages": []}, "no messages"),
        ({"messages": "a"}, "no messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "no messages"),
        ({"messages": ["a"]}, "not an object"),
        ({"messages": [{"role": "alien", "content": "x"}]}, "unknown role"),
        ({"messages": [{"role": 3, "content": "x"}]}, "unknown role"),
        ({"messages": [{"role": "user", "content": 3}]}, "not text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "not text"),
        ({"messages": turns([{"type": "image", "text": None, "image": "a.png"}], "b")}, "not text"),
        ({"messages": turns([{"type": "text", "text": {"a": 1}}], "b")}, "not text"),
        ({"messages": turns([{"type": "text", "text": None}], "b")}, "empty turn"),
        ({"messages": turns(None, "b")}, "empty turn"),
        ({"messages": turns("a", " ")}, "empty turn"),
        ({"messages": turns("a") + turns("b", "c")}, "alternate"),
        ({"messages": [ANSWERED]}, "alternate"),
        ({"messages": [ASKED, ANSWERED, ANSWERED]}, "alternate"),
        ({"messages": [ASKED, {"role": "tool", "content": "2"}]}, "alternate"),
        ({"messages": [ASKED, {"role": "system", "content": "x"}, ANSWERED]}, "behind the first"),
        (PLAIN | {"tools": "9" * 5000}, "tools are not JSON"),
        (PLAIN | {"tools": "[" * 100_000}, "tools are not JSON"),
        (PLAIN | {"tools": DEEPLY}, "nested too deeply"),
        (PLAIN | {"tools": "{"}, "tools are not JSON"),
        (PLAIN | {"tools": ["x"]}, "tools are not a list"),
        ({"messages": [ASKED, {"role": "assistant", "tool_calls": [{}]}]}, "without a name"),
        ({"messages": [ASKED, {"role": "assistant", "tool_calls": [BROKEN]}]}, "arguments"),
    ],
)
def test_bad_rows_have_a_reason(row, reason):
    with pytest.raises(RowError, match=reason):
        read_conversation(row)


def called(*calls, **row):
    return {"messages": [ASKED, ANSWERED | {"tool_calls": list(calls)}], **row}


def text(*texts):
    return [{"type": "text", "text": text, "image": None} for text in texts]


UNITED = {"role": None, "from": "human", "content": None, "value": "a"}
NONE = [[], "[]", None, "null", "", [None]]
CALLED = [[each | {"tool_calls": none} for each in PLAIN["messages"]] for none in NONE]
SYSTEMS = ["", " ", None, [], text(None)]
NO_SYSTEM = [[{"role": "system", "content": none}, ASKED, ANSWERED] for none in SYSTEMS]
CALL_WITH_NULLS = {"id": None, "function": {"name": "add", "arguments": {"x": 1, "to": None}}}
TEXT_WITH_NULLS = {"function": {"name": "add", "arguments": '{"x": 1, "to": null}'}}
DEEP = {"name": "f", "arguments": {"deep": [{"a": None, "b": [1, None]}]}}
TOOL = {"name": "f", "function": None, "parameters": {"a": None}}
BETWEEN = [ASKED, ANSWERED, {"role": "system", "content": None}, *turns("c", "d")]
# What parquet and Arrow make of a row, and the row.
NULL_FILLED = [
    ({"messages": [UNITED, ANSWERED]}, PLAIN),
    ({"messages": [{"role": None, "content": None}, ASKED, ANSWERED, {"role": None}]}, PLAIN),
    ({"messages": turns([*text("a"), None], "b")}, PLAIN),
    ({"messages": turns(text(None, "a"), "b")}, PLAIN),
    *(({"messages": each}, PLAIN) for each in CALLED),
    *((PLAIN | {"tools": none}, PLAIN) for none in NONE),
    *(({"system": "s", "messages": each}, PLAIN | {"system": "s"}) for each in NO_SYSTEM),
    ({"messages": BETWEEN}, {"messages": turns("a", "b", "c", "d")}),
    (called(CALL_WITH_NULLS), called(CALL)),
    (called(TEXT_WITH_NULLS), called(CALL)),
    (called(DEEP), called({"name": "f", "arguments": {"deep": [{"b": [1, None]}]}})),
    (called(CALL, tools=[TOOL]), called(CALL, tools=[{"name": "f", "parameters": {}}])),
]


@pytest.mark.parametrize(("filled", "row"), NULL_FILLED)
def test_nulls_are_what_is_not_there(filled, row):
    read, plain = read_conversation(filled), read_conversation(row)
    assert (read.messages, read.tools) == (plain.messages, plain.tools)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_has_every_name_that_templates_read(name):
    read = read_conversation({"messages": [ASKED, {**ANSWERED, name: "hm"}]}).messages[1]
    assert [read[key] for key in ("reasoning_content", "reasoning", "thinking")] == ["hm"] * 3
