"""OpenAI-compatible servers as one: requests shared evenly, repeated when they fail, failing servers rested."""

import asyncio
import random
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from eagle3.data.rows import Message, RowError
from eagle3.errors import RunError
from eagle3.regenerate import turns

FIRST_PAUSE = 0.5  # seconds; doubled with every failure in a row
LONGEST_PAUSE = 30.0
LONGEST_RETRY_AFTER = 600.0
LONGEST_CONNECT = 30.0
UNUSABLE_ENDS = ("abort", "error", "content_filter")
PROBE = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 64}


class AttemptError(Exception):
    """An attempt that may go better next time, and not before `retry_after` seconds."""

    def __init__(self, kind: str, detail: str = "", retry_after: float = 0.0):
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind, self.retry_after = kind, retry_after


@dataclass
class Server:
    """`url` is for messages, without a password; `failures` counts those in a row, `rests_until` is in seconds."""

    url: str
    client: httpx.AsyncClient
    in_flight: int = 0
    asked: int = 0
    failures: int = 0
    rests_until: float = 0.0
    error: str = ""


@dataclass
class Pool:
    """`complete` asks; `say` prints a line.

    One failure rests a server, and PROBE then shows whether the row or the server was at fault: a row is charged only
    with attempts at servers that were well, and all servers that fail `retries` times in a row end the stage.
    """

    servers: list[Server]
    concurrency: int
    retries: int
    say: Callable[[str], None]
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def complete(self, body: dict[str, Any], counts: Counter[str]) -> Message:
        """The answer; raises RowError when a server refuses the request or after too many attempts, or RunError."""
        failed = 0
        while True:
            server = await self.acquire()
            try:
                if server.failures and not await self.recovers(server, body):
                    continue
                answer, tokens = await ask(server, body)
                server.failures = 0
                counts["answer_tokens"] += tokens
                return answer
            except AttemptError as error:
                failed += 1
                if not server.failures:  # else it was under way when the server began to fail
                    self.rest(server, error)
                if failed > self.retries:
                    raise RowError(f"no answer after {failed} attempts: {error.kind}") from error
            finally:
                server.in_flight -= 1
                self.changed.set()
            counts["retries"] += 1
            await asyncio.sleep(pause(failed))

    async def acquire(self) -> Server:
        """The free server with the least in flight; one that failed is tried by a single request."""
        while True:
            now = time.monotonic()
            ready = [s for s in self.servers if s.rests_until <= now]
            free = [s for s in ready if s.in_flight < (1 if s.failures else self.concurrency)]
            if free:
                server = min(free, key=lambda s: (s.in_flight, s.asked))
                server.in_flight += 1
                server.asked += 1
                return server
            self.changed.clear()
            await self.changed.wait()

    def rest(self, server: Server, error: AttemptError) -> None:
        server.failures, server.error = server.failures + 1, str(error)
        if all(s.failures > self.retries for s in self.servers):
            raise RunError(f"no server answers any more ({last_errors(self.servers)}); start one") from error
        if server.failures == 2:
            self.say(f"regenerate: {server.url} fails ({error}); it is tried again now and then")
        seconds = max(pause(server.failures), error.retry_after)
        server.rests_until = time.monotonic() + seconds
        asyncio.get_running_loop().call_later(seconds + 0.001, self.changed.set)

    async def recovers(self, server: Server, body: dict[str, Any]) -> bool:
        """Whether a server that failed answers PROBE; otherwise it rests again, for longer."""
        try:
            await ask(server, body | PROBE)
        except RowError:
            pass  # a refusal is a sign of life too
        except AttemptError as error:
            self.rest(server, error)
            return False
        if server.failures > 1:
            self.say(f"regenerate: {server.url} is back")
        server.failures = 0
        self.changed.set()
        return True

    async def only_model(self) -> str:
        """The one model that the servers list, asked until one of them answers. Raises RunError."""
        for attempt in range(self.retries + 1):
            await asyncio.sleep(pause(attempt))
            names = sorted(set().union(*await asyncio.gather(*map(models, self.servers))))
            if len(names) > 1:
                raise RunError(f"the servers offer several models ({', '.join(names)}): name one in regenerate.model")
            if names:
                return names[0]
        raise RunError(
            f"no server says which model it has ({last_errors(self.servers)}); start one, set regenerate.urls, or "
            "name it in regenerate.model"
        )


