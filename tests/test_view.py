"""What `view` shows: token texts that join to the whole, brackets, escaped HTML, rejected rows."""

import copy
import io
import re
from html import unescape
from itertools import pairwise

import pytest
from conftest import TINY, section, turns, write_jsonl
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from eagle3.data import view
from eagle3.data.chat import NOT_FOUND, Chat
from eagle3.data.rows import Conversation
from eagle3.data.sources import Row, Source, find_files, read_rows
from eagle3.errors import RunError

NASTY = (
    "<script>alert(1)</script> \"'&<!-- [bold]x[/bold] :smile: \x1b[31m\u202e\ttab\r\n\n"
    " 你好 😀👨‍👩‍👧 e\u0301 a\ufffd\ufffdb "
)
TEXTS = {
    "ascii": "plain words, 12 numbers\n\n    indented\n",
    "cjk": "你好,世界。日本語のテキスト",
    "emoji": "😀 👨‍👩‍👧‍👦🇩🇪 ok 🤷🏽‍♀️",
    "replacement": "\ufffd a\ufffd\ufffd b\ufffd",
    "replacements": "\ufffd" * 50,
    "mixed": NASTY,
}


def row(answer, question="Hi", line=1, file="a.jsonl"):
    return Row(file, line, Conversation(turns(question, answer)))


def collect(tokenizer, *rows, num_samples=5, **options):
    return view.collect(iter(rows), Chat(tokenizer), section("data", **options), num_samples)


def printed(collected, **options):
    console = Console(file=io.StringIO(), markup=False, width=80, **options)
    view.show(collected, console)
    return console.file.getvalue()


def split(tokenizer, ids, supervised=0):
    """The pieces, which join to the decoded text and hold all ids."""
    pieces = view.split_tokens(tokenizer, ids, [supervised] * len(ids))
    whole = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert "".join(piece.text for piece in pieces) == whole
    assert [i for piece in pieces for i in piece.ids] == ids
    return pieces


@pytest.fixture(scope="module")
def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2's: words begin with a ▁, which the first loses; unknown characters are bytes."""
    words = ["<s>", "</s>", "<unk>", "▁", "▁Hello", "▁world", "ha", "▁ha"]
    words += [f"<0x{byte:02X}>" for byte in range(256)]
    vocab = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    to_marks = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence(to_marks)
    to_text = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*to_text, decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_pieces_join_to_the_decoded_text(tokenizer, text):
    pieces = split(tokenizer, [0, *tokenizer.encode(text, add_special_tokens=False), 4], 1)
    ends = [piece.position + len(piece.ids) for piece in pieces]
    assert [piece.position for piece in pieces] == [0, *ends[:-1]]
    assert [piece.special for piece in pieces] == [True, *[False] * (len(pieces) - 2), True]
    if "\ufffd" not in text:  # which a decoder writes for half a character too
        # A piece holds several tokens only for the sake of one character.
        assert all(len(piece.ids) == 1 or len(piece.text.strip()) == 1 for piece in pieces)
    assert sum(piece.text.count("\ufffd") for piece in pieces) == text.count("\ufffd")


def test_pieces_of_cut_bytes_and_of_a_decoder_that_drops_the_first_space(tokenizer, byte_fallback):
    ids = tokenizer.encode("a😀b", add_special_tokens=False)
    for cut in (ids[:2], [*ids[:3], 4, *ids[4:]], ids[2:]):
        split(tokenizer, cut)
    words = ["<s>", "▁Hello", "▁world", "<0xE4>", "<0xBD>", "<0xA0>"]
    words += ["▁ha", "ha", "</s>", "▁", "▁Hello"]
    ids = byte_fallback.convert_tokens_to_ids(words)
    from_0, _, from_9 = ([p.text for p in split(byte_fallback, ids[k:])] for k in (0, 1, 9))
    assert from_0[2:6] == [" world", "你", " ha", "ha"]
    assert from_9 == [" Hello"]


