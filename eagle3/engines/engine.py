"""What all descriptions of engines have in common, and what they are given and give back."""

import subprocess
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar

from packaging.specifiers import SpecifierSet

from eagle3.engines.server import program
from eagle3.errors import ConfigError

Drafting = tuple[int, int, int]  # steps, topk, verify_tokens; (0, 0, 0) is the target alone
# Nothing but the temperature shapes the distribution, whatever generation_config.json recommends.
UNSHAPED = {"top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}


@dataclass(frozen=True)
class Launch:
    """How a server of `model`, a TargetSpec, is started, whatever it is for."""

    model: Any
    python: str
    port: int
    tp_size: int = 1
    mem_fraction_static: float | None = None
    server_args: tuple[str, ...] = ()


@dataclass
class Answer:
    """The new tokens of one prompt, all but the first committed by `rounds` of drafting."""

    ids: list[int]
    rounds: int
    accepted_at: list[int]  # [k-1]: rounds in which the draft at position k was accepted
    seconds: float  # of this request's decoding
    text: str
    emitted: list[int] | None = None  # the tokens of every round, where that is reported
    truncated: bool = False  # it reached the most tokens that it may have


def answer_of_rounds(
    ids: list[int], text: str, accepted: list[int], steps: int, seconds: float, truncated=False
) -> Answer:
    """An answer by what each round `accepted`; what lies behind the end of `ids` does not count."""
    emitted: list[int] = []
    left = len(ids) - 1
    for count in accepted:
        if left > 0:
            emitted.append(min(count + 1, left))
            left -= emitted[-1]
    inside = [min(pair) for pair in zip(accepted, emitted, strict=False)]
    accepted_at = [sum(count >= position for count in inside) for position in range(1, steps + 1)]
    # Engines stop drafting close to the end of the context: a token a round.
    emitted += [1] * left
    return Answer(ids, len(emitted), accepted_at, seconds, text, emitted, truncated)


def is_loop(ids: list[int]) -> bool:
    """Whether a block of <= 48 tokens comes three times in a row, over >= 24 tokens in all."""
    for period in range(1, 49):
        # As many tokens in a row equal the one a period before.
        needed, found = max(2 * period, 24 - period), 0
        for before, token in zip(ids, ids[period:], strict=False):
            found = found + 1 if token == before else 0
            if found == needed:
                return True
    return False


class Engine:
    """An engine with an HTTP server, `module`; `eagle3.engines.sglang` shows what it needs."""

    name: ClassVar[str]
    packages: ClassVar[tuple[str, ...]]  # for pip
    versions: ClassVar[str]
    module: ClassVar[str]
    launch_flags: ClassVar[tuple[str, str, str]]  # model, number of GPUs, share of their memory
    generate_path: ClassVar[str]
    drafts_trees: ClassVar[bool]
    reads_speculators: ClassVar[bool]

    def find(self, python: str, key: str) -> str:
        """Its version in `python`, which `key` chooses. Raises ConfigError but for `versions`."""
        name, found = self.packages[0], ""
        for package in self.packages:
            code = f"from importlib.metadata import version; print(version({package!r}))"
            with suppress(OSError, subprocess.TimeoutExpired):
                answer = subprocess.run([python, "-c", code], capture_output=True, timeout=60)
                found = found or answer.stdout.decode().strip()
        if not found:
            remedy = f"run launch/engines.sh and set {key}=<environment>/bin/python"
            raise ConfigError(f"{name} is not installed for {python}: {remedy}")
        # Flags and counters change between versions, and a counter read wrongly is a wrong number.
        if not SpecifierSet(self.versions).contains(found, prereleases=True):
            raise ConfigError(f"{name} {found} of {python} is not one we know ({self.versions})")
        return found

    def server_command(self, launch: Launch, options: dict[str, Any]) -> list[str]:
        """What starts the server; the flags named here are spelled alike by all engines."""
        model = launch.model
        values = model.path, launch.tp_size, launch.mem_fraction_static
        flags = dict(zip(self.launch_flags, values, strict=True))
        flags |= {"--revision": model.revision, "--dtype": model.dtype}
        flags |= {"--trust-remote-code": model.trust_remote_code, "--host": "127.0.0.1"}
        words = command_line(flags | {"--port": launch.port} | options)
        return [launch.python, "-m", self.module, *words, *launch.server_args]

    def serve_command(
        self, target: str, draft: str | None, method: str, length: int
    ) -> list[list[str]]:
        """What a user types to serve chains, a list per line; `draft` None: `target` names it."""
        drafting = self.draft_options(draft, method, (length, 1, length + 1)) if draft else {}
        start = [program(self.name.lower(), "python"), "-m", self.module]
        flags = {self.launch_flags[0]: target} | drafting
        return [start, *([flag, str(value)] for flag, value in flags.items())]


def command_line(options: dict[str, Any]) -> list[str]:
    """Flags and their values as words: None and False are left out, True is bare, lists go on."""
    words: list[str] = []
    for flag, value in options.items():
        if value is not None and value is not False:
            values = value if isinstance(value, list) else [value]
            words += [flag, *(str(each) for each in values if each is not True)]
    return words
