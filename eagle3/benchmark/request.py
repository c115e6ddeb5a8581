"""What a benchmark is asked for and measures, whatever answers."""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from eagle3.benchmark.statistics import Trial
from eagle3.benchmark.suites import MORE_STEPS, SETUPS, SUITES, Setup, parse_suite
from eagle3.config import Data, OneOf, Within, nearest
from eagle3.data.chat import Chat
from eagle3.data.prepare import Prepared
from eagle3.data.sources import names_data
from eagle3.decode.tree import check_tree
from eagle3.draft.model import DraftConfig
from eagle3.engines.engine import Answer, Drafting
from eagle3.errors import ConfigError
from eagle3.target.handle import TargetHandle
from eagle3.target.spec import TargetSpec


@dataclass
class Subject:
    """A draft and its target, to be measured or checked, the latter also without a chat."""

    draft_folder: Path
    target: TargetHandle
    chat: Chat | None
    data: Data
    cache_dir: str
    seed: int
    prepared: Prepared | None = None


@dataclass(kw_only=True)
class Request:
    """The keys that every file of conf/benchmark has; its subclasses answer."""

    configs: list[list[int]]  # [batch, steps, topk, verify_tokens]; steps 0 is the target alone
    suites: list[str]
    protocol: Annotated[str, OneOf(tuple(SETUPS))]
    max_new_tokens: Annotated[int | None, Within(2, 1 << 20)]
    temperature: Annotated[float, Within(0, 100)]
    system_prompt: str | None
    paths: dict[str, str]
    execute_code: bool
    execute_code_unconfined: bool

    in_process: ClassVar[bool]  # all configs can then be open side by side
    count = int  # hears of new tokens as they come

    def __post_init__(self):
        self.configs = [in_steps(config, self.protocol) for config in self.configs]

    @classmethod
    def check_settings(cls, section: dict[str, Any]) -> None:
        """Raise ConfigError where the section `benchmark` asks for what is not installed."""

    def check_draft(self, folder: Path, target: TargetSpec) -> None:
        """Raise RunError where `start` could not use the draft in a folder."""

    def start(self, subject: Subject, run_dir: Path) -> dict[str, Any]:
        """Returns facts for benchmark.json; logs go to `run_dir`. Raises ConfigError, RunError."""

    def open(self, config: list[int]) -> None:
        """Get ready for questions under `config`; steps 0 is the target alone."""

    def answer(self, config: list[int], prompts: list[list[int]], setup: Setup) -> list[Answer]:
        """One answer per prompt, in order, `batch` at a time; each ends as `setup` says."""

    def choice_of_drafts(self, drafting: Drafting) -> str | None:
        """How it drafts: `greedy`, the likeliest tokens, or `sampled`; None where nobody knows."""
        return "sampled" if self.temperature > 0 and drafting[1] == 1 else "greedy"

    def extra_columns(self, drafted: list[Trial], baseline: list[Trial], steps: int) -> dict:
        """More values of a row of benchmark.json."""
        return {}

    def close(self) -> None:
        """End what was started."""


def check_shape(configs: list[list[int]], shape: DraftConfig) -> None:
    """Raise ConfigError for the first of `benchmark.configs` that no such draft can draft."""
    for config in configs:
        tree = config[1:]
        try:
            if tree != [0, 0, 0]:
                check_tree(*tree, shape.draft_vocab_size, shape.most_drafts)
        except ConfigError as error:
            raise ConfigError(f"benchmark.configs={config}: {error}") from error


def check_request(section: dict[str, Any]) -> None:
    """Raise ConfigError for the first value in the section `benchmark` that nothing could run."""
    suites = section["suites"]
    if not suites or not section["configs"]:
        raise ConfigError("benchmark.suites or benchmark.configs is empty; name at least one each")
    for config in section["configs"]:
        can_run = False
        with suppress(ConfigError, TypeError, ValueError):  # the others: it isn't four numbers
            batch, *tree = in_steps(config, section["protocol"])
            if tree != [0, 0, 0]:
                check_tree(*tree)
            can_run = batch >= 1
        if not can_run:
            known = "[batch, 0, 0, 0], [batch, steps, 1, steps + 1] or [batch, steps, topk, nodes]"
            raise ConfigError(f"benchmark.configs={config} must be {known}")
    if len({parse_suite(suite)[0] for suite in suites}) < len(suites):
        raise ConfigError(f"benchmark.suites={suites} names a suite twice; name each once")
    # A protocol is a promise of comparable numbers, which another system prompt would break.
    protocol, system_prompt = section["protocol"], section["system_prompt"]
    if system_prompt is not None and protocol != "chat":
        problem = f"benchmark.system_prompt={system_prompt} does not go with benchmark.protocol"
        raise ConfigError(f"{problem}={protocol}, which sets its own; leave one of them out")
    for name, path in section["paths"].items():
        if name not in SUITES:
            allowed = ", ".join(SUITES) + nearest(name, SUITES)
            raise ConfigError(f"benchmark.paths.{name} is no suite; allowed: {allowed}")
        if not os.path.exists(path):
            raise ConfigError(f"benchmark.paths.{name}={path} does not exist; give a local file")


def in_steps(config: list[int], protocol: str) -> list[int]:
    """[batch, steps, topk, verify_tokens] of a config in the numbers of its protocol."""
    batch, steps, topk, verify_tokens = config
    return [batch, steps + MORE_STEPS.get(protocol, 0) * (topk > 1), topk, verify_tokens]


def asks_heldout(section: dict[str, Any], data: Data) -> bool:
    """Whether the section `benchmark` asks the prompts that `prepare` holds out of `data`."""
    suites = [parse_suite(suite)[0] for suite in section["suites"]]
    return "heldout" in suites and "heldout" not in section["paths"] and names_data(data)