def test_samples_are_what_preparation_keeps(tokenizer):
    chat = Chat(tokenizer)
    rows = list(read_rows(find_files(Source(str(TINY / "conversations.jsonl")), "."), 10))
    collected = view.collect(iter(rows), chat, section("data", max_length=160), 4)
    assert len(collected.samples) == 4 and any(sample.left_out for sample in collected.samples)
    by_line = {row.line: row for row in rows}
    for sample in collected.samples:
        encoded = chat.encode(by_line[int(sample.place.split()[-1])].conversation)
        mask = [int(piece.supervised) for piece in sample.pieces for _ in piece.ids]
        assert [i for piece in sample.pieces for i in piece.ids] == encoded.input_ids[:160]
        assert mask == encoded.loss_mask[:160] and sum(mask) == sample.supervised
        assert (sample.tokens, sample.left_out) == (len(mask), len(encoded.input_ids) - len(mask))
        assert ("left out" in sample.summary) == (sample.left_out > 0)


def test_options_of_data_are_followed(tokenizer):
    given = Row("a.jsonl", 1, Conversation(turns(*"abcd")))
    for only_last, expected in ((False, "b<|eot_id|>d<|eot_id|>"), (True, "d<|eot_id|>")):
        (sample,) = collect(tokenizer, given, train_only_last_turn=only_last).samples
        assert "".join(piece.text for piece in sample.pieces if piece.supervised) == expected
    assert "Be brief." in printed(collect(tokenizer, row("b"), system_prompt="Be brief."))


def test_rows_are_read_no_further_than_needed(tokenizer):
    rows = iter([row("one"), row("two"), row("three")])
    assert len(view.collect(rows, Chat(tokenizer), section("data"), 2).samples) == 2
    assert next(rows).conversation.messages[1]["content"] == "three"


def test_the_stage_reads_all_sources_and_writes_the_page(tokenizer, tmp_path):
    sources, console = [], Console(file=io.StringIO(), width=400)
    for name in ("one", "two"):
        path = write_jsonl(tmp_path / f"{name}.jsonl", {"messages": turns("Hi", name)})
        sources.append((Source(str(path)), find_files(Source(str(path)), "")))
    view.view(section("data"), 5, sources, Chat(tokenizer), tmp_path, console)
    shown = console.file.getvalue()
    assert "one.jsonl, line 1" in shown and "two.jsonl, line 1" in shown and "view.html" in shown
    assert (tmp_path / "view.html").read_text().count("<section") == 2


def test_rejected_rows_are_shown_and_not_counted(tokenizer):
    bad = [Row("dir/a.jsonl", line, None, "broken JSON") for line in range(1, 8)]
    rows = [*bad, row("fine", "x" * 400, line=8), row("fine", line=9)]
    collected = collect(tokenizer, *rows, num_samples=1, max_length=40)
    (sample,) = collected.samples
    assert sample.place == "a.jsonl, line 9"
    first = "7 x broken JSON"
    assert collected.reasons[0] == first and len(collected.reasons) == 2
    assert first in printed(collected) and first in view.page(collected)


@pytest.fixture
def unfound(tokenizer):
    """A chat whose template changes the answers that ask for it."""
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>"
        "{{ m.content | upper if 'hide' in m.content else m.content }}<|eot_id|>{% endfor %}"
    )
    return Chat(tokenizer)


def test_a_turn_that_is_not_found_shows_its_rendering(unfound):
    rows = [row("hide me", "<b>first</b>\x1b", line=i) for i in range(1, 7)] + [row("fine", line=7)]
    collected = view.collect(iter(rows), unfound, section("data"), 1)
    assert collected.rejected == {NOT_FOUND: 6}
    rendering = "<|start_header_id|>user<|end_header_id|><b>first</b>"
    assert collected.rendering[1].startswith(rendering)
    text, html = printed(collected), view.page(collected)
    assert text.count(rendering + r"\x1b") == 1 and f"6 x {NOT_FOUND}" in text
    assert html.count("&lt;b&gt;first&lt;/b&gt;<i>\\x1b</i>") == 1 and f"6 x {NOT_FOUND}" in html


ANSWERS = "missing are messages or conversations, or instruction and output"
WITHOUT = {
    "2 x broken JSON$": ["{", "{"],
    "no rows$": [],
    rf"2 x no messages; the first row has id, text; {ANSWERS}": [{"id": 1, "text": "a"}] * 2,
    "1 x prompt without an answer; the first row has prompt; the rows have prompts but no "
    "answers: add regenerate to stages$": [{"prompt": "a"}],
    r"one is rendered as:\n<\|start_header_id\|>user": [{"prompt": "b", "output": "hide me"}],
}


