"""What the syntax tree says about a function or a class: the raw material of the questions and
answers.
"""

import ast
from dataclasses import dataclass

SHORT = 44  # characters: longer expressions are not quoted in prose


@dataclass
class Parameter:
    name: str
    default: str | None  # None: required; "*" and "**" names have "" here


@dataclass
class Function:
    """A function without its docstring and decorators, as `ast.unparse` writes it."""

    name: str
    source: str
    signature: str  # the line from "def" to ":"
    summary: str  # first sentence of the docstring, or ""
    parameters: list[Parameter]
    calls: list[str]
    returns: list[str]
    returns_value: bool  # also where the expression is too long to quote
    raises: list[str]
    loops: list[tuple[str, str]]  # (variable, what it runs over)
    tests: list[str]  # conditions of `if`
    sets: list[str]  # attributes assigned
    is_method: bool
    is_generator: bool
    node: ast.FunctionDef


@dataclass
class Class:
    name: str
    bases: list[str]
    summary: str
    methods: list[Function]


def unique(names):
    """The short ones of `names`, each once, in order."""
    return [n for n in dict.fromkeys(names) if len(n) <= SHORT and "\n" not in n]


def first_sentence(node):
    """First sentence of the docstring on one line without its full stop, or "" when there is none
    worth quoting.
    """
    text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
    sentence = text.split(". ")[0].rstrip(".: ")
    usable = (
        12 <= len(sentence) <= 130
        and sentence[0].isupper()
        and "`" not in sentence
        and sentence.isascii()
    )
    return sentence if usable else ""


def parameters_of(arguments):
    """`ast.arguments` -> parameters in the order of the signature, without `self` and `cls`."""
    plain = arguments.posonlyargs + arguments.args
    defaults = [None] * (len(plain) - len(arguments.defaults)) + [
        ast.unparse(d) for d in arguments.defaults
    ]
    found = [Parameter(a.arg, d) for a, d in zip(plain, defaults, strict=True)]
    if arguments.vararg:
        found.append(Parameter("*" + arguments.vararg.arg, ""))
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        found.append(Parameter(argument.arg, None if default is None else ast.unparse(default)))
    if arguments.kwarg:
        found.append(Parameter("**" + arguments.kwarg.arg, ""))
    return [p for p in found if p.name not in ("self", "cls")]


def function_of(node, is_method):
    """`ast.FunctionDef` -> Function; None where only a docstring or `pass` is left, or the text is
    not ASCII.
    """
    summary = first_sentence(node)
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    if not body or (len(body) == 1 and isinstance(body[0], ast.Pass)):
        return None
    bare = ast.FunctionDef(node.name, node.args, body, [], node.returns, lineno=0)
    source = ast.unparse(bare).strip()
    if not source.isascii():
        return None
    parts = list(ast.walk(bare))
    returned = [p.value for p in parts if isinstance(p, ast.Return) and p.value]
    raised = [p.exc for p in parts if isinstance(p, ast.Raise) and p.exc]
    assigned = [
        t
        for p in parts
        if isinstance(p, ast.Assign)
        for t in p.targets
        if isinstance(t, ast.Attribute)
    ]
    loops = [(ast.unparse(p.target), ast.unparse(p.iter)) for p in parts if isinstance(p, ast.For)]
    return Function(
        name=node.name,
        source=source,
        signature=source.split("\n")[0],
        summary=summary,
        parameters=parameters_of(node.args),
        calls=unique(ast.unparse(p.func) for p in parts if isinstance(p, ast.Call)),
        returns=unique(ast.unparse(value) for value in returned),
        returns_value=bool(returned),
        raises=unique(ast.unparse(e.func if isinstance(e, ast.Call) else e) for e in raised),
        loops=[(v, i) for v, i in loops if len(v) + len(i) <= SHORT],
        tests=unique(ast.unparse(p.test) for p in parts if isinstance(p, ast.If)),
        sets=unique(ast.unparse(target) for target in assigned),
        is_method=is_method,
        is_generator=any(isinstance(p, (ast.Yield, ast.YieldFrom)) for p in parts),
        node=bare,
    )


def class_of(node):
    """`ast.ClassDef` -> Class with the functions defined directly in it."""
    methods = [function_of(n, True) for n in node.body if isinstance(n, ast.FunctionDef)]
    bases = unique(ast.unparse(base) for base in node.bases)
    return Class(node.name, bases, first_sentence(node), [m for m in methods if m])
