"""Question-answer conversations about the source of Python's standard library; whole modules are
held out.

The text is pinned: another Python, or a changed standard library, is refused instead of giving
other conversations.
"""

import ast
import hashlib
import json
import platform
import random
import sysconfig
import warnings
from pathlib import Path

from dev.tiny.facts import class_of, function_of
from dev.tiny.questions import KINDS, outline, skeleton
from dev.tiny.wording import fenced

PYTHON = "3.11.7"
SHA256 = "c54708e246fc5eff9e56973a41e7521d3b58f0724c02b93ba9f6956a7ad708ce"
# modules whose functions appear in no training conversation, 4 % of the conversations: only for
# evaluation
HELD_OUT = (
    "calendar configparser csv email.contentmanager fnmatch fractions graphlib heapq http.cookies json.encoder "
    "multiprocessing.process pprint queue sched shlex statistics tempfile textwrap types xml.dom zipapp"
)
HELD_OUT = frozenset(HELD_OUT.split())
TWO_TURNS = 0.26  # of the conversations about one function are asked for two; 12 % of all get them
MAX_SOURCE = 420  # characters of source shown in a question
MAX_CHARACTERS = 1000  # of a conversation: about 350 tokens
SKIPPED = {
    "test",
    "tests",
    "site-packages",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "encodings",
    "__pycache__",
}
SKIPPED |= {"ensurepip", "pydoc_data", "lib-dynload"}


def modules():
    """Yields (dotted name, syntax tree) of the standard library's modules in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        parts = path.relative_to(root).with_suffix("").parts
        # written by the build of the interpreter, or by its user
        local = parts[0].startswith(("config-", "_sysconfigdata", "sitecustomize", "usercustomize"))
        if local or SKIPPED & set(parts):
            continue
        with warnings.catch_warnings(action="ignore"):
            yield ".".join(p for p in parts if p != "__init__"), ast.parse(path.read_bytes())


def turn(kind, f, follow_up, pick):
    """One (question, answer), with the source in the question unless it is a follow-up or asks for
    the source.
    """
    made = kind(f, not follow_up, pick)
    if made is None:
        return None
    ask, follow, answer = made
    if follow_up:
        return (pick.choice(follow), answer) if follow else None
    shown = f"\n\n{fenced(f.source)}" if follow else ""
    if kind.__name__ == "rename":
        shown = f"\n\n{fenced(f.source)}"
    return pick.choice(ask) + shown, answer


def about_function(f, how_many, pick):
    """Up to `how_many` conversations about one function, each of another kind: [(kind name,
    turns)].
    """
    kinds = [kind for kind, _ in KINDS]
    # weighted draw without replacement
    order = sorted(KINDS, key=lambda entry: pick.random() ** (1 / entry[1]), reverse=True)
    made = []
    for kind, _ in order:
        first = turn(kind, f, False, pick)
        if first is None:
            continue
        turns = [first]
        if pick.random() < TWO_TURNS:
            second = turn(pick.choice([k for k in kinds if k is not kind]), f, True, pick)
            turns += [second] if second else []
        made.append((kind.__name__, turns))
        if len(made) == how_many:
            break
    return made


def about_module(module, tree, seen):
    """Yields (kind name, turns) for the functions and classes of a module whose source was not seen
    before.
    """
    for node in ast.walk(tree):
        pick = random.Random(f"{module}:{getattr(node, 'lineno', 0)}")
        if isinstance(node, ast.ClassDef):
            for child in node.body:
                child.is_method = True
            c = class_of(node)
            if len(c.methods) >= 2:
                yield "skeleton", [skeleton(c, pick)]
                listed = outline(c, pick)
                if listed:
                    yield "outline", [listed]
        elif isinstance(node, ast.FunctionDef):
            f = function_of(node, getattr(node, "is_method", False))
            if f and f.source not in seen and 60 <= len(f.source) <= MAX_SOURCE:
                seen.add(f.source)
                yield from about_function(f, 1 + (pick.random() < 0.08), pick)


def conversations():
    """-> (training rows, held-out rows) of {"id", "module", "kind", "messages"}; refuses any but
    the pinned ones.
    """
    if platform.python_version() != PYTHON:
        raise SystemExit(
            f"The corpus is pinned to Python {PYTHON}; run this step with it, not {platform.python_version()}."
        )
    seen, rows = set(), []
    # training modules first: a held-out function that also stands in one of them is then dropped
    for module, tree in sorted(modules(), key=lambda entry: entry[0] in HELD_OUT):
        for number, (kind, turns) in enumerate(about_module(module, tree, seen)):
            messages = [
                {"role": role, "content": text}
                for pair in turns
                for role, text in zip(("user", "assistant"), pair)
            ]
            if sum(len(m["content"]) for m in messages) <= MAX_CHARACTERS:
                rows.append(
                    {
                        "id": f"{module}-{number}",
                        "module": module,
                        "kind": kind,
                        "messages": messages,
                    }
                )
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    if digest != SHA256:
        raise SystemExit(
            f"The conversations have sha256 {digest} instead of {SHA256}: this standard library differs."
        )
    return [r for r in rows if r["module"] not in HELD_OUT], [
        r for r in rows if r["module"] in HELD_OUT
    ]
