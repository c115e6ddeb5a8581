"""Small pieces of English and Markdown for the questions and answers."""

VERBS = (
    "add append apply build call change check clear close compare compile compute construct convert copy create decode "
    "define delete determine display do encode ensure escape execute extract fetch fill find finish flush format "
    "generate get give handle implement indicate initialize insert invoke iterate join list load look make map mark "
    "merge move open parse pop print process produce provide push put raise read receive record register release "
    "remove rename replace report reset resolve retrieve return run save scan search select send set show split start "
    "stop store strip take test tell transform turn update use validate wait walk wrap write yield"
)
VERBS = set(VERBS.split())


def third_person(sentence):
    """Turns "Return the size" into "returns the size"; None where the first word is not a verb we
    know.
    """
    verb, _, rest = sentence.partition(" ")
    verb = verb.lower()
    if verb in VERBS:
        verb += "es" if verb.endswith(("ch", "sh", "ss", "o", "x")) else "s"
        verb = verb[:-2] + "ies" if verb.endswith("ys") and verb[-3] not in "aeiou" else verb
    elif verb[:-1] not in VERBS and verb[:-2] not in VERBS:
        return None
    return f"{verb} {rest}"


def names(items, limit=4):
    """Turns ["a", "b", "c"] into "`a`, `b` and `c`"."""
    quoted = [f"`{item}`" for item in items[:limit]]
    return " and ".join([", ".join(quoted[:-1]), quoted[-1]] if len(quoted) > 1 else quoted)


def count(items, noun):
    """How many there are, in words: "two parameters"."""
    words = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    number = words[len(items)] if len(items) < 10 else "many"
    return f"{number} {noun}" + ("" if len(items) == 1 else "s")


def fenced(source):
    """The source as a code block of Markdown."""
    return f"```python\n{source}\n```"
