"""Named chat templates (`data.chat_template=llama3`) for tokenizers with none or the wrong one.

They render what the released models' own do, but without a default system prompt (that is
`data.system_prompt`), mark with `{% generation %}` what the model writes in a turn, and name
special tokens literally, which a tokenizer without a template often lacks too.
"""

from pathlib import Path

from eagle3.config import nearest
from eagle3.errors import ConfigError

FOLDER = Path(__file__).parent
# Llama 2's is of its release, with the two spaces that EAGLE's and SpecForge's copies have.
SYSTEM_PROMPTS = {p.stem: p.read_text("utf-8").strip() for p in FOLDER.glob("*.txt")}
# These render alike once Qwen2.5's default system prompt is left out.
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
