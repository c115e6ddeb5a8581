"""Named chat templates (`data.chat_template=llama3`) for tokenizers that have none or the wrong
one.

Each marks with `{% generation %}` what the model itself writes in a turn. Special tokens stand
literally in the files, as a tokenizer without a template often lacks them too. The texts are what
the released models' own templates render, except that no default system prompt is put in (that is
`data.system_prompt`); a file that differs says why on top.
"""

from pathlib import Path

from eagle3.config import nearest
from eagle3.errors import ConfigError

FOLDER = Path(__file__).parent
# Qwen2.5 and the Qwen3 Instruct-2507 models render alike once Qwen2.5's default system prompt is
# left out.
ALIASES = {"qwen3-instruct": "qwen"}


def names() -> list[str]:
    """The names `data.chat_template` takes besides `auto`, sorted."""
    return sorted([*(path.stem for path in FOLDER.glob("*.jinja")), *ALIASES])


def read(name: str) -> str:
    """The Jinja text of a named template; raises ConfigError."""
    if name not in names():
        allowed = ", ".join(["auto", *names()])
        raise ConfigError(f"data.chat_template={name} is none of {allowed}{nearest(name, names())}")
    return (FOLDER / f"{ALIASES.get(name, name)}.jinja").read_text(encoding="utf-8")
