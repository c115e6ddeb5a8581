"""The kinds of question: each function turns what `facts` found into a (question, answer) pair, or
None.

`pick` is a seeded `random.Random`. `shown` is the fenced source, or "" in a follow-up turn where
the first turn already showed it. Answers copy names from the question in sentences of their own: a
small model learns to look up, while a drafter that only repeats the prompt does not win.
"""

import ast

from dev.tiny.wording import count, fenced, names, third_person


def kind_of(f):
    return "method" if f.is_method else "function"


def purpose(f):
    """One sentence about what the function does, or ""."""
    if not f.summary:
        return ""
    action = third_person(f.summary)
    return f"It {action}." if action else f'Its purpose is: "{f.summary}".'


def steps(f):
    """Sentences about the body, in a fixed order."""
    told = []
    if f.tests:
        told.append(f"It checks whether `{f.tests[0]}` holds.")
    if f.loops:
        told.append(f"It loops over `{f.loops[0][1]}` with `{f.loops[0][0]}`.")
    if f.calls:
        told.append(f"It calls {names(f.calls)}.")
    if f.sets:
        told.append(f"It sets {names(f.sets)}.")
    if f.raises:
        told.append(f"It can raise {names(f.raises)}.")
    return told


def result(f):
    if f.is_generator:
        return "It is a generator."
    if f.returns_value and not f.returns:
        return "It returns the value of a longer expression."
    return f"It returns {names(f.returns, 2)}." if f.returns else "It returns nothing."


def taking(f):
    return (
        f"takes {names([p.name for p in f.parameters], 6)}"
        if f.parameters
        else "takes no arguments"
    )


def explain(f, shown, pick):
    ask = [
        "Explain what this code does.",
        f"What does the {kind_of(f)} `{f.name}` do?",
        "Explain this code.",
    ]
    follow = ["What does it do?", "Explain what it does.", f"And what does `{f.name}` do?"]
    answer = [f"The {kind_of(f)} `{f.name}` {taking(f)}.", purpose(f), *steps(f), result(f)]
    return ask, follow, " ".join(part for part in answer if part)


def write(f, shown, pick):
    action = third_person(f.summary) if f.summary else None
    if not action or len(f.source) > 480:
        return None
    head = f.signature.removeprefix("def ").rstrip(":")
    hints = []
    if f.calls:
        hints.append(f"call {names(f.calls, 3)}")
    if f.returns:
        hints.append(f"return {names(f.returns, 2)}")
    hint = f" It should {' and '.join(hints)}." if hints and pick.random() < 0.7 else ""
    lead = pick.choice(
        ["Write a Python {}", "Write a {}", "Implement a {}", "Please write the {}"]
    ).format(kind_of(f))
    lines = f.source.split("\n")
    source = "\n".join([lines[0], f'    """{f.summary}."""', *lines[1:]])
    return [f"{lead} `{head}` that {action}.{hint}"], None, fenced(source)


def document(f, shown, pick):
    if not f.parameters:
        return None
    ask = [
        "Write a docstring for this function.",
        "Document this function.",
        f"Write a docstring for `{f.name}`.",
    ]
    follow = ["Write a docstring for it.", "Document it.", "Now write its docstring."]
    told = [f.summary or f"{f.name.strip('_').replace('_', ' ').capitalize()}", "", "Args:"]
    for p in f.parameters:
        default = f", {p.default} by default" if p.default else ""
        told.append(f"    {p.name}: the {p.name.strip('*_').replace('_', ' ')}{default}.")
    if f.returns:
        told += ["", "Returns:", f"    {f.returns[-1]}"]
    if f.raises:
        told += ["", "Raises:", *[f"    {name}" for name in f.raises[:3]]]
    body = "\n".join(f"    {line}".rstrip() for line in told[1:])
    return ask, follow, fenced(f'{f.signature}\n    """{told[0]}.\n{body}\n    """')


def parameters(f, shown, pick):
    if not f.parameters:
        return None
    ask = [
        f"What are the parameters of `{f.name}`?",
        "List the parameters of this function and their defaults.",
    ]
    follow = ["What are its parameters?", "List its parameters.", "Which arguments does it take?"]
    lines = [f"The {kind_of(f)} `{f.name}` has {count(f.parameters, 'parameter')}:", ""]
    for p in f.parameters:
        how = "required" if p.default is None else f"optional, defaults to `{p.default}`"
        lines.append(f"- `{p.name}` ({how if p.default != '' else 'any number of values'})")
    return ask, follow, "\n".join(lines)


def arguments(f):
    """Source of the arguments of an example call: required ones by name, optional ones with their
    default.
    """
    shown = [
        p.name if p.default is None else f"{p.name}={p.default}"
        for p in f.parameters
        if p.default != ""
    ]
    return ", ".join(shown)


def usage(f, shown, pick):
    ask = [f"Show how to call `{f.name}`.", "Give an example of a call of this code."]
    follow = ["Show how to call it.", "Now show an example of how to use it.", "How do I call it?"]
    call = f"{'self.' if f.is_method else ''}{f.name}({arguments(f)})"
    bound = f"result = {call}" if f.returns_value else call
    told = f"You can call `{f.name}` like this:\n\n{fenced(bound)}\n\n"
    needed = [p.name for p in f.parameters if p.default is None]
    told += f"You must pass {names(needed, 6)}. " if needed else "No argument is required. "
    return ask, follow, told + result(f)


