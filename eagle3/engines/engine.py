"""What all descriptions of engines have in common, and what they are given and give back."""

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from eagle3.engines.server import find_package

Drafting = tuple[int, int, int]
"""(steps, topk, verify_tokens); (0, 0, 0) is the target alone."""


class ServedModel(Protocol):
    """The model of a server; `eagle3.target.spec.TargetSpec` is one."""

    path: str
    dtype: str
    revision: str | None
    trust_remote_code: bool


@dataclass(frozen=True)
class Launch:
    """How a server is started, whatever it is for. `server_args` go to it as they are."""

    model: ServedModel
    python: str
    port: int
    tp_size: int = 1
    mem_fraction_static: float | None = None
    server_args: tuple[str, ...] = ()


@dataclass
class Answer:
    """What a target answered to one prompt, with a draft or without.

    `ids` [n] are the new tokens. `rounds` verification rounds committed all of them but the first,
    which comes from the prefill. `accepted_at[k-1]` counts the rounds in which the draft at
    position k was accepted; None where the engine does not report it. `seconds` is this request's
    decoding where known, else the whole request. `emitted` has the tokens of every round, where the
    engine reports them.
    """

    ids: list[int]
    rounds: int
    accepted_at: list[int] | None
    seconds: float
    text: str
    emitted: list[int] | None = None


class Engine:
    """An inference engine with an HTTP server; `eagle3.engines.sglang` shows the methods it needs.

    `packages` are the names that pip may know it by.
    """

    name: ClassVar[str]
    packages: ClassVar[tuple[str, ...]]
    versions: ClassVar[str]
    health_path: ClassVar[str] = "/health"
    generate_path: ClassVar[str]
    drafts_trees: ClassVar[bool]
    reads_speculators: ClassVar[bool]

    def find(self, python: str, key: str) -> str:
        """Its version in this interpreter. Raises ConfigError, naming `key`, where it has none."""
        return find_package(python, self.packages, self.versions, key)


def command_line(options: dict[str, Any]) -> list[str]:
    """Flags and their values as words; those that are None or False are left out, True is bare."""
    words: list[str] = []
    for flag, value in options.items():
        if value is True:
            words.append(flag)
        elif value is not None and value is not False:
            words += [flag, str(value)]
    return words
