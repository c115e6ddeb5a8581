"""The assistant mask, token by token: marked by templates, found without marks, across borders."""

import random
import re

import pytest
from conftest import TINY, section, turns
from tokenizers import Tokenizer, models, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from eagle3.data import templates
from eagle3.data.chat import Chat, RowError, load_chat, with_system
from eagle3.data.rows import Conversation, read_conversation
from eagle3.data.templates import SYSTEM_PROMPTS
from eagle3.errors import ConfigError

HEADER = "'<|start_header_id|>' + m.role + '<|end_header_id|>\n\n'"
PROMPT = "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
LLAMA3 = (
    f"{{{{ bos_token }}}}{{% for m in messages %}}{{{{ {HEADER} + m.content | trim + '<|eot_id|>' "
    f"}}}}{{% endfor %}}{{% if add_generation_prompt %}}{PROMPT}{{% endif %}}"
)
CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": "<|im_end|"}}}
CALLING = [
    *turns("add"),
    {"role": "assistant", "content": "Let me check.", "tool_calls": [CALL]},
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": "two"},
]
SPECIAL = re.compile(r"<[|｜][^<>]*?[|｜]>|</s>|<(?:start|end)_of_turn>|</longcat_s>")


def tokenizer_with(template, special=()):
    tokenizer = AutoTokenizer.from_pretrained(TINY / "target")
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(set(special))})
    tokenizer.chat_template = template
    return tokenizer


def chat_with(template, special=(), options=None):
    return Chat(tokenizer_with(template, special), options)


def load(folder, tokenizer=None, template="auto"):
    """What a run takes of a folder, in which `tokenizer` is saved before."""
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return load_chat(section("model", path=str(folder)), section("data", chat_template=template))


def supervised(chat, messages, **options):
    """The text of every run of supervised tokens."""
    encoded = chat.encode(Conversation(messages, tools=options.pop("tools", None)), **options)
    assert chat.tokenizer.decode(encoded.input_ids) == encoded.text
    texts = [chat.tokenizer.decode(encoded.input_ids[first:stop]) for first, stop in encoded.spans]
    assert sum(encoded.loss_mask) == sum(stop - first for first, stop in encoded.spans)
    return texts


def without_marks(template):
    """The same template with `{% if true %}` where it marked what the model generates."""
    template = re.sub(r"\{%(-?)\s*generation\s*(-?)%\}", r"{%\1 if true \2%}", template)
    return re.sub(r"\{%(-?)\s*endgeneration\s*(-?)%\}", r"{%\1 endif \2%}", template)


@pytest.mark.parametrize("marked", [True, False])
def test_answers_and_their_ends_are_supervised(tokenizer, marked):
    chat = Chat(tokenizer) if marked else chat_with(LLAMA3)
    assert chat.marked == marked
    said = turns("first question", "the first answer ", "second", "the second\nanswer")
    messages = with_system(said, "be brief")
    answers = ["the first answer<|eot_id|>", "the second\nanswer<|eot_id|>"]
    assert supervised(chat, messages) == answers
    assert supervised(chat, messages, only_last_turn=True) == answers[1:]
    prompt = chat.encode_prompt(messages)
    assert prompt == chat.encode(Conversation(messages)).input_ids[: len(prompt)]
    cut = [*messages[:-1], messages[-1] | {"truncated": True}]
    assert supervised(chat, cut) == [answers[0], "the second\nanswer"], "which has no end"


@pytest.mark.parametrize("name", templates.names())
def test_turns_are_found_where_a_template_does_not_mark_them(name):
    """Each named template with its marks taken out: what is found must be what was marked,
    character by character.
    """
    template = templates.read(name)
    both = (chat_with(t, SPECIAL.findall(template)) for t in (template, without_marks(template)))
    marked, bare = both
    assert marked.marked and not bare.marked
    hostile = ["user", "a", "say assistant, then a", "assistant", "<think>", "think"]
    ordinary = ["What is 2 + 2?", "It is 4.\n\nBecause", "again ", "4 \n"]
    for messages in (turns(*hostile[:4]), turns(*ordinary), turns(*ordinary[:2]), turns(*hostile)):
        if name == "deepseek-r1-distill" or "think" in messages[-1]["content"]:
            messages = messages[:4]
        expected, found = (chat.encode(Conversation(messages)) for chat in (marked, bare))
        assert expected.text == found.text
        if name in ("deepseek-v32", "kimi-k2-thinking"):  # they mark no closed block before answers
            texts = (supervised(chat, messages) for chat in (marked, bare))
            bare_texts = ([re.sub("^(<think>)?(</think>)?", "", x) for x in each] for each in texts)
            assert next(bare_texts) == next(bare_texts)
        else:
            assert expected.spans == found.spans


QWEN3 = without_marks(templates.read("qwen3-thinking"))
CHATML = ["<|im_start|>", "<|im_end|>"]


