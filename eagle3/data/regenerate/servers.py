"""OpenAI-compatible servers (SGLang, vLLM) of the target answer a dataset again.

They share the requests evenly. One failure rests a server, and PROBE then shows whether the server
or the row was at fault: rows are charged only with attempts at servers that were well.
"""

import asyncio
import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from eagle3.data.regenerate import turns
from eagle3.data.regenerate.journal import Journal
from eagle3.data.rows import Message, RowError
from eagle3.data.sources import Row
from eagle3.errors import ConfigError, RunError

FIRST_PAUSE = 0.5  # seconds; doubled with every failure in a row
LONGEST_PAUSE = 30.0
LONGEST_RETRY_AFTER = 600.0
PROBE = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 64}
ADDRESS = re.compile(r"https?://([^/@\s]+@)?([\w.-]+|\[[\da-fA-F:]+\])(:\d+)?(/\S*)?")
PASSWORD = re.compile("//[^/@]*@")
MESSAGE = re.compile(r'"(?:message|detail|error)": *"((?:[^"\\]|\\[^n])+)')


def server(
    run,
    rows: Iterator[Row],
    folder: Path,
    *,
    urls: list[str],
    model: str | None = None,
    api_key_env: str = "OPENAI_API_KEY",
    concurrency: int = 64,
    retries: int = 6,
    timeout: float = 600.0,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | None = None,
    extra_body: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write `conversations.jsonl` and `rejects.jsonl` into `folder`; returns the facts. Raises
    ConfigError, RunError.

    An interrupted call leaves a journal from which the next one goes on.
    """
    if not urls or not all(map(ADDRESS.fullmatch, urls)):
        named = PASSWORD.sub("//", str(urls))
        raise ConfigError(
            f"regenerate.urls={named} must name servers, such as [http://127.0.0.1:30000/v1]"
        )
    options = {"model": model, "max_tokens": max_new_tokens or run.config.data.max_length}
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    options |= {name: value for name, value in sampling.items() if value is not None} | (
        extra_body or {}
    )
    with Journal(folder) as journal:
        servers = [connect(url.rstrip("/"), os.environ.get(api_key_env), timeout) for url in urls]
        pool = Pool(servers, options, concurrency, retries, journal.say)
        try:
            if not journal.complete:
                asyncio.run(answer_rows(pool, journal, rows, run.config.data.system_prompt))
        except RunError as error:
            kept = f"{len(journal.offsets):,} rows are done and kept, and the same command goes on from there"
            raise RunError(f"{error}; {kept}") from error
        return journal.finish()


async def answer_rows(
    pool: "Pool", journal: Journal, rows: Iterator[Row], system_prompt: str | None
) -> None:
    """As many workers as requests may be in flight, each on one conversation, until `rows` is
    through.
    """
    waiting = enumerate(rows)

    async def work() -> None:
        for number, row in waiting:
            await asyncio.sleep(0)  # many rows without a request would keep Ctrl-C waiting
            if number not in journal.offsets:
                journal.write(number, row, await turns.converse(pool.complete, row, system_prompt))

    workers: list[asyncio.Task] = []
    try:
        pool.options["model"] = pool.options["model"] or await pool.only_model()
        workers += [
            asyncio.create_task(work()) for _ in range(pool.concurrency * len(pool.servers))
        ]
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        await asyncio.gather(*(server.client.aclose() for server in pool.servers))


@dataclass
class Server:
    """`url` has no password, for messages; `failures` counts those in a row; it is left alone until
    `rests_until`.
    """

    url: str
    client: httpx.AsyncClient
    in_flight: int = 0
    failures: int = 0
    rests_until: float = 0.0
    error: str = ""


class AttemptError(Exception):
    """An attempt that may go better next time, and not before `retry_after` seconds."""

    def __init__(self, kind: str, detail: str = "", retry_after: float = 0.0):
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind, self.retry_after = kind, retry_after


@dataclass
class Pool:
    """`complete` asks, with `options` in every request and `concurrency` of them at each server;
    `say` prints.
    """

    servers: list[Server]
    options: dict[str, Any]
    concurrency: int
    retries: int
    say: Callable[[str], None]
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def complete(self, messages: list[Message], counts: Counter[str]) -> Message:
        """The answer. Raises RowError when a server refuses it or after too many attempts, RunError
        when all fail.
        """
        failed = 0
        while True:
            server = await self.acquire()
            try:
                if server.failures and not await self.recovers(server):
                    continue
                answer, tokens = await ask(server, self.options | {"messages": messages})
                server.failures = 0
                counts["answer_tokens"] += tokens
                return answer
            except AttemptError as error:
                failed += 1
                if (
                    not server.failures
                ):  # else the request was under way when the server began to fail
                    self.rest(server, error)
                if failed > self.retries:
                    raise RowError(f"no answer after {failed} attempts: {error.kind}") from error
            finally:
                server.in_flight -= 1
                self.changed.set()
            counts["retries"] += 1
            await asyncio.sleep(pause(failed))

    async def acquire(self) -> Server:
        """The free server with the least in flight; one that failed gets one request only."""
        while True:
            ready = [s for s in self.servers if s.rests_until <= time.monotonic()]
            free = [s for s in ready if s.in_flight < (1 if s.failures else self.concurrency)]
            if free:
                server = min(free, key=lambda s: (s.in_flight, random.random()))
                server.in_flight += 1
                return server
            self.changed.clear()
            await self.changed.wait()

    def rest(self, server: Server, error: AttemptError) -> None:
        server.failures, server.error = server.failures + 1, str(error)
        if all(s.failures > self.retries for s in self.servers):
            raise RunError(f"no server answers any more ({self.errors()})") from error
        if server.failures == 2:
            self.say(f"regenerate: {server.url} fails ({error}); it is tried again now and then")
        seconds = max(pause(server.failures), error.retry_after)
        server.rests_until = time.monotonic() + seconds
        asyncio.get_running_loop().call_later(seconds + 0.001, self.changed.set)

    async def recovers(self, server: Server) -> bool:
        """Whether a server that failed answers PROBE; otherwise it rests again, for longer."""
        try:
            with suppress(RowError):  # a refusal is a sign of life too
                await ask(server, self.options | PROBE)
            server.failures = 0
            self.changed.set()
        except AttemptError as error:
            self.rest(server, error)
        return not server.failures

    async def only_model(self) -> str:
        """The one model that the servers list, asked until one of them answers. Raises RunError."""
        for attempt in range(self.retries + 1):
            await asyncio.sleep(pause(attempt))
            names = sorted(set().union(*await asyncio.gather(*map(models, self.servers))))
            if len(names) > 1:
                raise RunError(
                    f"the servers offer several models ({', '.join(names)}): name one in regenerate.model"
                )
            if names:
                return names[0]
        raise RunError(
            f"no server names its model ({self.errors()}): set regenerate.urls, or regenerate.model"
        )

    def errors(self) -> str:
        return "; ".join(f"{server.url}: {server.error}" for server in self.servers)


def connect(url: str, key: str | None, timeout: float) -> Server:
    """A server by its url; proxies of the environment are for other machines than this one."""
    client = httpx.AsyncClient(
        base_url=url,
        headers={"Authorization": f"Bearer {key}"} if key else {},
        timeout=httpx.Timeout(timeout, connect=min(30.0, timeout)),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        trust_env=httpx.URL(url).host not in ("localhost", "127.0.0.1", "::1", "0.0.0.0"),
    )
    return Server(PASSWORD.sub("//", url), client)


def pause(failures: int) -> float:
    """Seconds to wait after `failures` in a row: exponential, with jitter."""
    return (
        min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (failures - 1)) * random.uniform(0.75, 1.25)
        if failures
        else 0.0
    )


async def models(server: Server) -> list[str]:
    """What a server lists; nothing while it cannot be asked. Raises RunError."""
    server.error = "it lists no model"
    try:
        with suppress(ValueError, LookupError, TypeError):
            return [model["id"] for model in (await send(server, "GET", "models")).json()["data"]]
    except AttemptError as error:
        server.error = str(error)
    return []


async def ask(server: Server, body: dict[str, Any]) -> tuple[Message, int]:
    """The answer and its tokens in a chat completion. Raises what `send` raises."""
    response = await send(server, "POST", "chat/completions", body)
    try:
        reply = response.json()
        choice, usage = reply["choices"][0], reply.get("usage") or {}
        message, end, tokens = (
            choice["message"],
            choice.get("finish_reason"),
            int(usage.get("completion_tokens") or 0),
        )
        reasoning = message.get("reasoning_content") or message.get("reasoning")
        if end in ("abort", "error", "content_filter"):
            raise AttemptError(f"finish reason {end}")
        return turns.answer(message.get("content"), reasoning, truncated=end == "length"), tokens
    except RowError as error:
        raise AttemptError(str(error)) from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise AttemptError("malformed reply", said(response)) from error


async def send(
    server: Server, method: str, path: str, body: dict[str, Any] | None = None
) -> httpx.Response:
    """One attempt. Raises AttemptError, RowError (the request is refused) or RunError (every one
    would be).
    """
    try:
        response = await server.client.request(method, path, json=body)
    except httpx.RequestError as error:
        kind = "timed out" if isinstance(error, httpx.TimeoutException) else "connection failed"
        raise AttemptError(kind, str(error)) from error
    status, words = response.status_code, said(response)
    if status in (408, 409, 425, 429) or status >= 500:
        wait = response.headers.get("Retry-After", "")
        seconds = (
            min(float(wait), LONGEST_RETRY_AFTER) if re.fullmatch(r"\d+(\.\d+)?", wait) else 0.0
        )
        raise AttemptError(f"HTTP {status}", words, seconds)
    if status in (401, 403):
        remedy = "set the right one in the environment variable that regenerate.api_key_env names"
        raise RunError(f"{server.url} refuses the key (HTTP {status}: {words}): {remedy}")
    if status == 404 or 300 <= status < 400:
        remedy = "check regenerate.model, and regenerate.urls, which usually end in /v1"
        raise RunError(
            f"{server.url} has no such model or address (HTTP {status}: {words}): {remedy}"
        )
    if status >= 400:
        raise RowError(f"HTTP {status}: {re.sub('[0-9]+', 'N', words)}")
    return response


def said(response: httpx.Response) -> str:
    """The server's message: its first line, at most 120 characters, without the key that was sent."""
    key = response.request.headers.get("Authorization", "").removeprefix("Bearer ")
    text = response.text.replace(key, "<key>") if key else response.text
    message = MESSAGE.search(text)
    return (message[1] if message else text.strip()).partition("\n")[0][:120]
