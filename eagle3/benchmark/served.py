"""Benchmarks of served targets: one server at a time, started for a config or given by its address.

Configs are [batch, steps, topk, verify_tokens]; the batch is how many requests are under way and
needs no server of its own.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from transformers import PretrainedConfig

from eagle3.benchmark import measure
from eagle3.benchmark.statistics import Answer
from eagle3.engines.server import Server, choose_port
from eagle3.errors import ConfigError, RunError
from eagle3.export.read import flatten, read_config
from eagle3.job import hardware
from eagle3.runs.logger import redact

DEATH_SECONDS = 5.0  # a process may end that long after its connections


@dataclass
class Dialect:
    """How one kind of server is spoken to.

    `body(prompt, max_new_tokens, stop)` is what is posted to `path`; `read(reply, steps)` an Answer
    from what comes back, raising RunError where it does not tell its rounds and seconds;
    `served(get)` the [steps, topk, verify_tokens] of a server that `get(path)` asks, raising
    RunError where it drafts in another way.
    """

    name: str
    path: str
    body: Callable[[list[int], int, tuple[str, ...]], dict[str, Any]]
    read: Callable[[dict[str, Any], int], Answer]
    served: Callable[[Callable[[str], httpx.Response]], list[int]]


class Servers:
    """An `Opener`: engines of the server that `command(port, [steps, topk, verify_tokens])` starts,
    or of given ones.

    A given `url` answers configs with a draft and `alone_url` those without. A server is kept while
    the next config needs the same one. Leaving the context ends it.
    """

    def __init__(
        self,
        dialect: Dialect,
        command: Callable[[int, list[int]], list[str]],
        url: str | None,
        alone_url: str | None,
        port: int | None,
        log_folder: Path,
        ready_seconds: float,
        timeout: float,
    ):
        self.dialect, self.command, self.url, self.alone_url = dialect, command, url, alone_url
        self.port, self.log_folder, self.ready_seconds, self.timeout = (
            port,
            log_folder,
            ready_seconds,
            timeout,
        )
        self.server: Server | None = None
        self.drafting: list[int] = []

    def __enter__(self) -> "Servers":
        return self

    def __exit__(self, *raised) -> None:
        self.close()

    def __call__(self, config: list[int]) -> "Client":
        batch, *drafting = config
        url = self.url if drafting[0] else self.alone_url
        if url is not None:
            url = url.rstrip("/").removesuffix("/v1")
            client = Client(self.dialect, url, None, batch, drafting[0], self.timeout)
            if (served := self.dialect.served(client.get)) != drafting:
                raise ConfigError(
                    f"benchmark.configs={config} is not what {url} serves, which drafts with [steps, topk, "
                    f"verify_tokens] = {served}; set benchmark.configs to that, or leave its address out"
                )
            return client
        if self.server is None or self.drafting != drafting:
            self.close()
            port = choose_port(self.port, "benchmark.port")
            name = "-".join(map(str, [self.dialect.name.lower(), *drafting]))
            self.server = Server(
                self.command(port, drafting),
                f"http://127.0.0.1:{port}",
                {},
                self.log_folder / f"{name}.log",
                self.ready_seconds,
                "/health",
                self.dialect.name,
            ).__enter__()
            self.drafting = drafting
        return Client(self.dialect, self.server.url, self.server, batch, drafting[0], self.timeout)

    def close(self) -> None:
        server, self.server = self.server, None
        if server is not None:
            server.close()


@dataclass
class Client:
    """An `Engine`: `batch` requests under way at the server at `url`, each answered within
    `timeout` seconds.
    """

    dialect: Dialect
    url: str
    server: Server | None
    batch: int
    steps: int
    timeout: float

    def get(self, path: str) -> httpx.Response:
        """Raises RunError where nobody answers; a refusal is an answer."""
        try:
            return httpx.get(self.url + path, timeout=min(30.0, self.timeout), trust_env=False)
        except httpx.HTTPError as error:
            raise RunError(
                f"no server answers at {self.url}{path} ({error}); check its address"
            ) from error

    def answer(
        self, prompts: list[list[int]], max_new_tokens: int, stop: tuple[str, ...] = ()
    ) -> list[Answer]:
        return asyncio.run(self.answer_all(prompts, max_new_tokens, stop))

    async def answer_all(
        self, prompts: list[list[int]], max_new_tokens: int, stop: tuple[str, ...]
    ) -> list[Answer]:
        free = asyncio.Semaphore(self.batch)
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            timeout=self.timeout, trust_env=False, limits=limits
        ) as client:

            async def ask(prompt: list[int]) -> Answer:
                async with free:
                    return await self.ask(client, self.dialect.body(prompt, max_new_tokens, stop))

            tasks = [asyncio.ensure_future(ask(prompt)) for prompt in prompts]
            try:
                return await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()

    async def ask(self, client: httpx.AsyncClient, body: dict[str, Any]) -> Answer:
        try:
            response = await client.post(self.url + self.dialect.path, json=body)
        except httpx.TimeoutException as error:
            raise RunError(
                f"{self.url} gave no answer within {self.timeout:g} s: raise benchmark.timeout"
            ) from error
        except httpx.HTTPError as error:
            await self.explain()
            raise RunError(
                f"{self.url} broke off a request ({type(error).__name__}: {error})"
            ) from error
        if response.status_code >= 500:
            await self.explain()
        if response.status_code != 200:
            raise RunError(
                f"{self.url} refused a request (HTTP {response.status_code}): {response.text[:300]}"
            )
        try:
            return self.dialect.read(response.json(), self.steps)
        except (ValueError, LookupError, TypeError) as error:
            words = f"{type(error).__name__}: {error}"
            raise RunError(
                f"{self.url} answers in a form we do not know ({words}): {response.text[:300]}"
            ) from error

    async def explain(self) -> None:
        """Raises RunError with the server's last words if it ends about now."""
        for _ in range(int(DEATH_SECONDS / 0.2)) if self.server is not None else ():
            self.server.check()
            await asyncio.sleep(0.2)

    def close(self) -> None:
        """Nothing: the server is that of `Servers`."""


