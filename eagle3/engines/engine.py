"""What the descriptions of all engines have in common, and what they are given and give back.

An engine is described once, by a subclass of `Engine`: its flags, request bodies and replies stand
nowhere else.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import httpx

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


class Engine(ABC):
    """An inference engine whose server answers over HTTP.

    `packages`: names under which pip may know it; `versions`: those it was tested with, and later
    ones that should do.
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

    @abstractmethod
    def benchmark_command(
        self, launch: Launch, draft: str, drafting: Drafting, batch: int, seed: int
    ) -> list[str]:
        """A server that reports what each request took and accepted, and caches no prompt.

        A cached prompt would cost nothing when the next batch asks it again.
        """

    @abstractmethod
    def serve_command(
        self, target: str, draft: str | None, draft_length: int, port: int | None, more: list[str]
    ) -> list[list[str]]:
        """What a user types to serve a draft with its target, as chains; one list per line.

        `draft` None: the served model names its draft itself. `more` arguments come last.
        """

    @abstractmethod
    def request_body(
        self, prompt: list[int], max_new_tokens: int, stop: tuple[str, ...], temperature: float
    ) -> dict[str, Any]:
        """The JSON posted to `generate_path`.

        Nothing but the temperature shapes the distribution, whatever generation_config.json
        recommends.
        """

    @abstractmethod
    def read_reply(self, reply: dict[str, Any], steps: int) -> Answer:
        """The answer in a reply. Raises RunError where it lacks the counters of the request."""

    @abstractmethod
    def read_drafting(self, get: Callable[[str], httpx.Response]) -> Drafting:
        """How a running server drafts, asked by `get(path)`. Raises RunError where it is none."""


def command_line(options: dict[str, Any]) -> list[str]:
    """Flags and their values as words; those that are None or False are left out, True is bare."""
    words: list[str] = []
    for flag, value in options.items():
        if value is True:
            words.append(flag)
        elif value is not None and value is not False:
            words += [flag, str(value)]
    return words