@pytest.mark.parametrize("sentence", WITHOUT)
def test_no_sample_is_an_error(unfound, tmp_path, sentence):
    path = str(write_jsonl(tmp_path / "a.jsonl", *WITHOUT[sentence]))
    sources, console = [(Source(path), find_files(Source(path), ""))], Console(file=io.StringIO())
    with pytest.raises(RunError, match=f"no conversation to show: .*{sentence}"):
        view.view(section("data"), 1, sources, unfound, tmp_path, console)


def test_terminal_without_colours_has_brackets(tokenizer):
    text = printed(collect(tokenizer, row(NASTY, "two\nlines [red]x[/red]")))
    assert "\x1b" not in text and "\u202e" not in text and "\r" not in text
    assert "two↵\nlines [red]x[/red]<|eot_id|>" in text
    (supervised,) = re.findall("⟦(<.*?)⟧", text, re.DOTALL)
    assert supervised.startswith("<script>alert(1)</script>") and supervised.endswith("b<|eot_id|>")
    assert r"[bold]x[/bold] :smile: \x1b[31m\u202e⇥   tab\r↵" in supervised and "你好" in supervised
    colourless = {"force_terminal": True, "color_system": "256", "no_color": True}
    assert "⟦" in printed(collect(tokenizer, row("fine")), **colourless)


def test_terminal_with_colours_alternates_shades(tokenizer):
    text = printed(collect(tokenizer, row("one two 😀")), force_terminal=True, color_system="256")
    assert "⟦" not in text
    shades = re.findall(r"48;5;(\d+)m", text)
    assert set(shades) == {"22", "28"} and all(a != b for a, b in pairwise(shades))
    assert re.search(r"\x1b\[[\d;]*m😀", text)


def tags_of(html):
    return re.findall(r"<\w[^>]*>", html)


def test_page_escapes_everything_and_loads_nothing(tokenizer):
    strange = row(NASTY, NASTY, file="<img src=x>\udcff.jsonl")
    refused = Row("a.jsonl", 2, None, "refused: <script>\x1b")
    closing = row("</div></span><style>*{}</style>")
    html = view.page(collect(tokenizer, strange, refused, closing))
    tags = [re.findall(r"\w+", tag)[0] for tag in tags_of(html)]
    allowed = "html head meta title style body main h1 h2 p section div span i ul li"
    assert set(tags) <= {*allowed.split()} and tags.count("style") == 1
    attributes = {name for tag in tags_of(html) for name in re.findall(r'\s([\w-]+)="', tag)}
    assert not attributes & {"src", "href", "onload", "onclick", "style"}
    assert "default-src 'none'" in html and "color-scheme: dark" in html and "url(" not in html
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202a-\u202e\u200b-\u200f]", html)
    text = unescape(re.sub("<i>.*?</i>|<[^>]*>", "", html.partition("<section")[2]))
    assert "<script>alert(1)</script> \"'&<!-- [bold]x[/bold]" in text and "你好" in text


def test_page_names_every_token(tokenizer):
    collected = collect(tokenizer, row("it's 😀\n"))
    (sample,) = collected.samples
    titles = re.findall('<span[^>]* title="(.*?)"', view.page(collected))
    titles = [unescape(title) for title in titles]
    assert titles == [piece.hint for piece in sample.pieces]
    assert titles[0] == "id 0, position 0, '<|begin_of_text|>'"
    several = next(piece for piece in sample.pieces if piece.text == "😀")
    ids = " ".join(map(str, several.ids))
    assert f"id {ids}, position {several.position}, '😀'" in titles


def test_part_for_a_notebook_keeps_its_styles_to_itself(tokenizer):
    part = view.page(collect(tokenizer, row("fine")), alone=False)
    assert part.startswith("<style>") and part.rstrip().endswith("</div>") and "<body" not in part
    rules = re.sub(r"@media[^{]*\{", "", part.partition("</style>")[0].removeprefix("<style>"))
    selectors = [name for names in re.findall(r"([^{}]+)\{", rules) for name in names.split(",")]
    assert all(re.match(r"\s*(body|div)?\.view\b", name) for name in selectors)
