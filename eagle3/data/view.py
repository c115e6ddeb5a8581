"""`stages=[view]`: the tokens that training sees, in the terminal and as a page."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, cycle, groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment
from rich.console import Console
from rich.text import Text

from eagle3.config import Data
from eagle3.data.chat import NOT_FOUND, Chat
from eagle3.data.encoder import Encoder
from eagle3.data.prepare import EXAMPLE_LETTERS
from eagle3.data.rows import RowError
from eagle3.data.sources import Row, SourceFiles, read_rows, why_none
from eagle3.errors import RunError

BROKEN = "\ufffd"  # what decoders write for bytes that are no whole character
MARKS = {"\n": "↵", "\t": "⇥   "}
# Both colours are set, so that they read alike on light and dark terminals; tmux may have only 256.
SHADES = ("color(231) on color(22)", "color(231) on color(28)")


@dataclass
class Piece:
    """A token, or those that together make a character, the first of them at `position`."""

    text: str
    ids: list[int]
    position: int
    supervised: bool
    special: bool

    @property
    def hint(self) -> str:
        return f"id {' '.join(map(str, self.ids))}, position {self.position}, {self.text!r}"


@dataclass
class Sample:
    """A conversation as it is trained on; `left_out` counts its tokens behind `data.max_length`."""

    place: str
    pieces: list[Piece]
    tokens: int
    supervised: int
    left_out: int

    @property
    def summary(self) -> str:
        cut = f", {self.left_out:,} more left out by data.max_length" * bool(self.left_out)
        share = f"{self.supervised / self.tokens:.1%}"
        return f"{self.tokens:,} tokens, {self.supervised:,} of them supervised ({share}){cut}"


@dataclass
class Collected:
    """The samples, counts of rejected rows, and (place, rendering) of the first without a turn."""

    samples: list[Sample] = field(default_factory=list)
    rejected: Counter[str] = field(default_factory=Counter)
    rendering: tuple[str, str] | None = None

    @property
    def reasons(self) -> list[str]:
        return [visible(f"{count:,} x {reason}") for reason, count in self.rejected.most_common()]


def view(
    data: Data, num_samples: int, sources: SourceFiles, chat: Chat, run_dir: Path, console: Console
) -> None:
    """Show the first conversations, also as `view.html` in `run_dir`. Raises RunError."""
    rows = (read_rows(files, None, data.preformatted) for _, files in sources)
    collected = collect(chain.from_iterable(rows), chat, data, num_samples)
    if not collected.samples:
        why = visible(why_none(collected.rejected, sources[0][1]))
        if collected.rendering is not None:
            why += f"; one is rendered as:\n{collected.rendering[1][:EXAMPLE_LETTERS]}"
        raise RunError(f"data.path has no conversation to show: {why}")
    show(collected, console)
    path = run_dir / "view.html"
    path.write_text(page(collected), encoding="utf-8")
    console.print(f"view: {path}")


def collect(rows: Iterator[Row], chat: Chat, data: Data, num_samples: int) -> Collected:
    """The first `num_samples` rows that preparation would keep."""
    encoder, collected = Encoder(chat, data), Collected()
    for row in rows:
        place = visible(f"{Path(row.file).name}, line {row.line}")
        try:
            if row.conversation is None:
                raise RowError(row.reason)
            encoded = encoder.encode(row.conversation)
        except RowError as error:
            collected.rejected[str(error)] += 1
            if str(error) == NOT_FOUND and collected.rendering is None:
                collected.rendering = place, encoder.example(row.conversation)
            continue
        ids, mask = encoded.input_ids[: data.max_length], encoded.loss_mask[: data.max_length]
        pieces = split_tokens(chat.tokenizer, ids, mask)
        left_out = len(encoded.input_ids) - len(ids)
        collected.samples.append(Sample(place, pieces, len(ids), sum(mask), left_out))
        if len(collected.samples) == num_samples:
            break
    return collected


def split_tokens(tokenizer: Any, input_ids: list[int], loss_mask: list[int]) -> list[Piece]:
    """The tokens with their texts, which joined are the decoded `input_ids`."""
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    pieces, before, first = [], 0, 0

    def decode(stop: int) -> str:
        # from the piece before on, as some decoders drop a space in front of what comes first
        ids = input_ids[before:stop]
        return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    for stop in range(1, len(input_ids) + 1):
        text = decode(stop)[len(decode(first)) :]
        goes_on = stop < len(input_ids) and loss_mask[stop] == loss_mask[stop - 1]
        if goes_on and (not text or text.endswith(BROKEN)):
            continue  # the next token has the other bytes of this character
        ids = input_ids[first:stop]
        pieces.append(Piece(text, ids, first, bool(loss_mask[stop - 1]), ids[-1] in special))
        before, first = first, stop
    return pieces


def runs(text: str) -> Iterator[tuple[str, bool]]:
    """Parts of `text` that show as they are, and marks (True) for what would steer the display."""
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


def show(collected: Collected, console: Console) -> None:
    """Print the samples, then what was rejected; nothing in them is taken for markup."""
    plain = console.no_color or console.color_system is None
    legend = "stand in ⟦ ⟧" if plain else "are green, in two shades by turns"
    console.print(Text(f"view: supervised tokens {legend}"))
    for sample in collected.samples:
        console.rule(Text(sample.place), style="dim")
        # Shades alternate, so that one sees where a token ends.
        text, shades = Text(sample.summary + "\n", "dim"), cycle(SHADES)
        for supervised, pieces in groupby(sample.pieces, lambda piece: piece.supervised):
            text.append("⟦" if supervised and plain else "")
            for piece in pieces:
                style = "cyan" if piece.special else "dim"
                text.append(visible(piece.text), next(shades) if supervised else style)
            text.append("⟧" if supervised and plain else "")
        console.print(text, soft_wrap=True)
    if collected.rendering is not None:
        place, text = collected.rendering
        console.rule(Text(place), style="dim")
        console.print(Text(f"{NOT_FOUND}\n{visible(text)}"), soft_wrap=True)
    for reason in collected.reasons:
        console.print(Text(f"rejected: {reason}", "yellow"), soft_wrap=True)


def page(collected: Collected, alone: bool = True) -> str:
    """HTML that loads nothing: a page, or with `alone=False` a part for a notebook's output."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    text = Path(__file__).with_name("view.html").read_text(encoding="utf-8")
    return environment.from_string(text).render(collected=collected, alone=alone, runs=runs)