def unit_test(f, shown, pick):
    if f.name.startswith("__"):
        return None
    ask = [f"Write a unit test for `{f.name}`.", "Write a test for this function."]
    follow = ["Write a unit test for it.", "Now write a test.", "Can you add a unit test?"]
    title = "".join(word.capitalize() for word in f.name.split("_"))
    call = f"{'self.subject.' if f.is_method else ''}{f.name}({arguments(f)})"
    lines = [
        "import unittest",
        "",
        f"class Test{title}(unittest.TestCase):",
        f"    def test_{f.name.strip('_')}(self):",
    ]
    lines += [f"        {p.name} = None" for p in f.parameters if p.default is None]
    if f.raises and not f.returns_value:
        lines += [f"        with self.assertRaises({f.raises[0]}):", f"            {call}"]
    elif f.returns_value:
        lines += [f"        result = {call}", "        self.assertIsNotNone(result)"]
    else:
        lines += [f"        {call}"]
    return ask, follow, fenced("\n".join(lines))


def calls(f, shown, pick):
    if not f.calls:
        return None
    ask = [f"Which functions does `{f.name}` call?", "Which functions are called in this code?"]
    follow = ["Which functions does it call?", "What does it call?"]
    lines = [f"The {kind_of(f)} `{f.name}` calls {count(f.calls, 'function')}:", ""]
    lines += [f"{number}. `{name}`" for number, name in enumerate(f.calls[:9], 1)]
    return ask, follow, "\n".join(lines)


def returned(f, shown, pick):
    ask = [
        f"What does `{f.name}` return?",
        "What does this code return, and can it raise an exception?",
    ]
    follow = ["What does it return?", "And what does it return?"]
    told = [f"The {kind_of(f)} `{f.name}`", "is a generator." if f.is_generator else result(f)[3:]]
    if f.tests:
        told.append(f"The result depends on `{f.tests[0]}`.")
    told.append(
        f"It can raise {names(f.raises)}." if f.raises else "It raises no exception itself."
    )
    return ask, follow, " ".join(told)


def hints(f, shown, pick):
    types = {
        p.name: type(ast.literal_eval(p.default)).__name__
        for p in f.parameters
        if is_literal(p.default)
    }
    if not types or len(types) > 5:
        return None
    ask = [
        f"Add type hints to the signature of `{f.name}`.",
        "Which type hints follow from the defaults here?",
    ]
    follow = ["Add type hints to its signature.", "Which type hints would you add?"]
    told = [
        f"{p.name}: {types[p.name]} = {p.default}" if p.name in types else p.name
        for p in f.parameters
    ]
    told = ", ".join((["self"] if f.is_method else []) + told)
    why = " ".join(f"The default of `{name}` is of type `{kind}`." for name, kind in types.items())
    return ask, follow, f"{fenced(f'def {f.name}({told}):')}\n\n{why}"


def is_literal(default):
    """A default whose type says something: a number, a text, a truth value, a tuple; not None."""
    if not default or default == "None":
        return False
    try:
        ast.literal_eval(default)
    except (ValueError, SyntaxError):
        return False
    return True


def rename(f, shown, pick):
    plain = [p.name for p in f.parameters if p.default != ""]
    if not plain or len(f.source) > 300 or not shown:
        return None
    old, new = (
        pick.choice(plain),
        pick.choice(["value", "item", "data", "source", "text", "other", "first", "entry"]),
    )
    if new in f.source:
        return None
    tree = ast.parse(f.source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == old:
            node.id = new
        elif isinstance(node, ast.arg) and node.arg == old:
            node.arg = new
    ask = [
        f"Rename the parameter `{old}` to `{new}`.",
        f"Use `{new}` instead of `{old}` in this function.",
    ]
    return (
        ask,
        None,
        f"{fenced(ast.unparse(tree))}\n\nThe parameter `{old}` of `{f.name}` is now called `{new}`.",
    )


def skeleton(c, pick):
    """A class from the names of its methods."""
    methods = c.methods[:5]
    base = f" derived from {names(c.bases)}" if c.bases else ""
    lead = pick.choice(
        ["Write a skeleton of the class", "Write the class", "Sketch a Python class"]
    )
    action = f" Its purpose: {c.summary}." if c.summary else ""
    question = (
        f"{lead} `{c.name}`{base} with the methods {names([m.name for m in methods], 5)}.{action}"
    )
    lines = [f"class {c.name}({', '.join(c.bases)}):" if c.bases else f"class {c.name}:"]
    lines += [f'    """{c.summary}."""'] if c.summary else []
    for m in methods:
        lines += ["", f"    {m.signature}"]
        lines += (
            [f'        """{m.summary}."""']
            if m.summary and len(m.summary) < 60
            else ["        ..."]
        )
    return question, fenced("\n".join(lines))


def outline(c, pick):
    """The methods of a class whose source is shown, one line each."""
    lines = [f"class {c.name}({', '.join(c.bases)}):" if c.bases else f"class {c.name}:"]
    told, size, told_of = [], 0, []
    for m in c.methods:
        if size + len(m.source) > 400:
            continue
        size += len(m.source)
        lines += ["", *[f"    {line}" for line in m.source.split("\n")]]
        told.append(f"- `{m.name}` {taking(m)}. {result(m)}")
        told_of.append(m)
    if len(told) < 2:
        return None
    ask = pick.choice(
        ["List the functions defined in this code.", f"Which methods does `{c.name}` have?"]
    )
    answer = f"The class `{c.name}` defines {count(told_of, 'method')}:\n\n" + "\n".join(told)
    return f"{ask}\n\n{fenced(chr(10).join(lines))}", answer


# (function, weight): how often each kind is drawn for a function
KINDS = [
    (explain, 22),
    (write, 26),
    (document, 12),
    (parameters, 9),
    (usage, 9),
    (unit_test, 9),
    (calls, 6),
    (returned, 7),
    (hints, 5),
    (rename, 5),
]
