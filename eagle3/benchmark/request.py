"""What a benchmark is asked for and measures, whatever answers."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from eagle3.benchmark.protocols import SETUPS, Setup
from eagle3.benchmark.statistics import Trial
from eagle3.benchmark.suites import SUITES, parse_suite
from eagle3.config import Data, Within, nearest
from eagle3.data.chat import Chat
from eagle3.data.prepare import Prepared
from eagle3.engines.engine import Answer
from eagle3.errors import ConfigError
from eagle3.target.handle import TargetHandle


@dataclass
class Subject:
    """What is measured, and what the run's data has for it.

    `heldout` is the file of prompts in the prepared data, `prepared` its documents; both are None
    where no suite needs them. Sampling and intervals depend on `seed`.
    """

    draft_folder: Path
    target: TargetHandle
    chat: Chat
    data: Data
    cache_dir: str
    seed: int
    heldout: Path | None = None
    prepared: Prepared | None = None


@dataclass(kw_only=True)
class Request:
    """The keys that every file of conf/benchmark has; its subclasses answer.

    `configs` are [batch, steps, topk, verify_tokens], and [batch, 0, 0, 0] the target alone.
    `max_new_tokens` and `system_prompt` None: those of the protocol. `paths` are local files of
    suites. `execute_code`: score humaneval by running what the model wrote.
    """

    configs: list[list[int]]
    suites: list[str]
    protocol: str
    max_new_tokens: Annotated[int | None, Within(2, 1 << 20)]
    temperature: Annotated[float, Within(0, 100)]
    system_prompt: str | None
    paths: dict[str, str]
    execute_code: bool

    # It decodes with the target of this process, so that all configs can be open side by side.
    in_process: ClassVar[bool]

    @classmethod
    def check_settings(cls, section: dict[str, Any]) -> None:
        """Raise ConfigError where the section `benchmark` asks for what is not installed."""

    def start(self, subject: Subject, run_dir: Path) -> dict[str, Any]:
        """Called first; returns facts for benchmark.json. Logs go to `run_dir`.

        Raises ConfigError and RunError.
        """
        raise NotImplementedError

    def open(self, config: list[int]) -> None:
        """Get ready for questions under `config`; steps 0 is the target alone."""

    def answer(self, config: list[int], prompts: list[list[int]], setup: Setup) -> list[Answer]:
        """One answer per prompt, in order, `batch` at a time; each ends as `setup` says."""
        raise NotImplementedError

    def extra_columns(self, drafted: list[Trial], baseline: list[Trial], steps: int) -> dict:
        """More values of a row of benchmark.json."""
        return {}

    def close(self) -> None:
        """End what was started."""


def check_request(section: dict[str, Any]) -> None:
    """Raise ConfigError for the first value in the section `benchmark` that nothing could run."""
    if not section["suites"] or not section["configs"]:
        raise ConfigError("benchmark.suites or benchmark.configs is empty; name at least one each")
    for config in section["configs"]:
        check_config(config)
    suites = section["suites"]
    if len({parse_suite(suite)[0] for suite in suites}) < len(suites):
        raise ConfigError(f"benchmark.suites={suites} names a suite twice; name each once")
    # A protocol is a promise of comparable numbers, which another system prompt would break.
    protocol, system_prompt = section["protocol"], section["system_prompt"]
    if protocol not in SETUPS:
        allowed = f"{', '.join(SETUPS)}{nearest(protocol, list(SETUPS))}"
        raise ConfigError(f"benchmark.protocol={protocol} is unknown; allowed: {allowed}")
    if system_prompt is not None and protocol != "chat":
        problem = f"benchmark.system_prompt={system_prompt} does not go with benchmark.protocol"
        raise ConfigError(f"{problem}={protocol}, which sets its own; leave one of them out")
    for name, path in section["paths"].items():
        if name not in SUITES:
            raise ConfigError(f"benchmark.paths.{name} is no suite; allowed: {', '.join(SUITES)}")
        if not os.path.exists(path):
            remedy = "give a local file or folder"
            raise ConfigError(f"benchmark.paths.{name}={path} does not exist; {remedy}")


def check_config(config: list[int]) -> None:
    if len(config) != 4 or not all(isinstance(number, int) for number in config):
        wanted = "must be four numbers: batch, steps, topk, verify_tokens"
        raise ConfigError(f"benchmark.configs={config} {wanted}")
    batch, steps, topk, verify_tokens = config
    # What a round drafts: topk children of the root, then of topk nodes at each further step.
    nodes = topk + (steps - 1) * topk * topk
    is_chain = steps >= 1 and topk == 1 and verify_tokens == steps + 1
    is_tree = steps >= 1 and topk > 1 and 2 <= verify_tokens <= nodes + 1
    if batch < 1 or not (is_chain or is_tree or config[1:] == [0, 0, 0]):
        raise ConfigError(
            f"benchmark.configs={config} is none of [batch, 0, 0, 0] (the target alone), "
            "[batch, steps, 1, steps + 1] (a chain) and [batch, steps, topk, verify_tokens] "
            f"(a tree, verify_tokens 2 to {max(nodes, 1) + 1})"
        )


def asks_heldout(section: dict[str, Any]) -> bool:
    """Whether the section `benchmark` asks the prompts that `prepare` holds out."""
    suites = [parse_suite(suite)[0] for suite in section["suites"]]
    return "heldout" in suites and "heldout" not in section["paths"]
