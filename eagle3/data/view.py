"""What training sees of conversations: their tokens, the supervised ones coloured, in the terminal
and as a page.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from jinja2 import Environment
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from eagle3.config import Data
from eagle3.data.chat import NOT_FOUND, Chat
from eagle3.data.encoder import Encoder, Preparation
from eagle3.data.prepare import EXAMPLE_LETTERS
from eagle3.data.rows import RowError
from eagle3.data.sources import Row
from eagle3.errors import RunError

BROKEN = "\ufffd"  # what decoders write for bytes that are no whole character
MARKS = {"\n": "↵", "\t": "⇥   "}
MOST_RENDERINGS = 3
MOST_PLACES = 5
# Both colours are set, so that they read alike on light and dark terminals; 256 colours, as tmux
# may have no more.
SHADES = ("color(231) on color(22)", "color(231) on color(28)")


@dataclass
class Piece:
    """A token, or the tokens that only together make a character; `positions` count the sample's
    tokens from 0.
    """

    text: str
    ids: list[int]
    positions: range
    supervised: bool
    special: bool


@dataclass
class Sample:
    """A conversation as it is trained on; `length` is its tokens before the cut to
    `data.max_length`.
    """

    file: str
    line: int
    pieces: list[Piece]
    tokens: int
    supervised: int
    length: int


@dataclass
class Rejected:
    """A row that cannot be used; `text` is its rendering, where no assistant turn was found in it."""

    file: str
    line: int
    reason: str
    text: str | None = None


@dataclass
class Collected:
    """The samples, and the rows that were rejected on the way to them."""

    samples: list[Sample] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)

    @property
    def renderings(self) -> list[Rejected]:
        return [row for row in self.rejected if row.text is not None]

    @property
    def reasons(self) -> list[str]:
        """How many rows each reason rejected, and the first of them; the most frequent first."""
        found: dict[str, list[str]] = {}
        for row in self.rejected:
            found.setdefault(row.reason, []).append(f"{Path(row.file).name}:{row.line}")
        return [
            f"{len(places):,} x {reason} ({', '.join(places[:MOST_PLACES])}{', …' * (len(places) > MOST_PLACES)})"
            for reason, places in sorted(found.items(), key=lambda item: -len(item[1]))
        ]


def split_tokens(
    tokenizer: PreTrainedTokenizerBase, input_ids: list[int], loss_mask: list[int]
) -> list[Piece]:
    """The tokens with their texts, which joined are the decoded `input_ids`."""
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    pieces: list[Piece] = []
    before = first = 0

    def decode(start: int, stop: int) -> str:
        return tokenizer.decode(
            input_ids[start:stop], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def text_of(start: int, stop: int) -> str:
        """Decoded behind the piece before, as some decoders drop a space in front of what comes
        first.
        """
        return decode(before, stop)[len(decode(before, start)) :]

    for stop in range(1, len(input_ids) + 1):
        text = text_of(first, stop)
        if (not text or text.endswith(BROKEN)) and stop < len(input_ids):
            continue
        # A broken end may be a real U+FFFD or lost bytes: tokens belong together only if decoding
        # them apart differs.
        while first < stop:
            text, ends = text_of(first, stop), range(first + 1, stop)
            end = next(
                (k for k in ends if (part := text_of(first, k)) and part + decode(k, stop) == text),
                stop,
            )
            pieces.append(
                Piece(
                    text_of(first, end),
                    input_ids[first:end],
                    range(first, end),
                    bool(loss_mask[end - 1]),
                    input_ids[end - 1] in special,
                )
            )
            before, first = first, end
    return pieces


def collect(rows: Iterator[Row], chat: Chat, data: Data, num_samples: int) -> Collected:
    """The first `num_samples` rows that preparation would keep; raises RunError when there is none."""
    # The very encoder of `prepare`; what it does not read of its options is left empty.
    encoder = Encoder(
        chat,
        Preparation(
            num_samples=num_samples,
            max_length=data.max_length,
            preformatted=data.preformatted,
            system_prompt=data.system_prompt,
            only_last_turn=data.train_only_last_turn,
            on_reject=data.on_reject,
            num_heldout=0,
            vocab_size=0,
            draft_vocab_size=0,
        ),
    )
    collected, renderings = Collected(), 0
    for row in rows:
        try:
            if row.conversation is None:
                raise RowError(row.reason)
            conversation = encoder.with_system(row.conversation)
            encoded = encoder.encode(conversation)
        except RowError as error:
            rejected = Rejected(row.file, row.line, str(error))
            if rejected.reason == NOT_FOUND and renderings < MOST_RENDERINGS:
                rejected.text = encoder.example(conversation)
                renderings += 1
            collected.rejected.append(rejected)
            continue
        ids, mask = encoded.input_ids[: data.max_length], encoded.loss_mask[: data.max_length]
        pieces = split_tokens(chat.tokenizer, ids, mask)
        if len(ids) < len(encoded.input_ids) and pieces[-1].text.endswith(BROKEN):
            pieces[-1].text = pieces[-1].text[:-1] + "⋯"  # the cut goes through a character
        sample = Sample(row.file, row.line, pieces, len(ids), sum(mask), len(encoded.input_ids))
        collected.samples.append(sample)
        if len(collected.samples) == num_samples:
            break
    if not collected.samples:
        told = "; ".join(collected.reasons) or "no rows"
        rendered = [
            f"; this is how one was rendered:\n{row.text[:EXAMPLE_LETTERS]}"
            for row in collected.renderings
        ]
        raise RunError(f"data.path has no conversation to show: {told}{''.join(rendered[:1])}")
    return collected


def runs(text: str) -> Iterator[tuple[str, bool]]:
    """Parts of `text` that show as they are, and marks (True) for what would not be seen or would
    steer the display.
    """
    for printable, letters in groupby(text, str.isprintable):
        if printable:
            yield "".join(letters), False
            continue
        for letter in letters:
            yield MARKS.get(letter, repr(letter)[1:-1]), True
            if letter == "\n":
                yield "\n", False


def visible(text: str) -> str:
    return "".join(part for part, _ in runs(text))


def heading(row: Sample | Rejected) -> str:
    return visible(f"{Path(row.file).name}, line {row.line}")


def about(sample: Sample) -> str:
    supervised = (
        f"{sample.supervised:,} of them supervised ({sample.supervised / sample.tokens:.1%})"
    )
    cut = (
        f", cut from {sample.length:,} to data.max_length" if sample.length > sample.tokens else ""
    )
    return f"{sample.tokens:,} tokens, {supervised}{cut}"


def cut_mark(sample: Sample) -> str:
    left_out = sample.length - sample.tokens
    return f"✂ {left_out:,} tokens left out" if left_out else ""


def hint(piece: Piece) -> str:
    """`id 5, position 12, 'text'`."""
    several = len(piece.ids) > 1
    positions = (
        f"positions {piece.positions[0]}–{piece.positions[-1]}"
        if several
        else f"position {piece.positions[0]}"
    )
    return (
        f"{'ids' if several else 'id'} {' '.join(map(str, piece.ids))}, {positions}, {piece.text!r}"
    )


def colour(sample: Sample, plain: bool) -> Text:
    """The sample for a terminal; `plain`: brackets stand for the colour."""
    text = Text()
    place = 0
    for supervised, pieces in groupby(sample.pieces, lambda piece: piece.supervised):
        text.append("⟦" if supervised and plain else "")
        for piece in pieces:
            style = SHADES[place % 2] if supervised else "cyan" if piece.special else "dim"
            style += " bold" * piece.special + " underline" * (len(piece.ids) > 1)
            for part, mark in runs(piece.text):
                text.append(part, f"{style} dim" if mark else style)
            place += 1
        text.append("⟧" if supervised and plain else "")
    return text.append(cut_mark(sample), "yellow")


def show(collected: Collected, console: Console) -> None:
    """Print the samples, then what was rejected; nothing in them is taken for markup."""
    plain = console.no_color or console.color_system is None
    console.print(
        Text(
            f"view: supervised tokens {'stand in ⟦ ⟧' if plain else 'are green, in two shades by turns'}"
        )
    )
    for sample in collected.samples:
        console.rule(Text(heading(sample)), style="dim")
        console.print(Text(about(sample), "dim"))
        console.print(colour(sample, plain), soft_wrap=True)
    for row in collected.renderings:
        console.rule(Text(heading(row)), style="dim")
        console.print(Text(row.reason, "yellow"))
        console.print(Text(visible(row.text)), soft_wrap=True)
    if collected.rejected:
        console.rule(Text("rejected on the way"), style="dim")
    for reason in collected.reasons:
        console.print(Text(visible(reason)), soft_wrap=True)


def page(collected: Collected, alone: bool = True) -> str:
    """The samples as HTML that loads nothing: a page, or with `alone=False` a part for a notebook's
    output.
    """
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(
        Path(__file__).with_name("view.html").read_text(encoding="utf-8")
    )
    samples = collected.samples
    return template.render(
        alone=alone,
        collected=collected,
        tokens=sum(sample.tokens for sample in samples),
        supervised=sum(sample.supervised for sample in samples),
        **{
            function.__name__: function
            for function in (runs, visible, heading, about, cut_mark, hint)
        },
    )


def write_page(collected: Collected, path: Path) -> None:
    path.write_text(page(collected), encoding="utf-8")