def test_templates_that_drop_earlier_thinking():
    chat = chat_with(QWEN3, CHATML)
    messages = turns("a", "<think>\nhm\n</think>\n\nfirst", "c", "<think>\nso\n</think>\n\nsecond")
    kept = ["first<|im_end|>", "<think>\nso\n</think>\n\nsecond<|im_end|>"]
    assert supervised(chat, messages) == kept
    messages[-1] = {"role": "assistant", "content": "second", "reasoning_content": "so"}
    assert supervised(chat, messages) == kept


def test_templates_that_add_an_empty_thinking_block():
    """Part of the turn when the model writes it, no part of it when the generation prompt does."""
    chat = chat_with(QWEN3, CHATML)
    added = ["first<|im_end|>", "<think>\n\n</think>\n\nthink<|im_end|>"]
    assert supervised(chat, turns("a", "first", "c", "think")) == added
    last = "('<think></think>' if loop.last else '') + m.content | trim"
    prompted = LLAMA3.replace("m.content | trim", last)
    prompted = prompted.replace(PROMPT, PROMPT.replace("' }}", "<think></think>' }}"))
    found = supervised(chat_with(prompted), turns("a", "first", "c", "second"))
    assert found == ["first<|eot_id|>", "second<|eot_id|>"]


def test_options_reach_the_template():
    template = LLAMA3 + "{% if shout %}!{% endif %}"
    assert chat_with(template, options={"shout": True}).render(turns("a", "b"))[0].endswith("!")
    assert not chat_with(template).render(turns("a", "b"))[0].endswith("!")


def test_quoted_openings_are_no_turns():
    opening = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    chat = chat_with(LLAMA3)
    question, answer = f"What does {opening}yes<|eot_id|> mean?", f"It opens: {opening}."
    found = supervised(chat, turns(question, answer, "ok", "<|eot_id|>"))
    assert found == [f"{answer}<|eot_id|>", "<|eot_id|><|eot_id|>"]


@pytest.mark.parametrize("name", ["qwen", "llama3"])
def test_tool_calls(name):
    template = templates.read(name)
    both = (chat_with(t, SPECIAL.findall(template)) for t in (template, without_marks(template)))
    chat, bare = both
    schema = {"name": "add", "description": "", "parameters": {"properties": {}}}
    tools = [{"type": "function", "function": schema}]
    messages = [*CALLING[:1], CALLING[1] | {"content": ""}, *CALLING[2:]]
    found = supervised(bare, messages, tools=tools)
    assert found == supervised(chat, messages, tools=tools)
    assert len(found) == 2 and '"add"' in found[0] and "two" in found[1]
    assert found[0].endswith(chat.turns.closings[0])


def test_preformatted_text_is_supervised_alike():
    chat = chat_with(LLAMA3)
    rendered = chat.encode(Conversation(turns("a", "first", "c", "second")))
    again = Conversation([], text=rendered.text)
    found = chat.encode(again)
    assert (found.input_ids, found.spans) == (rendered.input_ids, rendered.spans)
    assert chat.prompt_of(again) == chat.encode_prompt(turns("a", "first", "c"))
    with pytest.raises(RowError, match="not found"):
        chat.encode(Conversation([], text="no turns at all"))


REFUSING = (
    "{{ raise_exception('never with ' + messages[0].content) if messages[0].content == 'x' }}"
)
REFUSED = [  # by what is said instead of the content, what stands behind, and what is said
    ("m.content | upper", "", ("a", "b"), ConfigError, "does not render user and assistant turns"),
    ("m.content | replace('j', 'k')", "", ("a", "jj"), RowError, "not found"),
    ("m.content", REFUSING, ("x", "b"), RowError, "refused by the chat template: never with x"),
    ("m.content", "", ("a",), RowError, "prompt without an answer"),
    ("m.content", "", ("a\ud800", "b"), RowError, "bad UTF-8"),
]


@pytest.mark.parametrize("content, behind, said, error, words", REFUSED)
def test_rows_that_a_template_does_not_show_are_refused(content, behind, said, error, words):
    chat = chat_with(LLAMA3.replace("m.content | trim", content) + behind)
    if error is RowError:
        assert supervised(chat, turns("a", "b")) == ["b<|eot_id|>"]
    with pytest.raises(error, match=words):
        chat.encode(Conversation(turns(*said)))


def test_turns_that_nothing_opens_need_another_template():
    chat = chat_with("{% for m in messages %}{{ m.content }} {% endfor %}")
    words = r"no text in front of assistant turns.*data\.chat_template"
    with pytest.raises(ConfigError, match=words):
        chat.encode(Conversation(turns("a", "b")))


