"""`stages=[view]`: what training sees of conversations, their tokens with the supervised ones
coloured, in the terminal and as a page.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, groupby
from pathlib import Path

from jinja2 import Environment
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from eagle3.config import Data
from eagle3.data.chat import NOT_FOUND, Chat
from eagle3.data.encoder import Encoder
from eagle3.data.prepare import EXAMPLE_LETTERS
from eagle3.data.rows import RowError
from eagle3.data.sources import Row, SourceFiles, read_rows
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

    @property
    def hint(self) -> str:
        """`id 5, position 12, 'text'`."""
        ids, (first, last) = " ".join(map(str, self.ids)), (self.positions[0], self.positions[-1])
        if first == last:
            return f"id {ids}, position {first}, {self.text!r}"
        return f"ids {ids}, positions {first}–{last}, {self.text!r}"


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

    @property
    def summary(self) -> str:
        cut = f", cut from {self.length:,} to data.max_length" * (self.length > self.tokens)
        share = f"{self.supervised / self.tokens:.1%}"
        return f"{self.tokens:,} tokens, {self.supervised:,} of them supervised ({share}){cut}"

    @property
    def cut_mark(self) -> str:
        left_out = self.length - self.tokens
        return f"✂ {left_out:,} tokens left out" if left_out else ""


@dataclass
class Rejected:
    """A row that cannot be used; `text` is its rendering, where no turn was found in it."""

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
        lines = []
        for reason, places in sorted(found.items(), key=lambda item: -len(item[1])):
            more = ", …" * (len(places) > MOST_PLACES)
            lines.append(f"{len(places):,} x {reason} ({', '.join(places[:MOST_PLACES])}{more})")
        return lines


def view(
    data: Data, num_samples: int, sources: SourceFiles, chat: Chat, run_dir: Path, console: Console
) -> None:
    """Show the first `num_samples` conversations, also as `view.html` in `run_dir`. Raises
    RunError when there is none.
    """
    rows = (read_rows(files, None, data.preformatted) for _, files in sources)
    collected = collect(chain.from_iterable(rows), chat, data, num_samples)
    show(collected, console)
    path = run_dir / "view.html"
    path.write_text(page(collected), encoding="utf-8")
    console.print(f"view: {path}")


def collect(rows: Iterator[Row], chat: Chat, data: Data, num_samples: int) -> Collected:
    """The first `num_samples` rows that preparation would keep. Raises RunError without any."""
    encoder, collected = Encoder(chat, data), Collected()
    for row in rows:
        try:
            if row.conversation is None:
                raise RowError(row.reason)
            encoder.add_system(row.conversation)
            encoded = encoder.encode(row.conversation)
        except RowError as error:
            rejected = Rejected(row.file, row.line, str(error))
            if rejected.reason == NOT_FOUND and len(collected.renderings) < MOST_RENDERINGS:
                rejected.text = encoder.example(row.conversation)
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
        why = "; ".join(collected.reasons) or "no rows"
        for row in collected.renderings[:1]:
            why += f"; this is how one was rendered:\n{row.text[:EXAMPLE_LETTERS]}"
        raise RunError(f"data.path has no conversation to show: {why}")
    return collected


def split_tokens(
    tokenizer: PreTrainedTokenizerBase, input_ids: list[int], loss_mask: list[int]
) -> list[Piece]:
    """The tokens with their texts, which joined are the decoded `input_ids`."""
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    pieces: list[Piece] = []
    before = first = 0

    def decode(start: int, stop: int) -> str:
        return tokenizer.decode(input_ids[start:stop], **options)

    def text_of(start: int, stop: int) -> str:
        """Decoded behind the piece before, as some decoders drop a space in front of what comes
        first.
        """
        return decode(before, stop)[len(decode(before, start)) :]

    def end_of_piece(stop: int) -> int:
        """A broken end may be a real U+FFFD or lost bytes: tokens belong together only if decoding
        them apart differs.
        """
        text = text_of(first, stop)
        for end in range(first + 1, stop):
            part = text_of(first, end)
            if part and part + decode(end, stop) == text:
                return end
        return stop

    for stop in range(1, len(input_ids) + 1):
        text = text_of(first, stop)
        if (not text or text.endswith(BROKEN)) and stop < len(input_ids):
            continue
        while first < stop:
            end = end_of_piece(stop)
            text, ids, place = text_of(first, end), input_ids[first:end], range(first, end)
            pieces.append(Piece(text, ids, place, bool(loss_mask[end - 1]), ids[-1] in special))
            before, first = first, end
    return pieces


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


def colour(sample: Sample, plain: bool) -> Text:
    """The sample for a terminal; `plain`: brackets stand for the colour."""
    text, place = Text(), 0
    for supervised, pieces in groupby(sample.pieces, lambda piece: piece.supervised):
        text.append("⟦" if supervised and plain else "")
        for piece in pieces:
            style = SHADES[place % 2] if supervised else "cyan" if piece.special else "dim"
            style += " bold" * piece.special + " underline" * (len(piece.ids) > 1)
            for part, mark in runs(piece.text):
                text.append(part, f"{style} dim" if mark else style)
            place += 1
        text.append("⟧" if supervised and plain else "")
    return text.append(sample.cut_mark, "yellow")


def show(collected: Collected, console: Console) -> None:
    """Print the samples, then what was rejected; nothing in them is taken for markup."""
    plain = console.no_color or console.color_system is None
    legend = "stand in ⟦ ⟧" if plain else "are green, in two shades by turns"
    console.print(Text(f"view: supervised tokens {legend}"))
    for sample in collected.samples:
        console.rule(Text(heading(sample)), style="dim")
        console.print(Text(sample.summary, "dim"))
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
    text = Path(__file__).with_name("view.html").read_text(encoding="utf-8")
    tokens = sum(sample.tokens for sample in collected.samples)
    supervised = sum(sample.supervised for sample in collected.samples)
    given = {"collected": collected, "tokens": tokens, "supervised": supervised, "alone": alone}
    functions = {"runs": runs, "visible": visible, "heading": heading}
    return environment.from_string(text).render(**given, **functions)
