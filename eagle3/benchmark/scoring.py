"""Whether an answer is right, by suite; not the graders behind published scores."""

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from fractions import Fraction
from functools import cache
from tempfile import TemporaryDirectory, TemporaryFile

from eagle3.benchmark import guard
from eagle3.benchmark.guard import SECONDS

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
# A system of its own for what a command starts: processes, files and no network.
NAMESPACES = ("unshare", "--mount", "--pid", "--net", "--ipc", "--fork", "--kill-child")


def gsm8k(answer: str, reference: str) -> bool:
    """The number behind `####`, else the last number of the text, equals the reference's."""
    given = last_number(answer)
    return given is not None and given == last_number(reference)


def last_number(text: str) -> Fraction | None:
    found = NUMBER.findall(text.rpartition("####")[2]) or NUMBER.findall(text)
    return value(found[-1].replace(",", "")) if found else None


def math500(answer: str, reference: str) -> bool:
    r"""What stands in the last \boxed, else the last number, equals the reference."""
    _, found, rest = answer.rpartition("\\boxed{")
    given, depth = ["", *NUMBER.findall(answer)][-1], 1
    for place, letter in enumerate(rest if found else ""):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if depth == 0:
            given = rest[:place]
            break
    given, wanted = plain(given), plain(reference)
    return given == wanted or (value(given) is not None and value(given) == value(wanted))


def plain(latex: str) -> str:
    """LaTeX without spaces, units in \\text and what changes only its looks."""
    latex = re.sub(r"\\(?:left|right|[!,;:]|displaystyle|%)|\\?\$|(?<!\\)%", "", latex)
    latex = re.sub(r"\\[dt]frac", r"\\frac", latex)
    latex = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", latex)
    latex = re.sub(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})", "", latex)
    # A unit at the end goes with its exponent; other text keeps its letters.
    unit = r"(?<=[\w.}])\s*\\(?:text|mbox|mathrm)\s*\{[^{}]*\}(?:\^\{?\d\}?)?$"
    latex = re.sub(unit, "", latex.strip())
    latex = re.sub(r"\\(?:text|mbox|mathrm|textbf|mathbf)\s*\{([^{}]*)\}", r"\1", latex)
    latex = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", latex)
    return re.sub(r"^[a-zA-Z]=", "", re.sub(r"\s+", "", latex)).rstrip(".")


def value(text: str) -> Fraction | None:
    r"""A whole number, a decimal one, a/b or \frac{a}{b}."""
    text = re.sub(r"^(-?)\\frac\{(-?\d+)\}\{(\d+)\}$", r"\1\2/\3", text)
    if not re.fullmatch(r"[-+]?[\d./]{1,200}", text):
        return None  # an answer that loops, or an exponent, would take Python minutes or be refused
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        return None


def ceval(answer: str, reference: str) -> bool:
    """The last letter A-D that the text calls the answer, else the first alone, is right."""
    words = r"(?:答案|选择?|[Aa]nswer)[^A-Za-z]{0,8}(?:is\s*)?\W{0,3}"
    called = re.findall(words + r"([A-D])(?![A-Za-z])", answer)
    # A letter of a word or a formula (H2O) is no choice.
    alone = re.findall(r"(?<![A-Za-z])[A-D](?![A-Za-z])", answer)
    return (called[-1:] or alone[:1]) == [reference.strip()]


def humaneval(answer: str, reference: dict[str, str]) -> bool:
    """Whether the code of the answer (the block with the function) passes the row's tests."""
    prompt, name = reference["prompt"], reference["entry_point"]
    head = f"def {name}("
    # An answer that was cut off has a block without an end.
    blocks = re.findall(r"```[^\n]*\n(.*?)(?:```|\Z)", answer, re.DOTALL) or [answer]
    code = next((block for block in blocks if head in block), blocks[0])
    # Imports and helpers of the prompt stay; an answer that only goes on needs all of it.
    before = prompt[: prompt.rfind(head)] if head in code else prompt
    return passes(f"{before}{code}\n\n{reference['test']}\n\ncheck({name})\n")


@cache
def namespaces() -> tuple[str, ...]:
    """The command that starts another one confined; () where this system allows none."""
    as_user = () if os.geteuid() == 0 else ("--user", "--map-root-user")
    command = (*NAMESPACES, *as_user)
    return command if shutil.which(command[0]) and passes("import json, re", command) else ()


def passes(source: str, confined: tuple[str, ...] | None = None) -> bool:
    """Whether `source` runs through to its end, as nobody and confined where that can be."""
    confined = namespaces() if confined is None else confined
    # Drawn anew and written at the end: a program that ends early, however, has not said it.
    marker = secrets.token_hex(16).encode()
    with TemporaryDirectory() as folder, TemporaryFile() as given, TemporaryFile() as told:
        given.write(marker + b"\n" + source.encode(errors="replace"))
        given.seek(0)
        command = [*confined, sys.executable, "-I", guard.__file__]
        child = subprocess.Popen(
            [*command, folder] if confined else command,
            cwd=folder,
            env={"PATH": os.defpath},
            start_new_session=True,
            stdin=given,
            stdout=told,
            stderr=subprocess.DEVNULL,
        )
        try:
            child.wait(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            return False
        finally:
            # With all that it started: a group of its own, which outlives its first process.
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        told.seek(0)
        return told.read() == marker
