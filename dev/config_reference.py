"""Writes docs/config.md, the reference of all keys: `python dev/config_reference.py`.

Keys, defaults and meanings are read from conf/, where each key has a comment beside or above it;
what a key may be is read from the parameter that it is for.
"""

import inspect
import re
import sys
import typing
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from hydra.utils import get_object

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from eagle3.checks import bounds  # noqa: E402
from eagle3.config import RunConfig  # noqa: E402

CONF = ROOT / "conf"
LINE = re.compile(r"^( *)(\w+):(?: +(.*?))?(?: +# (.*))?$")
NO_KEYS = ("defaults", "hydra", "_target_", "_partial_", "_convert_")
HEAD = """# Every key of the config

Made by `python dev/config_reference.py` from the comments in `conf/` and the bounds in the code.
A key is set on the command line as `key=value`, an option of a group as `group=option`;
`python run.py --cfg job` prints what a command line comes to. `???` must be given.
"""


def entries(path: Path) -> list[tuple[str, str, str]]:
    """(key, default, meaning) of each line of a YAML file that sets one, keys dotted."""
    found, above, parents = [], [], []
    for line in path.read_text().splitlines():
        matched = LINE.match(line)
        if line.startswith("#"):
            above.append(line.lstrip("# "))
        if not matched:
            above = above if line.startswith("#") else []
            continue
        indent, name, value, meaning = matched.groups()
        parents = [*parents[: len(indent) // 2], name]
        if parents[0] not in NO_KEYS and name not in NO_KEYS:
            found.append((".".join(parents), value or "", meaning or " ".join(above)))
        above = []
    return found


def heading(path: Path) -> str:
    """What a file says of itself in the comment it begins with."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    return " ".join(line for line in lines if not line.startswith("@package"))


def hint_of(owner: Any, key: str) -> Any:
    """The annotation of the field that a dotted key names, below a dataclass."""
    for name in key.split("."):
        if not is_dataclass(owner):
            return Any
        owner = typing.get_type_hints(owner, include_extras=True).get(name, Any)
    return owner


def parameter_hints(path: Path) -> dict[str, Any]:
    """Annotations of what the `_target_` of a file takes; of a file without one, none."""
    named = re.search(r"^_target_: (\S+)", path.read_text(), re.MULTILINE)
    if named is None:
        return {}
    called = get_object(named[1])
    function = called.__init__ if inspect.isclass(called) else called
    return typing.get_type_hints(function, include_extras=True)


def table(rows: list[tuple[str, str, str, Any]]) -> str:
    lines = ["| key | default | may be | meaning |", "|---|---|---|---|"]
    for key, default, meaning, hint in rows:
        allowed = ", ".join(str(bound).removeprefix("one of ") for bound in bounds(hint))
        cells = (f"`{key}`", f"`{default}`", allowed, meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def root_tables() -> dict[str, str]:
    """Section -> its table, of what conf/run.yaml sets; the section "" has the root's own keys."""
    rows: dict[str, list] = {}
    sections = {key.split(".")[0] for key, _, _ in entries(CONF / "run.yaml") if "." in key}
    for key, default, meaning in entries(CONF / "run.yaml"):
        if key not in sections:
            name = key.split(".")[0] if "." in key else ""
            rows.setdefault(name, []).append((key, default, meaning, hint_of(RunConfig, key)))
    return {name: table(found) for name, found in rows.items()}


def group(folder: Path) -> str:
    """The options of a group, and the keys that each adds or gives another default."""
    key, text, meanings = str(folder.relative_to(CONF)), "", {}
    section = key.replace("/", ".")
    options = sorted(folder.glob("*.yaml"), key=lambda path: (not is_default(path), path.stem))
    for path in options:
        mark = " (default)" if is_default(path) else ""
        text += f"\n`{key}={path.stem}`{mark}: {heading(path)}\n"
        if key in ("experiment", "data", "model", "sweep") and path.stem != "hf":
            continue  # these name values of keys that stand elsewhere
        hints, rows = parameter_hints(path), []
        for name, default, meaning in entries(path):
            meaning = meaning or meanings.get(name, "")
            meanings[name] = meaning
            hint = hints.get(name, hint_of(RunConfig, f"{section}.{name}"))
            if default:
                rows.append((f"{section}.{name}", default, meaning, hint))
        text += "\n" + table(rows) if rows else ""
    return text


def is_default(path: Path) -> bool:
    chosen = rf"^  - {path.parent.relative_to(CONF)}: {re.escape(path.stem)}\b"
    return re.search(chosen, (CONF / "run.yaml").read_text(), re.MULTILINE) is not None


def reference() -> str:
    """The text of docs/config.md."""
    tables = root_tables()
    text = f"{HEAD}\n{tables.pop('')}"
    folders = sorted({path.parent for path in CONF.glob("*/**/*.yaml")})
    groups = {str(folder.relative_to(CONF)): group(folder) for folder in folders}
    for name in sorted(tables | groups):
        text += f"\n## {name}\n"
        text += groups.get(name, "")
        text += "\n" + tables[name] if name in tables else ""
    return text


if __name__ == "__main__":
    (ROOT / "docs" / "config.md").write_text(reference())