def connect(url: str, key: str | None, timeout: float) -> Server:
    """A server by its url; proxies of the environment are for other machines than this one."""
    client = httpx.AsyncClient(
        base_url=url,
        headers={"Authorization": f"Bearer {key}"} if key else {},
        timeout=httpx.Timeout(timeout, connect=min(LONGEST_CONNECT, timeout)),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        trust_env=httpx.URL(url).host not in ("localhost", "127.0.0.1", "::1", "0.0.0.0"),
    )
    return Server(re.sub("//[^/@]*@", "//", url), client)


def pause(failures: int) -> float:
    """Seconds to wait after `failures` in a row: exponential, with jitter."""
    return min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (failures - 1)) * random.uniform(0.75, 1.25) if failures else 0.0


def last_errors(servers: list[Server]) -> str:
    return "; ".join(f"{server.url}: {server.error}" for server in servers)


async def models(server: Server) -> list[str]:
    """What a server lists; nothing while it cannot be asked. Raises RunError."""
    try:
        response = await send(server, "GET", "models")
        return [model["id"] for model in response.json()["data"]]
    except (AttemptError, RowError) as error:
        server.error = str(error)
    except (ValueError, KeyError, TypeError):
        server.error = "lists no model"
    return []


async def send(server: Server, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
    """One attempt. Raises AttemptError, RowError (the request is refused) or RunError (every one would be)."""
    try:
        response = await server.client.request(method, path, json=body)
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise AttemptError("no connection", str(error) or "timed out") from error
    except httpx.TimeoutException as error:
        raise AttemptError("timed out", f"after {server.client.timeout.read:g} s") from error
    except httpx.RequestError as error:
        raise AttemptError("connection dropped", str(error)) from error
    status = response.status_code
    failure = f"HTTP {status}: {said(response)}"
    if status in (408, 409, 425, 429) or status >= 500:
        raise AttemptError(f"HTTP {status}", said(response), retry_after(response))
    if status in (401, 403):
        raise RunError(
            f"{server.url} refuses the key ({failure}): "
            "set the right one in the environment variable that regenerate.api_key_env names"
        )
    if status == 404 or 300 <= status < 400:
        raise RunError(
            f"{server.url} has no such model or address ({failure}): "
            "check regenerate.model, and regenerate.urls, which usually end in /v1"
        )
    if status >= 400:
        raise RowError(re.sub(r"(?<!HTTP )\d+", "N", failure))
    return response


async def ask(server: Server, body: dict[str, Any]) -> tuple[Message, int]:
    """The answer and its tokens in a chat completion. Raises what `send` raises."""
    response = await send(server, "POST", "chat/completions", body)
    try:
        reply = response.json()
    except ValueError as error:
        raise AttemptError("malformed reply", said(response)) from error
    choices = reply.get("choices") if isinstance(reply, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise AttemptError("reply without choices", said(response))
    message, end = choices[0].get("message"), choices[0].get("finish_reason")
    if not isinstance(message, dict) or not isinstance(message.get("content"), str | None):
        raise AttemptError("reply without a message", said(response))
    if end in UNUSABLE_ENDS:
        raise AttemptError(f"finish reason {end}")
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    answer = turns.answer(message.get("content"), reasoning if isinstance(reasoning, str) else None, end == "length")
    if answer is None:
        raise AttemptError("empty answer")
    usage = reply.get("usage")
    return answer, (usage.get("completion_tokens") or 0) if isinstance(usage, dict) else 0


def said(response: httpx.Response) -> str:
    """The server's message: its first line, at most 120 characters, without the key that was sent."""
    text = response.text
    try:
        content = response.json()
    except ValueError:
        content = None
    if isinstance(content, dict):
        error = content.get("error", content)
        text = error.get("message") or error.get("detail") or text if isinstance(error, dict) else error
    key = response.request.headers.get("Authorization", "").removeprefix("Bearer ")
    text = str(text).replace(key, "<key>") if key else str(text)
    return next(iter(text.strip().splitlines()), "")[:120]


def retry_after(response: httpx.Response) -> float:
    try:
        return min(max(float(response.headers.get("Retry-After", 0)), 0.0), LONGEST_RETRY_AFTER)
    except ValueError:
        return 0.0