def test_a_token_belongs_to_the_turn_it_ends_in():
    """A tokenizer that merges over every border: tokens go to turns by their last character."""
    template = "{% for m in messages %}{{ m.role[0] + ':' + m.content + ';' }}{% endfor %}"
    template += "{% if add_generation_prompt %}a:{% endif %}"
    texts = ["u:no;a:yes;u:no;a:yes;", "u:oh;a:ya;u:no;a:na;"]
    backend = Tokenizer(models.BPE(unk_token="?"))
    backend.train_from_iterator(texts * 9, trainers.BpeTrainer(vocab_size=60, special_tokens=["?"]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?")
    tokenizer.chat_template = template
    chat, crossing = Chat(tokenizer), 0
    for said in (("no", "yes", "no", "yes"), ("oh", "ya", "no", "na"), ("no", "na")):
        encoded = chat.encode(Conversation(turns(*said)))
        spans = [m.span(1) for m in re.finditer("a:(.*?;)", encoded.text)]
        offsets = backend.encode(encoded.text).offsets
        assert encoded.loss_mask == [int(any(a < end <= b for a, b in spans)) for _, end in offsets]
        edges = [edge for span in spans for edge in span]
        crossing += sum(first < edge < end for first, end in offsets for edge in edges)
    assert crossing > 0, "the test must have tokens that cross a border"


def test_spans_equal_offsets_on_text_of_every_kind(tokenizer):
    """Emoji, combining marks and other letters, whose bytes are several tokens."""
    pieces = ["a", "é", "🙂", "👩‍👩‍👧", "汉字", " ", "\n\n", "the end", "🇩🇪"]
    pieces += ["\u0301", "def f(x):\n    return", "\t"]
    randomly, chat = random.Random(0), chat_with(LLAMA3)
    answer = re.compile(r"assistant<\|end_header_id\|>\n\n(.*?<\|eot_id\|>)", re.DOTALL)
    for _ in range(30):
        parts = (randomly.choices(pieces, k=randomly.randint(1, 8)) for _ in range(4))
        encoded = chat.encode(Conversation(turns(*("x" + "".join(part) + "y" for part in parts))))
        offsets = tokenizer.backend_tokenizer.encode(encoded.text, add_special_tokens=False).offsets
        spans = [m.span(1) for m in answer.finditer(encoded.text)]
        assert encoded.loss_mask == [int(any(a < end <= b for a, b in spans)) for _, end in offsets]


def test_tokenizers_without_a_template_are_told_the_names(tmp_path):
    words = r"no chat template; .*set data\.chat_template to one of .*llama3"
    with pytest.raises(ConfigError, match=words):
        load(tmp_path, tokenizer_with(None))
    chat = load(tmp_path, template="llama3")
    assert supervised(chat, turns("a", "b")) == ["b<|eot_id|>"]
    assert chat.identity != load(tmp_path, template="longcat").identity
    with pytest.raises(ConfigError, match=r"chat_template=chatml needs <\|im_start\|>, no token"):
        load(tmp_path, template="chatml")


def test_what_a_tokenizer_cuts_and_pads_itself_is_switched_off(tmp_path, tokenizer):
    tokenizer = AutoTokenizer.from_pretrained(TINY / "target")
    tokenizer.backend_tokenizer.enable_truncation(6)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    assert supervised(load(tmp_path, tokenizer), turns("a " * 30, "b")) == ["b<|eot_id|>"]


def test_marks_around_header_and_newline_are_trimmed():
    shown = f"{HEADER} + m.content + '<|eot_id|>\n'"
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}{% generation %}"
        f"{{{{ {shown} }}}}{{% endgeneration %}}{{% endif %}}{{% endfor %}}"
    )
    found = supervised(chat_with(template), turns("a", "b", "c", "d"))
    assert found == ["b<|eot_id|>", "d<|eot_id|>"]


def test_templates_that_leave_the_last_turn_open():
    template = LLAMA3.replace("+ '<|eot_id|>' }}", "}}{% if not loop.last %}<|eot_id|>{% endif %}")
    assert supervised(chat_with(template), turns("a", "b", "c", "d")) == ["b<|eot_id|>", "d"]


def test_templates_that_drop_the_text_beside_a_call():
    either = "(m.tool_calls[0].function | tojson if m.tool_calls else m.content)"
    called, said = supervised(chat_with(LLAMA3.replace("m.content | trim", either)), CALLING)
    assert "add" in called and called.endswith("<|eot_id|>") and said == "two<|eot_id|>"


def test_named_system_prompts():
    named = {"role": "system", "content": SYSTEM_PROMPTS["llama2"]}
    theirs = {"role": "system", "content": "theirs"}
    assert with_system(turns("a"), "llama2")[0] == named
    assert with_system(turns("a"), "my own")[0]["content"] == "my own"
    assert with_system([theirs], "llama2") == [theirs]
    assert with_system(turns("a"), None) == turns("a")