def run(
    job,
    servers: Servers,
    configs: list[list[int]],
    suites: list[str],
    max_new_tokens: int | None,
    temperature: float,
    system_prompt: str | None,
    protocol: str,
    execute_code: bool,
    paths: dict[str, str] | None,
    facts: dict[str, Any],
) -> dict:
    """`measure.run` with servers, which have the GPU to themselves and end with it."""
    known = {"url": servers.url, "alone_url": servers.alone_url, "dtype": job.target_dtype}
    known["device"] = None if servers.url else hardware(job.device)["name"]
    job.let_go_of_target()  # it would take memory that the engine needs
    asked = (
        configs,
        suites,
        max_new_tokens,
        temperature,
        system_prompt,
        protocol,
        execute_code,
        paths,
    )
    with servers:
        return measure.run(job, servers, *asked, redact(facts | known))


def check_draft(folder: Path, target: PretrainedConfig, engine: str, speculators: bool) -> None:
    """Raises RunError, before anything starts, unless `folder` has an EAGLE3 draft of this target.

    `speculators`: whether the engine reads that form of it.
    """
    given = read_config(folder)
    values, form = flatten(given), given.get("speculators_model_type")
    kind = [*(given.get("architectures") or []), form or ""]
    if not any("eagle3" in name.lower() for name in kind):
        raise RunError(
            f"draft at {folder} is no EAGLE3 draft: its config.json names the architectures {kind}"
        )
    if form and not speculators:
        raise RunError(
            f"draft at {folder} has the form of speculators, which {engine} does not read; give another one"
        )
    theirs = {
        "vocab_size": values.get("vocab_size"),
        "hidden_size": values.get("target_hidden_size") or values.get("hidden_size"),
    }
    for name, value in theirs.items():
        if value != getattr(target, name):
            raise RunError(
                f"draft at {folder} is for a target with {name}={value}, not {getattr(target, name)}"
            )
