"""Whether an answer is right, by suite; not the graders behind published scores."""

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
SECONDS, MEMORY = 10, 1 << 30
PASSED = 97  # not 0, so that an answer that exits early passes nothing
# Runs in the child, before the answer does.
GUARD = f"""
import ctypes, os, resource, runpy, sys
limits = {{"CPU": {SECONDS}, "AS": {MEMORY}, "FSIZE": 1 << 20, "NOFILE": 32, "NPROC": 0, "CORE": 0}}
for name, most in limits.items():
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))
if sys.platform == "linux":
    ctypes.CDLL(None).unshare(0x10000000 | 0x40000000)  # CLONE_NEWUSER, CLONE_NEWNET
runpy.run_path(sys.argv[1], run_name="__main__")
os._exit({PASSED})
"""


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


def passes(source: str) -> bool:
    """Whether `source` runs through in a limited Python; no prison: it can read our files."""
    with TemporaryDirectory() as folder:
        path = f"{folder}/answer.py"
        Path(path).write_text(source, encoding="utf-8", errors="replace")
        command, empty = [sys.executable, "-I", "-c", GUARD, path], {"PATH": os.defpath}
        quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        child = subprocess.Popen(command, cwd=folder, env=empty, start_new_session=True, **quiet)
        try:
            return child.wait(timeout=SECONDS) == PASSED
        except subprocess.TimeoutExpired:
            return False
        finally:
            # With all that it started: a group of its own, which outlives its first process.
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
