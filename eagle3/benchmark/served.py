"""`benchmark=sglang` and `vllm`: a stock server, one at a time, started or given by its address."""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import httpx

from eagle3.benchmark.request import Request, Subject, check_shape
from eagle3.benchmark.suites import Setup
from eagle3.config import Within, instantiate
from eagle3.draft.model import DraftConfig
from eagle3.engines.engine import UNSHAPED, Answer, Drafting, Engine, Launch
from eagle3.engines.server import Server, choose_port, interpreter
from eagle3.errors import ConfigError, RunError
from eagle3.export import rules
from eagle3.export.read import read_any
from eagle3.runs.logger import redact
from eagle3.target.spec import TargetSpec

DEATH_SECONDS = 5.0  # a process ends a while after its connections, and then its log says why


@dataclass(kw_only=True)
class Served(Request):
    """The keys of conf/benchmark/sglang.yaml; where `url` or `alone_url` is None, servers start."""

    engine: Engine
    url: str | None
    alone_url: str | None
    python: str | None
    port: Annotated[int | None, Within(0, 65535)]
    tp_size: Annotated[int, Within(1, 1024)]
    mem_fraction_static: Annotated[float | None, Within(0.01, 1)]
    server_args: list[str]
    ready_seconds: Annotated[float, Within(1, 1e6)]
    timeout: Annotated[float, Within(1, 1e6)]

    in_process: ClassVar[bool] = False
    server = drafting = None  # the server that was started, and how it drafts

    def __post_init__(self):
        super().__post_init__()
        self.python = interpreter(self.engine.name.lower(), self.python)

    @classmethod
    def check_settings(cls, section: dict[str, Any]) -> None:
        request = instantiate(section)
        trees = [config for config in request.configs if config[2] > 1]
        if trees and not request.engine.drafts_trees:
            problem = f"benchmark.configs={trees[0]} is a tree"
            raise ConfigError(f"{problem}, which needs benchmark=sglang or benchmark=builtin")
        request.find_engine()

    def find_engine(self) -> str | None:
        """Its version; None where no server is started. Raises ConfigError where it is missing."""
        given = self.url and self.alone_url
        return None if given else self.engine.find(self.python, "benchmark.python")

    def check_draft(self, folder: Path, target: TargetSpec) -> DraftConfig:
        """The draft's shape. RunError unless the engine reads it, and it is of this target."""
        files, engine = read_any(folder), self.engine
        if files.is_speculators and not engine.reads_speculators:
            raise RunError(f"draft at {folder} has the form speculators, unknown to {engine.name}")
        form = rules.FORMS[type(files.shape)](files, target)
        # Not all rules: what only draws down acceptance is measured, and `check` says why.
        for finding in (*rules.shape(files, target), *([] if files.is_speculators else form)):
            if finding.severity == "wrong" and engine.name.lower() in finding.engines:
                raise RunError(f"draft at {folder}: {finding.sentence}")
        check_shape(self.configs, files.shape)
        return files.shape

    def start(self, subject: Subject, run_dir: Path) -> dict[str, Any]:
        """Free the target's memory for the engine, which has the GPU to itself."""
        self.shape = self.check_draft(subject.draft_folder, subject.target.spec)
        facts = {"runner": self.engine.name.lower(), "version": self.find_engine()}
        facts |= {key: getattr(self, key) for key in ("tp_size", "server_args", "url", "alone_url")}
        facts["dtype"] = subject.target.spec.dtype
        if self.url:
            facts["device"] = None  # the server's machine may be another one
        subject.target.close()
        self.subject, self.run_dir = subject, run_dir
        return redact(facts)

    def open(self, config: list[int]) -> None:
        drafting = tuple(config[1:])
        url = self.url if config[1] else self.alone_url
        if url is None:
            if self.server is None or self.drafting != drafting:
                self.close()
                self.server, self.drafting = self.start_server(drafting), drafting
            self.address = self.server.url
            return
        # The address is often copied from a client of the OpenAI API, which wants /v1 behind it.
        self.address = url.rstrip("/").removesuffix("/v1")
        actual = self.engine.read_drafting(self.get, self.shape.method)
        if actual != drafting:
            problem = f"{url} drafts with [steps, topk, verify_tokens] = {list(actual)}"
            raise ConfigError(f"benchmark.configs={config}: {problem}; set benchmark.configs to it")

    def start_server(self, drafting: Drafting) -> Server:
        engine, subject, port = self.engine, self.subject, choose_port(self.port, "benchmark.port")
        more = self.tp_size, self.mem_fraction_static, tuple(self.server_args)
        launch = Launch(subject.target.spec, self.python, port, *more)
        options: dict[str, Any] = {}
        if drafting[0]:
            sampled = self.choice_of_drafts(drafting) == "sampled"
            given = str(subject.draft_folder), self.shape.method, drafting
            options = engine.draft_options(*given, sampled)
        # Room for the largest batch, so that the server can stay for all of them.
        batch = max(config[0] for config in self.configs)
        command = engine.benchmark_command(launch, options, batch, subject.seed)
        log = self.run_dir / ("-".join(map(str, [engine.name.lower(), *drafting])) + ".log")
        url = f"http://127.0.0.1:{port}"
        return Server(command, url, {}, log, self.ready_seconds, engine.name).__enter__()

    def choice_of_drafts(self, drafting: Drafting) -> str | None:
        if self.url:
            return None  # whoever started it has decided
        method, whole = self.shape.method, self.shape.draft_vocab_size == self.shape.vocab_size
        sampled = self.engine.samples_drafts(method, drafting[1], whole)
        return "sampled" if self.temperature > 0 and sampled else "greedy"

    def close(self) -> None:
        if self.server is not None:
            self.server.close()
        self.server = None

    def get(self, path: str) -> httpx.Response:
        """Raises RunError where nobody answers; a refusal is an answer."""
        try:
            return httpx.get(self.address + path, timeout=30, trust_env=False)
        except httpx.HTTPError as error:
            raise RunError(f"no server answers at {self.address} ({error})") from error

    def answer(self, config: list[int], prompts: list[list[int]], setup: Setup) -> list[Answer]:
        sampling = UNSHAPED | {"temperature": self.temperature, "stop": list(setup.stop)}
        given = (setup.max_new_tokens, sampling)
        bodies = [self.engine.request_body(prompt, *given) for prompt in prompts]
        return asyncio.run(self.post_all(bodies, *config[:2]))

    async def post_all(self, bodies: list[dict[str, Any]], batch: int, steps: int) -> list[Answer]:
        # Always `batch` under way: the next question waits for a connection, however long.
        limits = httpx.Limits(max_connections=batch)
        timeout = httpx.Timeout(self.timeout, pool=None)
        async with httpx.AsyncClient(timeout=timeout, trust_env=False, limits=limits) as client:
            # The first error, or Ctrl-C, waits for none of the others: `asyncio.run` cancels them.
            return await asyncio.gather(*(self.post(client, body, steps) for body in bodies))

    async def post(self, client: httpx.AsyncClient, body: dict[str, Any], steps: int) -> Answer:
        reason = ""
        try:
            response = await client.post(self.address + self.engine.generate_path, json=body)
            reason = f"HTTP {response.status_code} {response.text[:300]}"
            if response.status_code == 200:
                answer = self.engine.read_reply(response.json(), steps)
                self.count(len(answer.ids))
                return answer
        except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
            reason = f"{type(error).__name__} {error} {reason}".strip()
        if self.server is not None:
            self.server.check(DEATH_SECONDS)
        limit = f"benchmark.timeout={self.timeout:g}"
        raise RunError(f"{self.address} gave no usable answer within {limit}: {reason}")