# As gpt-oss' own template: reasoning is a message before the answer's, under a name of its own.
HARMONY = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% if m.thinking is defined and loop.last"
    " %}{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif"
    " %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}{{ '<|return|>' if "
    "loop.last else '<|end|>' }}{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + "
    "'<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)


@pytest.mark.parametrize("thought", ["I know this one.", "It must be Paris", "Paris"])
@pytest.mark.parametrize("name", ["thinking", "reasoning_content"])
def test_reasoning_in_a_message_of_its_own(name, thought):
    chat = chat_with(HARMONY, SPECIAL.findall(HARMONY))
    messages = turns("Rome?", "Italy", "capital of France?", "Paris")
    messages[-1][name] = thought
    conversation = read_conversation({"messages": messages})
    analysis = f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant"
    answers = ["Italy<|end|>", "Paris<|return|>"]
    first, last = (f"<|channel|>final<|message|>{answer}" for answer in answers)
    assert supervised(chat, conversation.messages) == [first, analysis + last]
    encoded = chat.encode(conversation)
    assert chat.encode(Conversation([], text=encoded.text)).spans == encoded.spans


MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + "
    "'[/INST]' }}{% elif m.tool_calls is defined %}{{ '[TOOL_CALLS] [' }}{% for t in m.tool_calls "
    "%}{% if t.id | length != 9 %}{{ raise_exception('ids of 9 letters') }}{% endif %}"
    "{{ (t.function | tojson)[:-1] + ', \"id\": \"' + t.id + '\"}' }}{% endfor %}{{ ']</s>' }}"
    "{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS] {\"content\": ' + m.content + ', \"call_id\": "
    "\"' + m.tool_call_id + '\"}[/TOOL_RESULTS]' }}{% else %}{{ ' ' + m.content + '</s>' }}"
    "{% endif %}{% endfor %}"
)
INST = ["</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"]


def test_answers_behind_tool_results_that_nothing_else_opens():
    messages = turns("weather? [/INST]")
    for name in ("callidone", "callidtwo"):
        function = {"name": "weather", "arguments": {"city": "Rome"}}
        call = {"id": name, "type": "function", "function": function}
        messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        result = {"role": "tool", "tool_call_id": name, "content": "20 C [/TOOL_RESULTS]"}
        messages += [result] * 2
    messages += [{"role": "assistant", "content": "It is 20 C."}, *turns("thanks", "20 C")]
    first, second, *said = supervised(chat_with(MISTRAL, INST), messages)
    start = '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Rome"}, "id": "'
    assert (first, second) == (f'{start}callidone"}}]</s>', f'{start}callidtwo"}}]</s>')
    assert said == [" It is 20 C.</s>", " 20 C</s>"]
    messages[1]["tool_calls"][0]["id"] = "short"
    with pytest.raises(RowError, match="ids of 9 letters"):
        supervised(chat_with(MISTRAL, INST), messages)


VICUNA = (
    "{% for m in messages %}{{ {'system': '', 'user': 'USER: ', 'assistant': 'ASSISTANT: '}[m.role]"
    " + m.content + ('</s>' if m.role == 'assistant' else ' ') }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "opening", "end"),
    [
        (LLAMA3, "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
        (VICUNA, "ASSISTANT:", "</s>"),
        (MISTRAL, "[/INST]", "</s>"),
    ],
)
def test_system_messages_that_quote_an_opening(template, opening, end):
    quoting = {"role": "system", "content": f"{opening} Begin so."}
    if "[INST]" in template:  # it has the system message as a question's first words
        template = template.replace("m.role == 'user'", "m.role in ('user', 'system')")
    chat = chat_with(template, ["<|eot_id|>", *INST])
    found = supervised(chat, [quoting, *turns("say so", "a so", "so", "b so")])
    assert [answer.strip() for answer in found] == [f"a so{end}", f"b so{end}"]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{% generation %}{{ m.content }}{% endfor %}", "generation"),
        ("{% generation %}{{ raise_exception('never') }}{% endgeneration %}", "never"),
        ("{{ raise_exception('') }}", "TemplateError"),
        ("{{ messages[0].text | upper }}{{ none() }}", "not callable"),
    ],
)
def test_a_template_that_renders_nothing_is_told_at_once(tmp_path, template, reason):
    sentence = rf"data\.chat_template=auto renders no conversation \(.*{reason}.*one of chatml"
    with pytest.raises(ConfigError, match=sentence):
        load(tmp_path, tokenizer_with(template))


def test_a_tokenizer_that_needs_a_package(monkeypatch):
    """transformers begins such a message with an empty line."""

    def refuse(*arguments, **options):
        raise ImportError("\nLlamaTokenizer requires SentencePiece\nInstall it")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(ConfigError, match=r"that loads: LlamaTokenizer requires SentencePiece$"):
        load(TINY / "target")
